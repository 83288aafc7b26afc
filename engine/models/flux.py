"""The flow transformer of FLUX.1, with BFL's names (black-forest-labs/flux, src/flux/model.py)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..specs import FluxSpec
from .layers import (
    DoubleStreamBlock,
    EmbedND,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    timestep_embedding,
)
from .modulation import ModulationTable, informed
from .ops import PLAIN, Ops


class BlockHooks(Protocol):
    """What a host may put round the blocks: patches, replaced blocks, residuals of control networks."""

    def before(self, img: Tensor, txt: Tensor, img_ids: Tensor, txt_ids: Tensor
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sees, and may change, the embedded tokens and their positions."""

    def double(self, index: int, block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the double block, or what takes its place: (img, txt)."""

    def single(self, index: int, block: nn.Module, x: Tensor, txt_tokens: int, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> Tensor:
        """Runs the single block, or what takes its place, on text and image tokens."""


class Flux(nn.Module):
    """Predicts velocity (noise - clean) for the tokens of a noised picture."""

    def __init__(self, spec: FluxSpec, ops: Ops = PLAIN) -> None:
        super().__init__()
        if sum(spec.axes_dim) != spec.head_dim:
            raise ValueError(f"rope axes {spec.axes_dim} must add up to the head width {spec.head_dim}")
        self.spec = spec
        self._table: tuple[Tensor, Tensor, Tensor] | None = None
        self.modulations: ModulationTable | None = None
        self.pe_embedder = EmbedND(spec.head_dim, spec.theta, spec.axes_dim)
        self.img_in = ops.Linear(spec.in_channels, spec.hidden_size)
        self.time_in = MLPEmbedder(spec.frequency_dim, spec.hidden_size, ops)
        self.vector_in = MLPEmbedder(spec.vec_in_dim, spec.hidden_size, ops)
        self.guidance_in = MLPEmbedder(spec.frequency_dim, spec.hidden_size, ops) if spec.guidance_embed else None
        self.txt_in = ops.Linear(spec.context_in_dim, spec.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(spec, ops) for _ in range(spec.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(spec, ops) for _ in range(spec.depth_single_blocks))
        self.final_layer = LastLayer(spec, ops)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
                guidance: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Velocity of the image tokens.

        img `(B, L_img, in_channels)`; img_ids `(B, L_img, 3)`; txt `(B, L_txt, context_in_dim)`;
        txt_ids `(B, L_txt, 3)`; timesteps `(B,)` sigma in 0..1, fp32; y `(B, vec_in_dim)`; guidance `(B,)`, read by
        models that embed it, left out when None (what a conditioning without guidance means, 3.5, is the caller's to
        say); attn_mask broadcastable to `(B, H, L, L)` with text first.
        Returns `(B, L_img, out_channels)` in img's dtype.
        """
        return self.forward_orig(img, img_ids, txt, txt_ids, timesteps, y, guidance, attn_mask=attn_mask)

    def forward_orig(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
                     guidance: Tensor | None = None, attn_mask: Tensor | None = None,
                     hooks: BlockHooks | None = None) -> Tensor:
        """BFL's forward by its public name, which other packs replace as a whole."""
        dtype = img.dtype
        img = self.img_in(img)
        table = self.modulations
        entry = None if table is None else table.at(self, (timesteps, y, guidance), dtype)
        vec = self.vec(timesteps, y, guidance, dtype) if entry is None else entry.vec
        txt = self.txt_in(txt)
        if hooks is not None:
            img, txt, img_ids, txt_ids = hooks.before(img, txt, img_ids, txt_ids)
        pe = self.positions(txt_ids, img_ids)
        for i, block in enumerate(self.double_blocks):
            block = informed(block, entry)
            if hooks is None:
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)
            else:
                img, txt = hooks.double(i, block, img, txt, vec, pe, attn_mask)
        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            block = informed(block, entry)
            if hooks is None:
                x = block(x, vec=vec, pe=pe, attn_mask=attn_mask)
            else:
                x = hooks.single(i, block, x, txt.shape[1], vec, pe, attn_mask)
        out: Tensor = informed(self.final_layer, entry)(x[:, txt.shape[1]:], vec)
        return out

    def positions(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """The rotation table of these ids, kept while a run hands over the same two tensors step after step.

        Told by identity: comparing values would make the device wait at every step.
        """
        if self._table is None or self._table[0] is not txt_ids or self._table[1] is not img_ids:
            self._table = (txt_ids, img_ids, self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1)))
        return self._table[2]

    def vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The modulation vector `(B, hidden)` from time, guidance and pooled text."""
        dim = self.spec.frequency_dim
        vec: Tensor = self.time_in(timestep_embedding(timesteps.float(), dim).to(dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance.to(dtype), dim))
        vec = vec + self.vector_in(y.to(dtype))
        return vec
