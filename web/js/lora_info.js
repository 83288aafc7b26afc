// What a LoRA file is: picture, facts from its header, trigger words to copy.

import { el } from "./dom.js";
import { about, pictureOf } from "./lora_files.js";

/** An element that fills itself once the server has told. */
export function info(name) {
    const box = el("div", { className: "fk-info" }, el("div", { className: "fk-dim" }, "Looking ..."));
    about(name).then(told => box.replaceChildren(...parts(name, told)),
                     error => box.replaceChildren(el("div", { className: "fk-bad" }, error.message)));
    return box;
}

function parts(name, { lines = [], problems = [], words = [], picture }) {
    const found = [];
    if (picture)
        found.push(el("img", { className: "fk-picture", src: pictureOf(name), alt: `Picture of ${name}` }));
    const text = el("div", { className: "fk-facts" }, el("div", { className: "fk-name" }, name),
                    ...lines.map(line => el("div", { className: "fk-dim" }, line)),
                    ...problems.map(line => el("div", { className: "fk-bad" }, line)));
    if (words.length)
        text.append(el("div", { className: "fk-words", role: "group", aria: { label: "Trigger words" } },
                       ...words.map(word)));
    return [...found, text];
}

function word(text) {
    const copy = async () => {
        try {
            await navigator.clipboard.writeText(text);
            button.classList.add("fk-copied");
            setTimeout(() => button.classList.remove("fk-copied"), 900);
        } catch {
            button.title = "The browser did not allow to copy";
        }
    };
    const button = el("button", { className: "fk-word", type: "button", title: `Copy: ${text}`, onclick: copy }, text);
    return button;
}
