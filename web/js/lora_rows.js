// The rows of a LoRA stack: an editor of one JSON text, a list of {on, lora, model, clip, blocks, start, end}.
// Keys it does not know stay where they are, and a text that is no such list is shown as it is, never replaced.

import { el, icon, numberField } from "./dom.js";
import { names, plain, resolve } from "./lora_files.js";
import { info } from "./lora_info.js";
import { pick } from "./lora_picker.js";

const NEW = { on: true, lora: "", model: 1, clip: 1 };
const EMPTY = "[]";

/** Rows of a text, or null if it is no list of rows. */
export function parse(text) {
    try {
        const found = JSON.parse(text.trim() || EMPTY);
        const isRow = row => row && typeof row === "object" && !Array.isArray(row)
            && typeof (row.lora ?? "") === "string";
        return Array.isArray(found) && found.every(isRow) ? found : null;
    } catch {
        return null;
    }
}

export class RowsEditor {
    /** `changed(text)` hears of every change the user makes. `resized()`: the editor is higher or lower than it was. */
    constructor(changed, resized) {
        Object.assign(this, { changed, text: EMPTY, rows: [], opened: new WeakSet(), known: null });
        this.root = el("div", { className: "fk-loras fk-theme", role: "group", aria: { label: "LoRA stack" } });
        this.body = el("div", { className: "fk-body" });
        const style = el("link", { rel: "stylesheet", href: new URL("lora_stack.css", import.meta.url).href });
        this.note = el("div", { className: "fk-none", role: "note", hidden: true },
                       "The input rows is connected: change them where they come from.");
        this.root.append(style, this.note, this.body);
        // Keys of the canvas (delete, copy, arrows) are not for those who type here; those with Ctrl (run, undo) are.
        this.root.addEventListener("keydown", event => {
            if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
        });
        new ResizeObserver(() => {
            if (!this.body.offsetHeight) return;  // hidden: it keeps its height
            this.last = this.body.offsetHeight;
            resized();
        }).observe(this.body);
        this.render();
    }

    get value() { return this.text; }

    set value(text) {
        text = typeof text === "string" ? text : JSON.stringify(text ?? []);
        if (text === this.text) return;
        this.text = text;
        this.rows = parse(text);
        this.render();
    }

    /** Shown, but not to be edited. */
    set locked(yes) {
        this.body.inert = yes;
        this.note.hidden = !yes;
    }

    /** Height in pixels; before it is seen, a guess. */
    get height() {
        const now = this.body.offsetHeight + this.note.offsetHeight;
        return now || this.last || 56 + 30 * Math.min(this.rows?.length ?? 2, 16);
    }

    /** The rows have changed: tell, and draw anew unless `quiet`. */
    commit(quiet = false) {
        this.text = JSON.stringify(this.rows);
        if (quiet) this.marks();
        else this.render();
        this.changed(this.text);
    }

    render() {
        const back = this.focused();
        if (this.rows === null) return this.body.replaceChildren(this.unreadable());
        const lines = this.rows.map((row, at) => this.row(row, at));
        this.list = el("div", { className: "fk-list", role: "list" }, ...lines);
        const none = el("div", { className: "fk-none" }, "No LoRA yet");
        this.body.replaceChildren(this.head(), this.rows.length ? this.list : none, this.foot());
        this.marks();
        this.check();
        back?.();
    }

    /** Puts the focus back to the part that has it now, once the parts are made anew. */
    focused() {
        const has = document.activeElement;
        if (!this.body.contains(has)) return null;
        const at = has.closest("[data-at]")?.dataset.at;
        const parts = () => {
            const box = at === undefined ? this.body : this.list.children[at];
            return [...box?.querySelectorAll("button, input") ?? []];
        };
        const place = parts().indexOf(has), last = has.classList.contains("fk-add");
        return () => last ? this.body.querySelector(".fk-add")?.focus() : parts()[place]?.focus();
    }

    unreadable() {
        const take = () => { this.value = field.value; this.changed(this.text); };
        const field = el("textarea", { className: "fk-raw", rows: 4, spellcheck: false, value: this.text,
                                       aria: { label: "Rows as JSON" }, onchange: take });
        const told = "These rows are not a JSON list of {\"lora\": FILE, ...}. Mend the text, or ";
        const clear = el("button", { className: "fk-button", type: "button",
                                     onclick: () => { this.rows = []; this.commit(); } }, "start anew");
        return el("div", { className: "fk-unreadable" },
                  el("div", { className: "fk-bad", role: "alert" }, told, clear), field);
    }

