"""Nodes for masks, larger canvases, and parts of a picture cut out and put back."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning import canvas, masks, regions
from . import api
from .sizes import ASPECTS, CUSTOM

MENU = "Flux Kit/Image"
NO_SNAP = "none"
WHOLE, ERROR = "whole", "error"
MULTIPLES = [str(multiple) for multiple in regions.MULTIPLES]
PADS: dict[str, Any] = {"default": 0, "min": 0, "max": 4096, "step": 8}
SHARE: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.05}
GROW_TIP = "Pixels by which edges move outward; below 0 inward. The border of the picture is no edge."
FEATHER_TIP = "Width in pixels of a soft rim added outside the mask. The mask itself stays white."
THRESHOLD_TIP = "What is at least this white becomes white, the rest black. 0 keeps soft values."
SNAP_TIP = "Makes every cell of 8 (a latent pixel) or 16 pixels (a token) wholly white where any of it is."
ASPECT_TIP = ("Width : height of the canvas. custom: by the sides below. What is missing for an aspect is added to the "
              "sides that have pixels below, or evenly to both.")
OVERLAP_TIP = "How far the mask reaches into the picture on the sides that grow, so that the seam is painted anew."
FILL_TIP = ("What new pixels show until they are painted. Flux Fill does not see it; a sampler with denoise below 1 "
            "does.")
CANVAS_MULTIPLE_TIP = "Sides become multiples of this by adding pixels: 16 is FLUX.1's grid, 32 the official demo's."
MASK_TIP = "White where the picture is to change. In a batch one region holds the masks of all."
CONTEXT_MASK_TIP = "White what must also lie in the region for the model to see, but is not changed."
CONTEXT_TIP = "How many times larger than the mask the region is, as far as the picture goes."
MEGAPIXELS_TIP = "Area the region is brought to, in units of 1024 x 1024. 0: keep its own pixels, without resampling."
CROP_MULTIPLE_TIP = "Sides become multiples of this: 16 is FLUX.1's grid."
EMPTY_TIP = "What an empty mask does: stop with an error, or take the whole picture."
BLEND_TIP = ("Share of the edit, pixel by pixel: where it is black the picture stays as it is, bit for bit. Connect "
             "blend of Region Crop. Nothing: all of the region is replaced.")
MATCH_TIP = ("Takes out how far brightness and contrast of the edit drifted, measured where nothing is to change: "
             "in the region, outside blend. 0: off. 1: all of it.")


class FluxKitMaskRefine(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitMaskRefine", display_name="Mask Refine", category=MENU,
            search_aliases=["grow mask", "shrink mask", "feather mask", "blur mask", "invert mask", "threshold mask",
                            "fill holes"],
            description="Brings a mask into shape for Flux Fill and Region Crop: threshold, holes, grow or shrink by "
                        "exact pixels, feather outward.",
            inputs=[api.Mask.Input("mask", tooltip="White where the picture is to change."),
                    api.Int.Input("grow", default=8, min=-512, max=512, tooltip=GROW_TIP),
                    api.Int.Input("feather", default=0, min=0, max=512, tooltip=FEATHER_TIP),
                    api.Float.Input("threshold", default=0.5, **SHARE, tooltip=THRESHOLD_TIP),
                    api.Boolean.Input("fill_holes", default=True, tooltip="Whitens what the mask encloses."),
                    api.Boolean.Input("invert", default=False, tooltip="Swaps black and white, before all else."),
                    api.Combo.Input("snap", options=[NO_SNAP, "8", "16"], default=NO_SNAP, tooltip=SNAP_TIP)],
            outputs=[api.Mask.Output("MASK", tooltip="The refined mask."), api.report_output()])

    @classmethod
    def execute(cls, mask: Any, grow: int, feather: int, threshold: float, fill_holes: bool, invert: bool,
                snap: str) -> Any:
        made, notes = masks.refine(mask, masks.Refinement(grow, feather, threshold, fill_holes, invert,
                                                          0 if snap == NO_SNAP else int(snap)))
        return api.NodeOutput(made, api.told(notes))


class FluxKitOutpaintCanvas(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitOutpaintCanvas", display_name="Outpaint Canvas", category=MENU,
            search_aliases=["outpaint", "pad image for outpainting", "expand image", "uncrop", "extend canvas"],
            description="Makes room round a picture, by pixels a side or to an aspect, and the mask of what is to be "
                        "painted. The picture is never cut and keeps its pixels.",
            inputs=[api.Image.Input("image", tooltip="The picture that grows."),
                    api.Combo.Input("aspect", options=list(ASPECTS), default=CUSTOM, tooltip=ASPECT_TIP),
                    api.Int.Input("left", **PADS, tooltip="Pixels to add on the left."),
                    api.Int.Input("top", **PADS, tooltip="Pixels to add above."),
                    api.Int.Input("right", **PADS, tooltip="Pixels to add on the right."),
                    api.Int.Input("bottom", **PADS, tooltip="Pixels to add below."),
                    api.Int.Input("overlap", default=16, min=0, max=256, tooltip=OVERLAP_TIP),
                    api.Combo.Input("fill", options=list(canvas.FILLS), default="grey", tooltip=FILL_TIP),
                    api.Combo.Input("multiple", options=MULTIPLES, default="16", tooltip=CANVAS_MULTIPLE_TIP)],
            outputs=[api.Image.Output("IMAGE", tooltip="The picture on its canvas."),
                     api.Mask.Output("MASK", tooltip="White on all that is to be painted."), api.report_output()])

    @classmethod
    def execute(cls, image: Any, aspect: str, left: int, top: int, right: int, bottom: int, overlap: int, fill: str,
                multiple: str) -> Any:
        made, mask, notes = canvas.outpaint_to(image, canvas.Pads(left, top, right, bottom), aspect=ASPECTS[aspect],
                                               multiple=int(multiple), overlap=overlap, fill=fill)
        return api.NodeOutput(made, mask, api.told(notes))


class FluxKitRegionCrop(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitRegionCrop", display_name="Region Crop", category=MENU,
            search_aliases=["inpaint crop", "crop and stitch", "crop by mask", "only masked", "detailer"],
            description="Cuts out the masked part of a picture with its surroundings, at a size that FLUX.1 likes, so "
                        "that it is painted in full detail. Region Paste puts it back.",
            inputs=[api.Image.Input("image", tooltip="The whole picture, of any size."),
                    api.Mask.Input("mask", tooltip=MASK_TIP),
                    api.Mask.Input("context_mask", optional=True, tooltip=CONTEXT_MASK_TIP),
                    api.Float.Input("context", default=1.5, min=1.0, max=8.0, step=0.1, tooltip=CONTEXT_TIP),
                    api.Int.Input("min_context", default=64, min=0, max=1024,
                                  tooltip="Pixels round the mask that the region has at least."),
                    api.Float.Input("megapixels", default=1.0, min=0.0, max=4.0, step=0.05, tooltip=MEGAPIXELS_TIP),
                    api.Combo.Input("multiple", options=MULTIPLES, default="16", tooltip=CROP_MULTIPLE_TIP),
                    api.Combo.Input("if_empty", options=[ERROR, WHOLE], default=ERROR, tooltip=EMPTY_TIP)],
            outputs=[api.Image.Output("IMAGE", tooltip="The part that was cut out."),
                     api.Mask.Output("MASK", tooltip="The mask in that part."),
                     api.Mask.Output("region", display_name="region",
                                     tooltip="Where the part lies: a rectangle as large as the picture is."),
                     api.Mask.Output("blend", display_name="blend", tooltip="The mask on the whole picture."),
                     api.Int.Output("width", display_name="width", tooltip="Width of the part in pixels."),
                     api.Int.Output("height", display_name="height", tooltip="Height of the part in pixels."),
                     api.report_output()])

    @classmethod
    def execute(cls, image: Any, mask: Any, if_empty: str, multiple: str, **settings: Any) -> Any:
        made = regions.crop(image, mask, multiple=int(multiple), whole_if_empty=if_empty == WHOLE, **settings)
        return api.NodeOutput(made.image, made.mask, made.region, made.blend, made.width, made.height,
                              api.told(made.notes))


class FluxKitRegionPaste(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitRegionPaste", display_name="Region Paste", category=MENU,
            search_aliases=["inpaint stitch", "crop and stitch", "uncrop", "composite", "image composite masked"],
            description="Puts an edited picture back where it was cut out. Outside the mask every pixel stays as it "
                        "was, bit for bit, however often this is done.",
            inputs=[api.Image.Input("image", tooltip="The whole picture, as it was given to Region Crop."),
                    api.Image.Input("edited", tooltip="The part, edited, in the size it was cut out with. What Flux "
                                                      "Fill added to an odd size is taken off."),
                    api.Mask.Input("region", optional=True,
                                   tooltip="Where it goes: region of Region Crop. Nothing: the whole picture."),
                    api.Mask.Input("blend", optional=True, tooltip=BLEND_TIP),
                    api.Float.Input("colour_match", default=0.0, **SHARE, tooltip=MATCH_TIP),
                    api.Boolean.Input("use_blend", default=True,
                                      tooltip="Off: all of the region is replaced, whatever blend says.")],
            outputs=[api.Image.Output("IMAGE", tooltip="The whole picture with the edit in it."), api.report_output()])

    @classmethod
    def execute(cls, image: Any, edited: Any, colour_match: float, use_blend: bool, region: Any = None,
                blend: Any = None) -> Any:
        made, notes = regions.paste(image, edited, region=region, blend=blend, use_blend=use_blend,
                                    colour_match=colour_match)
        return api.NodeOutput(made, api.told(notes))
