"""The figures in TensorBoard take no more of a training than they may."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from simulated_predictions import simulated

from facecls.data.tasks import UTKFACE
from facecls.training import tensorboard as board


class _Run:
    """A training whose drawings take 3 seconds by its own clock, and in which each validation is better."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.spent = 1000.0, 0.0
        self.drawn: list[int] = []
        self.titles: list[tuple[str, bool]] = []
        self.table = simulated(30, 0)
        collector: Any = SimpleNamespace(batches=[1], table=lambda data: self.table, faces=lambda: self.table.index)
        self.board = board.FigureLogger(collector)
        logger = _Logger()
        logger.add_figure = lambda tag, figure, step: self.drawn.append(step)
        self.trainer: Any = SimpleNamespace(
            is_global_zero=True, loggers=[logger], sanity_checking=False,
            datamodule=SimpleNamespace(picture=lambda face: face, tasks=UTKFACE),
            checkpoint_callback=SimpleNamespace(best_model_score=None), callback_metrics={}, global_step=0,
        )  # fmt: skip
        monkeypatch.setattr(board, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(board, "create_figures", lambda table, tasks: [])
        monkeypatch.setattr(board, "draw", self._draw)

    def _draw(self, pictures: object, titles: list[tuple[str, bool]]) -> None:
        self.titles = titles
        self.now += 3
        self.spent += 3

    def train(self, epochs: int, seconds: float) -> None:
        module: Any = None
        self.board.on_train_start(self.trainer, module)
        for epoch in range(1, epochs + 1):
            self.now += seconds
            self.trainer.callback_metrics["val/loss"] = torch.tensor(1 / epoch)
            self.trainer.global_step = epoch
            self.board.on_validation_end(self.trainer, module)
            self.trainer.checkpoint_callback.best_model_score = torch.tensor(1 / epoch)
        self.board.on_train_end(self.trainer, module)


class _Logger(TensorBoardLogger):
    add_figure: Any

    def __init__(self) -> None:
        pass

    @property
    def experiment(self) -> Any:
        return self


@pytest.mark.parametrize(("epochs", "seconds"), [(200, 5), (100, 30), (12, 600)])
def test_drawings_take_their_share_at_most(epochs: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch)
    run.train(epochs, seconds)
    assert run.spent <= 0.02 * (run.now - 1000)
    assert len(run.drawn) >= min(epochs, 0.005 * (run.now - 1000))  # and are not put off for longer than that asks
    assert run.drawn[-1] == epochs


def test_a_short_run_draws_its_best_validation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch)
    run.train(3, 15)
    assert run.drawn == [3]


def test_the_gallery_shows_labels_that_are_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch)
    run.table = run.table.assign(age=None, age_from=20, age_to=29)
    run.train(3, 15)
    assert len(run.titles) == board.GALLERY
    assert all(text.split("\n")[0].endswith(", 20-29") for text, _ in run.titles)
