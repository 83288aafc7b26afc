"""What is not a LoRA for FLUX.1, told before a single layer is matched, and named as it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..weights.detect import Detection
from .vocabulary import BASES


@dataclass(frozen=True)
class Foreign:
    """LoRAs of another family: `says` and the names that only it has; `what` they are, in words."""

    says: str
    pattern: re.Pattern[str]
    what: str
    counted: re.Pattern[str] | None = None
    """What `what` counts, if it is more than what tells the family."""
    advice: str = "Use it with a model of its own family, or choose a FLUX.1 LoRA"


UNET = re.compile(r"(?:input|output|middle)_blocks?[._]\d+[._]|(?:down|up)_blocks[._]\d|mid_block[._]")


def _foreign(says: str, pattern: str, what: str, **more: Any) -> Foreign:
    return Foreign(says, re.compile(pattern), what, **more)


FOREIGN: tuple[Foreign, ...] = (
    _foreign("a LoRA converted for nunchaku (SVDQuant)",
             r"transformer_blocks\.\d+\.(?:qkv_proj|qkv_proj_context|mlp_(?:context_)?fc[12]|out_proj(?:_context)?)\."
             r"lora_(?:down|up)$", "layers packed for its kernels",
             advice="Use the original file it was converted from"),
    _foreign("an SDXL LoRA", r"(?:^|[._])te2_text_model_|text_encoder_2\.text_model\."
             r"|(?:input|output)_blocks[._]\d+[._]1[._]transformer_blocks[._][1-9]"
             r"|(?:down|up)_blocks[._]\d[._]attentions[._]\d[._]transformer_blocks[._][1-9]", "UNet blocks",
             counted=UNET),
    _foreign("an SD 1.5 or SDXL LoRA", UNET.pattern, "UNet blocks"),
    _foreign("an SD3 LoRA", r"joint_blocks[._]\d+[._]", "joint blocks"),
    _foreign("a FLUX.2 LoRA", r"(?:double_stream|single_stream)_modulation|"
             r"transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj", "layers of FLUX.2"),
    _foreign("a HunyuanVideo LoRA", r"individual_token_refiner|img_attn_qkv.*hunyuan", "token refiner layers"),
    _foreign("a Wan LoRA", r"(?:^|[._])blocks[._]\d+[._](?:self|cross)_attn[._]", "Wan blocks"),
    _foreign("a Qwen-Image LoRA", r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)[._]", "Qwen-Image blocks"),
    _foreign("a Z-Image or Lumina LoRA", r"(?:^|[._])(?:noise_refiner|context_refiner)[._]\d|"
             r"(?:^|[._])layers[._]\d+[._]attention[._]", "Z-Image or Lumina layers"),
    _foreign("an LTX-Video or PixArt LoRA", r"transformer_blocks[._]\d+[._]attn[12][._]to_", "attention of its blocks"),
    _foreign("a Chroma LoRA", r"distilled_guidance_layer", "its distilled guidance layer"),
    _foreign("an AuraFlow LoRA", r"single_transformer_blocks[._]\d+[._]ff[._]", "AuraFlow layers"),
)
"""First match first; a family needs a twentieth of all keys to be named."""
MIN_SHARE = 0.05

WIDTHS: Mapping[int, str] = {
    640: "an SDXL LoRA", 1280: "an SDXL LoRA", 320: "an SD 1.5 LoRA", 1536: "an SD3 LoRA (width 1536)",
    2432: "an SD3.5 Large LoRA (width 2432)", 6144: "a FLUX.2 LoRA (width 6144)", 4096: "a FLUX.2 LoRA (width 4096)",
    2048: "a LoRA of a transformer 2048 wide", 5120: "a LoRA of a transformer 5120 wide",
}
"""Width of a transformer whose layers have FLUX.1's names -> what the LoRA is for."""


def foreign(keys: Collection[str], own: int) -> str | None:
    """Why these keys are of another family. `own`: how many of them FLUX.1 has names for."""
    for row in FOREIGN:
        count = sum(row.pattern.search(key) is not None for key in keys)
        if count and count >= MIN_SHARE * len(keys):
            if row.counted is not None:
                count = sum(row.counted.search(key) is not None for key in keys)
            beside = f"; only {own} keys would match" if own else ""
            return (f"this is {row.says} ({count} of {len(keys)} keys are {row.what}{beside}): nothing was applied. "
                    f"{row.advice}")
    return None


def another_width(widths: Counter[int], misfits: int, modules: int) -> str:
    """Names are FLUX.1's but sizes are not. `widths`: input widths of the layers that do not fit, counted."""
    width = widths.most_common(1)[0][0]
    says = WIDTHS.get(width, f"a LoRA of a transformer {width} wide")
    known = " or ".join(f"{base.transformer.hidden_size} ({base.name})" for base in BASES)
    return (f"this is {says}: {misfits} of {modules} layers have other sizes than FLUX.1's, whose width is {known}; "
            "nothing was applied. Use it with a model of its own family")


def no_lora(detection: Detection, keys: Collection[str]) -> str | None:
    """Why a file is not a LoRA at all: a model in the LoRA's place."""
    if not keys:
        return "the file holds no tensors. Download it again, or ask its author"
    if detection.role == "lora":
        return None
    if detection.parts:
        return f"this is {detection.family}, not a LoRA. Choose it where a model is loaded, and a LoRA here"
    return None
