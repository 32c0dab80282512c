"""The console command: the same commands under one name, with the same words, statuses and processes."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from trained_model import save_checkpoint

from facecls import __version__
from facecls.__main__ import COMMANDS, main
from facecls.predict import __main__ as predict

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs as ``facecls``, made from the entry point that pyproject.toml names."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["facecls"].split(":")
    path = tmp_path_factory.mktemp("bin") / "facecls"
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


def _run(*words: str | Path, cwd: Path = ROOT, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *python, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow  # three of them import Lightning
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # other tests have imported them
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["facecls", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: facecls {name} ")


@pytest.mark.parametrize("name", ["predict", "convert"])
def test_usage_names_the_way_a_command_was_started(name: str) -> None:
    module, _ = COMMANDS[name]
    assert _run("-m", module, "--help").stdout.startswith(f"usage: python -m {module} ")
    assert _run("-m", "facecls", name, "--help").stdout.startswith(f"usage: facecls {name} ")


def test_all_commands_are_there() -> None:
    commands = {path.stem for path in (ROOT / "facecls").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    commands |= {path.parent.name for path in ROOT.glob("*/*/__main__.py")} | {"convert"}
    assert commands - {"__main__"} == set(COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_wait_for_torch(script: Path, words: list[str]) -> None:
    ended = _run(script, *words, python=("-X", "importtime"))
    assert ended.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "facecls" in imported
    assert not imported & {"torch", "pandas", "cv2"}


def test_help_lists_the_commands(script: Path) -> None:
    lines = _run(script, "--help").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert _run("-m", "facecls", "--help").stdout.splitlines() == lines
    assert _run(script, "--version").stdout == f"facecls {__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Expected a command such as fit, but got none; facecls --help lists them."),
        (["pedict", "--help"], "Expected a command such as fit, but got pedict; did you mean predict?"),
        (["quux"], "Expected a command such as fit, but got quux; --help lists them."),
    ],
    ids=["nothing", "misspelt", "unknown"],
)
def test_another_word_is_no_command(script: Path, words: list[str], says: str) -> None:
    ended = _run(script, *words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"facecls: error: {says}\n")


def test_words_and_statuses_are_passed_on(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, broken = save_checkpoint(tmp_path / "m.ckpt"), tmp_path / "not a face.jpg"
    broken.write_bytes(b"")
    words = [str(checkpoint), str(broken), "--device=cpu", "--batch_size", "1"]
    ended = _run(script, "predict", *words)
    assert (predict.main(words), ended.returncode) == (1, 1)  # one of the images could not be read
    assert broken.name in ended.stdout
    assert ended.stdout == capsys.readouterr().out
    assert _run(script, "predict", tmp_path / "no.ckpt", broken).returncode == 2
