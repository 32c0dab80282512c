"""The house: style, types, one-way imports, and a README that says what is run."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from write_benchmarks import markdown

ROOT = Path(__file__).parent.parent
ROOMS = (
    "facecls.errors",
    "facecls.files",
    "facecls.ranks",
    "facecls.console",
    "facecls.data",
    "facecls.model",
    "facecls.analysis",
    "facecls.run",
    "facecls.report",
    "facecls.predict",
    "facecls.training",
    "facecls.bench",
    "facecls.export",
)
"""In this order: a file imports from its own room or one before it; the commands come after all of them."""
INSTALL = "pip install -e . && python -m facecls.fit --config configs/demo.yaml"
TEST = 'pip install -e ".[dev]" && pytest'


@pytest.mark.parametrize(
    "words", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"]], ids=" ".join
)
def test_style_and_types(words: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _modules(package: str) -> list[tuple[str, Path]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in files]


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "facecls"}
    return found


def _room(module: str) -> int:
    for number, room in enumerate(ROOMS):
        if module == room or module.startswith(room + "."):
            return number
    return len(ROOMS)


def test_imports_go_one_way() -> None:
    for module, path in _modules("facecls"):
        for imported in _imports(path):
            top = imported.split(".")[0]
            assert top not in {"convert", "h5py", "onnx2torch", "tensorflow", "tf_keras", "keras"}, (
                f"{module}: {imported}"
            )
            if top == "facecls" and imported != "facecls" and not imported.startswith("facecls.__"):
                assert _room(imported) <= _room(module), f"{module} imports {imported}, which comes after it"
                assert _room(imported) < len(ROOMS), f"{module} imports the command {imported}"


def test_albumentations_is_imported_in_one_place() -> None:
    users = [module for module, path in _modules("facecls") if "albumentations" in _imports(path)]
    assert users == ["facecls.data.transforms"]


def test_the_readme_opens_with_the_commands_that_ci_runs() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", readme, flags=re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == [INSTALL, TEST]
    lines = ci.splitlines()
    assert lines.index(TEST) < lines.index(INSTALL)
    assert not [line for line in lines if "pytest" in line and line != TEST]


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m ((?:facecls|convert)[.\w]*)", readme)):
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for config in set(re.findall(r"configs/\w+\.yaml", readme)):
        assert (ROOT / config).exists(), config


def test_every_bound_carries_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        line = next(line for line in text.splitlines() if f'"{name}"' in line)
        assert re.search(r'"[,\]]*\s*#\s*\S+', line), f"{name} has no reason beside it"


def test_configurations_are_named_as_their_file() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_the_benchmarks_are_written_by_their_command() -> None:
    results = json.loads((ROOT / "benchmarks.json").read_text())
    assert (ROOT / "BENCHMARKS.md").read_text() == markdown(results)
