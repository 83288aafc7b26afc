// Puts the row editor in the place of the text box of FluxKitLoraStack's widget `rows`. The value stays the same
// text, so workflows, the API and hosts without this file read and write the same thing.

import { app } from "../../../scripts/app.js";
import { forget } from "./lora_files.js";
import { closePicker } from "./lora_picker.js";
import { RowsEditor } from "./lora_rows.js";

const NODE = "FluxKitLoraStack", TYPE = "FLUXKIT_LORA_ROWS";
const MARGIN = 8, WIDTH = 240, COMFORTABLE = 340;

/** Wheel and middle button belong to the canvas; in Nodes 2.0 the interface sees to that itself. */
function passOn(editor) {
    const forward = name => event => {
        if (window.LiteGraph?.vueNodesMode || (event.button !== 1 && name !== "processMouseWheel")) return;
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

const look = editor => ({ margin: MARGIN, getMinHeight: () => editor.height + 2 * MARGIN, hideOnZoom: true });

function rowsWidget(node, name, [, options = {}]) {
    const editor = new RowsEditor(text => { widget.value = text; app.graph?.setDirtyCanvas(true, true); }, fit(node));
    if (options.default) editor.value = options.default;
    const widget = node.addDOMWidget(name, TYPE, editor.root, {
        ...look(editor), getValue: () => editor.value, setValue: text => { editor.value = text; },
    });
    passOn(editor);
    const removed = node.onRemoved;
    node.onRemoved = function (...told) { closePicker(); return removed?.apply(this, told); };
    return { widget, minWidth: COMFORTABLE, minHeight: 120 };
}

/** Rows that are an input of a subgraph: newer interfaces copy the value to the outside, and draw only what they know.
 *
 * There the node asks its `createPromotedHostWidget` for a widget. Where it does not, the interface shares ours. */
function showOutside(node) {
    const { DOMWidgetImpl, addWidget } = window.comfyAPI?.domWidget ?? {};
    const own = node.createPromotedHostWidget;
    if (!own || !node._projectPromotedWidget || !DOMWidgetImpl || !addWidget) return;
    node.createPromotedHostWidget = function (input, id, source) {
        const settled = this.graph?.getNodeById(this.id) === this;
        if (source.type !== TYPE || !settled) return own.call(this, input, id, source);
        const kept = this._projectPromotedWidget(input);  // it holds the value
        const editor = new RowsEditor(text => { widget.value = text; }, fit(this));
        editor.value = kept.value;
        const widget = new DOMWidgetImpl({
            node: this, name: input.name, type: TYPE, element: editor.root,
            options: { ...look(editor), getValue: () => kept.value ?? "[]",
                       setValue: text => { kept.value = text; editor.value = text; } },
        });
        addWidget({ graph: this.graph, addCustomWidget() {} }, widget);  // to be drawn; the node lists it by itself
        passOn(editor);
        return widget;
    };
}

app.registerExtension({
    name: "fluxkit.lora-stack",
    getCustomWidgets: () => ({ [TYPE]: rowsWidget }),
    beforeRegisterNodeDef(type, definition) {
        if (definition.name === NODE) definition.input.required.rows[1].widgetType = TYPE;
    },
    nodeCreated: node => { if (node.subgraph) showOutside(node); },
    refreshComboInNodes: forget,
});
