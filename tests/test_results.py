"""The page about many runs: its numbers against pandas' and scikit-learn's, its rows, and what it keeps."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from run_folders import simulated_run
from sklearn import metrics

from facecls.errors import UserError
from facecls.results.__main__ import main
from facecls.results.page import MARK

GLASSES = {"data": {"root": "m.csv", "tasks": {"glasses": {"classes": ["without", "with"]}}}}


def _run(folder: Path, name: str, seed: int, **options: object) -> Path:
    """A run with a test: the scores of its predictions, and options."""
    simulated_run(folder, faces=600, seed=seed)
    table = pd.read_parquet(folder / "predictions.parquet")
    scores = {
        "test/gender/accuracy": metrics.accuracy_score(table["gender"], table["gender_predicted"]),
        "test/race/f1_macro": metrics.f1_score(table["race"], table["race_predicted"], average="macro"),
        "test/age/mae_years": metrics.mean_absolute_error(table["age"], table["age_predicted"]),
    }
    facts = {"faces/train": 616, "faces/test": 584, "faces_seen": 79_840, "seconds": 60.0 * seed, "device": "cpu | 2"}
    (folder / "metrics.json").write_text(json.dumps(scores | facts))
    _configure(folder, name, seed, **options)
    return folder


def _configure(folder: Path, name: str, seed: int, **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"name": name, "seed_everything": seed, "model": {"dropout": 0.2}, "data": {"root": "some/UTKFace.tar.gz"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | options))


def _trial(
    folder: Path, seed: int, losses: list[float], accuracies: list[float], every: int = 1, **options: object
) -> None:
    """A run without a test: options and curves, of a validation every so many epochs."""
    _configure(folder, "trial", seed, **options)
    logger = TensorBoardLogger(folder.parent, "", folder.name, default_hp_metric=False)
    for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
        values = {"val/loss": loss, "val/gender/accuracy": accuracy, "epoch": epoch * every + every - 1}
        logger.log_metrics(values, epoch)
    logger.finalize("success")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes of one name, three runs and one, and another one; runs/base has runs two folders below as well."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        _run(folder / f"base/version_{seed}", "base", seed)
    _run(folder / "base/version_4", "base", 4, model={"dropout": 0.4}, ema=0.99)
    _run(folder / "old/probe/version_0", "probe", 5, probe=True)
    _run(folder / "tuned/version_0", "tuned", 6, heads="probe/best.ckpt")
    return folder


def _tables(page: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each table, by the heading above it."""
    tables: dict[str, list[dict[str, str]]] = {}
    head: list[str] = []
    title = ""
    for line in page.read_text().partition(MARK)[0].splitlines():
        cells = [cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if line.startswith("#"):
            title, head = line.lstrip("# "), []
        elif line.startswith("|") and not head:
            head = cells
        elif line.startswith("|") and set(line) - set("|- "):
            assert len(cells) == len(head)
            tables.setdefault(title, []).append(dict(zip(head, cells, strict=True)))
    return tables


def _spread(values: list[float], digits: int) -> str:
    return (
        f"{np.mean(values):.{digits}f} \N{PLUS-MINUS SIGN} {np.std(values, ddof=1):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def test_runs_that_differ_in_the_seed_are_one_row_with_their_spread(runs: Path, tmp_path: Path) -> None:
    tables = _tables(main([str(runs / "base"), str(runs / "old"), "--out", str(tmp_path / "RESULTS.md")]))
    rows = tables["Scores of the test"]
    names = [row["recipe"] for row in rows]
    assert names == ["base (without ema, model.dropout 0.2)", "base (ema 0.99, model.dropout 0.4)", "probe"]
    assert [row["runs"] for row in rows] == ["3", "1", "1"]
    scores = [json.loads((runs / f"base/version_{seed}/metrics.json").read_text()) for seed in (1, 2, 3, 4)]
    of = {name: [each[f"test/{name}"] for each in scores] for name in ("gender/accuracy", "age/mae_years")}
    assert rows[0]["Gender accuracy (%)"] == _spread([100 * value for value in of["gender/accuracy"][:3]], 1)
    assert rows[0]["Mean absolute error of age (years)"] == _spread(of["age/mae_years"][:3], 2)
    assert rows[1]["Mean absolute error of age (years)"] == f"{of['age/mae_years'][3]:.2f}"
    assert "Race macro F1 (%)" in rows[0]
    assert "Gender macro F1 (%)" not in rows[0]  # none of the runs has it
    tested = [pd.read_parquet(runs / f"base/version_{seed}/predictions.parquet") for seed in (1, 2, 3)]
    some = [table[(table["age"] >= 21) & (table["age"] <= 60)].astype({"age": float}) for table in tested]
    errors = [metrics.mean_absolute_error(table["age"], table["age_predicted"]) for table in some]
    assert rows[0]["Age: error from 21 to 60 (years)"] == _spread(errors, 2)


def test_the_worst_group_is_that_of_the_mean_over_runs(runs: Path, tmp_path: Path) -> None:
    rows = _tables(main([str(runs / "base"), "--out", str(tmp_path / "RESULTS.md")]))["Worst groups"]
    row = next(row for row in rows if row["score"] == "Race accuracy (%)")
    tested = [pd.read_parquet(runs / f"base/version_{seed}/predictions.parquet") for seed in (1, 2, 3)]
    recalls = [metrics.recall_score(table["race"], table["race_predicted"], average=None) for table in tested]
    worst = int(np.mean(recalls, axis=0).argmin())
    name = ("white", "black", "asian", "indian", "others")[worst]
    assert row["by race"] == f"{name}: {_spread([100 * recall[worst] for recall in recalls], 1)}"
    row = next(row for row in rows if row["score"] == "Mean absolute error of age (years)")
    bands = [pd.cut(table["age"].astype(float), [-1, 9, 19, 29, 39, 59, 116]).cat.codes for table in tested]
    errors = [
        (table["age_predicted"] - table["age"].astype(float)).abs().groupby(band).mean()
        for table, band in zip(tested, bands, strict=True)
    ]
    worst = int(np.mean(errors, axis=0).argmax())
    name = ("0-9", "10-19", "20-29", "30-39", "40-59", "60+")[worst]
    assert row["by age band"] == f"{name}: {_spread([error[worst] for error in errors], 2)}"


def test_the_page_says_how_each_recipe_was_made(runs: Path, tmp_path: Path) -> None:
    rows = _tables(main([str(runs), "--out", str(tmp_path / "RESULTS.md")]))["How they were made"]
    assert rows[0] == {
        "recipe": "base (without ema, model.dropout 0.2)",
        "faces seen": "79,840",
        "minutes": "2.0",
        "device": "cpu | 2",
        "data": "UTKFace.tar.gz",
        "faces (train, val, test)": "616 / 0 / 584",
        "split": "seed 1, seed 2, seed 3",
    }
    assert [row["faces seen"] for row in rows[-2:]] == ["616 once", "79,840, from the heads of probe/best.ckpt"]


def test_what_is_not_known_is_left_open(tmp_path: Path) -> None:
    """A run of version 0.1 without a test, with curves or without, of a further attribute."""
    _configure(tmp_path / "a", "bare", 1)
    _trial(tmp_path / "b", 1, [1.0], [0.5], **GLASSES)
    page = main([str(tmp_path), "--out", str(tmp_path / "R.md")])
    tables = _tables(page)
    assert tables["Scores of the test"] == [{"recipe": name, "runs": "0 of 1"} for name in ("bare", "trial")]
    assert {row["faces seen"] for row in tables["How they were made"]} == {"\N{EN DASH}"}
    assert "No run has the predictions" in page.read_text()


def test_a_change_is_called_by_the_options_that_differ(tmp_path: Path) -> None:
    """Validation at the epoch that is kept, not the last nor the best of each score; runs without a test are enough."""
    for seed, accuracy in ((1, 0.90), (2, 0.92)):
        _trial(tmp_path / f"base/{seed}", seed, [2.0, 1.0, 3.0], [0.99, accuracy, 0.98])
        options = {"model": {"dropout": 0.2, "hidden": [512]}}
        _trial(tmp_path / f"trials/{seed}", seed, [2.0, 3.0, 1.5], [0.5, 0.6, accuracy + 0.015], **options)
    _trial(tmp_path / "trials/same", 3, [1.0], [0.1])
    _configure(tmp_path / "trials/stopped", "trial", 1, model={"dropout": 0.9}, data={"root": "some/UTKFace.tar.gz"})
    _trial(tmp_path / "trials/other", 1, [1.0], [0.905], model={"dropout": 0.5}, data={"root": "some/UTKFace.tar.gz"})
    _trial(tmp_path / "trials/running", 1, [2.0, 3.0], [0.8, 0.9], ema=None, trainer={"max_epochs": 4})
    seldom = {"max_epochs": 5, "check_val_every_n_epoch": 2}
    _trial(tmp_path / "trials/seldom", 1, [2.0, 1.0], [0.8, 0.9], every=2, trainer=seldom)
    by_steps = {"max_epochs": 9, "max_steps": 2}
    _trial(tmp_path / "trials/steps", 1, [1.0], [0.9], trainer=by_steps)
    words = ["--baseline", str(tmp_path / "base"), "--changes", str(tmp_path / "trials")]
    tables = _tables(main([*words, "--out", str(tmp_path / "R.md")]))
    assert tables == {
        "Validation, at the epoch that is kept": [
            {"change": "trial", "runs": "2", "Gender accuracy (%)": "91.0 ± 1.4"},
            {"change": "model.hidden [512]", "runs": "2", "Gender accuracy (%)": "92.5 ± 1.4, +1.5"},
            {"change": "model.dropout 0.5", "runs": "1", "Gender accuracy (%)": "90.5, -0.5"},
            {
                "change": "ema null, trainer.max_epochs 4",
                "runs": "1, after 2 of 4 epochs",
                "Gender accuracy (%)": "80.0, -11.0",
            },
            {
                "change": "trainer.check_val_every_n_epoch 2, trainer.max_epochs 5",
                "runs": "1",
                "Gender accuracy (%)": "90.0, -1.0",
            },
            {"change": "trainer.max_epochs 9, trainer.max_steps 2", "runs": "1", "Gender accuracy (%)": "90.0, -1.0"},
        ]
    }


def test_an_object_that_others_lack_is_told_once(tmp_path: Path) -> None:
    transform = {"class_path": "facecls.data.transforms.TrainTransform", "init_args": {"size": 224, "crop": 0.85}}
    weights = {"age": 0.2}
    with_object, without = (
        {"data": {"root": "x", "train_transform": each}, "model": {"task_weights": one}}
        for each, one in ((transform, weights), (None, "learned"))
    )
    for start, changed, said in (
        (with_object, without, "data.train_transform null, model.task_weights learned"),
        (
            without,
            with_object,
            "data.train_transform.class_path facecls.data.transforms.TrainTransform, "
            "data.train_transform.init_args.crop 0.85, data.train_transform.init_args.size 224, "
            "model.task_weights.age 0.2",
        ),
    ):
        folder = tmp_path / said[:30]
        _trial(folder / "base", 1, [1.0], [0.9], **start)
        _trial(folder / "trial", 1, [1.0], [0.9], **changed)
        words = ["--baseline", str(folder / "base"), "--changes", str(folder / "trial"), "--out", str(folder / "R.md")]
        (rows,) = _tables(main(words)).values()
        assert [row["change"] for row in rows] == ["trial", said]


def test_an_option_that_older_runs_lack_is_no_other_recipe(tmp_path: Path) -> None:
    folders = [_run(tmp_path / f"version_{seed}", "base", seed) for seed in (1, 2)]
    (folders[0] / "config.yaml").write_text(
        yaml.safe_dump({"name": "base", "seed_everything": 1, "model": {"dropout": 0.2}, "data": {"root": "x"}})
    )
    newer = {"dropout": 0.2, "feature_norm": False, "schedule": {"batchnorm": "train", "layer_decay": 1.0}}
    _configure(folders[1], "base", 2, model=newer, data={"root": "x", "split_file": None})
    tables = _tables(main([*map(str, folders), "--out", str(tmp_path / "RESULTS.md")]))
    assert [(row["recipe"], row["runs"]) for row in tables["Scores of the test"]] == [("base", "2")]


def test_what_only_shows_or_tests_a_run_is_no_other_recipe(tmp_path: Path) -> None:
    trainers = [
        {"limit_test_batches": None, "enable_progress_bar": None, "log_every_n_steps": 25},
        {"limit_test_batches": 0, "enable_progress_bar": False, "log_every_n_steps": 50},
        {"limit_test_batches": 3, "enable_progress_bar": None, "log_every_n_steps": 25},
    ]
    folders = [_run(tmp_path / f"version_{seed}", "base", seed, trainer=each) for seed, each in enumerate(trainers)]
    tables = _tables(main([*map(str, folders), "--out", str(tmp_path / "RESULTS.md")]))
    assert [(row["recipe"], row["runs"]) for row in tables["Scores of the test"]] == [
        ("base (without trainer.limit_test_batches)", "2"),
        ("base (trainer.limit_test_batches 3)", "1"),
    ]


def test_what_is_written_by_hand_stays(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    words = [str(runs / "old"), "--out", str(page)]
    main(words)
    written = page.read_text()
    assert written.endswith(f"{MARK}\n")
    by_hand = "\n\n## What did not help\n\n- mixup | \N{SNOWMAN}\n"
    page.write_text(f"old\n{MARK}{by_hand}")
    main(words)
    assert page.read_text() == written.removesuffix("\n") + by_hand


@pytest.mark.parametrize("content", [b"# My notes\n", b"\xff\xfe\0"])
def test_another_file_is_not_replaced(runs: Path, tmp_path: Path, content: bytes) -> None:
    page = tmp_path / "README.md"
    page.write_bytes(content)
    with pytest.raises(UserError, match=r"README.md to be a page of facecls\.results, .* but it is not; add the line"):
        main([str(runs / "old"), "--out", str(page)])
    assert page.read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected runs to report, but got none"),
        (["{empty}"], "Expected the folder of a run with config.yaml, .* but .*empty is neither"),
        (["{runs}", "--out", "page.html"], r"Expected --out to end in \.md"),
        (["--baseline", "{runs}"], "Expected --baseline and --changes together"),
        (["{runs}", "--changes", "{runs}"], "Expected --baseline and --changes together"),
        (
            ["--baseline", "{runs}", "--changes", "{runs}"],
            "to have runs of one recipe, but got base .*, probe, tuned; name one",
        ),
    ],
)
def test_mistakes_are_said(runs: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        main([word.format(empty=tmp_path / "empty", runs=runs) for word in words])


def test_texts_of_a_run_do_not_break_the_table(tmp_path: Path) -> None:
    _configure(tmp_path / "a", "a|b\n# c <img src=x>", 1)
    page = main([str(tmp_path), "--out", str(tmp_path / "R.md")]).read_text()
    assert "| a\\|b # c &lt;img src=x> | 0 of 1 |" in page
