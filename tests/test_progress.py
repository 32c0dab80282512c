"""What a training says in a pipe: a line every 30 seconds and one an epoch, none of them broken."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from facecls import console
from facecls.training import progress

TASKS = ["gender", "race", "age", "glasses"]


class _Training:
    """Batches of 32 faces on two devices, each 4 seconds by its own clock, and a validation of 100 after each epoch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first_step: int = 0) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(progress, "time", clock)
        monkeypatch.setattr(console, "time", clock)
        self.trainer: Any = SimpleNamespace(
            world_size=2, global_step=first_step, estimated_stepping_batches=300, current_epoch=0, max_epochs=3,
            callback_metrics={}, progress_bar_metrics={},
        )  # fmt: skip
        self.module: Any = SimpleNamespace(model=SimpleNamespace(tasks=dict.fromkeys(TASKS)))
        self.lines = progress.LineProgress()

    def epoch(self, steps: int) -> None:
        self.lines.on_train_epoch_start(self.trainer, self.module)
        for batch in range(steps):
            self.now += 4
            self.trainer.global_step += 1
            self.trainer.progress_bar_metrics["loss"] = 2.5
            self.lines.on_train_batch_end(self.trainer, self.module, None, {"index": torch.arange(32)}, batch)
        self.now += 100
        self.trainer.current_epoch += 1
        self.trainer.callback_metrics = {
            "train/loss": torch.tensor(2.25), "val/loss": torch.tensor(2.125),
            "val/gender/accuracy": torch.tensor(0.931), "val/race/f1_macro": torch.tensor(0.5),
            "val/race/accuracy": torch.tensor(0.75),
            "val/age/mae_years": torch.tensor(4.213), "val/age/band_accuracy": torch.tensor(0.5),
            "val/glasses/accuracy": torch.tensor(0.986),
        }  # fmt: skip


def test_a_line_every_30_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = _Training(monkeypatch)
    training.lines.on_train_start(training.trainer, training.module)
    training.epoch(20)
    # 8 batches take 32 seconds; 8 of 300 steps done
    assert capsys.readouterr().out.splitlines() == [
        "step 8/300, 16 faces/s, loss 2.500, 0:19:28 left",
        "step 16/300, 16 faces/s, loss 2.500, 0:18:56 left",
    ]
    training.epoch(2)
    # 21 steps took 184 seconds, of which the validation took 100; there is more of that to come, but it is not training
    assert capsys.readouterr().out.splitlines()[1:] == ["step 21/300, 16 faces/s, loss 2.500, 0:40:45 left"]


def test_a_resumed_run_counts_the_time_of_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = _Training(monkeypatch, first_step=200)
    training.lines.on_train_start(training.trainer, training.module)
    training.epoch(8)
    assert capsys.readouterr().out == "step 208/300, 16 faces/s, loss 2.500, 0:06:08 left\n"


def test_an_epoch_is_one_line_over_all_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = _Training(monkeypatch)
    training.lines.on_train_start(training.trainer, training.module)
    training.epoch(1)
    training.epoch(1)
    training.lines.on_train_end(training.trainer, training.module)
    results = "gender 93.1%, race 75.0%, age 4.21 years off, age 50.0% in range, glasses 98.6%"
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert epochs == [f"epoch {number}/3: loss 2.250, val 2.125, {results}" for number in (1, 2)]


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = _Training(monkeypatch)
    training.lines.disable()
    training.lines.on_train_start(training.trainer, training.module)
    training.epoch(20)
    training.lines.on_train_end(training.trainer, training.module)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("loop", "batches", "name"),
    [("test", "test", "test"), ("validation", "val", "validation"), ("predict", "predict", "calibration")],
)
def test_other_long_loops_say_how_far_they_are(
    loop: str, batches: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = _Training(monkeypatch)
    setattr(training.trainer, f"num_{batches}_batches", [50])
    training.trainer.sanity_checking = False
    getattr(training.lines, f"on_{loop}_start")(training.trainer, training.module)
    for batch in range(10):
        training.now += 4
        getattr(training.lines, f"on_{loop}_batch_end")(training.trainer, training.module, None, {}, batch)
    assert capsys.readouterr().out == f"{name} batch 8/50, 0:02:48 left\n"


def test_lines_stay_30_seconds_apart_where_epochs_are_shorter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = _Training(monkeypatch)
    training.trainer.num_val_batches, training.trainer.sanity_checking = [5], True
    training.lines.on_train_start(training.trainer, training.module)
    training.epoch(5)
    training.now -= 100  # of a validation that is not seen
    training.trainer.sanity_checking = False
    training.lines.on_validation_start(training.trainer, training.module)
    for batch in range(5):
        training.now += 4
        training.lines.on_validation_batch_end(training.trainer, training.module, None, {}, batch)
    assert capsys.readouterr().out == "validation batch 3/5, 0:00:08 left\n"


def test_features_are_counted_in_lines_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = _Training(monkeypatch)
    with console.count_progress("features", 2048) as advance:
        for _ in range(16):
            training.now += 4
            advance(64)
    assert capsys.readouterr().out.splitlines() == [
        "features 512/2,048, 16 faces/s, 0:01:36 left",
        "features 1,024/2,048, 16 faces/s, 0:01:04 left",
    ]


def test_features_have_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.count_progress("features", 10) as advance:
        advance(10)
    assert "10/10" in capsys.readouterr().out


@pytest.mark.parametrize(("is_terminal", "wanted"), [(True, progress.BarProgress), (False, progress.LineProgress)])
def test_a_terminal_has_a_bar_and_a_pipe_has_lines(
    is_terminal: bool, wanted: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "TTY_COMPATIBLE", "1" if is_terminal else "0")
    if not is_terminal:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert type(progress.create_progress()) is wanted


def test_the_bar_prints_the_line_of_an_epoch_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    training = _Training(monkeypatch)
    training.epoch(1)
    bar = progress.BarProgress()
    bar._init_progress(training.trainer)
    bar._print_epoch(training.trainer, training.module)
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"epoch 1/3: .*, glasses 98\.6%", line.strip()) for line in lines), lines