    head() {
        this.all = el("button", { className: "fk-switch", type: "button", role: "checkbox", title: "All on or off",
                                  aria: { label: "All LoRAs on" }, onclick: () => this.toggleAll() });
        this.count = el("span", { className: "fk-dim fk-grow", aria: { live: "polite" } });
        const column = text => el("span", { className: "fk-dim fk-column" }, text);
        return el("div", { className: "fk-head" }, this.all, this.count, column("model"), column("clip"));
    }

    foot() {
        const add = el("button", { className: "fk-button fk-add", type: "button",
                                   onclick: () => pick(add, "", name => this.add(name)) }, icon("plus"), "Add LoRA");
        return add;
    }

    add(name) {
        this.rows.push({ ...NEW, lora: name });
        this.commit();
        this.body.querySelector(".fk-add").focus();
    }

    row(row, at) {
        const name = row.lora ?? "";
        const label = plain(name.slice(Math.max(name.lastIndexOf("/"), name.lastIndexOf("\\")) + 1)) || "choose a file";
        const change = key => value => {
            row[key] = value;
            if (key === "model") clip.fallback(value);  // which clip follows until it has a value of its own
            this.commit(true);
        };
        const clip = numberField({ label: "CLIP strength", value: row.clip, fallback: row.model ?? 1,
                                   change: change("clip") });
        const model = numberField({ label: "Model strength", value: row.model, fallback: 1, change: change("model") });
        const choose = chosen => { row.lora = chosen; this.commit(); this.focus(at, ".fk-file"); };
        const toggle = el("button", { className: "fk-switch", type: "button", role: "switch", title: "On or off",
                                      aria: { checked: row.on !== false, label: `On: ${label}` },
                                      onclick: () => { row.on = row.on === false; this.commit(true); } });
        const file = el("button", { className: "fk-file", type: "button", title: name || "Choose a file",
                                    aria: { haspopup: "dialog", label: `File: ${name || "none"}` },
                                    onclick: () => pick(file, resolve(name, this.known ?? []) ?? name, choose) },
                        el("span", { className: "fk-label" }, label));
        const more = el("button", { className: "fk-tool fk-more", type: "button", title: "Blocks, range, trigger words",
                                    aria: { expanded: this.opened.has(row), label: `More of ${label}` },
                                    onclick: () => this.open(row, at) }, icon("more"));
        const away = el("button", { className: "fk-tool fk-away", type: "button", title: "Remove",
                                    aria: { label: `Remove ${label}` }, onclick: () => this.remove(at) },
                        icon("cross"));
        const line = el("div", { className: "fk-row" }, this.grip(row, at, label), toggle, file, model, clip,
                        el("span", { className: "fk-tools" }, more, away));
        const box = el("div", { className: "fk-item-row", role: "listitem", data: { at } }, line);
        if (this.opened.has(row)) box.append(this.details(row, change));
        return box;
    }

    details(row, change) {
        const blocks = el("input", { className: "fk-text", type: "text", value: row.blocks ?? "", spellcheck: false,
                                     placeholder: "double 0-9 = 0.5, single = 0",
                                     title: "A factor for each layer; empty: 1 everywhere",
                                     aria: { label: "Block weights" },
                                     // at each key: a run by Ctrl+Enter comes before the browser's `change`
                                     oninput: () => change("blocks")(blocks.value) });
        const share = (key, label, fallback) =>
            numberField({ label, value: row[key], fallback, min: 0, max: 1, change: change(key) });
        const range = el("span", { className: "fk-range" }, share("start", "From this share of the steps", 0),
                         el("span", { className: "fk-dim" }, "to"), share("end", "Up to this share of the steps", 1));
        const found = row.lora && this.known ? resolve(row.lora, this.known) : null;
        return el("div", { className: "fk-details" },
                  el("label", { className: "fk-pair" }, el("span", { className: "fk-dim" }, "blocks"), blocks),
                  el("div", { className: "fk-pair" }, el("span", { className: "fk-dim" }, "steps"), range),
                  found ? info(found) : null);
    }

    open(row, at) {
        if (!this.opened.delete(row)) this.opened.add(row);
        this.render();
        this.focus(at, ".fk-more");
    }

