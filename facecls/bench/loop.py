"""Times Lightning's loop, fed by its loader or by a batch already on the device, against a loop in plain torch."""

import copy
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Checkpoint

from facecls.bench.clock import ROUNDS, Clock
from facecls.bench.machine import Memory, memory_of_workers
from facecls.data.datamodule import FacesDataModule, ResumableLoader
from facecls.data.tasks import MISSING
from facecls.model.module import Batch, FaceModule
from facecls.model.schedule import freeze
from facecls.training.tensorboard import FigureLogger

TOGETHER, STEP, BARE = "together", "step", "bare"
"""Blocks: the whole loop; the loop on a batch already on the device; forward and backward pass and optimizer step in
plain torch on that batch."""
T = TypeVar("T")
_WARM_UP = 2
"""Batches before anything is timed: the first one allocates memory and chooses algorithms."""


class AlternatingLoader:
    """A loader that alternates between fresh batches and one that stays on the device, and times the loop it feeds.

    A block is as many batches as take ``seconds``. The loader's workers prefetch while the other blocks run, so where a
    block is long enough, the prefetched batches come before it and are not timed.

    Before the first step nothing is done that ``facecls.fit`` would not do, so that ``first_step`` holds for it too.

    Args:
        loader: The wrapped loader; its first batch is kept on the device.
        device: Where the trainer computes.
        create_bare: Returns a function that processes a batch on the device as a plain loop does.
        clock: Keeps the times.
        seconds: How long a block takes.
        others: Child processes that are not the loader's workers.

    Attributes:
        first_step: When the first step began, in seconds as by ``time.time``.
        memory: Memory of the loader's workers after the first batches; ``None`` without workers.
    """

    def __init__(
        self,
        loader: ResumableLoader,
        device: torch.device,
        create_bare: Callable[[], Callable[[Batch], None]],
        clock: Clock,
        seconds: float,
        others: Collection[BaseProcess] = (),
    ) -> None:
        self.loader = loader
        self.device = device
        self.create_bare = create_bare
        self.clock = clock
        self.seconds = seconds
        self.others = others
        self.first_step = 0.0
        self.memory: Memory | None = None

    def __len__(self) -> int:
        """More batches than will be used; iteration ends when everything is timed."""
        return 10**9

    def __iter__(self) -> Iterator[Batch]:
        """The batches; the loop has finished a batch when it asks for the next one."""
        fresh = cycle(self.loader)
        batch = next(fresh)
        self.first_step = time.time()
        for _ in range(_WARM_UP):
            started = time.perf_counter()
            yield batch
            self.clock.synchronize()
            took = time.perf_counter() - started
        self.memory = memory_of_workers(self.others)
        resident = {name: value.to(self.device) for name, value in batch.items()}
        bare = self.create_bare()
        bare(resident)
        count = max(1, round(self.seconds / took))
        prefetched = self.loader.num_workers * (self.loader.prefetch_factor or 0)
        faces = len(resident["index"])
        for turn in range(ROUNDS):
            for kind in (TOGETHER, STEP, BARE)[turn:] + (TOGETHER, STEP, BARE)[:turn]:
                if kind == TOGETHER and count > 2 * prefetched:
                    for _ in range(prefetched):
                        yield next(fresh)
                with self.clock.block(kind, count * faces):
                    for _ in range(count):
                        if kind == BARE:
                            bare(resident)
                        else:
                            yield next(fresh) if kind == TOGETHER else resident


def cycle(items: Iterable[T]) -> Iterator[T]:
    """Iterates again and again; unlike ``itertools.cycle`` it keeps no items."""
    while True:
        yield from items


def time_training(
    trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, clock: Clock, seconds: float
) -> AlternatingLoader:
    """Times the training loop, its step and the bare loop.

    Args:
        trainer: A trainer for one epoch, without validation.
        module: The module.
        data: After its ``setup``.
        clock: Keeps the times.
        seconds: How long a block takes.

    Returns:
        The loader, which knows when the first step began and how much memory the workers hold.
    """
    # what happens only after a validation or every ten minutes is no part of the loop
    rare = (Checkpoint, FigureLogger)
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, rare)]  # type: ignore[attr-defined]
    others, loader = multiprocessing.active_children(), data.train_dataloader()
    device = trainer.strategy.root_device
    alternating = AlternatingLoader(loader, device, partial(BareTraining, trainer, module), clock, seconds, others)
    trainer.fit(module, alternating, data.val_dataloader())  # no validation runs, but without a loader Lightning warns
    return alternating


def time_evaluation(
    trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, clock: Clock, seconds: float
) -> None:
    """Times the validation loop, its step and the bare loop, as ``time_training`` does with training."""
    trainer.limit_val_batches = 1.0
    device = trainer.strategy.root_device

    def bare(batch: Batch) -> None:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            module.model(batch["image"])

    alternating = AlternatingLoader(data.val_dataloader(), device, lambda: bare, clock, seconds)
    trainer.validate(module, dataloaders=alternating, verbose=False)


class BareTraining:
    """A training step in plain torch: forward pass, cross-entropies, backward pass, optimizer step, and no more.

    Args:
        trainer: Supplies device and precision.
        module: Its model is copied and frozen as in the first epoch.
    """

    def __init__(self, trainer: pl.Trainer, module: FaceModule) -> None:
        self.model = copy.deepcopy(module.model).to(trainer.strategy.root_device).train()
        for norm in freeze(self.model.trunk.net, module.schedule, 0):
            norm.eval()
        self.optimizer: Any = module.optimizer(self.model.parameters())
        self.autocast = trainer.precision_plugin.forward_context

    def __call__(self, batch: Batch) -> None:
        """Takes a step with a batch that is on the device."""
        with self.autocast():
            logits = self.model(batch["image"])
            losses = [
                F.cross_entropy(logits[name], batch[name], ignore_index=MISSING)
                if head.has_distribution
                else logits[name].mean()
                for name, head in self.model.heads.items()
            ]
            loss: Any = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
