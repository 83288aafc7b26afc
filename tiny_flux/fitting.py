"""The loop that trains a few parameters beside weights that rest: LoRAs, the eye of Redux."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, autocast, nn

log = logging.getLogger(__name__)


def fit(learned: Iterable[nn.Parameter], steps: int, rate: float, loss_of: Callable[[], Tensor],
        decay: float = 0.0) -> None:
    """AdamW; the rate rises over the first steps and falls over the last half."""
    parameters = list(learned)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.97), weight_decay=decay)
    began, running = time.time(), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50, (1 - step / steps) / 0.5)
        with autocast("cpu", torch.bfloat16):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            log.info("step %d loss %.4f (%.0f s)", step + 1, running / 100, time.time() - began)
            running = 0.0
