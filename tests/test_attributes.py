"""Attributes beside gender, race and age: an entry of the configuration and a column of the labels, no line of code."""

from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from labelled_faces import FAIRFACE_RACES, write_fairface, write_glasses
from run_folders import Page, without_drawing, without_rendering
from sklearn.metrics import accuracy_score, f1_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import facecls
from facecls import fit
from facecls.data.synthetic import draw_faces, wears_glasses
from facecls.export import __main__ as export
from facecls.predict import __main__ as predict
from facecls.report import __main__ as report

pytestmark = [pytest.mark.slow, pytest.mark.long]

DEMO = f"--config={Path(__file__).parent.parent / 'configs/demo.yaml'}"
QUIET = [
    "--model.trunk=test_resnet",
    "--trainer.precision=32-true",
    "--data.num_workers=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]
GLASSES = "--data.tasks={glasses: {classes: [without, with]}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned who wears glasses, beside gender, race and age."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("glasses"))
        without_rendering(patch)
        words = ["--data.root=synthetic:900", "--trainer.max_epochs=6"]
        fit.main([DEMO, *QUIET, GLASSES, *words])
        return Path("runs/demo/version_0").resolve()


def test_a_fourth_attribute_is_learned_and_measured(run: Path) -> None:
    table = pd.read_parquet(run / "predictions.parquet")
    labels, predicted = table["glasses"].to_numpy(int), table["glasses_predicted"].to_numpy(int)
    assert accuracy_score(labels, predicted) > 0.9
    index = {name: number for number, (name, _) in enumerate(draw_faces(900, 1))}
    assert [wears_glasses(1, index[name]) for name in table["path"]] == labels.astype(bool).tolist()
    metrics = facecls.run.read_run(run).metrics
    assert metrics["test/glasses/accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["test/glasses/f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["temperature/glasses"] != 1
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert {"train/glasses/loss", "val/glasses/accuracy"} <= {*tags["scalars"]}
    assert {"val/glasses/confusion", "val/glasses/reliability"} <= {*tags["images"]}


def test_a_fourth_attribute_is_reported(run: Path) -> None:
    page = Page(run / "report.html")
    table = pd.read_parquet(run / "predictions.parquet")
    right = table["glasses"] == table["glasses_predicted"]
    assert page.values["score/glasses/accuracy"] == pytest.approx(right.mean())
    assert {"confusion-glasses", "reliability-glasses", "data-glasses"} <= {figure["id"] for figure in page.figures}
    assert "glasses" in page.sections["summary"]
    for name, which in (("without", table["glasses"] == 0), ("with", table["glasses"] == 1)):
        of_group = (table["gender"] == table["gender_predicted"])[which].mean()
        found = [
            value
            for key, value in page.values.items()
            if key.startswith("group/") and key.endswith(f"/{name}/gender/accuracy")
        ]
        assert found == [pytest.approx(of_group)], f"gender among faces {name} glasses"


def test_a_fourth_attribute_is_predicted_and_exported(run: Path, tmp_path: Path) -> None:
    best, photos = run / "checkpoints/best.ckpt", tmp_path / "photos"
    manifest = write_glasses(photos, 40, seed=77, size=64)
    assert predict.main([str(best), str(photos), "--out", str(tmp_path / "out.csv"), "--device=cpu"]) == 0
    told = (
        pd.read_csv(tmp_path / "out.csv")
        .dropna(subset="glasses")
        .assign(file=lambda t: t["path"].map(lambda p: Path(p).name))
    )
    truth = pd.read_csv(manifest).set_index("path")["glasses"]
    assert accuracy_score(truth[told["file"]], told["glasses"]) > 0.85
    assert (told["p_glasses_without"] + told["p_glasses_with"]).to_numpy() == pytest.approx(1, abs=1e-5)

    export.main([str(best), str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert "glasses" in {output.name for output in session.get_outputs()}
    files = [str(photos / f"{number}.jpg") for number in range(5)]
    one, other = (facecls.load(path, device="cpu").predict(files) for path in (best, tmp_path / "model.onnx"))
    assert list(one) == list(other)
    assert one["glasses"].tolist() == other["glasses"].tolist()
    np.testing.assert_allclose(one["p_glasses_with"], other["p_glasses_with"], atol=1e-4)


def test_one_attribute_alone_and_two_runs_compared(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    without_drawing(monkeypatch)
    few = ["--data.root=synthetic:900", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    results = fit.main([DEMO, *QUIET, GLASSES, *few, "--model.tasks=[glasses]", "--model.task_weights={}"])
    assert {name.split("/")[1] for name in results if name.endswith("/loss") and name.count("/") == 2} == {"glasses"}
    page = Page(report.main([str(run), "runs/demo/version_0", "--out", "compare.html"]))
    assert any(name.endswith("glasses/accuracy") for name in page.values)
    assert "glasses" in page.sections["disagreements"]


@pytest.mark.usefixtures("unrendered")
def test_the_csv_of_fairface_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = write_fairface(tmp_path / "fairface", 700, seed=5, size=64)
    race = f"--data.tasks={{race: {{classes: [{', '.join(FAIRFACE_RACES)}]}}}}"
    results = fit.main([DEMO, *QUIET, race, f"--data.root={labels}", "--trainer.max_epochs=5"])
    table = pd.read_parquet("runs/demo/version_0/predictions.parquet")
    assert set(table["race"].dropna()) <= set(range(7))
    assert table["race"].nunique() == 7
    assert "test/age/mae_years" not in results
    assert table["age"].isna().all()
    rounded = table["age_predicted"].round()
    inside = (table["age_from"] <= rounded) & (rounded <= table["age_to"])
    assert results["test/age/band_accuracy"] == pytest.approx(inside.mean())
    assert results["test/gender/accuracy"] > 0.6
    page = Page(Path("runs/demo/version_0/report.html"))
    assert page.values["score/age/band_accuracy"] == pytest.approx(inside.mean())
    assert "East Asian" in page.sections["groups"]
