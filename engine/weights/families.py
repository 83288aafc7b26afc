"""What else people hand to a FLUX.1 loader, told by names and shapes: other families are named, never guessed at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def _any_shape(shape: Shape) -> bool:
    return True


def _size(axis: int, *sizes: int) -> Callable[[Shape], bool]:
    """Whether `axis` of a shape is one of `sizes`."""
    def test(shape: Shape) -> bool:
        return len(shape) > axis and shape[axis] in sizes
    return test


@dataclass(frozen=True)
class Family:
    """Files that have a name ending in `has` (after a dot or at the start), of a shape that passes, and one in
    `also`."""

    says: str
    has: str
    shape: Callable[[Shape], bool] = _any_shape
    also: str | None = None


CLIP_VISION_SIZES = (("ViT-B", 768), ("ViT-L", 1024), ("ViT-H", 1280), ("ViT-bigG", 1664))

FAMILIES: tuple[Family, ...] = (
    Family("a FLUX ControlNet", "controlnet_x_embedder.weight"),
    Family("a FLUX ControlNet", "controlnet_blocks.0.weight"),
    Family("a FLUX ControlNet", "controlnet_double_blocks.0.weight"),
    Family("a FLUX IP-Adapter", "ip_adapter_proj_model.proj.weight"),
    Family("a PuLID model", "pulid_encoder.id_embedding_mapping.0.weight"),
    Family("a Chroma transformer (it has no modulations; not FLUX.1)", "distilled_guidance_layer.in_proj.weight"),
    Family("a FLUX.2 transformer", "double_stream_modulation_img.lin.weight"),
    Family("a FLUX.2 transformer", "double_stream_modulation_img.linear.weight"),
    Family("a HunyuanVideo transformer", "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight"),
    Family("a HunyuanVideo transformer", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight"),
    Family("an SD3 transformer", "joint_blocks.0.x_block.attn.qkv.weight"),
    Family("an SD3 transformer", "transformer_blocks.0.attn.add_q_proj.weight", also="pos_embed.proj.weight"),
    Family("an SDXL UNet", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", _size(1, 2048)),
    Family("an SDXL UNet", "add_embedding.linear_1.weight"),
    Family("an SDXL UNet", "label_emb.0.0.weight"),
    Family("an SD 1.5 UNet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", _size(1, 768)),
    Family("an SD 2 UNet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", _size(1, 1024)),
    Family("an SD 1.5 UNet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", _size(1, 768)),
    Family("an SD 2 UNet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", _size(1, 1024)),
    Family("a Wan transformer", "blocks.0.cross_attn.norm_q.weight"),
    Family("a Qwen-Image transformer", "transformer_blocks.0.img_mod.1.weight"),
    Family("an LTX-Video transformer", "adaln_single.emb.timestep_embedder.linear_1.weight"),
    Family("a Lumina or Z-Image transformer", "noise_refiner.0.attention.qkv.weight"),
    Family("an SD 1.5 or SDXL autoencoder (4 latent channels; FLUX.1 has 16)", "decoder.conv_in.weight", _size(1, 4)),
    Family("a FLUX.2 autoencoder (32 latent channels; FLUX.1 has 16)", "decoder.conv_in.weight", _size(1, 32)),
    Family("a video autoencoder", "decoder.conv_in.weight", lambda shape: len(shape) == 5),
    Family("a video autoencoder", "decoder.conv_in.conv.weight"),
    Family("a Wan or Qwen-Image autoencoder", "decoder.head.2.weight"),
    *(Family(f"a CLIP {size} vision encoder (width {width}); FLUX.1 Redux takes SigLIP so400m (width 1152), "
             "sigclip_vision_patch14_384.safetensors", "embeddings.class_embedding", _size(0, width))
      for size, width in CLIP_VISION_SIZES),
    Family("a CLIP vision encoder; FLUX.1 Redux takes SigLIP so400m", "embeddings.class_embedding"),
    Family("a CLIP model in OpenCLIP's layout; FLUX.1 Redux takes SigLIP so400m in Hugging Face's",
           "visual.transformer.resblocks.0.attn.in_proj_weight"),
    Family("a SigLIP 2 NaFlex vision encoder; FLUX.1 Redux takes SigLIP so400m patch14 384",
           "embeddings.patch_embedding.weight", lambda shape: len(shape) == 2),
    Family("a DINOv2 vision encoder; FLUX.1 Redux takes SigLIP so400m",
           "embeddings.patch_embeddings.projection.weight"),
    Family("a T2I style adapter of SD 1.5; FLUX.1 takes flux1-redux-dev.safetensors", "style_embedding"),
    Family("a CLIP text encoder in OpenCLIP's layout, such as SDXL's CLIP-G; FLUX.1 takes CLIP-L in Hugging Face's",
           "transformer.resblocks.0.attn.in_proj_weight"),
    Family("an SDXL CLIP-G text encoder (width 1280; CLIP-L has 768)", "embeddings.token_embedding.weight",
           _size(1, 1280)),
    Family("an SD 2 CLIP-H text encoder (width 1024; CLIP-L has 768)", "embeddings.token_embedding.weight",
           _size(1, 1024)),
    Family("a UMT5 encoder (Wan); FLUX.1 takes T5 v1.1 XXL",
           "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    Family("a T5 1.0 encoder; FLUX.1 takes T5 v1.1 XXL", "encoder.block.0.layer.1.DenseReluDense.wi.weight"),
    Family("a language model (Llama, Mistral or Qwen kind)", "model.layers.0.self_attn.q_proj.weight"),
)
"""Asked of the file when it is nothing we load, and of each part we find, first match first."""

LORA = re.compile(
    r"(?:\.|_)lora(?:[._](?:A|B|C|up|down|mid|E)\b|_linear_layer\.|\d?[._](?:down|up)\.)|_lora\d?\.(?:down|up)\."
    r"|\.lora_(?:A|B)\.|\.lokr_w|\.lokr_t2|\.hada_|\.dora_scale$|\.lora_magnitude_vector|\.oft_|\.alpha$|\.diff(?:_b)?$"
    r"|\.set_weight$|\.on_input$|\.ia3_|proj_lora\d?\.|\.glora_|\.(?:a1|a2|b1|b2)\.weight$|\.boft_|\.reshape_weight$")
"""Side tensors of LoRA files, all spellings; what they mean is the adapters' business."""


def ends_with(names: Collection[str], ending: str) -> str | None:
    """The first name that is `ending` or ends in a dot and it."""
    if ending in names:
        return ending
    dotted = "." + ending
    return next((name for name in names if name.endswith(dotted)), None)


def family_of(shapes: Shapes) -> str | None:
    """What the tensors of these names and shapes are, if a row of FAMILIES knows them."""
    for row in FAMILIES:
        name = ends_with(shapes, row.has)
        if name is None or not row.shape(shapes[name]):
            continue
        if row.also is None or ends_with(shapes, row.also) is not None:
            return row.says
    return None


def is_lora(names: Collection[str]) -> bool:
    """Whether most tensors are side tensors of a LoRA."""
    return len(names) > 0 and 2 * sum(LORA.search(name) is not None for name in names) >= len(names)
