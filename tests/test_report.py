"""The command: one run's page again, and several runs side by side."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import Page, change, drawn_run
from sklearn.metrics import accuracy_score, f1_score
from trained_model import save_checkpoint

from facecls.data.synthetic import write_faces
from facecls.errors import UserError, command
from facecls.report import __main__ as report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return drawn_run(tmp_path / "runs" / "demo" / "version_0")


@pytest.mark.usefixtures("unrendered")
def test_pictures_are_read_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report.main([str(run)])
    assert path == run / "report.html"
    page = Page(path)
    assert len(page.images) > 24
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    out = capsys.readouterr().out
    assert f"wrote {path}" in out
    assert "no Grad-CAM maps: Expected a checkpoint" in out
    assert "checkpoint was not found" in page.sections["gallery"]


@pytest.mark.usefixtures("unrendered")
def test_what_the_heads_looked_at(run: Path) -> None:
    (run / "checkpoints").mkdir()
    save_checkpoint(run / "checkpoints" / "best.ckpt")
    page = Page(report.main([str(run)]))
    assert sum(image["alt"].startswith("Grad-CAM map") for image in page.images) >= 3


@pytest.mark.usefixtures("unrendered")
def test_faces_that_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "moved", 60, seed=3)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("synthetic:60", "gone"))
    page = Page(report.main([str(run)]))
    assert not page.images
    assert "there is nothing at gone" in capsys.readouterr().out
    assert "not found" in page.sections["gallery"]
    assert Page(report.main([str(run), "--data.root", str(tmp_path / "moved")])).images
    with pytest.raises(UserError, match="nothing at nowhere"):
        report.main([str(run), "--data.root", "nowhere"])
    with pytest.raises(UserError, match="are missing or changed"):
        report.main([str(run), "--data.root", "synthetic:5"])
    assert Page(run / "report.html").images  # a page is not replaced by a mistake


def test_mistakes_end_with_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for words in (
        [str(tmp_path / "empty")],
        [str(tmp_path / "nowhere")],
        [str(run), "--out", "a.html"],
        [str(run)] * 2,
    ):
        with pytest.raises(SystemExit) as ended, command("facecls.report"):
            report.main(words)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("facecls.report: error: Expected")


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "demo" / "version_1"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace('"seed_everything": 3', '"seed_everything": 4'))

    def worse(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[:9, "race_predicted"] = (table["race_predicted"] + 1) % 5
        return table.assign(age_predicted=table["age_predicted"] + np.where(table.index < 4, 9, 1)).iloc[:-2]

    change(other, worse)
    page = Page(report.main([str(run), str(other), "--out", str(tmp_path / "both.html")]))
    assert [*page.sections] == ["summary", "differences", "disagreements"]
    first, second = (pd.read_parquet(folder / "predictions.parquet") for folder in (run, other))
    first = first.iloc[:-2]
    a, b = "version_0", "version_1"
    truth = first.astype({"gender": int, "race": int, "age": int})
    wanted = {}
    for name, table in ((a, first), (b, second)):
        for task in ("gender", "race"):
            wanted[f"{name}/{task}/accuracy"] = accuracy_score(truth[task], table[f"{task}_predicted"])
            wanted[f"{name}/{task}/f1_macro"] = f1_score(truth[task], table[f"{task}_predicted"], average="macro")
        off = (table["age_predicted"] - truth["age"]).abs()
        wanted |= {f"{name}/age/mae_years": off.mean(), f"{name}/age/cs5": (off <= 5).mean()}
    values = page.values
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    for score in ("gender/accuracy", "race/accuracy", "race/f1_macro", "age/mae_years"):
        key, difference = f"{a}/{b}/{score}", wanted[f"{b}/{score}"] - wanted[f"{a}/{score}"]
        assert values[f"difference/{key}"] == pytest.approx(difference, rel=1e-6)
        assert values[f"low/{key}"] <= difference <= values[f"high/{key}"]
    assert values["faces/shared"] == len(first) == values[f"faces/{b}"] == values[f"faces/{a}"] - 2
    assert (values["disagreements/race"], values["disagreements/age"]) == (10, 4)
    assert "disagreements/gender" not in values
    assert len(page.images) == 14
    assert "version_0 is better" in page.sections["differences"]
    assert "seed_everything" in page.sections["summary"]
    assert {"data.root", "data.image_size"}.isdisjoint(page.sections["summary"].split())
    for figure in page.figures:
        assert figure["role"] == "img"
        assert any(character.isdigit() for character in figure["caption"])


def test_runs_without_pictures_or_a_common_task(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "other" / "version_0"
    shutil.copytree(run, other)
    change(run, lambda table: table[["path", "sha1", "split", "gender", "race", "age", "age_predicted"]])
    change(other, lambda table: table[[c for c in table if not c.startswith("age_")]])
    (run / "config.yaml").unlink()
    path = report.main([str(run), str(other)])
    assert path == run / "compare.html"
    page = Page(path)
    assert "no task with labels in common" in page.sections["differences"]
    assert "not found" in page.sections["disagreements"]
    change(other, lambda table: table.assign(sha1="0"))
    with pytest.raises(UserError, match="share none"):
        report.main([str(run), str(other)])
