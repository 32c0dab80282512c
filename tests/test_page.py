"""The page about a run: its numbers against scikit-learn's and SciPy's, its form, and runs that left little."""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from run_folders import Page, change, drawn_run, simulated_run
from scipy import stats
from sklearn import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained_model import save_checkpoint

from facecls.analysis.groups import group_table, score_groups
from facecls.analysis.suspects import suspects
from facecls.data.store import decode
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE, classifications
from facecls.errors import UserError
from facecls.events import read_scalars
from facecls.model.checkpoint import read_checkpoint
from facecls.model.heads import HeadOptions
from facecls.model.network import FaceModel
from facecls.model.trunk import create_trunk
from facecls.report.page import write_report
from facecls.run import read_run

pytestmark = pytest.mark.slow

SECTIONS = [
    "summary",
    "data",
    "curves",
    "classes",
    "age",
    "groups",
    "calibration",
    "gallery",
    "suspects",
    "limits",
]
GENDERS, RACES = (task.classes for task in classifications(UTKFACE.values()))
BANDS = {"0-9": (0, 9), "10-19": (10, 19), "20-29": (20, 29), "30-39": (30, 39), "40-59": (40, 59), "60+": (60, 116)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = simulated_run(tmp_path_factory.mktemp("runs") / "simulated")
    logger = TensorBoardLogger(folder.parent, folder.name, "", default_hp_metric=False)
    for epoch in range(3):
        values = {"train/race/loss": 2.5 - epoch, "val/race/loss": 3.5 - epoch, "epoch": epoch, "lr": 0.1**epoch}
        logger.log_metrics(values, 10 * epoch + 9)
    logger.finalize("success")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run, None, None))


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "predictions.parquet").astype({"gender": int, "race": int, "age": int})


def test_the_model_card_says_what_the_page_says(run: Path, page: Page) -> None:
    card = " ".join((run / "model_card.md").read_text().replace("\\", "").split())
    said = [line for line in card.partition("## Groups")[2].split(" - ") if "Worst group" in line]
    assert len(said) == 3
    summary, limits = (" ".join(page.sections[name].split()) for name in ("summary", "limits"))
    assert all(line.partition(" ## ")[0].strip() in summary for line in said)
    listed = card.partition("## Limits")[2].partition("## Terms")[0].split(" - ")[1:]
    assert len(listed) > 4
    assert all(line.strip() in limits for line in listed)


def _scores(table: pd.DataFrame) -> dict[str, float]:
    wanted = {}
    for task in ("gender", "race"):
        truth, guess = table[task], table[f"{task}_predicted"]
        wanted[f"{task}/accuracy"] = metrics.accuracy_score(truth, guess)
        wanted[f"{task}/f1_macro"] = metrics.f1_score(truth, guess, average="macro")
    off = (table["age_predicted"] - table["age"]).abs()
    return wanted | {"age/mae_years": off.mean(), "age/cs5": (off <= 5).mean()}


def _with(prefix: str, page: Page) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in page.values.items() if name.startswith(prefix)}


