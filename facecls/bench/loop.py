"""The real loop, fed in turns by its loader and by a batch that lies on the device, beside a bare loop of torch."""

import copy
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Checkpoint

from facecls.bench.clock import ROUNDS, Clock
from facecls.bench.machine import Memory, memory_of_workers
from facecls.board import StudyBoard
from facecls.data.datamodule import FacesDataModule, ResumableLoader
from facecls.data.labels import MISSING, TASKS
from facecls.model.module import Batch, FaceModule
from facecls.model.schedule import freeze

TOGETHER, STEP, BARE = "together", "step", "bare"
"""The loop as it is; the same on a batch that lies on the device; forward, backward and optimizer in plain torch."""
T = TypeVar("T")
_WARM = 2
"""Batches before anything is timed: the first one allocates and chooses algorithms."""


class Turns:
    """A loader whose batches come in turns from another one and from the device, and which times what is done to them.

    A block is as many batches as take ``seconds``. Of those from the loader the first ones, which its workers had ready
    while the others were running, are not counted where there are enough of them.

    Args:
        loader: The real one.
        resident: A batch on the device, of the same size.
        bare: Does to a resident batch what a plain loop does.
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
        resident: Batch,
        bare: Callable[[Batch], None],
        clock: Clock,
        seconds: float,
        others: Collection[BaseProcess] = (),
    ) -> None:
        self.loader = loader
        self.resident = resident
        self.bare = bare
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
        for _ in range(_WARM):
            batch = next(fresh)
            self.first = self.first or time.time()
            started = time.perf_counter()
            yield batch
            self.clock.synchronize()
        self.memory = memory_of_workers(self.others)
        self.bare(self.resident)
        count = max(1, round(self.seconds / (time.perf_counter() - started)))
        ready = self.loader.num_workers * (self.loader.prefetch_factor or 0)
        faces = len(self.resident["index"])
        for turn in range(ROUNDS):
            for kind in (TOGETHER, STEP, BARE)[turn:] + (TOGETHER, STEP, BARE)[:turn]:
                if kind == TOGETHER and count > 2 * ready:
                    for _ in range(ready):
                        yield next(fresh)
                with self.clock.block(kind, count * faces):
                    for _ in range(count):
                        if kind == BARE:
                            self.bare(self.resident)
                        else:
                            yield next(fresh) if kind == TOGETHER else self.resident


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
    turns = Turns(loader, on_device(trainer, loader), BareTraining(trainer, module), clock, seconds, others)
    trainer.fit(module, turns, data.val_dataloader())  # of which no batch is asked for; without any, Lightning warns
    return turns


def time_evaluation(
    trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, clock: Clock, seconds: float
) -> None:
    """Times the validation loop, its step and the bare loop, as ``time_training`` does with training."""
    trainer.limit_val_batches = 1.0
    loader = data.val_dataloader()
    resident = on_device(trainer, loader)
    model, device = module.model, trainer.strategy.root_device

    def bare(batch: Batch) -> None:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            model.to(device).eval()(batch["image"])

    trainer.validate(module, dataloaders=Turns(loader, resident, bare, clock, seconds), verbose=False)


def on_device(trainer: pl.Trainer, loader: ResumableLoader) -> Batch:
    """The first batch of a loader, where the trainer computes."""
    return {name: value.to(trainer.strategy.root_device) for name, value in next(iter(loader)).items()}


class BareTraining:
    """What a loop in plain torch does to a batch: forward, cross-entropies, backward, optimizer, and no more.

    Args:
        trainer: Says where and in which precision.
        module: Its model is copied, and frozen as in its first epoch.
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
