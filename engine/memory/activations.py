"""Bytes that models need beside their weights while they run, as formulas of picture size, batch and text length.

The factors were measured by counting the tensors alive at full width, on the meta device, with attention that keeps no
scores (as kernels on GPUs do). They lie 0 to 15 % above what was counted, 29 % for pictures of 256 x 256 in fp32;
`tests/engine/memory/test_activations.py` counts again. Workspaces of kernels come out of the device's reserve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.tiling import ROWS
from ..specs import AutoencoderSpec, ClipTextSpec, FluxSpec, SiglipSpec, T5Spec
from .weights import held_dtype

SAMPLE_TENSORS = 20
"""Tensors of (tokens, hidden) alive at once, fp32 copies for RoPE counted by their size."""
LONGEST_TEXT = 512


@dataclass(frozen=True)
class Activations:
    """Bytes of each stage. `strips`: of the decoder where it runs in strips."""

    encode: int
    sample: int
    decode: int
    strips: int


def estimate(flux: FluxSpec, t5: T5Spec, vae: AutoencoderSpec, *, width: int, height: int, batch: int = 1,
             text_tokens: int = LONGEST_TEXT, dtype: torch.dtype = torch.bfloat16) -> Activations:
    """What a picture of `width` x `height` pixels asks of each stage, in a compute dtype.

    Batches are sampled together, and decoded one picture at a time.
    """
    wide = held_dtype("vae", dtype).itemsize
    return Activations(text_bytes(t5, text_tokens, dtype.itemsize),
                       sample_bytes(flux, width, height, batch, text_tokens, dtype.itemsize),
                       decode_bytes(vae, width, height, wide), strip_bytes(vae, width, height, wide))


def text_bytes(spec: T5Spec, tokens: int, itemsize: int, batch: int = 2) -> int:
    """T5; CLIP-L needs far less. `batch` 2: a prompt with weights runs beside the empty one."""
    return itemsize * tokens * (5 * batch * spec.d_ff + spec.num_heads * tokens)


def clip_bytes(spec: ClipTextSpec, itemsize: int, batch: int = 2) -> int:
    tokens = spec.max_position_embeddings
    return itemsize * batch * tokens * (4 * spec.intermediate_size + spec.num_attention_heads * tokens)


def sample_bytes(spec: FluxSpec, width: int, height: int, batch: int, text_tokens: int, itemsize: int) -> int:
    """The transformer, one pass. With cfg the two passes run one after the other."""
    edge = spec.patch_size * 8
    tokens = -(-width // edge) * -(-height // edge) + text_tokens
    latents = 8 * 4 * batch * width * height // 4  # solvers keep a few, 16 channels an eighth of the side, fp32
    return batch * tokens * spec.hidden_size * SAMPLE_TENSORS * itemsize + latents


def decode_bytes(spec: AutoencoderSpec, width: int, height: int, itemsize: int) -> int:
    """The decoder on a whole picture."""
    return 5 * _widest(spec) * itemsize * width * height


def strip_bytes(spec: AutoencoderSpec, width: int, height: int, itemsize: int, rows: int = ROWS) -> int:
    """The decoder in strips: two maps of full size, and the work on one strip."""
    return _widest(spec) * (2 * itemsize * height + rows * (13 + itemsize)) * width


def encode_bytes(spec: AutoencoderSpec, width: int, height: int, itemsize: int) -> int:
    """The encoder on a whole picture."""
    return 3 * spec.ch * itemsize * width * height


def _widest(spec: AutoencoderSpec) -> int:
    """Channels that count at full resolution: half of those that arrive there, if these are more than its own."""
    arriving = spec.ch * spec.ch_mult[min(1, len(spec.ch_mult) - 1)]
    return max(spec.ch * spec.ch_mult[0], arriving // 2)


def vision_bytes(spec: SiglipSpec, itemsize: int) -> int:
    tokens = spec.num_positions
    return itemsize * tokens * (4 * spec.intermediate_size + spec.num_attention_heads * tokens)

