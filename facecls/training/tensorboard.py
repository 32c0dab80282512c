"""The study's figures in TensorBoard, while a model is trained."""

import time
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger

from facecls.data.tasks import CLASSES, MISSING, Labels
from facecls.predict.grid import draw, title
from facecls.report import figures
from facecls.training.collector import PredictionCollector

SHARE = 0.02
"""Of the time of the training that drawing may take."""
GALLERY = 24
"""Faces of the gallery, the same in every validation."""
_SECONDS = 2.0
"""That a drawing takes until one was measured; on a core with AVX2 it was so, half of it the gallery."""


class StudyBoard(pl.Callback):
    """Draws the figures of each validation that improves.

    Where epochs are short it waits, so that drawing takes no more than ``SHARE`` of the time, the last one included:
    the best validation is drawn at the end in any case, and in a run of less than three minutes only then.

    Args:
        collector: Comes before this one among the callbacks.
    """

    def __init__(self, collector: PredictionCollector) -> None:
        self.collector = collector
        self._began = self._spent = 0.0
        self._longest = _SECONDS
        self._waiting: tuple[pd.DataFrame, np.ndarray, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, if the validation is the best so far and there is time."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None or not self.collector.batches or not trainer.is_global_zero:
            return
        # checkpoints are kept after all other callbacks, so this is still the best before
        best = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
        if best is None or loss < best:
            table = self.collector.table(trainer.datamodule)  # type: ignore[attr-defined]
            self._waiting = (table, self.collector.faces()[:GALLERY], trainer.global_step)
        # one now, and one at the end
        if self._spent + 2 * self._longest <= SHARE * (time.monotonic() - self._began):
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the best validation, if it was not."""
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        if self._waiting is None:
            return
        (table, faces, step), self._waiting = self._waiting, None
        started = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for tag, figure in board_figures(table):
                    logger.experiment.add_figure(f"val/{tag}", figure, step)
                pictures = [trainer.datamodule.picture(face) for face in faces]  # type: ignore[attr-defined]
                logger.experiment.add_figure("val/gallery", draw(pictures, _titles(table[:GALLERY])), step)
        took = time.monotonic() - started
        self._spent, self._longest = self._spent + took, max(self._longest, took)


def board_figures(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The figures of one validation.

    Args:
        table: Predictions.

    Yields:
        A tag such as ``race/confusion``, and the figure.
    """
    for task in CLASSES:
        if f"{task}_predicted" in table and table[task].notna().any():
            yield f"{task}/confusion", figures.confusion(table, task)
            yield f"{task}/reliability", figures.reliability_diagram(table, task)
    if "age_predicted" in table and table["age"].notna().any():
        yield "age/predicted_against_true", figures.age_density(table)


def _titles(table: pd.DataFrame) -> list[tuple[str, bool]]:
    titles = []
    for row in table.to_dict("records"):
        told: dict[Hashable, Any] = {
            task: names[row[f"{task}_predicted"]] for task, names in CLASSES.items() if f"{task}_predicted" in row
        }
        if "age_predicted" in row:
            told["age"] = row["age_predicted"]
        titles.append(title(told, Labels(*(MISSING if pd.isna(row[t]) else int(row[t]) for t in Labels._fields))))
    return titles
