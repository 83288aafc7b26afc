// Small helpers for the DOM. Text goes in as text only: names and words come from files of strangers.

/** An element with properties, `aria` and `data` attributes, listeners (`onclick` ...) and children (nodes or text). */
export function el(tag, { aria = {}, data = {}, role, style, ...properties } = {}, ...children) {
    const made = document.createElement(tag);
    Object.assign(made, properties);
    if (role) made.setAttribute("role", role);
    if (style) made.style.cssText = style;
    for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, String(value));
    Object.assign(made.dataset, data);
    made.append(...children.filter(child => child !== null && child !== undefined));
    return made;
}

const SHAPES = {
    grip: "M6 4h.01M10 4h.01M6 8h.01M10 8h.01M6 12h.01M10 12h.01",
    plus: "M8 3v10M3 8h10",
    cross: "M4 4l8 8M12 4l-8 8",
    more: "M3.5 8h.01M8 8h.01M12.5 8h.01",
    right: "M6 4l4 4-4 4",
    down: "M4 6l4 4 4-4",
    warn: "M8 2.5L14.5 13.5H1.5ZM8 6.5v3.5M8 12h.01",
};

/** A drawing in the colour of the text round it; it says nothing to screen readers. */
export function icon(name) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    const path = document.createElementNS(space, "path");
    for (const [key, value] of Object.entries({ viewBox: "0 0 16 16", class: "fk-icon", "aria-hidden": "true" }))
        svg.setAttribute(key, value);
    path.setAttribute("d", SHAPES[name]);
    svg.append(path);
    return svg;
}

const shorter = value => String(Math.round(value * 1e6) / 1e6);

/** A typed number: type it, arrow keys, or drag sideways. `change(number)` hears of every new value.
 *
 * `value` may be undefined where `fallback` counts, which is shown in grey and changed by `field.fallback(number)`.
 * What is no number is not taken. */
export function numberField({ label, value, fallback, step = 0.05, min = -Infinity, max = Infinity, change }) {
    let current = value;
    const field = el("input", {
        className: "fk-number", type: "text", inputMode: "decimal", autocomplete: "off", spellcheck: false,
        role: "spinbutton", aria: { label }, title: `${label}: type, arrow keys, or drag sideways`,
    });
    const shown = () => current ?? fallback;
    const show = () => {
        field.value = current === undefined ? "" : shorter(current);
        field.placeholder = fallback === undefined ? "" : shorter(fallback);
        field.setAttribute("aria-valuenow", shown());
        field.removeAttribute("aria-invalid");
        field.classList.toggle("fk-zero", shown() === 0);
    };
    const take = number => {
        const next = Math.min(max, Math.max(min, Math.round(number * 1e6) / 1e6));
        const changed = next !== current;
        current = next;
        show();
        if (changed) change(next);
    };
    const typed = () => {
        const text = field.value.trim().replace(",", ".");
        const number = Number(text);
        if (text === "") return show();
        if (!Number.isFinite(number)) return field.setAttribute("aria-invalid", "true");
        take(number);
    };
    const big = event => event.shiftKey ? 10 : event.altKey ? 0.2 : 1;
    field.addEventListener("change", typed);
    field.addEventListener("blur", show);
    field.addEventListener("keydown", event => {
        const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (way) { event.preventDefault(); take(shown() + way * step * big(event)); }
        if (event.key === "Enter") { typed(); field.select(); }
        if (event.key === "Escape") show();
    });
    let drag = null;
    field.addEventListener("pointerdown", event => {
        if (event.button !== 0 || document.activeElement === field) return;
        event.preventDefault();  // focus comes with a click, not with a drag
        drag = { x: event.clientX, from: shown(), moved: false };
        field.setPointerCapture(event.pointerId);
    });
    field.addEventListener("pointermove", event => {
        if (!drag) return;
        const steps = Math.trunc((event.clientX - drag.x) / 6);
        drag.moved ||= Math.abs(event.clientX - drag.x) > 3;
        if (drag.moved) take(drag.from + steps * step * big(event));
    });
    const drop = () => {
        if (drag && !drag.moved) { field.focus(); field.select(); }
        drag = null;
    };
    field.addEventListener("pointerup", drop);
    field.addEventListener("pointercancel", () => { drag = null; });
    field.fallback = next => { fallback = next; show(); };
    show();
    return field;
}
