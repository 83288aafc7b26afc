"""How far apart two results are."""

from __future__ import annotations

import torch
from torch import Tensor


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the oracle's."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
