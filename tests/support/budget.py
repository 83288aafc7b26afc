"""A device with a byte budget, in host memory: it refuses what does not fit, as a GPU does."""

from __future__ import annotations

import torch
from torch import Tensor


class Budget:
    """`held`, `peak`: bytes taken now and at most; `taken`: sizes in the order they were asked for."""

    own_memory = True
    torch_device = torch.device("cpu")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.held = self.peak = 0
        self.taken: list[int] = []
        self._sizes: dict[int, int] = {}

    def free(self) -> int:
        return self.nbytes - self.held

    def take(self, nbytes: int) -> Tensor:
        if self.held + nbytes > self.nbytes:
            raise torch.OutOfMemoryError(f"out of memory: {nbytes} bytes asked, {self.free()} of {self.nbytes} free")
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        self.taken.append(nbytes)
        with torch.inference_mode(False):
            buffer = torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN in every float: nothing is there by chance
        self._sizes[id(buffer)] = nbytes
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        self.held -= self._sizes.pop(id(buffer))
        buffer.fill_(255)

    def settle(self) -> None:
        """Nothing is cached."""
