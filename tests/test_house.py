"""The rules of the repository: style, types, the picture in ARCHITECTURE.md, and documents that say what is true."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from inspect import signature
from itertools import chain
from pathlib import Path

import pytest
import yaml
from write_benchmarks import markdown

from facecls import __version__
from facecls.__main__ import COMMANDS
from facecls.data.datamodule import FacesDataModule
from facecls.model.module import FaceModule
from facecls.model.schedule import Schedule

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
FILES = sorted(chain((ROOT / "facecls").rglob("*.py"), (ROOT / "convert").rglob("*.py")))
COMPAT = "facecls.compat"
"""The one file that may use private names of libraries."""
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}
"""Methods of named tuples and ``os._exit``, which are public despite the underscore."""
INSTALL = "pip install -e . && python -m facecls.fit --config configs/demo.yaml"
TEST = 'pip install -e ".[dev]" && pytest'


@pytest.mark.style
@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"]], ids=" ".join
)
def test_style_and_types(words: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _room(module: str) -> str:
    """The room of a module as the picture names it, such as ``data/``, ``files`` or ``convert/``."""
    package, *rest = module.split(".")
    if package == "convert":
        return f"{rest[0]}/" if rest and (ROOT / package / rest[0]).is_dir() else "convert/"
    name = rest[0] if rest else "__init__"
    if (ROOT / package / name).is_dir():
        return f"{name}/"
    return name if _is_module(f"{package}.{name}") else "__init__"  # which exports all other names


def _is_module(module: str) -> bool:
    return (ROOT / Path(*module.split("."))).with_suffix(".py").exists()


def _imports(path: Path) -> set[str]:
    """All modules that a file imports anywhere; names that it imports from ``facecls`` count as modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "facecls" else {str(node.module), *filter(_is_module, names)}
    return found


def _floors() -> list[set[str]]:
    """The picture of ARCHITECTURE.md: its floors from the top down, each with its rooms."""
    picture = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    floors = [set(re.findall(r"\w+/?", line[: line.rindex("│")])) for line in picture.splitlines() if "│" in line]
    return [floor for floor in floors if floor]


def test_each_room_is_drawn_once() -> None:
    drawn = Counter(chain.from_iterable(_floors()))
    assert set(drawn) == {_room(_module(path)) for path in FILES}
    assert set(drawn.values()) == {1}


def test_imports_go_down_the_picture() -> None:
    height = {room: -number for number, floor in enumerate(_floors()) for room in floor}
    for path in FILES:
        room = _room(_module(path))
        for imported in _imports(path):
            if imported.split(".")[0] in {"facecls", "convert"}:
                other = _room(imported)
                assert other == room or height[other] < height[room], (
                    f"{_module(path)} imports {imported}, which is not drawn below it"
                )
                assert not imported.endswith("__main__"), f"{_module(path)} imports {imported}"


def test_each_room_has_its_paragraph() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = {room for floor in _floors() for room in floor if room.endswith("/")}
    assert {f"{name}/" for name in re.findall(r"^\*\*`(\w+)/`\*\*", text, re.MULTILINE)} == rooms


def test_files_that_documents_name_exist() -> None:
    for name in DOCUMENTS:
        for file in re.findall(
            r"`((?:facecls|convert|tests|configs|\.ci|examples)/[\w./]+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / file).exists(), f"{name}: {file}"


def test_no_room_is_larger_than_a_fifth() -> None:
    lines: Counter[str] = Counter()
    for path in FILES:
        lines[_room(_module(path))] += len(path.read_text().splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= lines.total() / 5, f"{room} has {most} of {lines.total()} lines"


def test_only_convert_knows_keras() -> None:
    for path in FILES:
        if path.is_relative_to(ROOT / "facecls"):
            tops = {imported.split(".")[0] for imported in _imports(path)}
            assert not tops & {"convert", "h5py", "onnx2torch", "tensorflow", "tf_keras", "keras"}, _module(path)


def test_albumentations_is_imported_in_one_place() -> None:
    users = [_module(path) for path in FILES if "albumentations" in _imports(path)]
    assert users == ["facecls.data.transforms"]


def _private_names(tree: ast.AST) -> set[str]:
    """What a file uses of others though its name begins with an underscore."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
        ):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("facecls", "convert")):
            found |= {alias.name for alias in node.names} | set(str(node.module).split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "setattr"}:
            found |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return {name for name in found if re.match("_[^_]", name)} - PUBLIC


def test_private_names_are_used_in_one_place() -> None:
    used = {_module(path): names for path in FILES if (names := _private_names(ast.parse(path.read_text())))}
    assert set(used) <= {COMPAT}, used


def test_the_readme_opens_with_the_commands_that_ci_runs() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", readme, flags=re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == [INSTALL, TEST]
    _, newest, lowest = ci.split("\nfresh\n")  # each begins with an environment of its own
    assert [line for line in newest.splitlines() if "pytest" in line] == [
        TEST,
        "pytest -m long",
        "pytest -n 0 -m style",
    ]
    lines = lowest.splitlines()
    assert lines.index("pip install -c constraints-lowest.txt -e . pytest pytest-xdist") < lines.index(INSTALL)


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    modules = {module for module, _ in COMMANDS.values()}
    for module in set(re.findall(r"-m ((?:facecls|convert)[.\w]*)", text)) - {"facecls"}:
        assert module in modules, module
    commands = "\n".join(_blocks(document, "bash"))
    for name in re.findall(r"^(?:srun |torchrun [^\n]*)?facecls (\w+)", commands, flags=re.MULTILINE):
        assert name in COMMANDS, name
    for config in set(re.findall(r"configs/\w+\.yaml", text)):
        assert (ROOT / config).exists(), config


def test_python_and_yaml_in_the_documents_can_be_read() -> None:
    assert _blocks("README.md", "python")
    for document in DOCUMENTS:
        for block in _blocks(document, "python"):
            compile(block, document, "exec")
        for block in _blocks(document, "yaml"):
            assert yaml.safe_load(block)


def test_options_that_the_documents_name_exist() -> None:
    known = {f"data.{name}" for name in signature(FacesDataModule).parameters}
    known |= {f"model.{name}" for name in signature(FaceModule).parameters}
    known |= {f"model.schedule.{name}" for name in signature(Schedule).parameters}
    for document in DOCUMENTS:
        named = re.findall(r"(?:--|`)((?:data|model)\.(?:schedule\.)?[a-z_]+)\b", (ROOT / document).read_text())
        assert set(named) <= known, document


def test_every_bound_carries_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        line = next(line for line in text.splitlines() if f'"{name}"' in line)
        assert re.search(r'"[,\]]*\s*#\s*\S+', line), f"{name} has no reason beside it"


def test_the_version_stands_in_one_place() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(citation)
    assert project["dynamic"] == ["version"]


def test_configurations_are_named_as_their_file() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_the_benchmarks_are_written_by_their_command() -> None:
    results = json.loads((ROOT / "benchmarks.json").read_text())
    assert (ROOT / "BENCHMARKS.md").read_text() == markdown(results)
