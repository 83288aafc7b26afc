"""Memory of the machine: what is free, and the device that weights are moved to."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

RESERVE = 512 << 20
"""Bytes of a GPU left to kernels' workspaces, fragments and the desktop."""
CGROUP = Path("/sys/fs/cgroup")


class Device(Protocol):
    """Where weights go to run; all their memory there is taken through it."""

    torch_device: torch.device
    own_memory: bool
    """False: the device computes in host memory, and weights are used where they are."""

    def free(self) -> int | None:
        """Bytes that can be taken, None if that cannot be told."""

    def take(self, nbytes: int) -> Tensor:
        """uint8 `(nbytes,)` on the device, not initialised. Raises as torch does where there is no room."""

    def give_back(self, buffer: Tensor) -> None:
        """`buffer` is used no more."""

    def settle(self) -> None:
        """Hands what was given back to the system, for allocations of other sizes."""


class TorchDevice:
    """A device of torch."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.own_memory = device.type != "cpu"

    def free(self) -> int | None:
        return device_free(self.torch_device)

    def take(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # a tensor made inside could not be written outside
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def give_back(self, buffer: Tensor) -> None:
        """Nothing: torch frees it with the last view of it."""

    def settle(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.torch_device.type == "mps":
            torch.mps.empty_cache()


def device_free(device: torch.device) -> int | None:
    """Bytes that can be taken on a device, less the reserve; of the host for a CPU. None: it cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, torch.cuda.mem_get_info(device)[0] + unused - RESERVE)
    if device.type == "mps":
        total = device_total(device)
        return None if total is None else max(0, total - torch.mps.driver_allocated_memory() - RESERVE)
    return host_free() if device.type == "cpu" else None


def device_total(device: torch.device) -> int | None:
    """All its memory; None for a CPU and where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):  # since torch 2.5
        return int(torch.mps.recommended_max_memory())
    return None


def host_free(swap: bool = False) -> int | None:
    """Bytes that programs can take without swapping, or with it, within the limit of a container. None: it cannot be
    told."""
    if sys.platform == "win32":
        return _windows_free(swap)
    known = [value for value in (_linux_free(swap), _container_free(swap)) if value is not None]
    return min(known, default=None)


def _linux_free(swap: bool, table: Path = Path("/proc/meminfo")) -> int | None:
    try:
        rows = dict(line.split(":", 1) for line in table.read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    names = ("MemAvailable", "SwapFree") if swap else ("MemAvailable",)
    return sum(int(rows[name].split()[0]) * 1024 for name in names) if rows.keys() >= set(names) else None


def _container_free(swap: bool, folder: Path = CGROUP) -> int | None:
    """What a container's limits leave; pages of files that can be dropped count as free."""
    memory = _left(folder, "memory")
    if memory is None:
        return None
    try:
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    memory += int(pages.get("inactive_file", 0)) + int(pages.get("active_file", 0))
    if swap:
        more = _left(folder, "memory.swap")
        return None if more is None else max(0, memory + more)
    return max(0, memory)


def _left(folder: Path, what: str) -> int | None:
    """Limit less use, None where there is no limit."""
    try:
        limit, used = ((folder / f"{what}.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdecimal() else None


class _MemoryStatus(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong),
                *[(name, ctypes.c_ulonglong) for name in (
                    "total", "available", "total_page", "available_page", "total_virtual", "available_virtual",
                    "extended")]]


def _windows_free(swap: bool) -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    library = getattr(ctypes, "windll", None)
    if library is None or not library.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available_page if swap else status.available)