def test_scores_stand_beside_trivial_ones(page: Page, run: Path, table: pd.DataFrame) -> None:
    found, wanted = _with("score/", page), _scores(table)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    right = (table["race"] == table["race_predicted"]).to_numpy(float)
    interval = stats.bootstrap((right,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert [found["race/accuracy/low"], found["race/accuracy/high"]] == pytest.approx(list(interval), abs=0.006)
    assert {found[f"{name}/faces"] for name in wanted} == {len(table)}
    faces = pd.read_parquet(run / "faces.parquet")
    train = faces[faces["split"] == "train"]
    guess = {f"{task}_predicted": train[task].mode()[0] for task in ("gender", "race")}
    assert _with("trivial/", page) == pytest.approx(
        _scores(table.assign(**guess, age_predicted=train["age"].median())), rel=1e-6
    )
    assert not _with("notebook/", page)  # these faces are not UTKFace's


def test_numbers_of_classes(page: Page, table: pd.DataFrame) -> None:
    for task, names in (("gender", GENDERS), ("race", RACES)):
        truth, guess = table[task], table[f"{task}_predicted"]
        columns = metrics.precision_recall_fscore_support(truth, guess, labels=range(len(names)))
        wanted = {
            f"{name}/{score}": column[code]
            for score, column in zip(("precision", "recall", "f1", "faces"), columns, strict=True)
            for code, name in enumerate(names)
        }
        assert _with(f"class/{task}/", page) == pytest.approx(wanted)
        cells = metrics.confusion_matrix(truth, guess, labels=range(len(names)))
        found = _with(f"confusion/{task}/", page)
        assert [[found[f"{row}/{column}"] for column in names] for row in names] == cells.tolist()
        assert (found["right"], found["faces"]) == (np.trace(cells), len(table))
        shares = {name: value for name, value in found.items() if name.endswith("/share")}
        row, column = (names.index(part) for part in next(iter(shares)).split("/")[:2])
        wrong = cells - np.diag(np.diag(cells))
        assert wrong[row, column] == wrong.max()
        assert [*shares.values()] == pytest.approx([cells[row, column] / cells[row].sum()])
    assert page.values["roc/gender/area"] == pytest.approx(metrics.roc_auc_score(table["gender"], table["p_female"]))
    men = table[table["gender"] == 0]
    assert page.values["roc/gender/false_positive_rate"] == pytest.approx((men["gender_predicted"] == 1).mean())


def test_numbers_of_age(page: Page, table: pd.DataFrame) -> None:
    error = table["age_predicted"].astype(float) - table["age"]
    inside = (table["age_low"] <= table["age"]) & (table["age"] <= table["age_high"])
    width = (table["age_high"] - table["age_low"]).astype(float)
    wanted = {
        "correlation": stats.pearsonr(table["age"], table["age_predicted"]).statistic,
        "bias_years": error.mean(),
        "median_error": error.abs().median(),
        "coverage": inside.mean(),
        "width_years": width.mean(),
    }
    assert _with("age/", page) == pytest.approx(wanted, rel=1e-6)
    wanted = {}
    for band, (low, high) in BANDS.items():
        some = table["age"].between(low, high)
        wanted |= {f"{band}/faces": some.sum(), f"{band}/mae_years": error[some].abs().mean()}
        wanted |= {f"{band}/bias_years": error[some].mean(), f"{band}/cs5": (error[some].abs() <= 5).mean()}
        wanted |= {f"{band}/coverage": inside[some].mean(), f"{band}/width_years": width[some].mean()}
    assert _with("band/age/", page) == pytest.approx(wanted, rel=1e-6)
    wanted = {str(years): stats.percentileofscore(error.abs(), years, "weak") / 100 for years in (1, 5, 10, 15)}
    assert _with("cumulative/age/", page) == pytest.approx(wanted)


def test_numbers_of_groups(page: Page, run: Path, table: pd.DataFrame) -> None:
    found = _with("group/", page)
    groups = {
        "/".join(row[:3]): row for row in group_table(score_groups(read_run(run).predictions, UTKFACE)).to_numpy()
    }
    labelled = {name: found.pop(name) for name in [*found] if re.search("/(accuracy|mae_years)/faces$", name)}
    for name, faces in labelled.items():  # of the worst groups; all faces have all labels
        assert faces == found[f"{'/'.join(name.split('/')[:3])}/faces"]
    assert len(labelled) == 3
    assert {name.rsplit("/", 1)[0] for name in found if name.endswith("/faces")} == {*groups}
    assert len(groups) == 1 + 2 + 5 + 6 + 2 * 5 * 6
    for group in groups:
        some = table
        gender, race, band = group.split("/")
        some = some if gender == "all" else some[some["gender"] == GENDERS.index(gender)]
        some = some if race == "all" else some[some["race"] == RACES.index(race)]
        some = some if band == "all" else some[some["age"].between(*BANDS[band])]
        assert found.pop(f"{group}/faces") == len(some)
        wanted = _scores(some) if len(some) >= 20 else {}
        for task, name in (("gender", gender), ("race", race)):
            if name != "all":
                wanted.pop(f"{task}/f1_macro", None)
        for score, value in wanted.items():
            assert found.pop(f"{group}/{score}") == pytest.approx(value, rel=1e-6), f"{group} {score}"
            low, high = found.pop(f"{group}/{score}/low"), found.pop(f"{group}/{score}/high")
            assert low <= value <= high or value in (0, 1)
    assert not found  # nothing is said about groups under 20
    assert "< 20 faces" in page.sections["groups"]


def _ece(p: np.ndarray, truth: np.ndarray) -> float:
    confidence, right = p.max(1), p.argmax(1) == truth
    bins = [(confidence > low) & (confidence <= low + 1 / 15) for low in np.arange(15) / 15]
    return sum(some.mean() * abs(confidence[some].mean() - right[some].mean()) for some in bins if some.any())


def test_numbers_of_calibration(page: Page, table: pd.DataFrame) -> None:
    wanted = {}
    for task, names in (("gender", GENDERS), ("race", RACES)):
        p = table[[f"p_{name}" for name in names]].to_numpy(float)
        temperature = table[f"temperature_{task}"].iloc[0]
        before = p**temperature
        for stage, values, t in (("before", before / before.sum(1, keepdims=True), 1), ("after", p, temperature)):
            key = f"{task}/{stage}"
            wanted |= {f"{key}/ece": _ece(values, table[task].to_numpy()), f"{key}/temperature": t}
            values = values / values.sum(1, keepdims=True)
            wanted |= {f"{key}/nll": metrics.log_loss(table[task], values), f"{key}/faces": len(table)}
    for stage, ending, t in (("before", "_raw", 1), ("after", "", table["temperature_age"].iloc[0])):
        low, high = table[f"age_low{ending}"], table[f"age_high{ending}"]
        wanted |= {f"age/{stage}/coverage": table["age"].between(low, high).mean(), f"age/{stage}/temperature": t}
        wanted |= {f"age/{stage}/width": (high.astype(int) - low).mean(), f"age/{stage}/faces": len(table)}
    assert _with("calibration/", page) == pytest.approx(wanted, rel=1e-5)


def test_numbers_of_data_and_limits(page: Page, run: Path, table: pd.DataFrame) -> None:
    faces = pd.read_parquet(run / "faces.parquet")
    found = _with("data/", page)
    for split, part in faces.groupby("split"):
        wanted = {f"{split}/gender/{name}": (part["gender"] == code).mean() for code, name in enumerate(GENDERS)}
        wanted |= {f"{split}/race/{name}": (part["race"] == code).mean() for code, name in enumerate(RACES)}
        for quantile in (25, 50, 75):
            wanted[f"{split}/age/q{quantile}"] = np.percentile(part["age"].astype(int), quantile)
        assert {name: found.pop(name) for name in wanted} == pytest.approx(wanted)
    assert not found
    duplicates = faces.groupby("sha1").filter(lambda some: len(some) > 1).groupby("sha1")
    assert _with("duplicates/", page) == {
        "faces": duplicates.size().sum(),
        "groups": len(duplicates),
        "disagreeing": sum(len(some[["gender", "race", "age"]].drop_duplicates()) > 1 for _, some in duplicates),
        "crossing": sum(some["split"].nunique() > 1 for _, some in duplicates),
    }
    assert _with("rejects/", page) == {"truncated": 2, "not an image": 1}
    assert page.values["rejects"] == 3
    assert _with("unread/", page) == {"race/no such race": 2, "age/no age": 1}
    assert _with("faces/", page) == {"tested": len(table), **faces["split"].value_counts()}
    cells = group_table(score_groups(table, UTKFACE)).query("gender != 'all' and race != 'all'")
    limits = _with("limits/", page)
    assert (limits["combinations"], limits["thin"]) == (60, (cells["faces"] < 20).sum())
    assert limits["thin_share"] == pytest.approx(cells.query("faces < 20")["faces"].sum() / len(table))
    train = faces[faces["split"] == "train"]
    assert limits["train/race/white"] == pytest.approx((train["race"] == 0).mean())


def test_every_number_is_checked_here(page: Page) -> None:
    checked = "score trivial class confusion roc age band cumulative group calibration data duplicates rejects faces"
    checked += " limits curves suspects unread"
    assert {name.split("/")[0] for name in page.values} == {*checked.split()}


def test_numbers_are_shown_as_they_are(page: Page) -> None:
    for name, text in page.shown.items():
        value = page.values[name]
        number = float(re.sub("[ %,+]", "", text))
        last = 10.0 ** -len(text.rstrip(" %").partition(".")[2])
        percent = "%" in text or (
            name.startswith(("score", "group")) and name.endswith(("/low", "/high")) and value <= 1
        )
        if percent and "years" not in name:
            value *= 100
        assert abs(number - value) <= last / 2 + 1e-9 or "e-" in text or "lr" in name, f"{name}: {text} for {value}"


def test_curves_are_those_that_tensorboard_shows(page: Page, run: Path) -> None:
    shown = EventAccumulator(str(run)).Reload()
    found = read_scalars(run)
    assert {*found} == {*shown.Tags()["scalars"]}
    for tag, series in found.items():
        assert [(event.step, event.value) for event in shown.Scalars(tag)] == [*series.items()]
    assert _with("curves/", page) == pytest.approx(
        {"val/race/loss/first": 3.5, "val/race/loss/last": 1.5, "lr/first": 1, "lr/last": 0.01}
    )


def test_a_curve_that_was_cut_and_one_that_was_resumed(run: Path, tmp_path: Path) -> None:
    (events,) = run.glob("events*")
    whole = events.read_bytes()
    (tmp_path / "events.out.tfevents.1.a").write_bytes(whole[:-30])
    assert [*read_scalars(tmp_path)["lr"].index] == [9, 19]
    (tmp_path / "events.out.tfevents.2.b").write_bytes(whole)
    assert [*read_scalars(tmp_path)["lr"]] == pytest.approx([1, 0.1, 0.01])
    (tmp_path / "events.out.tfevents.3.c").write_bytes(b"\0" * 40 + b"nonsense" * 9)
    assert [*read_scalars(tmp_path)["lr"]] == pytest.approx([1, 0.1, 0.01])


def test_suspects_come_in_three_lists(page: Page, run: Path) -> None:
    kept, faces = pd.read_csv(run / "suspects.csv"), pd.read_parquet(run / "faces.parquet")
    table = read_run(run).predictions
    assert kept["kind"].drop_duplicates().tolist() == ["model", "duplicates_disagree"]  # the model's own first
    found = _with("suspects/", page)
    for kind, some in kept.groupby("kind"):
        assert some["score"].is_monotonic_decreasing
        assert found.pop(kind) == len(some) == len(some[["path", "task"]].drop_duplicates())
        assert {name: found.pop(f"{kind}/{name}") for name in UTKFACE} == Counter(some["task"])
    assert found == {"duplicate": 0}
    alone = suspects(table, UTKFACE)
    assert {*alone.loc[alone["kind"] == "model", "path"]} == {*kept.loc[kept["kind"] == "model", "path"]}
    # of duplicates all labels that a duplicate contradicts, of faces that were not tested too
    duplicates = faces.groupby("sha1").filter(lambda some: len(some) > 1)
    wanted = {
        (path, task)
        for _, some in duplicates.groupby("sha1")
        for task in UTKFACE
        if some[task].nunique() > 1
        for path in some["path"]
    }
    listed = kept[kept["kind"] == "duplicates_disagree"]
    assert {*zip(listed["path"], listed["task"], strict=True)} == wanted
    assert listed["seen_in_training"].any()


@pytest.mark.usefixtures("unrendered")
def test_duplicates_that_agree_and_labels_that_are_in_two_lists(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60)

    def with_duplicates(table: pd.DataFrame) -> pd.DataFrame:
        labels = ["race", "age"]
        table.loc[[1, 3], labels] = table.loc[[0, 2], labels].to_numpy()
        table.loc[[0, 1, 2, 3], "sha1"] = ["first", "first", "second", "second"]
        table.loc[[0, 1, 2, 3], "gender"] = [0, 1, 1, 1]
        table.loc[0, ["gender_predicted", "p_male", "p_female"]] = [1, 0.01, 0.99]
        return table

    change(folder, with_duplicates)
    (folder / "faces.parquet").unlink()
    page, kept = Page(write_report(folder, None, None)), pd.read_csv(folder / "suspects.csv")
    paths = pd.read_parquet(folder / "predictions.parquet")["path"]
    values = _with("suspects/", page)
    assert (values["duplicates_disagree"], values["duplicates_disagree/gender"], values["duplicate"]) == (2, 2, 1)
    assert {*kept.loc[(kept["path"] == paths[0]) & (kept["task"] == "gender"), "kind"]} == {
        "model",
        "duplicates_disagree",
    }
    assert kept[["path", "other", "kind"]].iloc[-1].tolist() == [paths[3], paths[2], "duplicate"]
    titles = ("Labels that the model contradicts", "Duplicates with contradicting labels", "Other duplicates")
    places = [page.sections["suspects"].index(title) for title in titles]
    assert places == sorted(places)


def test_form(page: Page) -> None:
    assert [*page.sections] == SECTIONS
    assert {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")} == {
        f"#{i}" for i in SECTIONS
    }
    for figure in page.figures:
        assert figure["role"] == "img"
        assert figure["label"]
        assert re.search(r"\d", figure["caption"]), figure["id"]
    assert len(page.figures) >= 17
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    for tag, name, value in page.attributes:
        assert "://" not in value or name == "value", f"{tag} {name} {value}"
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/")), f"{tag} {name} {value}"
    style = re.search(r"<style>(.*?)</style>", page.text, flags=re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import", style[1])
    assert "prefers-color-scheme: dark" in style[1]
    assert "@media print" in style[1]


def test_texts_are_only_texts(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "<script>alert(1)<")
    change(folder, lambda table: table.assign(path="<img src=x>" + table["path"]))
    (folder / "config.yaml").write_text('{"data": {"root": "</pre><script>alert(2)"}}')
    page = Page(write_report(folder, None, None))
    assert write_report(folder, None, None).read_text() == page.text  # the same, whenever it is written
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "alert(2)" in page.sections["summary"]


def _without(*names: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.drop(columns=[c for c in table if any(re.fullmatch(name, c) for name in names)])


GENDER = _without("race_.*", "p_(white|black|asian|indian|others)", "age_.*", "temperature_(race|age)")
NO_SPREAD = _without("age_(low|high).*", "temperature_.*")
LITTLE = {
    "one task": (GENDER, {"age": "not trained for age", "classes": "not trained for race"}),
    "no labels of race": (lambda table: table.assign(race=pd.NA), {"classes": "is labelled for race"}),
    "no labels": (
        lambda table: table.assign(gender=pd.NA, race=pd.NA, age=pd.NA),
        {"groups": "no labels", "calibration": "calibration cannot be checked", "age": "is labelled for age"},
    ),
    "old, regression": (NO_SPREAD, {"age": "no intervals", "calibration": "temperature of race was not saved"}),
    "one face": (lambda table: table.head(1), {"groups": "No two groups"}),
    "one class": (lambda table: table[table["gender"] == 0], {}),
    "not fitted, some labels missing": (
        lambda table: table.assign(
            age=table["age"].mask(table.index % 3 == 0),
            race=table["race"].mask(table.index % 4 == 0),
            **dict.fromkeys(("temperature_gender", "temperature_race", "temperature_age"), 1.0),
        ),
        {"calibration": "No temperatures were fitted"},
    ),
}


@pytest.mark.parametrize("kind", LITTLE)
def test_what_is_missing_is_said(kind: str, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 120)
    less, said = LITTLE[kind]
    change(folder, less)
    for name in ("faces.parquet", "metrics.json", "config.yaml", "rejects.csv") if kind != "one class" else ():
        (folder / name).unlink()
    page = Page(write_report(folder, None, None))
    assert [*page.sections] == SECTIONS
    missing = {"curves": "No curves", "gallery": "images were not found"} | said
    if kind != "one class":
        missing |= {"data": "no faces.parquet", "summary": "no config.yaml"}
    for section, sentence in missing.items():
        assert sentence in page.sections[section], section
    assert all(len(text.strip()) > 20 for text in page.sections.values())
    assert "nan" not in "".join(page.sections.values())


@pytest.mark.usefixtures("unrendered")
def test_the_seed_numbers_stand_beside_utkface_only(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60)
    change(folder, lambda table: table.assign(path="UTKFace/26_1_2_20170116174525125.jpg"))
    found = _with("notebook/", Page(write_report(folder, None, None)))
    assert found == {"gender/accuracy": 0.944, "race/accuracy": 0.875, "age/mae_years": 7.38}
    (folder / "config.yaml").write_text('{"data": {"root": "synthetic:60"}}')
    assert not read_run(folder).is_utkface


@pytest.mark.parametrize(
    ("name", "content"), [("predictions.parquet", "no"), ("config.yaml", "a: [1"), ("metrics.json", "3")]
)
def test_broken_files(name: str, content: str, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 60)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        write_report(folder, None, None)
    (folder / name).unlink()


@pytest.mark.usefixtures("unrendered")
def test_gallery(tmp_path: Path) -> None:
    folder = drawn_run(tmp_path / "run")
    table = pd.read_parquet(folder / "predictions.parquet")
    faces = read_table("synthetic:60", 3, UTKFACE)
    place = {path: number for number, path in enumerate(faces.faces["path"])}

    def image(row: int) -> np.ndarray:
        return decode(faces.store[place[table["path"].iloc[row]]])

    model = read_checkpoint(save_checkpoint(tmp_path / "model.ckpt")).module.model
    page = Page(write_report(folder, image, model))
    wrong = {
        "gender": (table["gender"] != table["gender_predicted"]).sum(),
        "race": (table["race"] != table["race_predicted"]).sum(),
        "age": ((table["age"] - table["age_predicted"]).abs() > 6).sum(),
    }
    few = {task: min(12, number) for task, number in wrong.items()}
    tiles = page.text.split("<li")
    grid = [tile for tile in tiles if "Random faces" not in tile and re.search(r'alt="face \d+"', tile)]
    assert len(grid) == 24 + sum(few.values())
    for tile in grid:
        (row,) = map(int, re.findall(r'alt="face (\d+)"', tile))
        face = table.iloc[row]
        marks = [face[task] != face[f"{task}_predicted"] for task in ("gender", "race")]
        assert tile.count("<b>✗") == sum(map(int, [*marks, abs(face["age"] - face["age_predicted"]) > 6]))
    assert sum(image["alt"].startswith("Grad-CAM map") for image in page.images) == sum(few.values())
    assert "a Grad-CAM map of the race head" in page.sections["gallery"]
    assert all(image["alt"] for image in page.images)


@pytest.mark.usefixtures("unrendered")
def test_a_trunk_without_one_map_of_features(tmp_path: Path) -> None:
    folder = drawn_run(tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace('"image_size": 64', '"image_size": 240'))
    model = FaceModel(create_trunk("crossvit_tiny_240"), UTKFACE.values(), HeadOptions())
    page = Page(write_report(folder, lambda row: np.full((64, 64, 3), row, np.uint8), model))
    assert page.sections["gallery"].count("There are no Grad-CAM maps: Expected features") == 1
    assert "Beside each face" not in page.sections["gallery"]
    assert sum(image["alt"].startswith("face") for image in page.images) > 24
    assert not [image for image in page.images if image["alt"].startswith("Grad-CAM map")]


@pytest.mark.usefixtures("unrendered")
def test_confident_mistakes_come_first(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 200)
    table = pd.read_parquet(folder / "predictions.parquet")
    page = write_report(folder, lambda row: np.full((64, 64, 3), row, np.uint8), None).read_text()
    tiles = page.split("Race: most confident mistakes")[1].split("</ul>")[0]
    rows = [int(row) for row in re.findall(r'alt="face (\d+)"', tiles)]
    wrong = table[table["race"] != table["race_predicted"]]
    sure = wrong[[f"p_{name}" for name in RACES]].max(axis=1)
    assert [*sure[rows]] == sorted(sure, reverse=True)[:12]


def test_size_with_5000_faces(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run", 5000)

    def noise(row: int) -> np.ndarray:  # nothing compresses worse
        return np.random.default_rng(row).integers(0, 256, (64, 64, 3), np.uint8)

    path = write_report(folder, noise, None)
    assert path.stat().st_size < 8e6
    encoded = base64.b64decode(Page(path).images[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(encoded)).size == (112, 112)
