"""The engine's transformer as ComfyUI calls one: the `diffusion_model` of a genuine MODEL."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.ldm.flux.model
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...engine.conditioning.attention import beside_references, grid_of
from ...engine.models import flux as engine_flux
from ...engine.sampling.latents import patchify, text_ids, unpatchify
from ...engine.sampling.slots import METHODS, check_method, positions, size_of
from ...engine.specs import FluxSpec
from .layers import flux_layers
from .modulation import HostTable

Options = dict[str, Any]


def params_of(spec: FluxSpec) -> dict[str, Any]:
    """A spec as the host's `FluxParams` and `unet_config` have it; channels before patching."""
    patch = spec.patch_size**2
    return {
        "in_channels": spec.in_channels // patch, "out_channels": spec.out_channels // patch,
        "vec_in_dim": spec.vec_in_dim, "context_in_dim": spec.context_in_dim, "hidden_size": spec.hidden_size,
        "mlp_ratio": spec.mlp_ratio, "num_heads": spec.num_heads, "depth": spec.depth,
        "depth_single_blocks": spec.depth_single_blocks, "axes_dim": list(spec.axes_dim), "theta": spec.theta,
        "patch_size": spec.patch_size, "qkv_bias": spec.qkv_bias, "guidance_embed": spec.guidance_embed,
        "txt_ids_dims": []}


