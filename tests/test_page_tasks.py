"""The page about further attributes, other classes and ranges of ages; the verdict at its beginning."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import Page, change, drawn_run, simulated_run
from simulated_predictions import FAIRFACE, FAIRFACE_AGES
from sklearn import metrics

from facecls.data.tasks import UTKFACE, Classification, Tasks, classifications, create_tasks
from facecls.errors import UserError
from facecls.report.page import write_comparison, write_report
from facecls.run import read_run


def _image(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven races, glasses, and half of the ages known as ranges."""
    return simulated_run(tmp_path_factory.mktemp("runs") / "fairface", 700, tasks=FAIRFACE, ranges=0.5)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run, _image, None))


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "predictions.parquet").astype({"gender": int, "race": int, "glasses": int})


def _with(prefix: str, page: Page) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in page.values.items() if name.startswith(prefix)}


def _title(page: Page) -> str:
    found = re.search("<h1>(.*)</h1>", page.text)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("task", classifications(FAIRFACE.values()), ids=lambda task: task.name)
def test_numbers_of_any_classification(task: Classification, page: Page, table: pd.DataFrame) -> None:
    truth, guess = table[task.name], table[f"{task.name}_predicted"]
    found = _with(f"score/{task.name}/", page)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(truth, guess, average="macro"))
    recall = metrics.recall_score(truth, guess, average=None)
    assert [page.values[f"class/{task.name}/{name}/recall"] for name in task.classes] == pytest.approx([*recall])
    cells = metrics.confusion_matrix(truth, guess)
    shown = [[page.values[f"confusion/{task.name}/{row}/{column}"] for column in task.classes] for row in task.classes]
    assert shown == cells.tolist()
    p = table[list(task.probabilities)].to_numpy(float)
    log_loss = metrics.log_loss(truth, p / p.sum(1, keepdims=True))
    assert page.values[f"calibration/{task.name}/after/nll"] == pytest.approx(log_loss, rel=1e-5)
    if len(task.classes) == 2:
        area = metrics.roc_auc_score(truth, p[:, 1])
        assert page.values[f"roc/{task.name}/area"] == pytest.approx(area)
    shares = {name: (truth == code).mean() for code, name in enumerate(task.classes)}
    assert _with(f"data/test/{task.name}/", page) == pytest.approx(shares)
    figures = {figure["id"] for figure in page.figures}
    assert {f"{kind}-{task.name}" for kind in ("confusion", "reliability", "data")} <= figures
    assert (f"roc-{task.name}" in figures) == (len(task.classes) == 2)


def test_groups_by_any_classification(page: Page, table: pd.DataFrame) -> None:
    right = table["gender"] == table["gender_predicted"]
    for name, group in (("all/all/all/with", table["glasses"] == 1), ("all/East Asian/all/all", table["race"] == 3)):
        assert page.values[f"group/{name}/faces"] == group.sum()
        assert page.values[f"group/{name}/gender/accuracy"] == pytest.approx(right[group].mean())
    assert {"with (glasses)", "East Asian (race)"} <= {*re.findall(r'<th scope="row">([^<]*)</th>', page.text)}


def test_attributes_are_named_wherever_they_belong(page: Page, run: Path) -> None:
    assert '<a href="#classes">Gender, race and glasses</a>' in page.text
    assert "Gender, race and glasses are a data set's labels, with its categories" in page.sections["limits"]
    assert "Glasses: most confident mistakes" in page.sections["gallery"]
    kept = pd.read_csv(run / "suspects.csv")
    of_glasses = kept[(kept["kind"] == "model") & (kept["task"] == "glasses")]
    assert page.values["suspects/model/glasses"] == len(of_glasses) > 0
    assert {*of_glasses["label"]} <= {"with", "without"}


