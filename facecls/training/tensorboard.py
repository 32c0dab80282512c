"""The report's figures in TensorBoard during training."""

import time
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger

from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import Tasks, ages, classifications
from facecls.errors import uninterrupted
from facecls.predict.grid import draw, title
from facecls.report import figures
from facecls.training.collector import PredictionCollector

SHARE = 0.02
"""The largest share of training time that drawing may take."""
GALLERY = 24
"""Faces of the gallery, the same in every validation."""
_SECONDS = 2.0
"""Assumed for the first drawing; measured on one core with AVX2, half of it for the gallery."""


class FigureLogger(pl.Callback):
    """Draws the figures of each validation that is the best so far.

    Where epochs are short it skips some, so that drawing takes no more than ``SHARE`` of the time, the last drawing
    included. The best validation is always drawn at the end; in a run of less than three minutes it is the only one.

    Args:
        collector: Comes before this one in the list of callbacks.
    """

    def __init__(self, collector: PredictionCollector) -> None:
        self.collector = collector
        self._began = self._spent = 0.0
        self._longest = _SECONDS
        self._pending: tuple[pd.DataFrame, np.ndarray, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws if the validation is the best so far and there is time."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None or not self.collector.batches or not trainer.is_global_zero:
            return
        # checkpoints are saved after all other callbacks, so this is still the best of the validations before
        best = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
        if best is None or loss < best:
            table = self.collector.table(trainer.datamodule)  # type: ignore[attr-defined]
            self._pending = (table, self.collector.faces()[:GALLERY], trainer.global_step)
        # one drawing now, and one at the end
        if self._spent + 2 * self._longest <= SHARE * (time.monotonic() - self._began):
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the best validation unless that has been done."""
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        if self._pending is None:
            return
        (table, faces, step), self._pending = self._pending, None
        started = time.monotonic()
        data: FacesDataModule = trainer.datamodule  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for tag, figure in create_figures(table, data.tasks):
                    _add(logger, tag, figure, step)
                titles = [_title(row, data.tasks) for row in table[:GALLERY].to_dict("records")]
                gallery = draw([data.picture(face) for face in faces], titles)
                _add(logger, "gallery", gallery, step)
        took = time.monotonic() - started
        self._spent, self._longest = self._spent + took, max(self._longest, took)


def _add(logger: TensorBoardLogger, tag: str, figure: Figure, step: int) -> None:
    with uninterrupted():  # as for metrics, see RunLogger
        logger.experiment.add_figure(f"val/{tag}", figure, step)


def create_figures(table: pd.DataFrame, tasks: Tasks) -> Iterator[tuple[str, Figure]]:
    """The figures of one validation.

    Args:
        table: Predictions.
        tasks: The tasks that faces are labelled with; those that are not predicted or have no labels are left out.

    Yields:
        A tag such as ``race/confusion``, and the figure.
    """
    shown = [task for name, task in tasks.items() if f"{name}_predicted" in table and table[name].notna().any()]
    for classification in classifications(shown):
        yield f"{classification.name}/confusion", figures.confusion(table, classification)
        yield f"{classification.name}/reliability", figures.reliability_diagram(table, classification)
    for age in ages(shown):
        yield f"{age.name}/predicted_against_true", figures.age_density(table, age)


def _title(row: Mapping[Hashable, Any], tasks: Tasks) -> tuple[str, bool]:
    predicted = {name: row[f"{name}_predicted"] for name in tasks if f"{name}_predicted" in row}
    columns = [column for task in tasks.values() for column in task.columns if column in row]
    return title(tasks, predicted, {column: row[column] for column in columns if not pd.isna(row[column])})
