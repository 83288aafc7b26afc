// Puts the row editor in the place of the text box of FluxKitLoraStack's widget `rows`. The value stays the same
// text, so workflows, the API and hosts without this file read and write the same thing.

import { app } from "../../../scripts/app.js";
import { forget } from "./lora_files.js";
import { closePicker } from "./lora_picker.js";
import { RowsEditor } from "./lora_rows.js";

const NODE = "FluxKitLoraStack", TYPE = "FLUXKIT_LORA_ROWS";
const MARGIN = 8, WIDTH = 240, COMFORTABLE = 340;

/** Over the canvas, wheel and middle button belong to it. In Nodes 2.0 and in App mode the interface sees to them. */
function passOn(editor) {
    const forward = name => event => {
        if (!editor.root.closest(".dom-widget") || (event.button !== 1 && name !== "processMouseWheel")) return;
        const list = editor.list;
        if (name === "processMouseWheel" && !event.ctrlKey && list && list.scrollHeight > list.clientHeight) return;
        event.preventDefault();
        app.canvas[name]?.(event);
    };
    editor.root.addEventListener("wheel", forward("processMouseWheel"), { passive: false });
    editor.root.addEventListener("pointerdown", forward("processMouseDown"));
}

/** Makes a node as high as its rows; when it is first seen, only if it is too small. */
function fit(node) {
    let seen = false;
    return () => {
        if (!node.graph) return;
        const least = node.computeSize()[1], fits = node.size[1] >= least && node.size[0] >= WIDTH;
        if (seen || !fits) node.setSize([Math.max(node.size[0], WIDTH), least]);
        seen = true;
        app.graph?.setDirtyCanvas(true, true);
    };
}

/** Rows that come by a link are shown, but not edited here. The canvas sees to that itself, Nodes 2.0 does not. */
function lock(editor, node, name) {
    const slot = node.inputs?.find(input => input.widget?.name === name);
    editor.locked = !!window.LiteGraph?.vueNodesMode && slot?.link !== undefined && slot.link !== null;
}

function also(node, name, act) {
    const own = node[name];
    node[name] = function (...told) { act(); return own?.apply(this, told); };
}

const look = editor => ({ margin: MARGIN, getMinHeight: () => editor.height + 2 * MARGIN, hideOnZoom: true });

function rowsWidget(node, name, [, options = {}]) {
    const fitted = fit(node), locked = () => lock(editor, node, name);
    const editor = new RowsEditor(text => { widget.value = text; app.graph?.setDirtyCanvas(true, true); },
                                  () => { locked(); fitted(); });
    if (options.default) editor.value = options.default;
    const widget = node.addDOMWidget(name, TYPE, editor.root, {
        ...look(editor), getValue: () => editor.value, setValue: text => { editor.value = text; },
    });
    passOn(editor);
    also(node, "onRemoved", closePicker);
    also(node, "onConnectionsChange", locked);
    editor.root.addEventListener("pointerenter", locked);
    return { widget: copied(widget), minWidth: COMFORTABLE, minHeight: 120 };
}

/** The editor on the outside of a subgraph, of rows that `kept.value` holds; what is changed goes to `source`, too. */
function outside(node, name, source, kept) {
    const editor = new RowsEditor(text => { widget.value = text; widget.toInside(text); }, fit(node));
    editor.value = kept.value;
    const widget = new window.comfyAPI.domWidget.DOMWidgetImpl({
        node, name, type: TYPE, element: editor.root,
        options: { ...look(editor), getValue: () => kept.value ?? "[]",
                   setValue: text => { kept.value = text; editor.value = text; } },
    });
    widget.toInside = text => { source.value = text; source.toInside?.(text); };
    passOn(editor);
    return copied(widget);
}

/** Older interfaces copy a widget to the outside of a subgraph: one editor for each outside, and never two. */
function copied(widget) {
    const copies = new WeakMap();
    const copy = node => {
        if (!copies.has(node)) copies.set(node, outside(node, widget.name, widget, {}));
        const made = copies.get(node);
        made.value = widget.value;
        return made;
    };
    if (window.comfyAPI?.domWidget?.DOMWidgetImpl) widget.createCopyForNode = copy;
    return widget;
}

/** Newer interfaces copy only the value, and ask the node's `createPromotedHostWidget` for a widget to show it. */
function showOutside(node) {
    const { DOMWidgetImpl, addWidget } = window.comfyAPI?.domWidget ?? {};
    const own = node.createPromotedHostWidget;
    if (!own || !node._projectPromotedWidget || !DOMWidgetImpl || !addWidget) return;
    node.createPromotedHostWidget = function (input, id, source) {
        const settled = this.graph?.getNodeById(this.id) === this;
        if (source.type !== TYPE || !settled) return own.call(this, input, id, source);
        const widget = outside(this, input.name, source, this._projectPromotedWidget(input));
        addWidget({ graph: this.graph, addCustomWidget() {} }, widget);  // to be drawn; the node lists it by itself
        return widget;
    };
}

/** After undo, the form of App mode still shows the editor from before: the one that counts now takes its place. */
function intoForm() {
    for (const node of (app.rootGraph ?? app.graph)?.nodes ?? []) {
        for (const widget of node.widgets?.filter(widget => widget.type === TYPE && widget.element) ?? []) {
            const key = CSS.escape(`${node.graph.id}:${node.id}:${widget.name}`);
            const place = document.querySelector(`[data-widget-key="${key}"] [data-testid=node-widget] > :last-child`);
            if (place && !place.contains(widget.element)) place.replaceChildren(widget.element);
        }
    }
}

/** After undo, Nodes 2.0 still shows the editors from before, too. */
function intoNodes() {
    if (!window.LiteGraph?.vueNodesMode) return;
    for (const node of app.canvas?.graph?.nodes ?? []) {
        const own = node.widgets?.filter(widget => widget.type === TYPE && widget.element) ?? [];
        const seen = document.querySelectorAll(`[data-node-id="${CSS.escape(String(node.id))}"] .fk-loras`);
        if (own.length !== seen.length) continue;
        own.forEach(({ element }, at) => { if (!element.isConnected) seen[at].replaceWith(element); });
    }
}

app.registerExtension({
    name: "fluxkit.lora-stack",
    getCustomWidgets: () => ({ [TYPE]: rowsWidget }),
    beforeRegisterNodeDef(type, definition) {
        if (definition.name === NODE) definition.input.required.rows[1].widgetType = TYPE;
    },
    nodeCreated: node => { if (node.subgraph) showOutside(node); },
    // once the interface has put its elements where it wants
    afterConfigureGraph: () => setTimeout(() => { intoForm(); intoNodes(); }, 100),
    refreshComboInNodes: forget,
});
