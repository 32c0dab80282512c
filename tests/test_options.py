"""Options that are misspelt, wherever they are written, are told with what may be meant."""

import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from facecls import evaluate, fit
from facecls.crop import __main__ as crop
from facecls.data.limits import LIMITS, Limits, set_limits
from facecls.errors import UserError
from facecls.export import __main__ as export
from facecls.predict import __main__ as predict
from facecls.report import __main__ as report

COMMANDS = ["predict", "crop", "export", "report"]
NAMES = [field.name for field in fields(Limits)]
ROOT = Path(__file__).parent.parent
WORDS = [f"--config={ROOT / 'configs/base.yaml'}", "--data.root=synthetic:20"]


@pytest.mark.parametrize(
    ("words", "got", "meant"),
    [
        (["--data.batchsize=3"], "--data.batchsize", "--data.batch_size"),
        (["--data.batchsize", "3"], "--data.batchsize", "--data.batch_size"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch", "--trainer.max_epochs"),
        (["--model.schedule", "{warmu: 3}"], "--model.schedule.warmu", "--model.schedule.warmup"),
        (["--model.optimizer.init_args.lrr", "3"], "--model.optimizer.init_args.lrr", "--model.optimizer.init_args.lr"),
    ],
)
def test_an_option_of_the_command_line(words: list[str], got: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        fit.main([*WORDS, *words])
    assert str(caught.value) == f"Expected an option that is known, but got {got}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("text", "got", "line", "meant"),
    [
        ("data:\n  image_size: 64\n  batchsize: 3\n", "data.batchsize", 3, "data.batch_size"),
        ("# dated\n\ndat:\n  root: synthetic:20\n", "dat.root", 4, "data.root"),
        ("model: {schedule: {warmu: 3}}\n", "model.schedule.warmu", 1, "model.schedule.warmup"),
        (
            "model:\n  optimizer:\n    class_path: torch.optim.AdamW\n    init_args:\n      lrr: 3\n",
            "model.optimizer.init_args.lrr",
            5,
            "model.optimizer.init_args.lr",
        ),
        (
            "data:\n  train_transform:\n    class_path: facecls.data.transforms.TrainTransform\n    init_args:\n"
            "      siz: 64\n",
            "data.train_transform.init_args.siz",
            5,
            "data.train_transform.init_args.size",
        ),
    ],
)
@pytest.mark.parametrize("is_one_word", [True, False])
def test_an_option_of_a_file(is_one_word: bool, text: str, got: str, line: int, meant: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        fit.main([*WORDS, *([f"--config={file}"] if is_one_word else ["--config", str(file)])])
    assert str(caught.value) == (
        f"Expected an option that is known, but got {got} in {file}, line {line}; did you mean {meant}?"
    )


def test_an_option_like_no_other() -> None:
    with pytest.raises(UserError, match=r"but got --qqqqqq; --help lists them\.$"):
        fit.main([*WORDS, "--qqqqqq=1"])


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("data.batch_size=many", "a whole number"),
        ("data.val_fraction=half", "a number"),
        ("model.hidden=[wide]", "a whole number"),
        ("model.hidden=512", "a list such as [1, 2]"),
        ("model.tasks=age", "a list such as [a, b] or null"),
        ("model.class_weights=3", "names and values such as {name: value}"),
        ("model.task_weights=equal", "one of learned or names and numbers such as {name: 1}"),
        ("model.tta=flp", "one of none, flip, zoom"),
        ("probe=maybe", "true or false"),
        ("ema=strong", "a number or null"),
    ],
)
@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_value_of_another_kind(word: str, kind: str, is_in_file: bool, tmp_path: Path) -> None:
    name, _, value = word.partition("=")
    words, place = [*WORDS, f"--{word}"], f"--{name}"
    if is_in_file:
        file = tmp_path / "mine.yaml"
        group, _, own = name.rpartition(".")
        file.write_text(f"\n{group}: {{{own}: {value}}}\n" if group else f"\n{own}: {value}\n")
        words, place = [*WORDS, f"--config={file}"], f"{name} in {file}, line 2"
    with pytest.raises(UserError) as caught:
        fit.main(words)
    got = value if name != "model.hidden" else value.strip("[]")
    assert str(caught.value) == f"Expected {kind} for {place}, but got {got}; correct it."


