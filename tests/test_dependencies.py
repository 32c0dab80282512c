"""The two files of constraints say what pyproject.toml says."""

import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    canonicalize_name(requirement.name): requirement
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
}


def _constraints(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    versions = {canonicalize_name(package): Version(version) for package, version in pairs}
    assert len(versions) == len(lines)
    return versions


def test_lowest_versions_are_the_bounds() -> None:
    bounds = {
        name: [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==")]
        for name, requirement in REQUIREMENTS.items()
    }
    assert {name: [version] for name, version in _constraints("constraints-lowest.txt").items()} == bounds


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_tested_versions_are_allowed(name: str) -> None:
    assert _constraints("constraints.txt")[name] in REQUIREMENTS[name].specifier
