"""Layers that hold packed weights, put in place of plain ones after a model is built: models know nothing of them.

The packed bytes are the parameter `weight` `(rows, row_bytes)` uint8, `bias` stands beside it, and `in_features`,
`out_features`, `num_embeddings` and `embedding_dim` count weights, as in torch's layers. A tile of rows is unpacked
into one buffer, used, and overwritten by the next, so a layer needs its bytes, that buffer and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NotFinite
from .formats import QuantFormat, rows_of

LINEAR_TILE_WEIGHTS = 1 << 21
"""Weights of a CPU's product at once: enough rows for its full speed, few enough for the cache. Other devices: all."""
SCALE = "scale_weight"


class Cache(Protocol):
    """Where a layer may find its weight unpacked (`cache.UnpackedCache`)."""

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor | None: ...


class _Packed(nn.Module):
    """What both layers share. `scale_weight`, if the file has scales, is fp32 and as in `QuantFormat.dequantize`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale_weight: nn.Parameter | None

    def __init__(self, format: QuantFormat, rows: int, width: int, scale: tuple[int, ...] | None,
                 device: torch.device | str | None) -> None:
        super().__init__()
        self.format = format
        self.doubt: tuple[str, str | None] | None = None
        """Message and file of the error to raise if a scale turns out to be no finite number; None once that is known
        not to be so."""
        self.cache: Cache | None = None
        self.register_parameter("weight", _fixed((rows, format.row_bytes(width)), torch.uint8, device))
        self.register_parameter(SCALE, None if scale is None else _fixed(scale, torch.float32, device))

    def unpacked(self, rows: slice | Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """These rows of the weight, `(rows, width)` in `dtype`; `out`: where they may be put."""
        whole = None if self.cache is None else self.cache.weight(self, dtype)
        return self.unpack(rows, dtype, out) if whole is None else whole[rows]

    def unpack(self, rows: slice | Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`unpacked`, anew; `out` as in `QuantFormat.dequantize`."""
        scale, packed = self.scale_weight, self.weight[rows]
        if self.doubt is not None:
            self.check(packed if isinstance(rows, Tensor) else self.weight, whole=isinstance(rows, slice))
        return self.format.dequantize(packed, dtype, out=out,
                                      scale=None if scale is None else rows_of(scale, rows))

    def check(self, packed: Tensor, whole: bool = True) -> None:
        """Raises `NotFinite` if a scale in `packed`, all or part of the bytes, is NaN or infinite. Looks until it has
        seen the whole weight once."""
        if self.doubt is not None and not packed.is_meta:
            if not self.format.is_finite(packed):
                message, file = self.doubt
                raise NotFinite(message, file=file)
            if whole:
                self.doubt = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves, and casts all but the scales: half a scale's digits would be an error of every weight."""
        exact = None if self.scale_weight is None else self.scale_weight.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.scale_weight is not None and self.scale_weight.dtype != exact.dtype:
            self.scale_weight.data = exact.to(self.scale_weight.device)
        return self

    def extra_repr(self) -> str:
        rows, width = self.weight.shape[0], self.format.width(self.weight.shape[1])
        return f"{rows} x {width}, {self.format.name}"


def _fixed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(_Packed):
    """`x @ weight.T + bias` in the dtype of `x`.

    The result is that of unpacking the weight whole: each output is the same sum of products, so any difference comes
    from the order in which a product of another size adds them, at most `2 * in_features` roundings of the sum.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, format: QuantFormat,
                 scale: tuple[int, ...] | None = None, device: torch.device | str | None = None) -> None:
        super().__init__(format, out_features, in_features, scale, device)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", _fixed((out_features,), torch.float32, device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        step = self.out_features if x.device.type != "cpu" else max(1, LINEAR_TILE_WEIGHTS // self.in_features)
        if step >= self.out_features:
            return F.linear(x, self.unpacked(slice(None), x.dtype), bias)
        tokens = x.reshape(-1, self.in_features)
        out = torch.empty(tokens.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        buffer = torch.empty(step, self.in_features, dtype=x.dtype, device=x.device)
        for first in range(0, self.out_features, step):
            rows = slice(first, min(first + step, self.out_features))
            weight = self.unpacked(rows, x.dtype, buffer[:rows.stop - first])
            out[:, rows] = F.linear(tokens, weight, None if bias is None else bias[rows])
        return out.view(*x.shape[:-1], self.out_features)


class Embedding(_Packed):
    """Looks rows up and unpacks only these, in `dtype`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, format: QuantFormat,
                 dtype: torch.dtype = torch.float32, scale: tuple[int, ...] | None = None,
                 device: torch.device | str | None = None) -> None:
        super().__init__(format, num_embeddings, embedding_dim, scale, device)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Integers `(...)` -> `(..., embedding_dim)`."""
        return self.unpacked(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)


class PackedOps(Protocol):
    """A host's namespace of packed layers, with the signatures of those here."""

    Linear: Any
    Embedding: Any


class PlainPackedOps:
    Linear = Linear
    Embedding = Embedding


PACKED: PackedOps = PlainPackedOps()


def packed_like(layer: nn.Module, format: QuantFormat, scale: tuple[int, ...] | None, dtype: torch.dtype,
                ops: PackedOps = PACKED) -> nn.Module | None:
    """A packed layer on the meta device in place of `layer`, or None where there is none of its kind.

    `scale`: shape of the scales, None without; `dtype`: what an embedding gives.
    """
    if isinstance(layer, nn.Linear):
        made: nn.Module = ops.Linear(layer.in_features, layer.out_features, layer.bias is not None, format=format,
                                     scale=scale, device="meta")
        return made
    if isinstance(layer, nn.Embedding):
        made = ops.Embedding(layer.num_embeddings, layer.embedding_dim, format=format, dtype=dtype, scale=scale,
                             device="meta")
        return made
    return None
