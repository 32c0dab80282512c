"""Training callbacks: the last checkpoint, settings after a resume, the average of the weights."""

import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from facecls.compat import create_checkpoint, set_place
from facecls.console import console
from facecls.errors import UserError, uninterrupted
from facecls.model.module import FaceModule
from facecls.run import LAST_CHECKPOINT, set_results_aside
from facecls.training.checkpoint_options import check_state
from facecls.training.processes import is_lost

SAVE_EVERY = timedelta(minutes=10)
"""How much work a killed run loses at most."""


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run: the logger's, or the root folder without a logger.

    A collective call: the first process chooses the folder, so all processes must call this together.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` after every epoch, every ten minutes within one, one batch before its end, and if stopped.

    Lightning's ``ModelCheckpoint`` can't replace it:

    - A checkpoint of the last batch of an epoch, or of its validation, makes Lightning skip that validation when the
      run is resumed, and during validation the model and its average are swapped. So the save comes one batch before.
    - It saves by ``Trainer.save_checkpoint``, for which all processes must meet. Their clocks differ, and after Ctrl-C
      the others do not answer. Here the first process saves alone.

    Ctrl-C and SIGTERM wait for the end of a batch. Within one, BatchNorms may have seen faces that the step has not
    counted yet, or weights have moved and their average not, and the resumed run would do that a second time. (Between
    the batches of one step, with accumulated gradients, BatchNorms do see them twice.)

    It is a ``Checkpoint`` because Lightning runs those after all other callbacks, in the order of their list: after the
    ``ModelCheckpoint`` of the best epoch, whose state is part of what is saved.

    Attributes:
        path: The file; ``None`` before training.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._saved = time.monotonic()
        self._batch = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Determines the path, which all processes must do together."""
        if stage == "fit":
            self.path = run_folder(trainer) / LAST_CHECKPOINT

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run or not trainer.global_step or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        assert self.path is not None, "setup comes first"
        trainer.strategy.save_checkpoint(create_checkpoint(trainer), self.path)
        self._saved = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lets interruptions wait."""
        self._batch.enter_context(uninterrupted())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if ten minutes have passed or one batch is left.

        Raises:
            KeyboardInterrupt: If an interruption came during the batch.
        """
        left = trainer.num_training_batches - 1 - batch_idx
        if left == 1 or (left > 1 and time.monotonic() - self._saved > SAVE_EVERY.total_seconds()):
            self._save(trainer)
        self._batch.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the finished epoch."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves if the run is stopped, or loses a process, after the first batch of an epoch and before its last."""
        batch = self._batch.pop_all()
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        has_state = isinstance(exception, KeyboardInterrupt) or is_lost(exception)
        try:
            if has_state and trainer.training and not last:
                self._save(trainer)
        finally:
            with suppress(KeyboardInterrupt):  # the run is ending, by the exception, which is what is to be told
                batch.close()


class ResumeSettings(pl.Callback):
    """Makes a resumed run follow its own options; Lightning restores those of the run that saved the checkpoint."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continues at the place in the epoch that the datamodule has found, whatever the batches were before.

        Without averaging, continues from the weights themselves: ``state_dict`` is their average.

        Args:
            trainer: The trainer, which has loaded ``state_dict``, and the state of the datamodule.
            pl_module: The module.
            checkpoint: Contents of the checkpoint.

        Raises:
            UserError: If it has weights alone, or a state of other kinds, or the end of the training lies before it.
        """
        check_state(checkpoint)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        epoch, batch = data.resumed_at
        self._check_end(trainer, epoch, checkpoint["global_step"])
        set_place(checkpoint, epoch, batch)
        assert isinstance(pl_module, FaceModule)
        pl_module.resume_at(epoch, batch, checkpoint["global_step"])
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not averages and "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"])

    @staticmethod
    def _check_end(trainer: pl.Trainer, epochs: int, steps: int) -> None:
        """Refuses to resume beyond the end, and says so at the end."""
        for name, done, end in (("epochs", epochs, trainer.max_epochs), ("steps", steps, trainer.max_steps)):
            if end is None or end == -1 or done < end:
                continue
            if done > end:
                raise UserError(
                    f"Expected trainer.max_{name} of {done} or more, since so many {name} of the run are done, but "
                    f"got {end}; raise it, or see facecls.evaluate for a test alone."
                )
            console(quiet=not trainer.is_global_zero).print(
                f"nothing is left to train: {done:,} of {end:,} {name} are done"
            )

    @staticmethod
    def _set_results_aside(trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run and (aside := set_results_aside(folder)):  # type: ignore[attr-defined]
            console().print(f"results of the run before it was resumed are now called {', '.join(aside)}")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets results aside that the test's would replace: of a finished run in which nothing was left to train."""
        self._set_results_aside(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the configured weight decay and so on of each parameter group, and the learning rate of this place.

        Comes before the module's own hook, which freezes layers that ``configure_optimizers`` unfreezes.
        """
        if trainer.ckpt_path is None:
            return
        self._set_results_aside(trainer)  # only now, since what was refused before leaves the run as it was
        assert isinstance(pl_module, FaceModule)
        scheduler, settings = pl_module.lr_schedulers(), pl_module.configure_optimizers()
        assert isinstance(scheduler, LambdaLR), "FaceModule has one"
        factor = pl_module.course.factor(pl_module.schedule, pl_module.course.start)
        for group, configured in zip(scheduler.optimizer.param_groups, settings["optimizer"].param_groups, strict=True):
            group |= {name: value for name, value in configured.items() if name != "params"}
            group["lr"] = configured["initial_lr"] * factor
            if group.get("fused"):
                # it counts steps on the parameters' device, while the optimizer that saved them may have on the CPU
                for parameter in group["params"]:
                    if "step" in (state := scheduler.optimizer.state.get(parameter, {})):
                        state["step"] = state["step"].to(parameter.device)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        rates = [group["lr"] for group in groups]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": pl_module.course.start, "_last_lr": rates})


Weights = tuple[Tensor, ...] | list[Tensor]
"""As torch's ``AveragedModel`` hands them to its ``multi_avg_fn``."""


class ExponentialAverage:
    """The update rule of an exponential moving average with warm-up, for ``WeightAveraging``.

    The decay grows with the number of steps, as in TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, so
    that the average of a short run does not consist mostly of its first weights.

    Attributes:
        decay: The highest share of the average that a step retains, 0..1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: Weights, currents: Weights, averaged: Tensor | int) -> None:
        """Updates the averages in place; an average that equals its weight, as of frozen layers, keeps its bits.

        Args:
            averages: The averages so far, all of one dtype.
            currents: The weights, of the same shapes.
            averaged: How many steps are in the averages.
        """
        steps = int(averaged)
        decay = min(self.decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point():
            if currents[0].dtype != averages[0].dtype:
                # Lightning copies the module before it converts it, as precision 64-true and bf16-true do
                currents = [current.to(averages[0].dtype) for current in currents]
            get_ema_multi_avg_fn(decay)(averages, currents, steps)  # type: ignore[no-untyped-call]
        else:
            for average, current in zip(averages, currents, strict=True):  # BatchNorm's counts of batches
                # torch's rule truncates decay * n + (1 - decay) * n, which may be below n
                average.copy_(average + (1 - decay) * (current - average))
