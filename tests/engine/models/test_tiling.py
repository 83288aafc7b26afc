"""Decoding in strips: equal to decoding whole, and lean. Memory is counted on fake tensors: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import relative
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.tiling import decode_tiled
from flux_kit.engine.specs import FLUX_AE, AutoencoderSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import loaded, on_meta, random_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = AutoencoderSpec(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def small() -> Autoencoder:
    return loaded(on_meta(Autoencoder, SMALL), random_state(on_meta(Autoencoder, SMALL)))


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


@settings(max_examples=25)
@given(height=st.integers(1, 5), width=st.integers(1, 5), batch=st.integers(1, 2), rows=st.integers(1, 41))
def test_equal_to_decoding_whole(small: Autoencoder, height: int, width: int, batch: int, rows: int) -> None:
    z = latents(batch, 16, height, width)
    assert relative(decode_tiled(small, z, rows=rows), small.decode(z)) <= 1e-5


def test_equal_where_halves_of_the_picture_differ(small: Autoencoder) -> None:
    """Statistics of strips differ most here: strips normalised by themselves would be far off."""
    z = latents(1, 16, 8, 3)
    z[:, :, 4:] = z[:, :, 4:] * 0.1 + 3
    whole = small.decode(z)
    assert relative(decode_tiled(small, z, rows=8), whole) <= 1e-5
    apart = torch.cat([small.decode(half) for half in z.split(4, dim=2)], dim=2)
    assert relative(apart, whole) > 1e-2


def test_equal_at_full_width() -> None:
    model = loaded(on_meta(Autoencoder, FLUX_AE), random_state(on_meta(Autoencoder, FLUX_AE)))
    z = latents(1, 16, 9, 4)
    assert relative(decode_tiled(model, z, rows=20), model.decode(z)) <= 1e-5


def test_low_precision(small: Autoencoder) -> None:
    """bf16 in, bf16 out, and no worse than decoding whole in bf16."""
    z = latents(1, 16, 6, 4)
    exact = small.decode(z)
    state = {name: value.bfloat16() for name, value in small.state_dict().items()}
    half = loaded(on_meta(Autoencoder, SMALL), state)
    tiled = decode_tiled(half, z.bfloat16(), rows=10)
    assert tiled.dtype == torch.bfloat16
    assert relative(tiled, exact) <= 1.2 * relative(half.decode(z.bfloat16()), exact)


def test_no_rows_is_refused(small: Autoencoder) -> None:
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        decode_tiled(small, latents(1, 16, 1, 1), rows=0)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def test_live_bytes_counts_what_is_alive() -> None:
    with LiveBytes() as counter:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100) + 1
        del a, b
        c = torch.empty(500, device="meta")
    assert (counter.peak, counter.now) == (8000, 2000)
    del c


def peak_bytes(decode: Any, side: int) -> int:
    with FakeTensorMode():
        model, z = Autoencoder(FLUX_AE), torch.empty(1, 16, side // 8, side // 8)
        with LiveBytes() as counter:
            decode(model, z)
    return counter.peak


def test_half_the_memory_at_2048() -> None:
    whole, tiled = peak_bytes(Autoencoder.decode, 2048), peak_bytes(decode_tiled, 2048)
    assert 10e9 < whole < 15e9, "four maps of the widest level: otherwise the count is wrong"
    assert tiled <= 0.5 * whole
