"""Stops a training at the first loss that is not finite, before it reaches the weights."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from facecls.errors import UserError

_NAMED = 3
"""Faces of the batch that are named."""


class FiniteLoss(pl.Callback):
    """Raises a ``UserError`` for a loss that is NaN or infinite; weights and checkpoints stay as they were."""

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Checks the loss."""
        if torch.isfinite(loss).item():
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        paths = data.faces["path"].iloc[self._batch["index"].cpu().numpy()].tolist()
        more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
        raise UserError(
            f"Expected a finite loss, but that of step {trainer.global_step + 1:,} is {float(loss):g} (faces "
            f"{', '.join(paths[:_NAMED])}{more}); lower the learning rate, set trainer.gradient_clip_val to 1, or use "
            "--trainer.precision 32-true."
        )
