"""The precision is what is fastest here, by steps that leave no trace; it is said, kept, and kept when resuming."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from facecls import evaluate, fit
from facecls.compat import cpu_computes_bfloat16
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.model.checkpoint import read_checkpoint
from facecls.model.heads import HeadOptions
from facecls.model.network import FaceModel
from facecls.model.schedule import Schedule
from facecls.model.trunk import create_trunk
from facecls.training import cli, precision, trial
from facecls.training.collector import PredictionCollector
from facecls.training.precision import choose_precision, possible_precisions
from facecls.training.trial import time_precisions

pytestmark = pytest.mark.slow

BOTH = ["32-true", "bf16-mixed"]
CPU = torch.device("cpu")
TINY = ["--name=tiny", "--model.trunk=test_resnet", "--data.image_size=64", "--data.batch_size=8"]
TINY += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2"]
TINY += ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0"]


def _fails(*_: object, **__: object) -> Any:
    raise AssertionError("nothing is to be tried")


@pytest.fixture
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes in bfloat16."""
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: True)


@pytest.mark.parametrize(
    ("computes", "wanted"), [((True, False), BOTH), ((False, True), BOTH), ((False, False), BOTH[:1])]
)
def test_a_processor_is_tried_in_what_it_has(
    computes: tuple[bool, bool], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes[0])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: computes[1])
    assert possible_precisions("cpu")[0] == wanted


@pytest.mark.parametrize(
    ("has_bfloat16", "capability", "wanted"),
    [(True, (8, 0), BOTH), (False, (7, 5), ["32-true", "16-mixed"]), (False, (6, 1), ["32-true"])],
)
def test_a_card_is_tried_in_what_it_has(
    has_bfloat16: bool, capability: tuple[int, int], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for accelerator in ("auto", "gpu", "cuda"):
        assert possible_precisions(accelerator)[0] == wanted


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize(
    ("rates", "wanted", "said"),
    [
        ((8.6, 19.5), "bf16-mixed", "19.5 faces/s against 8.6 with 32-true"),
        ((40.5, 35.4), "32-true", "40.5 faces/s against 35.4 with bf16-mixed"),
        ((100.0, 104.0), "32-true", "100 faces/s against 104 with bf16-mixed"),  # for so little nothing is rounded
        ((0.0, 1234.0), "bf16-mixed", "1,234 faces/s against 0.0 with 32-true"),  # float32 does not fit into memory
        ((5.0, 0.0), "32-true", "5.0 faces/s against 0.0 with bf16-mixed"),
    ],
)
def test_the_fastest_is_chosen(rates: tuple[float, float], wanted: str, said: str) -> None:
    assert choose_precision("cpu", lambda names: dict(zip(names, rates, strict=True))) == (wanted, said)


def test_nothing_is_tried_without_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: False)
    assert choose_precision("cpu", _fails)[0] == "32-true"


@pytest.mark.parametrize("root", ["nowhere", "[synthetic:20, nowhere]"])
def test_nothing_is_tried_without_faces(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose_precision", _fails)
    with pytest.raises(UserError, match="there is nothing at nowhere"):
        fit.main(["--model.trunk=test_resnet", "--data.image_size=64", f"--data.root={root}"])


def _model() -> FaceModel:
    return FaceModel(create_trunk("test_resnet", image_size=64), list(UTKFACE.values()), HeadOptions(dropout=0.5))


@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.parametrize("schedule", [None, Schedule(), Schedule({0: -1}), Schedule(batchnorm="frozen")], ids=str)
def test_a_trial_leaves_all_as_it_was(
    schedule: Schedule | None, has_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, trained = set[tuple[int, ...]](), set[bool]()
    step = trial._step

    def seen(model: FaceModel, name: str, images: torch.Tensor) -> float:
        shapes.add(tuple(images.shape))
        trained.add(model.training)
        return step(model, name, images)

    monkeypatch.setattr(trial, "_step", seen)
    monkeypatch.setattr(trial, "_SECONDS", 1e9 if has_time else 1e-9)
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    rates = time_precisions(BOTH if cpu_computes_bfloat16() else BOTH[:1], model, (6, 64), CPU, schedule)
    assert all(rate > 0 for rate in rates.values())
    assert shapes == ({(2, 3, 64, 64), (6, 3, 64, 64)} if has_time else {(2, 3, 64, 64)})
    assert trained == {schedule is not None}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize("trains", [True, False])
def test_a_trial_goes_forward_and_in_training_back(trains: bool) -> None:
    went, model = list[str](), _model()
    head: Any = model.heads["gender"]
    head.register_forward_hook(lambda *_: went.append("forward"))
    head.register_full_backward_hook(lambda *_: went.append("back"))
    time_precisions(["32-true"], model, (2, 64), CPU, Schedule() if trains else None)
    assert went[:2] == (["forward", "back"] if trains else ["forward", "forward"])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), torch.OutOfMemoryError()], ids=repr)
