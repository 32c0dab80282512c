"""How fast batches are made: each stage alone, all in one process, and by one and by all workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch

from facecls.bench.clock import ROUNDS, Clock
from facecls.bench.loop import endless
from facecls.data.datamodule import FacesDataModule, ResumableLoader
from facecls.data.store import decode

READ, DECODE, AUGMENT, COLLATE, WHOLE = "read", "decode", "augment", "collate", "one process"
RESIZE_ALONE = "OpenCV's decoding and resizing alone"
ONE, ALL = "one worker", "all workers"
_SAMPLE = 256
"""Faces that the stages are timed on in a round."""


def time_stages(data: FacesDataModule, loader: ResumableLoader, clock: Clock) -> None:
    """Times what makes a batch, in this process and on one core.

    Args:
        data: After its ``setup``.
        loader: Of training or evaluation; what its workers do is done here.
        clock: Keeps the times.
    """
    batches: Any = loader.dataset
    plans = endless(loader.sampler)
    size = (data.image_size, data.image_size)
    with _one_thread():
        for turn in range(ROUNDS + 1):
            timer = clock if turn else Clock()  # the first round warms up
            for _ in range(-(-_SAMPLE // data.batch_size)):
                plan: Any = next(plans)
                count = len(plan.faces)
                with timer.block(WHOLE, count):
                    batches[plan]
                with timer.block(READ, count):
                    encoded = [batches.store[face] for face in plan.faces]
                with timer.block(DECODE, count):
                    pixels = [decode(each) for each in encoded]
                with timer.block(AUGMENT, count):
                    images = [batches.transform(image=each)["image"] for each in pixels]
                with timer.block(COLLATE, count):
                    np.stack(images)
                with timer.block(RESIZE_ALONE, count):
                    for each in encoded:
                        cv2.resize(cv2.imdecode(each, cv2.IMREAD_COLOR_RGB), size, interpolation=cv2.INTER_AREA)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As workers compute."""
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


def time_workers(data: FacesDataModule, create: Callable[[], ResumableLoader], clock: Clock, seconds: float) -> None:
    """Times batches as they come from one worker and from all of them, with nothing else to do.

    Args:
        data: After its ``setup``.
        create: Makes the loader, with as many workers as ``data.num_workers`` says.
        clock: Keeps the times.
        seconds: How long each is timed in a round.
    """
    workers = data.num_workers
    if not workers:
        return
    drains = {ALL: _Drain(create(), seconds)}
    if workers > 1:
        data.num_workers = 1
        drains[ONE] = _Drain(create(), seconds)
        data.num_workers = workers
    for _ in range(ROUNDS):
        for name, drain in drains.items():
            drain(name, clock)


class _Drain:
    """Takes batches from a loader as fast as they come; those that were ready before are not counted."""

    def __init__(self, loader: ResumableLoader, seconds: float) -> None:
        self.ready = loader.num_workers * (loader.prefetch_factor or 0)
        self.batches = endless(loader)
        warm = Clock()
        faces = len(next(self.batches)["index"])
        count = self.ready + 2 * loader.num_workers
        with warm.block("", count * faces):
            for _ in range(count):
                next(self.batches)
        self.count = max(2 * loader.num_workers, round(seconds * warm.rates()[""].median / faces))
        self.faces = faces

    def __call__(self, name: str, clock: Clock) -> None:
        for _ in range(self.ready):
            next(self.batches)
        with clock.block(name, self.count * self.faces):
            for _ in range(self.count):
                next(self.batches)
