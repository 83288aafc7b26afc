// The list to pick a LoRA from: folders as a tree, and a search that forgives.

import { el, icon } from "./dom.js";
import { search } from "./fuzzy.js";
import { info } from "./lora_info.js";
import { names, plain } from "./lora_files.js";

const SHOWN = 200;  // of a long list; the search narrows it down
const open = new Set();  // folders, for as long as the page lives
let current = null;

/** Opens the list at an element; `choose(name)` hears the choice, and then the focus is back where it was. */
export function pick(anchor, chosen, choose) {
    current?.close();
    current = new Picker(anchor, chosen, choose);
}

export const closePicker = () => current?.close();

class Picker {
    constructor(anchor, chosen, choose) {
        Object.assign(this, { anchor, chosen, choose, known: [], items: [], active: 0 });
        const id = `fk-tree-${Math.random().toString(36).slice(2)}`;
        this.field = el("input", {
            className: "fk-search", type: "text", placeholder: "Search", autocomplete: "off", spellcheck: false,
            role: "combobox", aria: { label: "Search LoRA files", expanded: true, controls: id, haspopup: "tree" },
            oninput: () => this.fill(), onkeydown: event => this.key(event),
        });
        this.tree = el("div", { className: "fk-tree", id, role: "tree", aria: { label: "LoRA files" } });
        this.side = el("div", { className: "fk-side", aria: { live: "polite" } });
        this.root = el("div", { className: "fk-picker fk-theme", popover: "auto", role: "dialog",
                                aria: { label: "Choose a LoRA" } },
                       this.field, el("div", { className: "fk-columns" }, this.tree, this.side));
        this.root.addEventListener("toggle", event => { if (event.newState === "closed") this.close(false); });
        for (const kind of ["pointerdown", "mousedown", "click", "wheel", "keyup", "copy", "paste", "contextmenu"])
            this.root.addEventListener(kind, event => event.stopPropagation());
        anchor.closest(".fk-loras").append(this.root);
        this.root.showPopover();  // above the canvas and its transforms; a press elsewhere closes it
        this.place();
        this.field.focus();
        this.load();
    }

    async load() {
        this.tree.replaceChildren(el("div", { className: "fk-none" }, "Looking ..."));
        try {
            this.known = await names(true);
        } catch (error) {
            this.tree.replaceChildren(el("div", { className: "fk-none" }, `The list did not come: ${error.message}`));
            return;
        }
        for (let at = this.chosen.indexOf("/"); at > 0; at = this.chosen.indexOf("/", at + 1))
            open.add(this.chosen.slice(0, at));
        this.fill();
        const at = this.items.findIndex(item => item.name === this.chosen);
        if (at >= 0) this.activate(at);
    }

    /** Below the anchor, or above where there is more room, and inside the window. */
    place() {
        const box = this.anchor.getBoundingClientRect();
        const [width, height] = [Math.min(440, innerWidth - 16), Math.min(360, innerHeight - 16)];
        const below = innerHeight - box.bottom >= height + 8 || box.top < innerHeight / 2;
        const top = below ? box.bottom + 4 : box.top - height - 4;
        Object.assign(this.root.style, {
            width: `${width}px`, height: `${height}px`,
            left: `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`,
            top: `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`,
        });
    }

    fill() {
        const query = this.field.value.trim();
        const found = query ? search(query, this.known).map(found => ({ ...parted(found), depth: 0 }))
            : branches(this.known);
        this.items = found.slice(0, SHOWN);
        this.tree.replaceChildren(...this.items.map((item, at) => this.row(item, at)));
        const rest = found.length - this.items.length;
        if (!found.length) {
            const told = this.known.length ? "No file fits" : "There are no files in the folder loras";
            this.tree.append(el("div", { className: "fk-none" }, told));
        } else if (rest) {
            this.tree.append(el("div", { className: "fk-none" }, `${rest} more: type to search`));
        }
        this.activate(0, !!query);
    }

    row(item, at) {
        const folder = item.folder !== undefined;
        const aria = { level: item.depth + 1, selected: false };
        if (folder) aria.expanded = open.has(item.folder);
        return el("div", {
            className: folder ? "fk-item fk-folder" : "fk-item", id: `${this.tree.id}-${at}`, role: "treeitem", aria,
            title: item.name ?? item.folder, style: `padding-left: ${6 + 14 * item.depth}px`,
            onpointermove: () => this.active !== at && this.activate(at, true, false),
            onclick: () => { this.activate(at); this.take(); },
        }, folder ? icon(open.has(item.folder) ? "down" : "right") : null,
           el("span", { className: "fk-label" }, item.label,
              item.path ? el("span", { className: "fk-dim" }, ` ${item.path}`) : null),
           folder ? el("span", { className: "fk-count" }, String(item.count)) : null);
    }

    activate(at, look = true, scroll = true) {
        const rows = this.tree.querySelectorAll("[role=treeitem]");
        rows[this.active]?.setAttribute("aria-selected", "false");
        this.active = Math.max(0, Math.min(at, rows.length - 1));
        const row = rows[this.active];
        row?.setAttribute("aria-selected", "true");
        if (row) this.field.setAttribute("aria-activedescendant", row.id);
        if (scroll) row?.scrollIntoView({ block: "nearest" });
        clearTimeout(this.later);
        const name = this.items[this.active]?.name;
        this.side.replaceChildren();
        if (look && name) this.later = setTimeout(() => this.side.replaceChildren(info(name)), 150);
    }

    key(event) {
        event.stopPropagation();
        const folder = this.items[this.active]?.folder;
        const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
        if (steps) this.activate(this.active + steps);
        else if (event.key === "Enter") this.take();
        else if (event.key === "Escape" || event.key === "Tab") this.close();
        else if (folder !== undefined && event.key === "ArrowRight" && !open.has(folder)) this.take();
        else if (folder !== undefined && event.key === "ArrowLeft" && open.has(folder)) this.take();
        else return;
        event.preventDefault();
    }

    /** Opens or shuts a folder, or takes a file. */
    take() {
        const item = this.items[this.active];
        if (!item) return;
        if (item.folder === undefined) {
            this.close();
            this.choose(item.name);
            return;
        }
        if (!open.delete(item.folder)) open.add(item.folder);
        const at = this.active;
        this.fill();
        this.activate(at);
        this.field.focus();
    }

    close(back = true) {
        clearTimeout(this.later);
        this.root.remove();
        if (current === this) current = null;
        if (back && this.anchor.isConnected) this.anchor.focus();
    }
}

/** A file found by a search: its own name, and the folder it is in. */
function parted(name) {
    const at = name.lastIndexOf("/");
    return { name, label: plain(name.slice(at + 1)), path: name.slice(0, Math.max(at, 0)) };
}

/** The tree as the rows that are to be seen: folders before files, what is shut left out. */
function branches(known) {
    const top = { folders: new Map(), files: [], count: 0 };
    for (const name of known) {
        const parts = name.split("/");
        let at = top;
        for (const part of parts.slice(0, -1)) {
            if (!at.folders.has(part)) at.folders.set(part, { folders: new Map(), files: [], count: 0 });
            at = at.folders.get(part);
            at.count++;
        }
        at.files.push({ name, label: plain(parts.at(-1)) });
    }
    const rows = [];
    const walk = (at, path, depth) => {
        for (const [label, inner] of at.folders) {
            const folder = path ? `${path}/${label}` : label;
            rows.push({ folder, label, depth, count: inner.count });
            if (open.has(folder)) walk(inner, folder, depth + 1);
        }
        rows.push(...at.files.map(file => ({ ...file, depth })));
    };
    walk(top, "", 0);
    return rows;
}
