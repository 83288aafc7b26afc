"""Ways to change a layer's output without touching its weight.

A term adds its part to `out`, for tokens `(T, in)` -> `(T, rows)`. It is told the layer's own output without its bias,
`plain` `(T, rows)`, and a way to multiply other inputs by the layer's weight. Strength is a number on the device, `()`,
or one per token, `(T, 1)`; a term reads nothing else that changes between steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import rotations

Product = Callable[[Tensor], Tensor]


class Term(nn.Module):
    """`x` and `out` as above. Tensors are buffers, so that a term moves with its layer, and stand in no state dict."""

    needs_plain = False

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        raise NotImplementedError

    def _keep(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class LowRank(Term):
    """`scale * x @ down^T @ up^T`. Those of all adapters of a layer are run as one (`sidepath`), never one by one."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self._keep(down=down, up=up)  # (r, in), (rows, r)
        self.scale = scale

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        out.addmm_((F.linear(x, self.down.to(x)) * (strength * self.scale)).to(out), self.up.to(out).T)


class Dense(Term):
    """`x @ delta^T`, the change as a matrix: as large as the weight, and a second product of its size."""

    delta: Tensor

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self._keep(delta=delta)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        out.addmm_((x * strength).to(out), self.delta.to(out).T)


class Switched(Dense):
    """The whole of `delta` at any strength but 0: what replaces a weight is not taken by halves."""

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        super().add(out, x, plain, product, (strength != 0).to(strength.dtype))


class Kron(Term):
    """`scale * kron(first, second) @ x`, where `second` may be `up @ second`; the product of both is never formed."""

    first: Tensor
    second: Tensor
    up: Tensor | None

    def __init__(self, first: Tensor, second: Tensor, up: Tensor | None, scale: float) -> None:
        super().__init__()
        self._keep(first=first, second=second, up=up)
        self.scale = scale

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        split = x.unflatten(1, (self.first.shape[1], self.second.shape[1]))   # (T, in1, in2)
        h = F.linear(split, self.second.to(x))                                  # (T, in1, r or out2)
        h = torch.einsum("oi,tir->tor", self.first.to(x), h)
        if self.up is not None:
            h = F.linear(h, self.up.to(x))
        out.add_((h.flatten(1) * (strength * self.scale)).to(out))


class RowScale(Term):
    """`vector` times the layer's output without its bias."""

    needs_plain = True
    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self._keep(vector=vector)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        assert plain is not None
        out.add_((plain * (strength * self.vector)).to(out))


class RotateOutput(Term):
    needs_plain = True
    blocks: Tensor
    rescale: Tensor | None

    def __init__(self, blocks: Tensor, rescale: Tensor | None) -> None:
        super().__init__()
        self._keep(blocks=blocks, rescale=rescale)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        assert plain is not None
        rows = plain.T.to(self.blocks.dtype)
        mixed = strength if strength.ndim == 0 else strength.T
        out.add_(rotations.changed(self.blocks, rows, self.rescale, mixed.to(rows)).T.to(out))


class RotateInput(Term):
    """The layer's product with the turn of its input: a second product of the layer's size."""

    blocks: Tensor

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self._keep(blocks=blocks)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        wide = x.to(self.blocks.dtype)
        out.add_(product(((rotations.inputs(self.blocks, wide) - wide) * strength).to(x)))


class ColumnScale(Term):
    """The layer's product with `vector * x`: a second product of the layer's size."""

    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self._keep(vector=vector)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        out.add_(product((x * (self.vector * strength)).to(x)))


class Bias(Term):
    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self._keep(vector=vector)

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        out.add_((strength * self.vector).to(out))


class SwitchedBias(Bias):
    """The whole of `vector` at any strength but 0."""

    def add(self, out: Tensor, x: Tensor, plain: Tensor | None, product: Product, strength: Tensor) -> None:
        super().add(out, x, plain, product, (strength != 0).to(strength.dtype))
