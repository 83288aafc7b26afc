"""Writes the example workflows, example_workflows/*.json, from the tables below and the nodes' schemas.

    python -P docs/tools/examples.py

A workflow is a few columns of nodes; sizes, links and the order of widgets' values follow from the schemas, so a file
cannot differ from its nodes. `thumbnails.py` draws what they make.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_workflows"
LEFT, TOP, ACROSS, DOWN, WIDTH = 60, 120, 60, 70, 420
TITLE, ROW, LINES, PICTURE = 40, 24, 94, 300    # pixels: a node's title, a socket or widget, a text of lines, a picture
COLORS = {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class Node:
    """`inputs`: socket -> "title.OUTPUT" of another node. `values`: widgets that differ from their defaults."""

    title: str
    type: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    name: str
    note: str
    columns: Sequence[Sequence[Node]]


CLIP, T5, VAE = "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors"


def load(model: str) -> Node:
    return Node("Load Flux", "FluxKitLoadFlux", {}, {"model": model, "clip_l": CLIP, "t5": T5, "vae": VAE})


def prompt(text: str, guidance: float = 3.5, title: str = "Prompt", clip: str = "Load Flux.CLIP") -> Node:
    return Node(title, "FluxKitEncodePrompt", {"clip": clip}, {"prompt": text, "guidance": guidance})


def picture(title: str = "Picture") -> Node:
    return Node(title, "LoadImage", {}, {"image": "example.png"})


def sampler(positive: str, latent: str, model: str = "Load Flux.MODEL", title: str = "Sampler", **values: Any) -> Node:
    return Node(title, "FluxKitSampler", {"model": model, "positive": positive, "latent": latent}, values)


def decode(latent: str = "Sampler.LATENT", title: str = "Decode") -> Node:
    return Node(title, "FluxKitDecode", {"latent": latent, "vae": "Load Flux.VAE"})


def save(images: str = "Decode.IMAGE", prefix: str = "flux", title: str = "Save") -> Node:
    return Node(title, "FluxKitSave", {"images": images}, {"filename_prefix": prefix})


def rows(*files: tuple[str, float]) -> str:
    return json.dumps([{"on": True, "lora": file, "model": strength, "clip": 1.0} for file, strength in files])


FOLDERS = "model goes to diffusion_models, clip_l and t5 to text_encoders, vae to vae, LoRAs to loras."
ALONE = "Without ComfyUI: *flux-kit run {name}.json --models path/to/models --input path/to/pictures*"

EXAMPLES_TABLE = (
    Example("inpaint_region", (
        "**Paint a part of a picture anew, at full resolution.** Right-click *Picture*, open the mask editor, and "
        "paint over what is to change.\n\n- *Mask* grows it a little and smooths its edge\n- *Crop* cuts the part out "
        "and brings it to a size that FLUX.1 is good at; *context* is how much of its surroundings it sees\n- *Fill* "
        "needs FLUX.1 Fill\n- *Paste* puts it back: every pixel outside the mask stays what it was, bit for bit\n\n"
        "Guidance 30 and 20 to 50 steps are usual for Fill."), (
        (picture(), load("flux1-fill-dev.safetensors")),
        (Node("Mask", "FluxKitMaskRefine", {"mask": "Picture.MASK"}, {"feather": 4}),
         Node("Crop", "FluxKitRegionCrop", {"image": "Picture.IMAGE", "mask": "Mask.MASK"}),
         prompt("a bunch of sunflowers in a blue vase", 30)),
        (Node("Fill", "FluxKitFill", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE", "image": "Crop.IMAGE",
                                      "mask": "Crop.MASK", "model": "Load Flux.MODEL"}),
         sampler("Fill.POSITIVE", "Fill.LATENT")),
        (decode(), Node("Paste", "FluxKitRegionPaste", {"image": "Picture.IMAGE", "edited": "Decode.IMAGE",
                                                        "region": "Crop.region", "blend": "Crop.blend"}),
         save("Paste.IMAGE", "inpaint")))),
    Example("outpaint", (
        "**Make a picture larger.** *Canvas* adds room on the sides you name, or to an aspect; *Fill* paints it.\n\n"
        "- *overlap* is how far into the picture the model may paint, only on sides that grow, so that no seam is "
        "left\n- *Paste* keeps all the rest of the picture bit for bit"), (
        (picture(), load("flux1-fill-dev.safetensors")),
        (Node("Canvas", "FluxKitOutpaintCanvas", {"image": "Picture.IMAGE"}, {"left": 256, "right": 256}),
         prompt("a wide landscape", 30)),
        (Node("Fill", "FluxKitFill", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                      "image": "Canvas.IMAGE", "mask": "Canvas.MASK", "model": "Load Flux.MODEL"}),
         sampler("Fill.POSITIVE", "Fill.LATENT")),
        (decode(), Node("Paste", "FluxKitRegionPaste", {"image": "Canvas.IMAGE", "edited": "Decode.IMAGE",
                                                        "blend": "Canvas.MASK"}),
         save("Paste.IMAGE", "outpaint")))),
    Example("depth", (
        "**Keep the depth of a picture, change everything else.** Here by the depth LoRA on FLUX.1 dev.\n\n- *Map* "
        "needs a depth model in models/depth, or choose *as is* and give it a depth map, white near\n- for the full "
        "model load flux1-depth-dev in *Load Flux* and switch the row in *LoRAs* off\n- guidance 10 is set by "
        "*Structure*"), (
        (picture(), load("flux1-dev.safetensors")),
        (Node("Map", "FluxKitStructureMap", {"image": "Picture.IMAGE"}, {"kind": "depth"}),
         Node("LoRAs", "FluxKitLoraStack", {}, {"rows": rows(("flux1-depth-dev-lora.safetensors", 1.0))}),
         Node("Apply", "FluxKitLoraApply", {"model": "Load Flux.MODEL", "loras": "LoRAs.FLUX_LORAS"}),
         prompt("a robot made of glass in a forest", 10)),
        (Node("Structure", "FluxKitStructure", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                                "map": "Map.IMAGE", "model": "Apply.MODEL"}, {"kind": "depth"}),
         sampler("Structure.POSITIVE", "Structure.LATENT", "Apply.MODEL")),
        (decode(), save(prefix="depth")))),
    Example("canny", (
        "**Keep the outlines of a picture, change everything else.** *Map* draws them as FLUX.1 Canny learned them "
        "(thresholds 50 and 200); more lines with lower ones.\n\n- guidance 30 is set by *Structure*\n- the result has "
        "the size of the picture, or the one you type into *Structure*"), (
        (picture(), load("flux1-canny-dev.safetensors")),
        (Node("Map", "FluxKitStructureMap", {"image": "Picture.IMAGE"}, {"kind": "canny"}),
         prompt("a pencil drawing, coloured with watercolours", 30)),
        (Node("Structure", "FluxKitStructure", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                                "map": "Map.IMAGE", "model": "Load Flux.MODEL"}, {"kind": "canny"}),
         sampler("Structure.POSITIVE", "Structure.LATENT")),
        (decode(), save(prefix="canny")))),
    Example("redux_mix", (
        "**Pictures instead of words.** Each *Redux* adds what one picture shows, with a strength and a level of "
        "detail of its own; two in a row mix them.\n\n- strength 0 switches one off, 1 is as published\n- less "
        "*detail* leaves more room for the prompt: 27 is all, 9 a third a side, 1 only the gist\n- the prompt may be "
        "empty"), (
        (picture("First"), picture("Second"), load("flux1-dev.safetensors")),
        (Node("Redux files", "FluxKitLoadRedux", {}, {"clip_vision": "sigclip_vision_patch14_384.safetensors",
                                                      "style_model": "flux1-redux-dev.safetensors"}),
         prompt("", 2.5), Node("Size", "FluxKitEmptyLatent", {}, {"aspect": "1:1"})),
        (Node("Redux 1", "FluxKitRedux", {"conditioning": "Prompt.CONDITIONING", "images": "First.IMAGE",
                                          "style_model": "Redux files.STYLE_MODEL",
                                          "clip_vision": "Redux files.CLIP_VISION"}),
         Node("Redux 2", "FluxKitRedux", {"conditioning": "Redux 1.CONDITIONING", "images": "Second.IMAGE",
                                          "style_model": "Redux files.STYLE_MODEL",
                                          "clip_vision": "Redux files.CLIP_VISION"}, {"strength": 0.5})),
        (sampler("Redux 2.CONDITIONING", "Size.LATENT"), decode(), save(prefix="redux")))),
    Example("kontext_edit", (
        "**Say what is to change.** FLUX.1 Kontext paints the picture again with that change and leaves the rest.\n\n"
        "- *preferred-stretch* brings the picture to the nearest size that Kontext was trained on; *keep-16* keeps its "
        "size\n- the sentence says what to do: *make the car red*, *remove the person on the left*\n- to change a part "
        "only, connect a mask to *edit_mask*"), (
        (picture(), load("flux1-kontext-dev.safetensors")),
        (prompt("make the background a snowy forest", 2.5),
         Node("Kontext", "FluxKitKontext", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                            "image_1": "Picture.IMAGE", "model": "Load Flux.MODEL"})),
        (sampler("Kontext.POSITIVE", "Kontext.LATENT"),),
        (decode(), save(prefix="kontext")))),
    Example("kontext_two_references", (
        "**Two pictures, one sentence.** The sentence says what to take from which.\n\n- *chain* sets them side by "
        "side as ComfyUI does; *index* gives each a plane of its own; *stitch* makes them one picture\n- the result "
        "has the aspect of the first, or the one you choose"), (
        (picture("First"), picture("Second"), load("flux1-kontext-dev.safetensors")),
        (prompt("put the person of the first picture into the room of the second", 2.5),
         Node("Kontext", "FluxKitKontext", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                            "image_1": "First.IMAGE", "image_2": "Second.IMAGE",
                                            "model": "Load Flux.MODEL"})),
        (sampler("Kontext.POSITIVE", "Kontext.LATENT"),),
        (decode(), save(prefix="kontext")))),
    Example("lora_fill", (
        "**LoRAs on FLUX.1 Fill.** LoRAs made for dev work on Fill too: they change the layers that both have, and "
        "*Apply* says what fitted and what did not.\n\n- add rows with +, drag them, switch them off; a row at 0 reads "
        "nothing\n- paint the mask in the mask editor of *Picture*\n- *Apply* takes quantised models as they are; the "
        "LoRA runs beside the packed weights"), (
        (picture(), load("flux1-fill-dev.safetensors"),
         Node("LoRAs", "FluxKitLoraStack", {}, {"rows": rows(("my_style.safetensors", 1.0))})),
        (Node("Apply", "FluxKitLoraApply", {"model": "Load Flux.MODEL", "loras": "LoRAs.FLUX_LORAS"}),
         Node("Mask", "FluxKitMaskRefine", {"mask": "Picture.MASK"}, {"feather": 4}),
         prompt("a bunch of sunflowers in a blue vase", 30)),
        (Node("Fill", "FluxKitFill", {"positive": "Prompt.CONDITIONING", "vae": "Load Flux.VAE",
                                      "image": "Picture.IMAGE", "mask": "Mask.MASK", "model": "Apply.MODEL"}),
         sampler("Fill.POSITIVE", "Fill.LATENT", "Apply.MODEL")),
        (decode(), Node("Paste", "FluxKitRegionPaste", {"image": "Picture.IMAGE", "edited": "Decode.IMAGE",
                                                        "blend": "Mask.MASK"}),
         save("Paste.IMAGE", "fill")))),
    Example("image_to_image", (
        "**Start from a picture.** *denoise* says how much of it is repainted: 0.3 keeps nearly all, 0.8 little more "
        "than its colours.\n\n- *all steps* in *denoise_meaning* runs the number of steps you ask for; *keep steps* is "
        "ComfyUI's way"), (
        (picture(), load("flux1-dev.safetensors")),
        (Node("Encode", "FluxKitEncode", {"image": "Picture.IMAGE", "vae": "Load Flux.VAE"}),
         prompt("an oil painting with thick strokes of the brush")),
        (sampler("Prompt.CONDITIONING", "Encode.LATENT", denoise=0.7),),
        (decode(), save(prefix="image_to_image")))),
    Example("draft_then_final", (
        "**A draft in four steps, then the real thing.** schnell makes the composition, dev paints it again from "
        "there.\n\n- change the seed of *Draft* until you like the composition; *Final* need not run meanwhile "
        "(bypass it)\n- lower *denoise* in *Final* to stay closer to the draft\n- both use the same text encoders and "
        "autoencoder"), (
        (load("flux1-dev.safetensors"), Node("Load schnell", "FluxKitLoadTransformer", {},
                                             {"model": "flux1-schnell.safetensors"})),
        (prompt("a lighthouse on a rocky coast at dawn"), Node("Size", "FluxKitEmptyLatent", {}, {"aspect": "3:2"})),
        (sampler("Prompt.CONDITIONING", "Size.LATENT", "Load schnell.MODEL", "Draft", steps=4),
         decode("Draft.LATENT", "Decode draft"), save("Decode draft.IMAGE", "draft", "Save draft")),
        (sampler("Prompt.CONDITIONING", "Draft.LATENT", title="Final", denoise=0.6), decode("Final.LATENT"),
         save(prefix="final")))),
)


@dataclass(frozen=True)
class Shape:
    """What a file says of a node type: sockets, outputs, widgets with their defaults, in order, and its height."""

    sockets: Sequence[tuple[str, str]]
    outputs: Sequence[tuple[str, str]]
    widgets: Mapping[str, Any]
    controlled: frozenset[str]
    height: int


LOAD_IMAGE = Shape((), (("IMAGE", "IMAGE"), ("MASK", "MASK")), {"image": "", "upload": "image"}, frozenset(),
                   TITLE + 4 * ROW + PICTURE)


def shapes() -> dict[str, Shape]:
    from flux_kit import hosts
    from flux_kit.hosts.standalone.folders import Folders
    from flux_kit.hosts.standalone.host import StandaloneHost
    hosts.use(StandaloneHost(Folders(models=[], input=[], output=Path("output"), temp=Path("output")), device="cpu"))
    from flux_kit.hosts.standalone.io import WidgetInput
    from flux_kit.nodes import NODES
    found = {"LoadImage": LOAD_IMAGE}
    for schema in (node.GET_SCHEMA() for node in NODES):
        sockets = [(spec.id, spec.io_type) for spec in schema.inputs if not isinstance(spec, WidgetInput)]
        widgets = [spec for spec in schema.inputs if isinstance(spec, WidgetInput)]
        controlled = frozenset(spec.id for spec in widgets if getattr(spec, "control_after_generate", None))
        lines = sum(bool(getattr(spec, "multiline", False)) for spec in widgets)
        height = (TITLE + ROW * (max(len(sockets), len(schema.outputs)) + len(widgets) + len(controlled) - lines)
                  + LINES * lines + (PICTURE if schema.node_id in ("FluxKitSave", "FluxKitLoraStack") else 0))
        found[schema.node_id] = Shape(sockets, [(output.id, output.io_type) for output in schema.outputs],
                                      {spec.id: default_of(spec) for spec in widgets}, controlled, height)
    return found


def default_of(widget: Any) -> Any:
    default = getattr(widget, "default", None)
    options = getattr(widget, "options", None)
    return options[0] if default is None and options else default


def workflow(example: Example, known: Mapping[str, Shape]) -> dict[str, Any]:
    nodes = [node for column in example.columns for node in column]
    ids = {node.title: number for number, node in enumerate(nodes, start=1)}
    assert len(ids) == len(nodes), f"{example.name}: two nodes of one title"
    links: list[list[Any]] = []
    for node in nodes:
        shape = known[node.type]
        assert node.inputs.keys() <= {name for name, _ in shape.sockets}, (node.title, node.inputs.keys())
        for at, (name, _) in enumerate(shape.sockets):
            if name in node.inputs:
                source, output = node.inputs[name].split(".")
                outputs = known[nodes[ids[source] - 1].type].outputs
                place = [out for out, _ in outputs].index(output)
                links.append([len(links) + 1, ids[source], place, ids[node.title], at, outputs[place][1]])
    written = [{"id": len(nodes) + 1, "type": "MarkdownNote", "pos": [LEFT - WIDTH - ACROSS, TOP],
                "size": [WIDTH, 460], "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {},
                "widgets_values": ["\n\n".join((example.note, FOLDERS, ALONE.format(name=example.name)))],
                "title": "How to use this", **COLORS}]
    for x, column in enumerate(example.columns):
        y = TOP
        for node in column:
            height = known[node.type].height
            written.append(placed(node, known[node.type], ids[node.title], (LEFT + x * (WIDTH + ACROSS), y), links))
            y += height + DOWN
    for order, entry in enumerate(sorted(written[1:], key=lambda entry: depth_of(entry["id"], links)), start=1):
        entry["order"] = order
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"flux-kit/{example.name}")), "revision": 0,
            "last_node_id": len(nodes) + 1, "last_link_id": len(links), "nodes": written, "links": links, "groups": [],
            "config": {}, "extra": {"ds": {"scale": 0.7, "offset": [WIDTH + ACROSS, 40]}}, "version": 0.4}


def placed(node: Node, shape: Shape, number: int, pos: tuple[int, int], links: Sequence[Sequence[Any]]
           ) -> dict[str, Any]:
    assert node.values.keys() <= shape.widgets.keys(), (node.title, node.values.keys() - shape.widgets.keys())
    values: list[Any] = []
    for name, default in shape.widgets.items():
        values.append(node.values.get(name, default))
        values += ["fixed"] if name in shape.controlled else []
    into = {link[4]: link[0] for link in links if link[3] == number}
    return {
        "id": number, "type": node.type, "pos": list(pos), "size": [WIDTH, shape.height], "flags": {}, "order": 0,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": into.get(at)} for at, (name, kind) in enumerate(shape.sockets)],
        "outputs": [{"name": name, "type": kind,
                     "links": [link[0] for link in links if (link[1], link[2]) == (number, at)]}
                    for at, (name, kind) in enumerate(shape.outputs)],
        "properties": {"Node name for S&R": node.type}, "widgets_values": values, "title": node.title}


def depth_of(node: int, links: Sequence[Sequence[Any]]) -> int:
    return 1 + max((depth_of(link[1], links) for link in links if link[3] == node), default=0)


def main() -> None:
    known = shapes()
    for example in EXAMPLES_TABLE:
        path = EXAMPLES / f"{example.name}.json"
        path.write_text(json.dumps(workflow(example, known), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main()