@pytest.mark.parametrize("which", BOTH)
def test_what_overflows_or_does_not_fit_has_no_rate(
    which: str, wrong: float | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(model: FaceModel, name: str, images: torch.Tensor) -> float:
        if name == which and isinstance(wrong, Exception):
            raise wrong
        return wrong if name == which and isinstance(wrong, float) else 0.0

    monkeypatch.setattr(trial, "_step", step)
    rates = time_precisions(BOTH, _model(), (2, 64), CPU, None)
    assert [name for name, rate in rates.items() if rate == 0] == [which]


def _measures(rates: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> list[Schedule | None]:
    """Lets a trial find these rates; returns the schedules that it was asked for."""
    asked = list[Schedule | None]()

    def measured(names: list[str], model: object, shape: object, device: object, schedule: Any, epoch: int = 0) -> Any:
        assert names == list(rates)
        assert shape == (8, 64)
        asked.append(schedule)
        return rates

    for module in (cli, evaluate):
        monkeypatch.setattr(module, "time_precisions", measured)
    return asked


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("words", [[], ["--trainer.precision=auto"], ["--trainer.precision=null"]], ids=str)
@pytest.mark.parametrize("probe", [False, True])
def test_auto_is_the_default_and_a_probe_is_tried_forward_alone(
    words: list[str], probe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = _measures({"32-true": 1.0, "bf16-mixed": 2.0}, monkeypatch)
    frozen = [f"--probe={probe}", "--model.schedule.frozen={0: -1}"]
    made = cli.FaceCLI([*TINY, *words, *frozen, "--data.root=synthetic:72"])
    assert (made.config.trainer.precision, made.trainer.precision) == ("bf16-mixed", "bf16-mixed")
    assert made.precision_note == "precision bf16-mixed: 2.0 faces/s against 1.0 with 32-true"
    assert [schedule is None for schedule in asked] == [probe]


@pytest.mark.usefixtures("_bfloat16")
def test_several_devices_take_the_same_untried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "time_precisions", _fails)
    made = cli.FaceCLI([*TINY, "--data.root=synthetic:72", "--trainer.devices=2"])
    assert made.trainer.precision == "bf16-mixed"
    assert "the CPU computes in bfloat16" in made.precision_note


@pytest.mark.usefixtures("_bfloat16")
def test_what_was_chosen_is_kept(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"--data.root={faces}"]
    _measures({"32-true": 2.0, "bf16-mixed": 1.0}, monkeypatch)
    fit.main([*words, "--trainer.max_epochs=1"])
    assert "precision 32-true: 2.0 faces/s against 1.0 with bf16-mixed" in capsys.readouterr().out
    run = Path("runs/tiny/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == "32-true"
    last = run / "checkpoints/last.ckpt"
    assert read_checkpoint(last).precision == "32-true"
    monkeypatch.setattr(cli, "time_precisions", _fails)
    resumed = [*words, "--trainer.max_epochs=2", f"--ckpt_path={last}"]
    made = cli.FaceCLI(resumed)
    assert made.trainer.precision == "32-true"
    assert made.precision_note == "precision 32-true: as in the run that is resumed"
    assert cli.FaceCLI([*resumed, "--trainer.precision=64-true"]).trainer.precision == "64-true"
    _measures({"32-true": 1.0, "bf16-mixed": 2.0}, monkeypatch)
    words = [f"--ckpt_path={last}", "--accelerator=cpu"]
    options, checkpoint = cli.parse_with_checkpoint(evaluate.create_parser(), words)
    tester = evaluate.create_trainer(options, checkpoint, PredictionCollector())
    assert (tester.precision, options.precision) == ("32-true", "32-true")  # its results are those of the run
    options.precision = "auto"
    older = checkpoint._replace(precision=None)
    assert evaluate.create_trainer(options, older, PredictionCollector()).precision == "bf16-mixed"