@pytest.mark.parametrize("name", ["../up", "a/../../b", "/tmp/elsewhere"])
def test_a_run_stays_in_the_folder_of_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facecls.training.precision.choose_precision", None)  # is not asked before
    with pytest.raises(UserError, match=rf"Expected a name that stays within runs, but got {name}; take another"):
        fit.main([*WORDS, "--model.trunk=test_resnet", "--model.weights=null", f"--name={name}"])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("facecls.predict", ["a.ckpt", "b.jpg", "--batchsize=3"], "--batchsize; did you mean --batch_size?"),
        ("facecls.report", ["run", "--outt", "x"], "--outt; did you mean --out?"),
        ("facecls.export", ["a.ckpt", "b.onnx", "--opsett=17"], "--opsett; did you mean --opset?"),
        ("facecls.evaluate", ["--ckpt_path=x", "--data.splitt=all"], "--data.splitt; did you mean --data.split?"),
        ("facecls.identify", ["a", "b", "--tp=3"], "--tp; did you mean --top?"),
        ("facecls.download", ["utkface", "--destination=x"], "--destination; --help lists them."),
        ("convert", ["a.h5", "b.safetensors", "--outputs=x"], "--outputs; did you mean --output?"),
    ],
)
def test_the_options_of_other_commands(
    module: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a program, since each command must turn the error into a line itself."""
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{module}: error: Expected an option that is known, but got {message}\n"


def test_a_misspelt_choice_is_told_with_the_near_one() -> None:
    with pytest.raises(
        UserError, match=r"Expected --tta to be one of none, flip, zoom, but got flipp; did you mean flip\?"
    ):
        predict.main(["a.ckpt", "b.jpg", "--tta=flipp"])


def test_what_is_missing_is_told() -> None:
    with pytest.raises(
        UserError, match=r"^The following arguments are required: INPUT; --help says what is expected\.$"
    ):
        predict.main(["a.ckpt"])


@pytest.mark.parametrize("main", [predict.main, crop.main, export.main, report.main], ids=COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_limits_are_options(name: str, main: Callable[[list[str]], object], tmp_path: Path) -> None:
    """They hold for the process before anything is read."""
    words = [str(tmp_path / "none"), str(tmp_path / "none")]
    try:
        with pytest.raises(UserError, match="none"):
            main([*words, f"--limits.{name}=12345"])
        assert getattr(LIMITS, name) == 12345
        with pytest.raises(UserError, match="none"):  # and no longer
            main(words)
        assert Limits() == LIMITS
        with pytest.raises(UserError, match=rf"Expected --limits.{name} to be at least 1, but got 0; "):
            main([*words, f"--limits.{name}=0"])
        with pytest.raises(UserError, match=r"--limits.\w+: invalid int"):
            main([*words, f"--limits.{name}=many"])
        with pytest.raises(UserError, match=rf"got --limits.{name[:-1]}; did you mean --limits.{name}\?"):
            main([*words, f"--limits.{name[:-1]}=12345"])  # options are not cut short
    finally:
        set_limits()


def test_limits_are_options_of_commands_with_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("limits: {image_pixels: 7, names: 8}\n")
    words = [
        "--data.root=missing",
        "--trainer.precision=32-true",
        f"--config={tmp_path / 'mine.yaml'}",
        "--limits.names=9",
    ]
    try:
        with pytest.raises(UserError, match="there is no"):
            fit.main([*words, "--model.trunk=test_resnet", f"--trainer.default_root_dir={tmp_path}"])
        assert (LIMITS.image_pixels, LIMITS.names, LIMITS.folders) == (7, 9, 100)
        with pytest.raises(UserError, match=r"limits.imagepixels; did you mean --limits.image_pixels\?"):
            fit.main([*words, "--limits.imagepixels=3"])
    finally:
        set_limits()
    config = evaluate.create_parser().parse_args(["--ckpt_path=x", "--data.root=x", "--limits.folders=3"])
    assert config.limits.folders == 3
