"""The memory of the workers, the arithmetic of a forward pass, the peak of the device, and when this process began."""

import copy
import multiprocessing
import os
import time
from collections.abc import Collection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from facecls.bench.clock import Clock
from facecls.model.network import FaceModel

_MIB = 2**20


class Memory(NamedTuple):
    """Memory of the worker processes, in MiB.

    Attributes:
        private_mib: By worker, what no other process shares.
        shared_mib: By worker, its part of what it shares (PSS less private).
    """

    private_mib: list[float]
    shared_mib: list[float]


def memory_of_workers(others: Collection[BaseProcess]) -> Memory | None:
    """Reads the memory of the worker processes from ``/proc``.

    Args:
        others: Child processes that are not workers.

    Returns:
        The memory; ``None`` on systems other than Linux.
    """
    memory = Memory([], [])
    for child in set(multiprocessing.active_children()).difference(others):
        rollup = Path(f"/proc/{child.pid}/smaps_rollup")
        if not rollup.exists():
            return None
        fields = {
            line.split(":")[0]: int(line.split()[1]) * 1024 / _MIB
            for line in rollup.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.endswith(" kB")
        }
        private = fields["Private_Clean"] + fields["Private_Dirty"]
        memory.private_mib.append(round(private, 1))
        memory.shared_mib.append(round(fields["Pss"] - private, 1))
    return memory


def process_start() -> float | None:
    """When this process was started, in seconds as by ``time.time``; ``None`` on systems other than Linux."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not stat.exists() or not uptime.exists():
        return None
    ticks = int(
        stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    )  # proc(5), field 22: since the system booted
    return time.time() - float(uptime.read_text(encoding="utf-8").split()[0]) + ticks / os.sysconf("SC_CLK_TCK")


def forward_flops(model: FaceModel, size: int) -> float:
    """Counts the floating point operations of one face's forward pass; a multiply-add counts as two.

    Args:
        model: Trunk and heads.
        size: Side of the images in pixels.

    Returns:
        The number of operations.
    """
    counted = copy.deepcopy(model).cpu().float().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        counted(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    return float(counter.get_total_flops()) / 2


def peak_flops(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Measures the floating point operations per second of a device, in products of square matrices.

    Args:
        device: The device.
        dtype: Type of the matrices.
        clock: Used to synchronise.

    Returns:
        The highest of eight measurements.
    """
    size = 8192 if device.type == "cuda" else 2048
    one = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        clock.synchronize()
        started = time.perf_counter()
        one @ one
        clock.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
