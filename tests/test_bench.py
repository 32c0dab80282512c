"""The bench reports what a stopwatch of known work says, and leaves no files behind."""

import json
import signal
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from facecls.bench.__main__ import main
from facecls.bench.clock import Clock
from facecls.bench.loop import BareTraining
from facecls.bench.machine import forward_flops, process_start
from facecls.bench.show import verdict
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.model.heads import HeadOptions
from facecls.model.module import FaceModule
from facecls.model.network import FaceModel
from facecls.model.trunk import create_trunk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]

SMALL = ["--model.trunk=test_resnet", "--data.image_size=64", "--data.batch_size=8", "--trainer.accelerator=cpu"]
RATES = {"together": 0.98, "step / peak": 0.5}


def test_everything_is_measured_and_nothing_left(faces: Path) -> None:
    results = main([*SMALL, f"--data.root={faces}", "--data.num_workers=1", "--seconds=0.05", "--out=bench.json"])
    assert json.loads(Path("bench.json").read_text()) == results
    assert [path.name for path in Path().iterdir()] == ["bench.json"]
    for stage in ("training", "evaluation"):
        for rates in (results[stage]["input"], results[stage]["loop"]):
            assert all(0 < rate["low"] <= rate["median"] <= rate["high"] for rate in rates.values())
        assert set(results[stage]["input"]) == {
            "read", "decode", "augment", "collate", "one process", "all workers"
        }  # fmt: skip
        assert all(value > 0 for value in results[stage]["ratios"].values())
    assert len(results["memory"]["worker_private_mib"]) == 1
    data = sum(path.stat().st_size for path in faces.iterdir() if path.name != "rejects") / 2**20
    assert 0.8 * data < results["memory"]["images_mib"] <= data
    assert results["start_seconds"] > 0
    assert results["workers"] == 1


def test_without_workers_batches_are_made_in_the_process(faces: Path) -> None:
    frozen, threads = "--model.schedule.frozen={0: -1, 3: 0}", torch.get_num_threads()
    results = main([*SMALL, f"--data.root={faces}", "--data.num_workers=0", "--seconds=0.05", frozen])
    assert "all workers" not in results["training"]["input"]
    assert results["memory"]["worker_private_mib"] == []
    # frozen as in the last epoch, so everything trains
    assert results["training"]["flops_per_face"] == 3 * results["evaluation"]["flops_per_face"]
    assert torch.get_num_threads() == threads


def test_a_clock_tells_medians_and_compares_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    lasted = {"ours": [2.0, 4.0, 10.0], "theirs": [1.0, 4.0, 8.0]}  # the machine was slower and slower
    ticks = iter([tick for pair in zip(*lasted.values(), strict=True) for seconds in pair for tick in (0.0, seconds)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = Clock()
    for _ in range(3):
        for name in lasted:
            with clock.block(name, 20):
                pass
    assert clock.rates() == {"ours": (5.0, 2.0, 10.0), "theirs": (5.0, 2.5, 20.0)}
    assert clock.ratio("ours", "theirs") == 0.8  # the median of 0.5, 1 and 0.8


def test_flops_are_those_of_the_layers() -> None:
    model = FaceModel(create_trunk("resnet18"), [UTKFACE["gender"]], HeadOptions())
    # He et al. 2016, table 1: 1.8e9 multiply-adds for ResNet-18 at 224 pixels; here each counts as two
    assert forward_flops(model, 224) == pytest.approx(2 * 1.8e9, rel=0.02)


def test_a_bare_step_trains_every_head() -> None:
    module = FaceModule(
        "test_resnet", age_head="regression", image_size=64, task_options={"glasses": {"classes": ["without", "with"]}}
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    step = BareTraining(trainer, module)
    step(
        {"image": torch.zeros(4, 3, 64, 64, dtype=torch.uint8)}
        | dict.fromkeys(module.model.tasks, torch.ones(4).long())
    )
    assert list(step.model.heads) == ["gender", "race", "age", "glasses"]
    for name, head in step.model.heads.items():
        before = dict(module.model.heads[name].named_parameters())
        assert all(not torch.equal(before[which], after) for which, after in head.named_parameters())


def test_a_process_started_before_now() -> None:
    start = process_start()
    assert start is not None
    assert 0 < time.time() - start < 24 * 3600


@pytest.mark.parametrize(
    ("rates", "workers", "on_gpu", "said"),
    [
        ({"input": 300, "step": 200, "step / peak": None}, 4, False, "the step is the bottleneck; use "),
        ({"input": 100, "step": 200}, 1, True, "the input is the bottleneck; increase --data.num_workers above 1"),
        ({"input": 100, "step": 200}, 4, True, "the input is the bottleneck; use a machine with more cores"),
        ({"input": 300, "step": 200}, 4, True, "larger --data.batch_size"),
        ({"input": 300, "step": 200}, 4, False, "a GPU"),
    ],
)
def test_the_verdict_names_the_bottleneck(rates: dict[str, float], workers: int, on_gpu: bool, said: str) -> None:
    text = verdict("training", RATES | rates, workers, 4, on_gpu)
    assert said in text
    assert "at 98 % of the slower" in text


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--out=no/such/bench.json", "--out in a folder that exists"),
        ("--seconds=0", "above 0"),
        ("--probe=true", "probe"),
    ],
)
def test_mistakes_are_said_before_anything_is_timed(option: str, said: str, faces: Path) -> None:
    with pytest.raises(UserError, match=said):
        main([*SMALL, f"--data.root={faces}", "--model.schedule.frozen={0: -1}", option])


def test_ctrl_c_ends_it_as_any_command(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FaceModule, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            main([*SMALL, f"--data.root={faces}", "--data.num_workers=0"])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert list(Path().iterdir()) == []
