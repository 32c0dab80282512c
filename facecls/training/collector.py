"""Collects the predictions of a validation or a test."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from facecls.analysis.predictions import check_finite, predictions_table
from facecls.data.datamodule import FacesDataModule
from facecls.model.module import FaceModule

T = TypeVar("T")


class PredictionCollector(pl.Callback):
    """Collects the estimates of a validation or a test of ``FaceModule``, from all processes.

    Attributes:
        batches: Outputs of the steps, on the CPU: ``index`` (N,) int64 and the estimates, float32.
        is_test: Whether they are those of a test.
        temperatures: Of each head, by task.
    """

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.is_test = False
        self.temperatures: dict[str, float] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discards what was collected before."""
        assert isinstance(pl_module, FaceModule)
        self.batches, self.is_test = [], bool(trainer.testing)
        self.temperatures = {name: head.temperature.item() for name, head in pl_module.model.heads.items()}

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
        estimates = {name: value.float().cpu() for name, value in outputs.items() if name != "index"}
        self.batches.append({"index": outputs["index"].cpu(), **estimates})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the estimates of all processes, in the order of the faces."""
        if trainer.world_size > 1:
            batches = all_gather(self.batches)
            whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            order = whole["index"].argsort()
            self.batches = [{name: values[order] for name, values in whole.items()}]

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def faces(self) -> npt.NDArray[np.int64]:
        """The faces that were tested: (N,) row numbers of the data's table."""
        return torch.cat([batch["index"] for batch in self.batches]).numpy()

    def table(self, data: FacesDataModule) -> pd.DataFrame:
        """The predictions of all faces that were tested, as ``predictions_table`` returns them.

        Raises:
            UserError: If one is not finite.
        """
        names = self.batches[0].keys() - {"index"}
        estimates = {name: torch.cat([batch[name] for batch in self.batches]).numpy() for name in names}
        faces = data.faces.iloc[self.faces()]
        check_finite(estimates, faces["path"].tolist())
        return predictions_table(faces, estimates, self.temperatures, data.tasks)


def all_gather(items: list[T]) -> list[T]:
    """Gathers lists from all processes.

    Args:
        items: Those of this process; anything that can be pickled.

    Returns:
        The items of the first process, then those of the second, and so on; the same in every process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
