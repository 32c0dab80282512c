"""What happens beside the training: the last checkpoint, and what is shown."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, RichProgressBar
from torch import Tensor

from facecls.files import replacing

SAVE_EVERY = timedelta(minutes=10)
"""How much work a killed run loses at most."""


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run: the logger's, or the root where there is no logger.

    The first of several processes decides, so all of them have to ask together once they have met.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: after every epoch, every ten minutes within one, near its end, and on Ctrl-C.

    Near its end is one batch before the validation: a checkpoint of the last batch, or of the validation, would make
    Lightning skip that validation when it is resumed, and during it model and average are swapped.

    A ``Checkpoint``, since Lightning calls those after all other callbacks and in the order of their list: behind the
    one that keeps the best, it saves what that one has just learned.

    Of several processes the first saves, without asking the others as ``Trainer.save_checkpoint`` does: they go by
    other clocks, and on Ctrl-C they do not answer any more.

    Attributes:
        path: Where; ``None`` before the training.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._saved = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learns the folder while all processes are there."""
        if stage == "fit":
            self.path = run_folder(trainer) / "checkpoints" / "last.ckpt"

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run or not trainer.global_step or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        assert self.path is not None, "setup comes first"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), part)
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time, or one batch is left."""
        left = trainer.num_training_batches - 1 - batch_idx
        if left == 1 or (left > 1 and time.monotonic() - self._saved > SAVE_EVERY.total_seconds()):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves on Ctrl-C between the first batch of an epoch and the last."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if isinstance(exception, KeyboardInterrupt) and trainer.training and not last:
            self._save(trainer)


class Progress(RichProgressBar):
    """Lightning's progress bar, with a line of its own for each epoch that stays on the screen."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands beside the bar: the training loss alone."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name == "loss"}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the epoch before reached; at its end the module had not logged its training metrics yet."""
        self._show_epoch(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the last epoch reached."""
        self._show_epoch(trainer)
        super().on_train_end(trainer, pl_module)

    def _show_epoch(self, trainer: pl.Trainer) -> None:
        if self.progress is not None and "train/loss" in trainer.callback_metrics:
            self.progress.console.print(epoch_line(trainer), highlight=False)


def epoch_line(trainer: pl.Trainer) -> str:
    """What the epochs so far reached, such as ``epoch 3/5: loss 2.310, val 2.251, gender 93.1%, ...``."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shown = {
        "train/loss": "loss {:.3f}",
        "val/loss": "val {:.3f}",
        "val/gender/accuracy": "gender {:.1%}",
        "val/race/accuracy": "race {:.1%}",
        "val/age/mae_years": "age {:.2f} years off",
    }
    parts = [text.format(values[name]) for name, text in shown.items() if name in values]
    return f"epoch {trainer.current_epoch}/{trainer.max_epochs}: {', '.join(parts)}"


Weights = tuple[Tensor, ...] | list[Tensor]
"""As torch has them where it works on many at once."""


class Average:
    """The rule of an exponential moving average, as ``WeightAveraging`` takes it.

    Its memory grows with the number of steps, as TensorFlow's ``ExponentialMovingAverage`` has it with ``num_updates``,
    so that a short run is not mostly its first weights.

    Attributes:
        decay: Share of the average that a step leaves, at most.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: Weights, currents: Weights, averaged: Tensor | int) -> None:
        """One step of the averages, in place; what equals its average, as all that is frozen does, stays as it is.

        Args:
            averages: The averages so far, all of one dtype.
            currents: The weights now, of the same shapes.
            averaged: How many steps are in the averages.
        """
        count = int(averaged)
        share = 1 - min(self.decay, (1 + count) / (10 + count))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, share)  # together, as each by itself costs a GPU more to start
        else:
            for average, current in zip(averages, currents, strict=True):  # BatchNorm's counts of batches
                average.copy_(average + share * (current - average))
