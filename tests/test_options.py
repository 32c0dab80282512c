"""Options that are misspelt, wherever they are written, are told with what may be meant."""

import importlib
from pathlib import Path

import pytest

from facecls import evaluate, fit
from facecls.errors import UserError

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


def test_other_mistakes_are_told_as_they_were() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size"):
        fit.main([*WORDS, "--data.batch_size=many"])


def test_the_options_of_evaluate() -> None:
    with pytest.raises(UserError, match=r"but got --data\.splitt; did you mean --data\.split\?"):
        evaluate.main(["--ckpt_path=x", "--data.splitt=all"])


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("facecls.predict.__main__", ["a.ckpt", "b.jpg", "--batchsize=3"], "--batchsize; did you mean --batch_size?"),
        ("facecls.report.__main__", ["run", "--outt", "x"], "--outt; did you mean --out?"),
        ("facecls.export.__main__", ["a.ckpt", "b.onnx", "--opsett=17"], "--opsett; did you mean --opset?"),
        ("facecls.identify", ["a", "b", "--tp=3"], "--tp; did you mean --top?"),
        ("facecls.download", ["utkface", "--destt=x"], "--destt; --help lists them."),
        ("convert.__main__", ["a.h5", "b.safetensors", "--outputs=x"], "--outputs; did you mean --output?"),
        ("facecls.predict.__main__", ["a.ckpt"], "The following arguments are required: INPUT; --help says"),
    ],
)
def test_the_options_of_other_commands(module: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        importlib.import_module(module).main(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