class Flux(engine_flux.Flux):
    """Named as the host's own class, and with its attributes, since other packs look for both."""

    def __init__(self, spec: FluxSpec, dtype: torch.dtype) -> None:
        super().__init__(spec, flux_layers())
        known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
        self.params = comfy.ldm.flux.model.FluxParams(
            **{name: value for name, value in params_of(spec).items() if name in known})
        self.dtype = dtype
        self.patch_size, self.hidden_size, self.num_heads = spec.patch_size, spec.hidden_size, spec.num_heads
        self.in_channels, self.out_channels = spec.in_channels, spec.out_channels
        self._ids: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None = None,  # type: ignore[override]
                guidance: Tensor | None = None, ref_latents: list[Tensor] | None = None, control: Any = None,
                transformer_options: Options | None = None, **kwargs: Any) -> Tensor:
        """Velocity `(B, 16, h, w)` of latents x `(B, C, h, w)`; timestep `(B,)` sigma, context `(B, L, d)`."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        run = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        out: Tensor = run.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)
        return out

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None = None,
                 guidance: Tensor | None = None, ref_latents: list[Tensor] | None = None, control: Any = None,
                 transformer_options: Options | None = None, attention_mask: Tensor | None = None,
                 ref_latents_method: str = METHODS[0], **kwargs: Any) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        references = [] if ref_latents is None else list(ref_latents)
        parts = [patchify(x), *(patchify(latents) for latents in references)]
        if references:
            check_method(ref_latents_method)
            options = {**options, "reference_image_num_tokens": [part.shape[1] for part in parts[1:]]}
            attention_mask = covering(attention_mask, context.shape[1], x, references)
        img_ids, txt_ids = self._positions(x, references, ref_latents_method, context.shape[1], options)
        out = self.forward_orig(torch.cat(parts, dim=1), img_ids, context, txt_ids, timestep, y, guidance,
                                control=control, transformer_options=options, attn_mask=attention_mask)
        return unpatchify(out[:, :parts[0].shape[1]], x.shape[-2], x.shape[-1])

    def forward_orig(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor,  # type: ignore[override]
                     timesteps: Tensor, y: Tensor | None, guidance: Tensor | None = None, control: Any = None,
                     transformer_options: Options | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """By the signature that packs which replace it have; tokens in, tokens out."""
        options = {} if transformer_options is None else transformer_options
        width = self.spec.vec_in_dim
        y = img.new_zeros(img.shape[0], width) if y is None else y[:, :width]
        hooks = Hooks(control, options, len(self.double_blocks), len(self.single_blocks))
        if isinstance(self.modulations, HostTable):
            self.modulations.sigmas = options.get("sample_sigmas")
        return super().forward_orig(img, img_ids, txt, txt_ids, timesteps, y, guidance, attn_mask=attn_mask,
                                    hooks=hooks)

    def _positions(self, x: Tensor, references: list[Tensor], method: str, length: int, options: Options
                   ) -> tuple[Tensor, Tensor]:
        """Ids of image `(B, L_img, 3)` and text `(B, length, 3)` tokens; the same tensors as long as shapes stay, by
        which the table of rotations is kept."""
        scaling = options.get("rope_options") or {}
        key = (x.shape[0], x.shape[-2:], [latents.shape for latents in references], method, length, x.device,
               dict(scaling), torch.is_inference_mode_enabled())
        if self._ids is None or self._ids[0] != key:
            sizes = [size_of(latents) for latents in references]
            found = positions(x.shape[0], size_of(x), sizes, method, device=x.device)
            img_ids = torch.cat([scaled(ids, scaling) for ids in found], dim=1)
            self._ids = (key, img_ids, text_ids(x.shape[0], length, device=x.device))
        return self._ids[1], self._ids[2]


def covering(mask: Tensor | None, text_tokens: int, x: Tensor, references: list[Tensor]) -> Tensor | None:
    """An attention mask of text and picture, made to cover the references too; one that covers them stays.

    The host brings masks to the picture's size and leaves references out, on which its own network fails.
    """
    grid = grid_of(x)
    if mask is None or mask.shape[-1] != text_tokens + grid[0] * grid[1]:
        return mask
    return beside_references(mask, grid, [grid_of(latents) for latents in references])


def scaled(ids: Tensor, options: Options) -> Tensor:
    """Ids stretched and shifted as the host's `rope_options` ask; a part keeps its own corner in place."""
    if not options:
        return ids
    corner = ids[:, :1]
    stretch = ids.new_tensor([1.0, options.get("scale_y", 1.0), options.get("scale_x", 1.0)])
    shift = ids.new_tensor([options.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    return corner + (ids - corner) * stretch + shift


class Hooks:
    """What other nodes ask for round the blocks (`engine.models.flux.BlockHooks`)."""

    def __init__(self, control: Any, options: Options, doubles: int, singles: int) -> None:
        self.options = options.copy()
        self.patches = options.get("patches", {}).get("post_input", ())
        self.replace = options.get("patches_replace", {}).get("dit", {})
        self.residuals = {kind: (control or {}).get(key) or () for kind, key in (("double", "input"),
                                                                                ("single", "output"))}
        self.counts = {"double": doubles, "single": singles}

    def before(self, img: Tensor, txt: Tensor, img_ids: Tensor, txt_ids: Tensor
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for patch in self.patches:
            out = patch({"img": img, "txt": txt, "img_ids": img_ids, "txt_ids": txt_ids,
                         "transformer_options": self.options})
            img, txt, img_ids, txt_ids = out["img"], out["txt"], out["img_ids"], out["txt_ids"]
        return img, txt, img_ids, txt_ids

    def double(self, index: int, block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        def original(args: Options) -> Options:
            out_img, out_txt = block(**inputs_of(args, "img", "txt"))
            return {"img": out_img, "txt": out_txt}

        self._tell("double", index, txt.shape[1], txt.shape[1] + img.shape[1])
        args = {"img": img, "txt": txt, "vec": vec, "pe": pe, "attn_mask": attn_mask,
                "transformer_options": self.options}
        replaced = self.replace.get(("double_block", index))
        out = original(args) if replaced is None else replaced(args, {"original_block": original})
        return self._add("double", index, out["img"], 0), out["txt"]

    def single(self, index: int, block: nn.Module, x: Tensor, txt_tokens: int, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> Tensor:
        def original(args: Options) -> Options:
            return {"img": block(args["img"], **inputs_of(args))}

        self._tell("single", index, txt_tokens, x.shape[1])
        args = {"img": x, "vec": vec, "pe": pe, "attn_mask": attn_mask, "transformer_options": self.options}
        replaced = self.replace.get(("single_block", index))
        out = original(args) if replaced is None else replaced(args, {"original_block": original})
        return self._add("single", index, out["img"], txt_tokens)

    def _tell(self, kind: str, index: int, first: int, last: int) -> None:
        """Where the run is, for patches that read it; `img_slice` is where the image lies among the tokens."""
        self.options.update(block_type=kind, block_index=index, total_blocks=self.counts[kind],
                            img_slice=[first, last])

    def _add(self, kind: str, index: int, x: Tensor, first: int) -> Tensor:
        """x with the residual of a control network, which may cover fewer tokens; on a copy, since a replaced block may
        hand out a tensor that it keeps for later steps."""
        residuals = self.residuals[kind]
        residual = residuals[index] if index < len(residuals) else None
        if residual is None:
            return x
        x = x.clone()
        x[:, first:first + residual.shape[1]] += residual
        return x


def inputs_of(args: Options, *streams: str) -> Options:
    """What a block is called with, from what a replacing patch hands on; some hand on less than they were given."""
    return {**{name: args[name] for name in (*streams, "vec", "pe")},
            "attn_mask": args.get("attn_mask"), "transformer_options": args.get("transformer_options")}
