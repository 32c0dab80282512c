"""Times the input pipeline: each stage alone, all stages in one process, one worker, and all workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch

from facecls.bench.clock import ROUNDS, Clock
from facecls.bench.loop import cycle
from facecls.data.datamodule import FacesDataModule, ResumableLoader
from facecls.data.store import decode

READ, DECODE, AUGMENT, COLLATE, WHOLE = "read", "decode", "augment", "collate", "one process"
RESIZE_ALONE = "OpenCV's decoding and resizing alone"
ONE_WORKER, ALL_WORKERS = "one worker", "all workers"
_FACES = 256
"""Faces that the stages are timed on in each round."""


def time_stages(data: FacesDataModule, loader: ResumableLoader, clock: Clock) -> None:
    """Times the stages that make a batch, in this process and on one core.

    Args:
        data: After its ``setup``.
        loader: A loader for training or evaluation; the work of its workers is done in this process.
        clock: Keeps the times.
    """
    dataset: Any = loader.dataset
    batches: Any = cycle(loader.sampler)
    size = (data.image_size, data.image_size)
    with _one_thread():
        for turn in range(ROUNDS + 1):
            timer = clock if turn else Clock()  # the first round warms up
            for _ in range(-(-_FACES // data.batch_size)):
                batch = next(batches)
                count = len(batch.faces)
                with timer.block(WHOLE, count):
                    dataset[batch]
                with timer.block(READ, count):
                    encoded = [dataset.store[face] for face in batch.faces]
                with timer.block(DECODE, count):
                    pixels = [decode(each) for each in encoded]
                with timer.block(AUGMENT, count):
                    images = [dataset.transform(image=each)["image"] for each in pixels]
                with timer.block(COLLATE, count):
                    np.stack(images)
                with timer.block(RESIZE_ALONE, count):
                    for each in encoded:
                        cv2.resize(cv2.imdecode(each, cv2.IMREAD_COLOR_RGB), size, interpolation=cv2.INTER_AREA)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes on one thread, as each worker does."""
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


def time_workers(data: FacesDataModule, create: Callable[[], ResumableLoader], clock: Clock, seconds: float) -> None:
    """Times how fast one worker and all workers make batches, with nothing else running.

    Args:
        data: After its ``setup``.
        create: Creates the loader, with ``data.num_workers`` workers.
        clock: Keeps the times.
        seconds: How long each block takes.
    """
    workers = data.num_workers
    if not workers:
        return
    drains = {ALL_WORKERS: _Drain(create(), seconds)}
    if workers > 1:
        data.num_workers = 1
        drains[ONE_WORKER] = _Drain(create(), seconds)
        data.num_workers = workers
    for _ in range(ROUNDS):
        for name, drain in drains.items():
            drain(name, clock)


class _Drain:
    """Takes batches from a loader as fast as they come; prefetched batches are not counted."""

    def __init__(self, loader: ResumableLoader, seconds: float) -> None:
        self.prefetched = loader.num_workers * (loader.prefetch_factor or 0)
        self.batches = cycle(loader)
        warm_up = Clock()
        self.faces = len(next(self.batches)["index"])
        count = self.prefetched + 2 * loader.num_workers
        with warm_up.block("", count * self.faces):
            for _ in range(count):
                next(self.batches)
        self.count = max(2 * loader.num_workers, round(seconds * warm_up.rates()[""].median / self.faces))

    def __call__(self, name: str, clock: Clock) -> None:
        for _ in range(self.prefetched):
            next(self.batches)
        with clock.block(name, self.count * self.faces):
            for _ in range(self.count):
                next(self.batches)
