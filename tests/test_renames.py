"""Options of version 0.1 are still read, wherever they stand, and a line says what they are called now."""

import os
from pathlib import Path

import pytest

from facecls.errors import UserError
from facecls.training.cli import FaceCLI, parse
from facecls.training.renames import rename_options

OLD = "name: old\ndata: {root: somewhere}\nmodel: {schedule: {norms: none, drops: {3: 0.5}, warmup: 1e-1}}\n"
WORDS = ["--data.root=synthetic:60", "--model.trunk=test_resnet", "--trainer.accelerator=cpu", "--data.image_size=64"]
WORDS += ["--trainer.precision=32-true"]
NOTES = [
    "model.schedule.norms is now called model.schedule.batchnorm",
    "model.schedule.drops is now called model.schedule.lr_milestones",
]


@pytest.mark.parametrize(
    "words",
    [
        ["--config=old.yaml"],
        ["--config", "old.yaml"],
        ["-c", "old.yaml"],
        ["--model.schedule.norms=none", "--model.schedule.drops={3: 0.5}", "--model.schedule.warmup=0.1"],
        ["--model.schedule.norms", "none", "--model.schedule.drops", "{3: 0.5}", "--model.schedule.warmup", "0.1"],
        ["--model.schedule={norms: none, drops: {3: 0.5}, warmup: 0.1}"],
        ["--model.schedule", "{norms: none, drops: {3: 0.5}, warmup: 1e-1}"],
        ['--model={"schedule": {"norms": "none", "drops": {"3": 0.5}, "warmup": 0.1}}'],
        ["--config=old.yaml", "--model.schedule.norms=unfrozen", "--model.schedule.batchnorm=frozen"],
        ["--model", "model.yaml"],
        ["--model.schedule=schedule.yaml"],
    ],
)
def test_old_names_are_read(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(OLD)
    Path("model.yaml").write_text("schedule: {norms: none, drops: {3: 0.5}, warmup: 1e-1}\n")
    Path("schedule.yaml").write_text("norms: none\ndrops: {3: 0.5}\nwarmup: 0.1\n")
    schedule = FaceCLI([*words, *WORDS]).model.schedule
    assert (schedule.batchnorm, schedule.lr_milestones, schedule.warmup) == ("frozen", {3: 0.5}, 0.1)
    assert capsys.readouterr().err.splitlines() == NOTES


def test_the_value_that_keeps_its_meaning_has_a_new_name() -> None:
    words = ["--model.schedule.norms=unfrozen"]
    assert rename_options(words) == (["--model.schedule.batchnorm=train"], NOTES[:1])


def test_present_names_and_everything_else_are_left_alone(tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text("# a comment\nmodel: {schedule: {batchnorm: frozen, lr_milestones: {3: 0.5}}}\n")
    words = [
        f"--config={new}", "--config", "missing.yaml", "--model.schedule={batchnorm: train}", "--data.root", "norms",
        "--model.optimizer={class_path: Adam, init_args: {norms: 1}}", "--model.hidden=[1, 2]", "--name=model: {", "-h",
        "--model.schedule={broken: [",
    ]  # fmt: skip
    assert rename_options(words) == (words, [])


@pytest.mark.parametrize("option", ["--config", "-c", "--model", "--model.schedule"])
@pytest.mark.parametrize("is_one_word", [True, False])
def test_options_that_can_be_read_only_once_are_refused(option: str, is_one_word: bool, tmp_path: Path) -> None:
    """As those of ``--config <(...)``, which would come back empty when they are read again."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"Expected a file of options, but .*pipe.yaml is a device, pipe or socket"):
        rename_options([f"{option}={pipe}"] if is_one_word else [option, str(pipe)])


def test_an_old_name_with_a_wrong_value_is_refused_under_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batchnorm"):
        parse(FaceCLI, [*WORDS, "--model.schedule.norms=sometimes"])
