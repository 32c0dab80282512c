"""The model card: the block that hubs read, and what it says about runs that know much or little."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from run_folders import drawn_run, simulated_run
from simulated_predictions import FAIRFACE
from sklearn import metrics

from facecls.analysis.scores import score
from facecls.data.tasks import Tasks, create_tasks
from facecls.report.blocks import Bullets, Section, sentence
from facecls.report.card import write_card
from facecls.run import read_run

UTKFACE_TERMS = "UTKFace is for non-commercial research only"
ODD: Tasks = create_tasks({"hat": {"classes": ["none: [x]", "<b>|`#"]}})


def _card(folder: Path, limits: str = "", **config: object) -> tuple[ModelCard, str]:
    """The card as the hub's own reader sees it, and its text."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    run = read_run(folder)
    said = [Bullets([sentence("{}", limits)])]
    text = write_card(run, score(run.predictions, run.tasks), said, Section("limits", "Limits", said)).read_text()
    return ModelCard(text), text


def _utkface_run(folder: Path) -> Path:
    """A run on faces with UTKFace's names."""
    simulated_run(folder)
    for name in ("faces", "predictions"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        table["path"] = [f"26_1_2_2017011617{number:07}.jpg" for number in range(len(table))]
        table.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def test_hubs_read_the_scores_that_scikit_learn_computes(tmp_path: Path) -> None:
    card, _ = _card(_utkface_run(tmp_path / "base/version_3"))
    assert card.data.model_name == "base/version_3"
    read = {(result.task_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    table = read_run(tmp_path / "base/version_3").predictions
    truth = {task: table[task].astype(int) for task in ("gender", "race", "age")}
    assert read == {
        ("Gender", "accuracy"): pytest.approx(
            metrics.accuracy_score(truth["gender"], table["gender_predicted"]), abs=1e-4
        ),
        ("Gender", "f1"): pytest.approx(
            metrics.f1_score(truth["gender"], table["gender_predicted"], average="macro"), abs=1e-4
        ),
        ("Race", "accuracy"): pytest.approx(metrics.accuracy_score(truth["race"], table["race_predicted"]), abs=1e-4),
        ("Race", "f1"): pytest.approx(
            metrics.f1_score(truth["race"], table["race_predicted"], average="macro"), abs=1e-4
        ),
        ("Age", "mae"): pytest.approx(metrics.mean_absolute_error(truth["age"], table["age_predicted"]), abs=1e-4),
        ("Age", "cs5"): pytest.approx(((truth["age"] - table["age_predicted"]).abs() <= 5).mean(), abs=1e-4),
    }
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {("UTKFace", "test")}
    assert card.data.library_name == "facecls"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "are not known to the run"),
        ({"model": {"trunk": "resnet18", "weights": None}}, "started from random weights"),
        ({"model": {"trunk": "graph", "weights": "weights/VGGFace2_mobilenet.safetensors"}}, "it learnt VGGFace2"),
        ({"model": {"trunk": "graph", "weights": "weights/arcface.safetensors"}}, "are not known to the run"),
        ({"model": None}, "are not known to the run"),
    ],
)
def test_terms_are_said_as_far_as_the_run_knows_them(tmp_path: Path, model: dict[str, object], said: str) -> None:
    card, text = _card(_utkface_run(tmp_path / "run"), **model)
    assert (card.data.license, card.data.to_dict()["license_name"]) == ("other", "non-commercial-research")
    faces, trunk, code = text.partition("## Terms")[2].strip().splitlines()
    assert UTKFACE_TERMS in faces
    assert said in trunk
    assert code == "- facecls itself: MIT."


def test_heads_that_the_model_started_from_are_named(tmp_path: Path) -> None:
    model = {"trunk": "graph", "weights": "w.safetensors"}
    _, text = _card(_utkface_run(tmp_path / "run"), model=model, heads="probe/best.ckpt")
    assert "- Weights it started from: w.safetensors, heads of probe/best.ckpt\n" in text


def test_faces_of_unknown_terms_make_an_unknown_licence(tmp_path: Path) -> None:
    """Others than UTKFace's, and UTKFace's alone of a model that learnt who knows what."""
    card, text = _card(simulated_run(tmp_path / "others"))
    assert card.data.license == "unknown"
    assert UTKFACE_TERMS not in text
    tested = _utkface_run(tmp_path / "tested")
    (tested / "faces.parquet").unlink()
    card, text = _card(tested)
    assert card.data.license == "unknown"
    assert "Faces: their terms are not known to the run" in text


def test_drawn_faces_are_said_to_be_drawn(tmp_path: Path) -> None:
    card, text = _card(drawn_run(tmp_path / "drawn"))
    assert "The faces were drawn by a program" in text
    assert "datasets" not in card.data.to_dict()


@pytest.mark.parametrize("tasks", [FAIRFACE, ODD], ids=["fairface", "odd"])
def test_any_attribute_has_its_scores_and_no_text_is_markup(tmp_path: Path, tasks: Tasks) -> None:
    folder = simulated_run(tmp_path / "a|b: [c]" / "version_0", tasks=tasks)
    card, text = _card(folder, limits="<i>*none* | [x](y)", data={"root": "x|<u>#.csv"})
    assert {result.task_name for result in card.data.eval_results} == {task.title for task in tasks.values()}
    assert card.data.model_name == "a|b: [c]/version_0"
    body = text.partition("\n---\n")[2]
    assert "# a\\|b: \\[c\\]/version\\_0" in body
    assert "- \\<i\\>\\*none\\* \\| \\[x\\](y)" in body
    assert not [line for line in body.splitlines() if "<u>" in line or "<b>" in line]


def test_a_run_without_labels_or_files_has_a_card(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "bare")
    for name in ("metrics.json", "faces.parquet"):
        (folder / name).unlink()
    table = pd.read_parquet(folder / "predictions.parquet")
    table[["gender", "race", "age"]] = pd.NA
    table.to_parquet(folder / "predictions.parquet", index=False)
    (folder / "config.yaml").write_text("{}")
    card, text = _card(folder)
    assert "model-index" not in yaml.safe_load(text.split("---\n")[1])
    assert card.data.eval_results is None
    for known in ("Trunk", "Weights it started from", "Image size", "Faces seen in training", "Device", "Split"):
        assert f"- {known}: unknown\n" in text, known
