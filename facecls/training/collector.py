"""Keeps the predictions of a validation or a test."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from facecls.analysis.predictions import predictions_table
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import TASKS, Task

T = TypeVar("T")


class PredictionCollector(pl.Callback):
    """Keeps what a validation or a test of ``FaceModule`` gives, to be made into a table after it."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.temperatures: dict[Task, float] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts anew."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the estimates of a batch."""
        self._keep(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts together what several processes have kept, in the order of the faces."""
        if trainer.world_size > 1:
            batches = gathered(self.batches)
            whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            order = whole["index"].argsort()
            self.batches = [{name: values[order] for name, values in whole.items()}]

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _start(self, module: Any) -> None:
        self.batches = []
        self.temperatures = dict(zip(TASKS, module.model.temperatures.tolist(), strict=True))

    def _keep(self, outputs: Mapping[str, Tensor]) -> None:
        self.batches.append({name: value.float().cpu() for name, value in outputs.items() if name != "index"})
        self.batches[-1]["index"] = outputs["index"].cpu()

    def faces(self) -> np.ndarray:
        """Which faces were tested: (N,) int64, row numbers of the data's table."""
        return torch.cat([batch["index"] for batch in self.batches]).numpy()

    def table(self, data: FacesDataModule) -> pd.DataFrame:
        """All faces tested, as ``predictions_table`` gives them."""
        names = self.batches[0].keys() - {"index"}
        estimates = {name: torch.cat([batch[name] for batch in self.batches]).numpy() for name in names}
        return predictions_table(data.faces.iloc[self.faces()], estimates, self.temperatures)


def gathered(items: list[T]) -> list[T]:
    """What all processes have, on each of them.

    Args:
        items: What this one has; anything that can be pickled.

    Returns:
        The items of the first process, then those of the second, and so on.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
