"""What happens beside the training: the last checkpoint, and what is shown."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

SAVE_EVERY = timedelta(minutes=10)
"""How much work a killed run loses at most."""


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run: the logger's, or the root where there is no logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def last_checkpoint(trainer: pl.Trainer) -> Path:
    """Where the run keeps its last state."""
    return run_folder(trainer) / "checkpoints" / "last.ckpt"


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt``: after every epoch, every ten minutes within one, before validation, and on Ctrl-C."""

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or not trainer.global_step:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(last_checkpoint(trainer), weights_only=False)
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Saves if it is time."""
        if time.monotonic() - self._saved > SAVE_EVERY.total_seconds():
            self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves: while validation runs, model and average are swapped, and Ctrl-C could not save them."""
        self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves on Ctrl-C during training."""
        if isinstance(exception, KeyboardInterrupt) and trainer.training:
            self._save(trainer)


class Progress(RichProgressBar):
    """Lightning's progress bar, with a line of its own for each validation that stays on the screen."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands beside the bar: the training loss alone."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name == "train/loss"}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the epoch reached."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.progress is not None:
            self.progress.console.print(epoch_line(trainer), highlight=False)


def epoch_line(trainer: pl.Trainer) -> str:
    """What an epoch reached, such as ``epoch 3/5: loss 2.310, val 2.251, gender 93.1%, ...``."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shown = {
        "train/loss": "loss {:.3f}",
        "val/loss": "val {:.3f}",
        "val/gender/accuracy": "gender {:.1%}",
        "val/race/accuracy": "race {:.1%}",
        "val/age/mae_years": "age {:.2f} years off",
    }
    parts = [text.format(values[name]) for name, text in shown.items() if name in values]
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(parts)}"
