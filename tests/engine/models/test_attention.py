"""Rotary positions and attention against the textbook formulas in float64, on every path that the CPU takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_kit.engine.models import attention as module
from flux_kit.engine.models.attention import apply_rope, attention, rope
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(length: int, dim: int) -> Tensor:
    return rope(torch.arange(length)[None].float() * 3, dim, 10_000).unsqueeze(1)  # (1, 1, L, D/2, 2, 2)


def turned(x: Tensor, length: int) -> Tensor:
    """Channel pairs (2i, 2i+1) at position p turn by p * theta^(-2i/D)."""
    dim = x.shape[-1]
    angle = 3 * torch.arange(length, dtype=torch.float64)[:, None] * 10_000 ** -(torch.arange(0, dim, 2).double() / dim)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)


def textbook(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return float((ours.double() - exact).norm() / exact.norm())


@given(batch=st.integers(1, 3), heads=st.integers(1, 6), length=st.integers(1, 37), pairs=st.integers(1, 9),
       dtype=st.sampled_from(list(TOLERANCE)), grad=st.booleans())
def test_rope(batch: int, heads: int, length: int, pairs: int, dtype: torch.dtype, grad: bool) -> None:
    x = drawn(batch, length, heads, 2 * pairs, seed=1).transpose(1, 2).to(dtype)  # strided, as heads are split
    before = x.clone()
    with torch.set_grad_enabled(grad):
        out = apply_rope(x, table(length, 2 * pairs))
    assert out.dtype == dtype
    assert error(out, turned(x.double(), length)) <= TOLERANCE[dtype]
    assert torch.equal(x, before)


@given(batch=st.integers(1, 2), heads=st.integers(1, 5), length=st.integers(1, 40), with_rope=st.booleans(),
       dtype=st.sampled_from(list(TOLERANCE)), grad=st.booleans(), budget=st.sampled_from([1, 70, 700, 5000, 2**23]))
def test_attention(batch: int, heads: int, length: int, dtype: torch.dtype, with_rope: bool, grad: bool,
                   budget: int) -> None:
    """`budget` scores at a time: single rows, some rows, some heads, everything at once."""
    q, k, v = (drawn(batch, heads, length, 16, seed=i).to(dtype) for i in range(3))
    exact_q, exact_k = (turned(x.double(), length) if with_rope else x.double() for x in (q, k))
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(module, "SCORES", budget)
        out = attention(q, k, v, table(length, 16) if with_rope else None)
    assert out.dtype == dtype
    assert error(out, textbook(exact_q, exact_k, v.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masks(dtype: torch.dtype) -> None:
    q, k, v = (drawn(2, 3, 11, 16, seed=i).to(dtype) for i in range(3))
    keep = torch.arange(11)[None] < torch.tensor([[4], [9]])  # (B, L)
    added = torch.zeros(2, 1, 1, 11, dtype=torch.float64).masked_fill(~keep[:, None, None], -torch.inf)
    exact = textbook(q.double(), k.double(), v.double(), added)
    with torch.no_grad():
        assert error(attention(q, k, v, None, keep[:, None, None]), exact) <= TOLERANCE[dtype]
        assert error(attention(q, k, v, None, added.to(dtype)), exact) <= TOLERANCE[dtype]


@torch.no_grad()
def test_other_number_of_keys() -> None:
    q, k, v = drawn(1, 2, 5, 16, seed=0), drawn(1, 2, 9, 16, seed=1), drawn(1, 2, 9, 16, seed=2)
    for dtype, tolerance in TOLERANCE.items():
        assert error(attention(q.to(dtype), k.to(dtype), v.to(dtype)), textbook(q, k, v)) <= tolerance


@torch.no_grad()
def test_one_table_for_each_of_a_batch() -> None:
    """pe may be `(1, 1, ...)` or hold a row for each of the batch."""
    q, k, v = (drawn(2, 2, 6, 16, seed=i).bfloat16() for i in range(3))
    shared = attention(q, k, v, table(6, 16))
    assert torch.equal(shared, attention(q, k, v, table(6, 16).expand(2, -1, -1, -1, -1, -1)))


def test_gradients_flow_through_rope_and_attention() -> None:
    q, k, v = (drawn(1, 2, 4, 8, seed=i).requires_grad_() for i in range(3))
    attention(q, k, v, table(4, 8).double()).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_positions_far_out_keep_their_digits() -> None:
    """fp32 angles would be off by 1e-3 at position 20,000."""
    far = rope(torch.tensor([[20_000.0]]), 16, 10_000)[0, 0]
    angle = 20_000.0 * 10_000 ** -(torch.arange(0, 16, 2).double() / 16)
    assert torch.equal(far[:, 0, 0], angle.cos().float())
    assert torch.equal(far[:, 1, 0], angle.sin().float())


class OnMps(Tensor):
    """Positions as they are on MPS, whose copy to the CPU cannot widen them on the way (TypeError since torch 1.12)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.double or any(one is torch.float64 for one in (*args, *(kwargs or {}).values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_angles_are_widened_once_they_are_on_the_cpu() -> None:
    positions = torch.arange(7)[None].float()
    on_mps = positions.as_subclass(OnMps)
    with pytest.raises(TypeError):
        on_mps.to("cpu", torch.float64)
    assert torch.equal(rope(on_mps, 8, 10_000), rope(positions, 8, 10_000))
