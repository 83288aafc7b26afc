"""Stored tensors as weights: their numbers, or their packed rows with the scales that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..quant.formats import FORMATS, QuantFormat
from .containers import TensorInfo, torch_dtype
from .keymaps import Source

SCALES = ("scale_weight", "weight_scale")
"""What writers call the number that all weights of a layer are to be multiplied by."""
UNUSED = ("scale_input", "input_scale")
"""Scales of the layer's input for products in fp8; here products are in the dtype of the input, which needs none."""
ALIGNMENT = 4
"""Formats whose blocks are an even number of bytes are read as words of up to so many."""


def beside(name: str, ending: str) -> str:
    """The name of a side tensor: `img_in.weight` -> `img_in.scale_weight`."""
    return f"{name.rpartition('.')[0]}.{ending}"


@dataclass(frozen=True)
class Stored:
    """The tensors of one part by bare name.

    `dtype`: what packed weights become where they cannot stay packed, None: fp32. It also decides about plain fp8,
    which torch holds itself: as stored for None, else packed.
    """

    infos: Mapping[str, TensorInfo]
    dtype: torch.dtype | None

    def scale_name(self, name: str) -> str | None:
        """The name of the tensor's scale, if it has one."""
        names = (beside(name, ending) for ending in SCALES if name.endswith(".weight"))
        return next((found for found in names if found in self.infos), None)

    def scale(self, name: str) -> Tensor | None:
        """Its scale, fp32: `()`, one per row `(rows, 1)` or one per column `(1, width)`."""
        found = self.scale_name(name)
        if found is None:
            return None
        scale = self.infos[found].read().to(torch.float32)
        return scale.reshape(()) if scale.numel() == 1 else scale

    def format(self, name: str) -> QuantFormat | None:
        """The format of a packed tensor, None for numbers that torch holds."""
        info = self.infos[name]
        if torch_dtype(info.format) is None:
            return FORMATS.get(info.format)
        fp8 = info.format in ("F8_E4M3", "F8_E5M2")
        return FORMATS[info.format] if fp8 and (self.dtype is not None or self.scale_name(name)) else None

    def rows(self, name: str) -> Tensor:
        """Packed rows `(rows, row_bytes)` uint8: a view of the file wherever its bytes are aligned as they are read."""
        info, format = self.infos[name], self.format(name)
        raw = info.raw()
        if raw.data_ptr() % ALIGNMENT and (format is None or format.nbytes % 2 == 0):
            raw = raw.clone()
        return raw.view(info.shape[0] if len(info.shape) > 1 else 1, -1)

    def numbers(self, name: str) -> Tensor:
        """The tensor in its own dtype, or a packed one unpacked, with its scale in it."""
        info, format, scale = self.infos[name], self.format(name), self.scale(name)
        if format is not None and info.nbytes:
            return format.dequantize(self.rows(name), self.dtype or torch.float32, scale=scale).view(info.shape)
        found = info.read()
        return found if scale is None else (found.float() * scale).to(self.dtype or torch.float32)

    def dtype_of(self, source: Source) -> torch.dtype:
        """The dtype of `source` as numbers: `dtype`, or, for None, one that holds the numbers of all its tensors."""
        kinds = {self.dtype or self._own_dtype(name) for name in source.names}
        if len(kinds) == 1:
            return kinds.pop()
        # torch promotes no fp8; bf16 and fp16 hold its numbers
        return reduce(torch.promote_types, (torch.bfloat16 if kind.itemsize == 1 else kind for kind in kinds))

    def _own_dtype(self, name: str) -> torch.dtype:
        """What `numbers` gives where no dtype is asked for."""
        found = None if self.format(name) or self.scale_name(name) else torch_dtype(self.infos[name].format)
        return found or torch.float32

    def format_of(self, source: Source) -> QuantFormat | None:
        """The format in which `source` can be put together row by row: that of all its tensors. None if there are
        several, or columns of several tensors have scales of their own."""
        formats = {self.format(name) for name in source.names}
        format = next(iter(formats))
        return format if len(formats) == 1 and (len(source.names) == 1 or not self._has_columns(source)) else None

    def _has_columns(self, source: Source) -> bool:
        scales = (self.scale_name(name) for name in source.names)
        return any(len(self.infos[name].shape) == 2 and self.infos[name].shape[1] > 1 for name in scales if name)

    def scales_of(self, source: Source) -> Tensor | None:
        """The scales of `source`, fp32, as of one tensor; `(rows, 1)` if rows come from several."""
        scales = {name: self.scale(name) for name in source.names}
        if all(scale is None for scale in scales.values()):
            return None
        only = scales[source.names[0]]
        if len(scales) == 1 and only is not None and (only.ndim == 0 or only.shape[0] == 1):
            return only
        each = {name: torch.ones(()) if scale is None else scale for name, scale in scales.items()}
        parts = []
        for piece in source.pieces:
            scale = each[piece.name]
            parts.append(scale[piece.theirs:piece.theirs + piece.rows] if scale.ndim else scale.expand(piece.rows, 1))
        return torch.cat(parts)
