"""One row per face: its truth, its probabilities, its estimated age and how far that spreads."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from facecls.data.datamodule import FacesDataModule
from facecls.data.labels import CLASSES, TASKS, Task

T = TypeVar("T")
INTERVAL = (0.05, 0.95)
"""Quantiles of the age distribution between which 90 % of its probability lies."""


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


def predictions_table(
    faces: pd.DataFrame, estimates: Mapping[str, np.ndarray], temperatures: Mapping[Task, float]
) -> pd.DataFrame:
    """Puts truth and estimates side by side.

    Args:
        faces: N rows with ``path``, ``sha1``, ``split``, ``gender``, ``race`` and ``age``.
        estimates: ``gender`` (N, 2) and ``race`` (N, 5) probabilities, ``age`` (N,) years and ``age_distribution``
            (N, 117), those that the model has.
        temperatures: By task; the estimates already follow from them.

    Returns:
        N rows with the columns above; per task ``<task>_predicted`` (a code, or years); ``p_<class>`` for each gender
        and race; ``age_low`` and ``age_high``, between which 90 % of the age distribution lies, ``age_low_raw`` and
        ``age_high_raw`` the same before its temperature; ``temperature_<task>``, the same in each row.
    """
    table = faces[["path", "sha1", "split", *TASKS]].reset_index(drop=True)
    for task, names in CLASSES.items():
        if task in estimates:
            table[f"{task}_predicted"] = estimates[task].argmax(1).astype(np.int16)
            for code, name in enumerate(names):
                table[f"p_{name}"] = estimates[task][:, code]
            table[f"temperature_{task}"] = temperatures[task]
    if "age" in estimates:
        table["age_predicted"] = estimates["age"]
    if "age_distribution" in estimates:
        distribution = estimates["age_distribution"]
        table["age_low"], table["age_high"] = age_interval(distribution)
        raw = distribution.astype(np.float64) ** temperatures["age"]
        table["age_low_raw"], table["age_high_raw"] = age_interval(raw)
        table["temperature_age"] = temperatures["age"]
    return table


def age_interval(distribution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ages between which 90 % of each distribution lies.

    Args:
        distribution: (N, 117) shares of the ages 0..116, of any positive sum.

    Returns:
        (N,) and (N,) int16 years: the 5 % and the 95 % quantile.
    """
    cumulated = distribution.cumsum(1, dtype=np.float64)
    cumulated /= cumulated[:, -1:]
    low, high = ((cumulated < share).sum(1).astype(np.int16) for share in INTERVAL)
    return low, high
