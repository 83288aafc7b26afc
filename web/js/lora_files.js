// What the server knows of LoRA files: names, and of one file its facts, trigger words and picture.

import { app } from "../../../scripts/app.js";

const facts = new Map();  // name -> promise
let listing = null;

async function get(path) {
    const answer = await app.api.fetchApi(path);
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.error ?? answer.statusText);
    return told;
}

/** Names of all LoRA files, slashes forward. `fresh`: asked anew. */
export function names(fresh = false) {
    if (fresh || !listing)
        listing = get("/flux_kit/loras").then(told => told.files).catch(error => { listing = null; throw error; });
    return listing;
}

/** {lines, words, picture} of a file: facts to show, trigger words, whether there is a picture. */
export function about(name) {
    if (!facts.has(name)) {
        const asked = get(`/flux_kit/lora?name=${encodeURIComponent(name)}`);
        asked.catch(() => facts.delete(name));
        facts.set(name, asked);
    }
    return facts.get(name);
}

/** A name without its ending. */
export const plain = name => name.replace(/\.(safetensors|sft|gguf)$/i, "");

export const pictureOf = name => app.api.apiURL(`/flux_kit/lora/picture?name=${encodeURIComponent(name)}`);

/** The file that a row means, as the server will take it: the exact one, else the only one of that base name. */
export function resolve(name, known) {
    const slashed = name.replaceAll("\\", "/");
    if (known.includes(name)) return name;
    if (known.includes(slashed)) return slashed;
    const base = path => path.slice(path.lastIndexOf("/") + 1).toLowerCase();
    const same = known.filter(other => base(other) === base(slashed));
    return same.length === 1 ? same[0] : null;
}

export function forget() {
    listing = null;
    facts.clear();
}
