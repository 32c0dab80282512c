"""The real loop, fed in turns by its loader and by a batch that lies on the device, beside a bare loop of torch."""

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
from facecls.data.tasks import MISSING, TASKS
from facecls.model.module import Batch, FaceModule
from facecls.model.schedule import freeze
from facecls.training.tensorboard import StudyBoard

TOGETHER, STEP, BARE = "together", "step", "bare"
"""The loop as it is; the same on a batch that lies on the device; forward, backward and optimizer in plain torch."""
T = TypeVar("T")
_WARM = 2
"""Batches before anything is timed: the first one allocates and chooses algorithms."""


class Turns:
    """A loader whose batches come in turns from another one and from the device, and which times what is done to them.

    A block is as many batches as take ``seconds``. Of those from the loader the first ones, which its workers had ready
    while the others were running, are not counted where there are enough of them.

    Nothing is prepared before the first step but what every fit prepares, so that ``first`` is true of them.

    Args:
        loader: The real one; its first batch is kept on the device.
        device: Where the trainer computes.
        create_bare: Gives what does to a resident batch what a plain loop does.
        clock: Keeps the times.
        seconds: How long a block takes.
        others: Processes that are not the loader's workers.

    Attributes:
        first: When the first step began, as ``time.time`` has it.
        memory: What the loader's workers hold after the first batches; ``None`` without any.
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
        self.first = 0.0
        self.memory: Memory | None = None

    def __len__(self) -> int:
        """More than will be asked for; it ends when all is timed."""
        return 10**9

    def __iter__(self) -> Iterator[Batch]:
        """The batches; what is done to one has been done when the next is asked for."""
        fresh = endless(self.loader)
        batch = next(fresh)
        self.first = time.time()
        for _ in range(_WARM):
            started = time.perf_counter()
            yield batch
            self.clock.synchronize()
            took = time.perf_counter() - started
        self.memory = memory_of_workers(self.others)
        resident = {name: value.to(self.device) for name, value in batch.items()}
        bare = self.create_bare()
        bare(resident)
        count = max(1, round(self.seconds / took))
        ready = self.loader.num_workers * (self.loader.prefetch_factor or 0)
        faces = len(resident["index"])
        for turn in range(ROUNDS):
            for kind in (TOGETHER, STEP, BARE)[turn:] + (TOGETHER, STEP, BARE)[:turn]:
                if kind == TOGETHER and count > 2 * ready:
                    for _ in range(ready):
                        yield next(fresh)
                with self.clock.block(kind, count * faces):
                    for _ in range(count):
                        if kind == BARE:
                            bare(resident)
                        else:
                            yield next(fresh) if kind == TOGETHER else resident


def endless(items: Iterable[T]) -> Iterator[T]:
    """All items, again and again."""
    while True:
        yield from items


def time_training(
    trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, clock: Clock, seconds: float
) -> Turns:
    """Times the training loop, its step and the bare loop.

    Args:
        trainer: Of one epoch, without validation.
        module: The module.
        data: After its ``setup``.
        clock: Keeps the times.
        seconds: How long a block takes.

    Returns:
        What was fed to it.
    """
    # what comes after a validation or every ten minutes is no part of the loop
    rare = (Checkpoint, StudyBoard)
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, rare)]  # type: ignore[attr-defined]
    others, loader = multiprocessing.active_children(), data.train_dataloader()
    device = trainer.strategy.root_device
    turns = Turns(loader, device, partial(BareTraining, trainer, module), clock, seconds, others)
    trainer.fit(module, turns, data.val_dataloader())  # of which no batch is asked for; without any, Lightning warns
    return turns


def time_evaluation(
    trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, clock: Clock, seconds: float
) -> None:
    """Times the validation loop, its step and the bare loop, as ``time_training`` does with training."""
    trainer.limit_val_batches = 1.0
    device = trainer.strategy.root_device

    def bare(batch: Batch) -> None:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            module.model(batch["image"])

    turns = Turns(data.val_dataloader(), device, lambda: bare, clock, seconds)
    trainer.validate(module, dataloaders=turns, verbose=False)


class BareTraining:
    """What a loop in plain torch does to a batch: forward, cross-entropies, backward, optimizer, and no more.

    Args:
        trainer: Says where and in which precision.
        module: Its model, which the training has begun with, is copied, and frozen as in its first epoch.
    """

    def __init__(self, trainer: pl.Trainer, module: FaceModule) -> None:
        self.model = copy.deepcopy(module.model).to(trainer.strategy.root_device).train()
        for norm in freeze(self.model.trunk.net, module.schedule, 0):
            norm.eval()
        self.optimizer: Any = module.optimizer(self.model.parameters())
        self.autocast = trainer.precision_plugin.forward_context

    def __call__(self, batch: Batch) -> None:
        """Takes a step with a batch that lies on the device."""
        with self.autocast():
            logits = self.model(batch["image"])
            losses = [
                F.cross_entropy(logits[task], batch[task], ignore_index=MISSING)
                if logits[task].shape[1] > 1
                else logits[task].mean()
                for task in TASKS
                if task in logits
            ]
            loss: Any = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
