"""A checkpoint that version 0.1 trained on drawn faces predicts what it predicted then.

``data/version_0_1.json`` is what version 0.1 said about the faces of ``draw_faces(12, seed=5)``. With as many threads
on the same processor all digits agree; others add up in another order, which changes the last digit of a float32.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import facecls
from facecls.data.synthetic import draw_faces
from facecls.data.tasks import UTKFACE
from facecls.model.checkpoint import read_checkpoint
from facecls.predict.__main__ import main

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "version_0_1.ckpt"
THEN: dict[str, list[dict[str, Any]]] = json.loads((DATA / "version_0_1.json").read_text())
WORDS = ["gender", "race"]
YEARS = ["age_low", "age_high"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, encoded in draw_faces(12, seed=5):
        Path(name).write_bytes(encoded)
    return [row["path"] for row in THEN["none"]]


def _compare(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> None:
    for row, old in zip(now, then, strict=True):
        assert list(row)[: len(old)] == list(old)
        for name, value in old.items():
            if name in ("path", *WORDS):
                assert row[name] == value
            elif name in YEARS:
                assert int(row[name]) == value
            else:
                assert float(row[name]) == pytest.approx(np.float32(value), rel=1e-5), name


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_the_library_predicts_what_version_0_1_did(tta: Any, files: list[str]) -> None:
    table = facecls.load(CHECKPOINT, device="cpu", tta=tta).predict(files, faces="whole")
    _compare(table.to_dict("records"), THEN[tta])  # type: ignore[arg-type]
    assert table["error"].isna().all()


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_the_command_writes_what_version_0_1_did(tta: str, files: list[str]) -> None:
    assert main([str(CHECKPOINT), *files, "--out", "out.csv", "--tta", tta, "--device", "cpu", "--faces=whole"]) == 0
    with Path("out.csv").open(newline="") as stream:
        _compare(list(csv.DictReader(stream)), THEN[tta])


def test_its_tasks_are_those_of_utkface() -> None:
    kept = read_checkpoint(CHECKPOINT)
    assert kept.module.model.tasks == UTKFACE
    assert (kept.data["root"], kept.data["image_size"]) == ("synthetic:300", 64)
    assert kept.is_frame_assumed  # it does not say how its faces lie