def test_ages_and_ranges_are_judged_apart(page: Page, table: pd.DataFrame) -> None:
    ranges = table[table["age_from"].notna()].astype({"age_from": int, "age_to": int})
    off = (table["age_predicted"].astype(float) - table["age"].astype(float)).abs().dropna()
    assert len(off) + len(ranges) == len(table)
    assert page.values["score/age/mae_years"] == pytest.approx(off.mean())
    assert page.values["score/age/mae_years/faces"] == len(off)
    inside = ranges["age_predicted"].round().between(ranges["age_from"], ranges["age_to"])
    assert page.values["score/age/band_accuracy"] == pytest.approx(inside.mean())
    assert page.values["score/age/band_accuracy/faces"] == len(ranges)
    wanted = {}
    for first, last in FAIRFACE_AGES:
        some = ranges["age_from"] == first
        if some.any():
            name = f"{first}+" if last == 116 else f"{first}-{last}"
            wanted |= {f"{name}/faces": some.sum(), f"{name}/band_accuracy": inside[some].mean()}
    assert _with("range/age/", page) == pytest.approx(wanted)
    assert "labelled with a range of ages" in page.sections["age"]
    shares = ranges["age_from"].value_counts(normalize=True)
    assert page.values["data/test/age/20-29"] == pytest.approx(shares[20])


def test_ages_that_are_all_ranges(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 200, tasks=FAIRFACE, ranges=1)
    page, table = Page(write_report(folder, _image, None)), read_run(folder).predictions
    assert table["age"].isna().all()
    inside = table["age_predicted"].round().between(table["age_from"], table["age_to"])
    assert page.values["score/age/band_accuracy"] == pytest.approx(inside.mean())
    assert "score/age/mae_years" not in page.values
    assert "in the labelled range for" in page.sections["summary"]
    assert "Age by labelled range" in page.sections["age"]
    assert "nan" not in "".join(page.sections.values())


def test_tasks_without_labels_or_predictions_are_left_out(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 100, tasks={"glasses": FAIRFACE["glasses"]})
    for name in ("predictions.parquet", "faces.parquet"):
        faces = pd.read_parquet(folder / name)
        nothing = pd.array([pd.NA] * len(faces), "Int16")
        faces.assign(gender=nothing, race=nothing, age=nothing).to_parquet(folder / name, index=False)
    page = Page(write_report(folder, None, None))
    assert list(read_run(folder).tasks) == ["glasses"]
    assert "age" not in page.sections
    assert '<a href="#classes">Glasses</a>' in page.text
    assert "not trained for" not in page.text


BANDS = {"0-9": (0, 9), "10-19": (10, 19), "20-29": (20, 29), "30-39": (30, 39), "40-59": (40, 59), "60+": (60, 116)}