    remove(at) {
        this.rows.splice(at, 1);
        this.commit();
        if (this.rows.length) this.focus(Math.min(at, this.rows.length - 1), ".fk-away");
        else this.body.querySelector(".fk-add").focus();
    }

    toggleAll() {
        const on = !this.rows.every(row => row.on !== false);
        for (const row of this.rows) row.on = on;
        this.commit(true);
    }

    move(from, to) {
        if (to < 0 || to >= this.rows.length || from === to) return false;
        this.rows.splice(to, 0, ...this.rows.splice(from, 1));
        this.commit();
        return true;
    }

    focus(at, part) {
        this.list.children[at]?.querySelector(part)?.focus();
    }

    /** The handle: drag it, or arrow keys while it has the focus. */
    grip(row, at, label) {
        const told = `Move ${label}, row ${at + 1} of ${this.rows.length}`;
        const grip = el("button", { className: "fk-grip", type: "button", title: "Drag to reorder, or arrow keys",
                                    aria: { label: told } }, icon("grip"));
        grip.addEventListener("keydown", event => {
            const way = { ArrowUp: -1, ArrowDown: 1 }[event.key];
            if (event.key === "Delete") this.remove(at);
            if (!way) return;
            event.preventDefault();
            if (this.move(at, at + way)) this.focus(at + way, ".fk-grip");
        });
        grip.addEventListener("pointerdown", event => event.button === 0 && this.drag(event, grip, at));
        return grip;
    }

    /** Marks the place where the row would go; it goes there when let go. */
    drag(event, grip, from) {
        const lines = [...this.list.children];
        let to = from;
        event.preventDefault();
        grip.setPointerCapture(event.pointerId);
        lines[from].classList.add("fk-dragged");
        const mark = () => lines.forEach((line, at) => {
            line.classList.toggle("fk-before", at === to && to < from);
            line.classList.toggle("fk-after", at === to && to > from);
        });
        const moved = ({ clientY }) => {
            const below = lines.filter((line, at) => {
                const box = line.getBoundingClientRect();
                return at !== from && clientY > (box.top + box.bottom) / 2;
            });
            to = below.length;
            mark();
        };
        const end = ({ type }) => {
            grip.removeEventListener("pointermove", moved);
            lines[from].classList.remove("fk-dragged");
            if (type === "pointerup" && this.move(from, to)) return this.focus(to, ".fk-grip");
            to = from;
            mark();
        };
        grip.addEventListener("pointermove", moved);
        for (const kind of ["pointerup", "pointercancel"]) grip.addEventListener(kind, end, { once: true });
    }

    /** States that a change of a row touches in other places: switches, counts, rows that do nothing. */
    marks() {
        this.all.parentElement.hidden = !this.rows.length;
        const on = this.rows.filter(row => row.on !== false).length;
        this.all.setAttribute("aria-checked", on === 0 ? "false" : on === this.rows.length ? "true" : "mixed");
        this.count.textContent = this.rows.length ? `${on} of ${this.rows.length} on` : "";
        [...this.list.children].forEach((line, at) => {
            const row = this.rows[at];
            const idle = row.on === false || ((row.model ?? 1) === 0 && (row.clip ?? row.model ?? 1) === 0);
            line.classList.toggle("fk-idle", idle);
            line.querySelector(".fk-row > [role=switch]").setAttribute("aria-checked", String(row.on !== false));
            const special = row.blocks?.trim() || (row.start ?? 0) !== 0 || (row.end ?? 1) !== 1;
            line.querySelector(".fk-more").classList.toggle("fk-used", !!special);
        });
    }

    /** Marks files that are not there, once the list of files has come. */
    async check() {
        const before = this.known;
        try {
            this.known = await names();
        } catch {
            return;  // the server tells before a run, too
        }
        if (!before && this.rows?.some(row => this.opened.has(row))) return this.render();
        [...this.list?.children ?? []].forEach((line, at) => {
            const name = this.rows?.[at]?.lora ?? "";
            const lost = !name || resolve(name, this.known) === null;
            const file = line.querySelector(".fk-file");
            file.classList.toggle("fk-lost", lost);
            if (!lost || file.querySelector("svg")) return;
            file.prepend(icon("warn"));
            file.title = name ? `${name}\nThis file is not in the folders for LoRAs` : "Choose a file";
            if (name) file.setAttribute("aria-label", `File: ${name}, not found`);
        });
    }
}
