"""What a training shows while it runs: a progress bar on a terminal, lines of text elsewhere."""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

from facecls.console import console

LINE_EVERY = 30.0
"""Seconds between two lines of text."""
_METRICS = {
    "accuracy": "{task} {value:.1%}",
    "mae_years": "{task} {value:.2f} years off",
    "band_accuracy": "{task} {value:.1%} in range",
}
"""Metrics of a validation that the line of an epoch shows."""


def create_progress() -> ProgressBar:
    """A progress bar if stdout is a terminal or a notebook, else lines of text."""
    out = console()
    return BarProgress() if out.is_terminal or out.is_jupyter else LineProgress()


class BarProgress(RichProgressBar):
    """Lightning's progress bar, and a line for each epoch that stays on the screen."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Only the training loss is shown beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name == "loss"}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the previous epoch, whose training metrics are logged after all callbacks have ended."""
        self._print_epoch(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the last epoch."""
        self._print_epoch(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _print_epoch(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.progress is not None and "train/loss" in trainer.callback_metrics:
            line = epoch_line(trainer, pl_module.model.tasks)
            self.progress.console.print(line, highlight=False, soft_wrap=True)


class LineProgress(ProgressBar):
    """Every 30 seconds a line of plain text with step, rate, loss and time left, and a line for each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._last_line = 0.0
        self._first_step, self._started = 0, 0.0
        self._faces, self._counted_since = 0, 0.0

    def disable(self) -> None:
        """Called by Lightning in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._last_line = self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the previous epoch; the rate is that of training alone, without validation."""
        self._print_epoch(trainer, pl_module)
        self._restart_count()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints a line if it is time."""
        self._faces += len(batch["index"]) * trainer.world_size
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY:
            return
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        parts = [f"step {step:,}/{steps:,}", f"{self._faces / (now - self._counted_since):,.0f} faces/s"]
        parts.append(f"loss {float(trainer.progress_bar_metrics['loss']):.3f}")
        if step > self._first_step:
            left = (now - self._started) / (step - self._first_step) * (steps - step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        self._print(", ".join(parts))
        self._last_line = now
        self._restart_count()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line of the last epoch."""
        self._print_epoch(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._last_line = self._started = time.monotonic()

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
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            batches = int(sum(trainer.num_test_batches))
            left = (now - self._started) / (batch_idx + 1) * (batches - batch_idx - 1)
            self._print(f"test batch {batch_idx + 1:,}/{batches:,}, {timedelta(seconds=round(left))} left")
            self._last_line = now

    def _restart_count(self) -> None:
        self._faces, self._counted_since = 0, time.monotonic()

    def _print_epoch(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self._print(epoch_line(trainer, pl_module.model.tasks))

    def _print(self, line: str) -> None:
        if self._enabled:
            print(line, flush=True)


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