def _guess(*tasks: str):
    """Puts a guess that the label does not matter for in place of a task's predictions."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        rng = np.random.default_rng(1)
        for task in classifications(UTKFACE[name] for name in tasks):
            p = rng.dirichlet(np.full(len(task.classes), 0.2), len(table))  # sure of itself
            table[list(task.probabilities)] = p.astype(np.float32)
            table[f"{task.name}_predicted"] = p.argmax(1)
        if "age" in tasks:
            ages = rng.integers(0, 90, len(table))
            table = table.assign(age_predicted=ages.astype(float), age_low=ages - 1, age_high=ages + 1)
        return table

    return change


def _verdict(page: Page) -> str:
    return " ".join(page.sections["summary"].split("constant guess")[0].split())


@pytest.mark.usefixtures("unrendered")
def test_a_good_model_is_called_so_with_its_worst_groups(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 500)
    page, table = Page(write_report(folder, None, None)), pd.read_parquet(folder / "predictions.parquet")
    verdict, faces = _verdict(page), len(table)
    assert f"The model is better than guessing at gender, race and age, on {faces} tested faces." in verdict
    assert "not shown" not in verdict
    groups = {
        f"{name} ({task.name})": table[task.name] == code
        for task in classifications(UTKFACE.values())
        for code, name in enumerate(task.classes)
    }
    groups |= {f"{name} (age band)": table["age"].between(*ends) for name, ends in BANDS.items()}
    groups = {name: some.to_numpy(bool) for name, some in groups.items() if some.sum() >= 20}
    train = pd.read_parquet(folder / "faces.parquet").query("split == 'train'")
    for task in ("gender", "race"):
        right = (table[task] == table[f"{task}_predicted"]).to_numpy(bool)
        name = min(groups, key=lambda name: right[groups[name]].mean())
        majority = (table[task] == train[task].mode()[0]).mean()
        assert re.search(
            rf"{task.capitalize()}: right for {100 * right.mean():.1f} % \([\d.]+ to [\d.]+\) of {faces} faces; always "
            rf"answering with the most common class would be right for {100 * majority:.1f} %. Worst group: "
            rf"{re.escape(name)}, {100 * right[groups[name]].mean():.1f} % \([\d.]+ to [\d.]+\) of "
            rf"{groups[name].sum()} faces\.",
            verdict,
        )
    off = (table["age_predicted"] - table["age"]).abs().to_numpy(float)
    name = max(groups, key=lambda name: off[groups[name]].mean())
    median = (table["age"] - train["age"].median()).abs().mean()
    assert re.search(
        rf"Age: wrong by {off.mean():.2f} \([\d.]+ to [\d.]+\) years on average over {faces} faces; always answering "
        rf"with the median age would be wrong by {median:.2f} years. Worst group: {re.escape(name)}, "
        rf"{off[groups[name]].mean():.2f} \([\d.]+ to [\d.]+\) years over {groups[name].sum()} faces\.",
        verdict,
    )


@pytest.mark.usefixtures("unrendered")
def test_a_model_that_guesses_is_called_so_and_suspects_no_label(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 300)
    assert "model" in {*pd.read_csv(_reported(folder) / "suspects.csv")["kind"]}
    change(folder, _guess("gender", "race", "age"))
    page, kept = Page(write_report(folder, None, None)), pd.read_csv(folder / "suspects.csv")
    verdict = _verdict(page)
    assert "The model is better" not in verdict
    assert verdict.count(": not shown to be better than guessing, ") + verdict.count(": worse than guessing, ") == 3
    assert {*kept["kind"]} == {"duplicates_disagree"}
    assert page.values["suspects/model"] == 0 < page.values["suspects/duplicates_disagree"]
    assert (
        "not shown to be better than guessing at gender, race or age, so it cannot judge these"
        in page.sections["suspects"]
    )


@pytest.mark.usefixtures("unrendered")
def test_a_model_that_guesses_at_one_task(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 300)
    change(folder, _guess("race"))
    page, kept = Page(write_report(folder, None, None)), pd.read_csv(folder / "suspects.csv")
    verdict = _verdict(page)
    assert "The model is better than guessing at gender and age, but worse than guessing at race, on" in verdict
    assert "Race: worse than guessing, right for" in verdict
    assert {*kept.loc[kept["kind"] == "model", "task"]} == {"gender", "age"}


def _reported(folder: Path) -> Path:
    write_report(folder, None, None)
    return folder


@pytest.mark.usefixtures("unrendered")
def test_drawn_faces_are_called_so_in_the_title(tmp_path: Path, page: Page) -> None:
    assert _title(page) == "Report on " + _title(page).removeprefix("Report on ").removesuffix(" (drawn faces)")
    first, second = drawn_run(tmp_path / "runs/a"), drawn_run(tmp_path / "runs/b")
    drawn = Page(write_report(first, None, None))
    assert _title(drawn) == "Report on runs/a (drawn faces)"
    assert "drawn by a program" in _verdict(drawn)
    both = Page(write_comparison([first, second], None, tmp_path / "both.html"))
    assert _title(both) == "Comparison of a and b (drawn faces)"


def test_runs_with_other_classes_share_the_tasks_that_are_the_same(tmp_path: Path) -> None:
    first = simulated_run(tmp_path / "utkface", 100)
    second = simulated_run(tmp_path / "fairface", 100, tasks=FAIRFACE)
    page = Page(write_comparison([first, second], None, tmp_path / "both.html"))
    scores = {name.removeprefix("utkface/") for name in page.values if name.startswith("utkface/")}
    assert {score.split("/")[0] for score in scores} == {"gender", "age"}


def test_tasks_that_are_not_compared_are_named(tmp_path: Path) -> None:
    first = simulated_run(tmp_path / "a", 100, tasks=FAIRFACE)
    second = simulated_run(tmp_path / "b", 100)
    page = Page(write_comparison([first, second], None, tmp_path / "both.html"))
    assert "Not compared: race (other classes), glasses (only in a)." in page.sections["summary"]
    both = Page(
        write_comparison([first, simulated_run(tmp_path / "c", 100, tasks=FAIRFACE)], None, tmp_path / "c.html")
    )
    assert "Not compared" not in both.sections["summary"]


SWAPPED = create_tasks({"gender": {"classes": ["female", "male"]}})


@pytest.mark.parametrize("tasks", [SWAPPED, FAIRFACE], ids=["other order", "other classes"])
def test_the_tasks_of_a_run_are_known_without_its_options(tasks: Tasks, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60, tasks=tasks)
    known = read_run(folder).tasks
    assert known == tasks
    (folder / "config.yaml").unlink()
    assert read_run(folder).tasks == tasks
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json or config\.yaml beside .* to say what its tasks"):
        read_run(folder)


def test_few_faces_give_no_verdict(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60)
    change(folder, lambda table: table.head(4))
    verdict = _verdict(Page(write_report(folder, None, None)))
    assert "No verdict: of the 4 tested faces, too few are labelled to tell whether" in verdict
    assert verdict.count(": too few labelled faces (4) to tell, ") == 3
    change(folder, lambda table: table.head(1))
    page = Page(write_report(folder, None, None))
    assert "of the 1 tested face, too few" in _verdict(page)
    assert not re.search(r"\b1 (tested |training )?faces", "".join(page.sections.values()))


@pytest.mark.usefixtures("unrendered")
def test_a_task_that_the_training_faces_have_no_labels_of_is_judged(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 300, tasks=FAIRFACE)
    faces = pd.read_parquet(folder / "faces.parquet")
    faces["glasses"] = faces["glasses"].mask(faces["split"] == "train")
    faces.to_parquet(folder / "faces.parquet", index=False)
    page, table = Page(write_report(folder, None, None)), pd.read_parquet(folder / "predictions.parquet")
    most = table["glasses"].value_counts(normalize=True).max()
    assert page.values["trivial/glasses/accuracy"] == pytest.approx(most)
    assert "better than guessing at gender, race, age and glasses" in _verdict(page)
    assert (
        "The constant guess is the most common class for gender and race and the median age for age (from the training "
        "faces); the most common class for glasses (from the tested faces)."
    ) in page.sections["summary"]


def test_what_is_said_about_ranges_without_a_distribution_and_equal_predictions(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 100, ranges=1)
    page = Page(write_report(folder, None, None))
    assert "labelled with ranges of age only" in page.sections["calibration"]
    assert "middle of the most common range for age" in page.sections["summary"]
    change(folder, lambda table: table.drop(columns=["age_low", "age_high", "age_low_raw", "age_high_raw"]))
    assert "so it has no intervals" in Page(write_report(folder, None, None)).sections["age"]
    other = simulated_run(tmp_path / "other", 100)
    change(other, lambda table: table.assign(age_predicted=30.0))
    page = Page(write_report(other, None, None))
    assert "correlation" not in page.sections["age"]
    assert "nan" not in "".join(page.sections.values())


@pytest.mark.usefixtures("unrendered")
def test_tables_of_numbers_are_narrow_enough_for_the_page(tmp_path: Path) -> None:
    attributes = {name: {"classes": ["no", "yes"]} for name in ("beard", "hat", "smile", "blurred")}
    tasks = {**create_tasks(attributes), **FAIRFACE}
    folder = simulated_run(tmp_path / "run", 200, tasks=tasks, ranges=0.5)
    text = write_report(folder, None, None).read_text()
    tables = re.findall(r'<div class="scroll( wraps)?.*?<tbody>\n<tr>(.*?)</tr>', text, flags=re.DOTALL)
    cells = [row.count("<th") + row.count("<td") for wraps, row in tables if not wraps]
    assert len(cells) > 20
    assert max(cells) <= 8  # of short numbers; about 1120 pixels


def test_a_run_of_version_0_1_has_the_tasks_of_utkface(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60)
    assert "tasks" not in json.loads((folder / "config.yaml").read_text())["data"]
    (folder / "metrics.json").write_text("{}")
    assert read_run(folder).tasks == UTKFACE
