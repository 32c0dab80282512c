"""Progress of a training run: a bar on a terminal, lines of text elsewhere."""

import time
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

from facecls.console import LINE_EVERY, shows_bars, time_left
from facecls.terminal import printable

_METRICS = {
    "accuracy": "{task} {value:.1%}",
    "mae_years": "{task} {value:.2f} years off",
    "band_accuracy": "{task} {value:.1%} in range",
}
"""Metrics of a validation that the line of an epoch shows."""


def create_progress() -> ProgressBar:
    """A progress bar if stdout is a terminal or a notebook, else lines of text."""
    return BarProgress() if shows_bars() else LineProgress()


class _EpochLines(ProgressBar):
    """Prints a line for each epoch, which stays on the screen."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the previous epoch, whose training metrics are logged after all callbacks have ended."""
        self._print_epoch(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the last epoch."""
        self._print_epoch(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _print_epoch(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self._print_line(epoch_line(trainer, pl_module.model.tasks))

    def _print_line(self, line: str) -> None:
        raise NotImplementedError


class BarProgress(_EpochLines, RichProgressBar):
    """Lightning's progress bar, with the training loss beside it."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Only the training loss is shown beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name == "loss"}

    def _print_line(self, line: str) -> None:
        if self.progress is not None:
            self.progress.console.print(printable(line), highlight=False, soft_wrap=True, markup=False, emoji=False)


class LineProgress(_EpochLines):
    """Every 30 seconds a line of plain text: step, rate, loss and time left, or the batch of a validation or test."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._last_line = time.monotonic()
        self._started = self._loop_started = 0.0
        self._first_step = 0
        self._faces, self._counted_since = 0, 0.0

    def disable(self) -> None:
        """Called by Lightning in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._last_line = self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restarts the count of faces: the rate is that of training alone, without validation."""
        super().on_train_epoch_start(trainer, pl_module)
        self._restart_count()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints a line if it is time."""
        self._faces += len(batch["index"]) * trainer.world_size
        if not self._takes_turn():
            return
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        rate = self._faces / (self._last_line - self._counted_since)
        parts = [f"step {step:,}/{steps:,}", f"{rate:,.0f} faces/s"]
        parts.append(f"loss {float(trainer.progress_bar_metrics['loss']):.3f}")
        if step > self._first_step:
            parts.append(time_left(self._started, step - self._first_step, steps - self._first_step))
        self._print_line(", ".join(parts))
        self._restart_count()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the loop; lines stay 30 seconds apart, however short the epochs are."""
        self._loop_started = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints a line if it is time."""
        if not trainer.sanity_checking:
            self._count_batch("validation", batch_idx, trainer.num_val_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._last_line = self._loop_started = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints a line if it is time."""
        self._count_batch("test", batch_idx, trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self.on_test_start(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints a line if it is time; fit predicts to calibrate, and for nothing else."""
        self._count_batch("calibration", batch_idx, trainer.num_predict_batches)

    def _count_batch(self, loop: str, batch_idx: int, batches: Iterable[float]) -> None:
        if self._takes_turn():
            done, total = batch_idx + 1, int(sum(batches))
            self._print_line(f"{loop} batch {done:,}/{total:,}, {time_left(self._loop_started, done, total)}")

    def _takes_turn(self) -> bool:
        """Whether it is time for a line, which the caller must then print."""
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY:
            return False
        self._last_line = now
        return True

    def _restart_count(self) -> None:
        self._faces, self._counted_since = 0, time.monotonic()

    def _print_line(self, line: str) -> None:
        if self._enabled:
            print(printable(line), flush=True)


def epoch_line(trainer: pl.Trainer, tasks: Iterable[str]) -> str:
    """The results of the last epoch, such as ``epoch 3/5: loss 2.310, val 2.251, gender 93.1%, age 4.21 years off``.

    Args:
        trainer: After an epoch.
        tasks: Names of the tasks that are learned.
    """
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = [
        f"{shown} {values[name]:.3f}" for name, shown in (("train/loss", "loss"), ("val/loss", "val")) if name in values
    ]
    for task in tasks:
        for metric, text in _METRICS.items():
            if (name := f"val/{task}/{metric}") in values:
                parts.append(text.format(task=task, value=values[name]))
    return f"epoch {trainer.current_epoch}/{trainer.max_epochs}: {', '.join(parts)}"
