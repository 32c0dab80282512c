"""The commands fit and evaluate as users run them, on a few drawn faces."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from labelled_faces import manifest_of
from narrow import narrow
from plain_networks import write_folded_trunk, write_small_trunk
from run_folders import Page, without_drawing
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained_model import GLASSES as TASK
from trained_model import save_checkpoint

from convert import __main__ as convert
from facecls import evaluate, fit
from facecls.analysis.predictions import predictions_table
from facecls.data.datamodule import FacesDataModule
from facecls.data.synthetic import write_faces
from facecls.data.tasks import UTKFACE, classifications
from facecls.errors import UserError, command
from facecls.model.checkpoint import read_checkpoint
from facecls.model.trunk import create_trunk, save_trunk
from facecls.predict import __main__ as predict
from facecls.run import METRICS, set_results_aside
from facecls.training import callbacks, cli
from facecls.training.checkpoint_options import _check_optimizer, check_split

pytestmark = pytest.mark.slow

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMALL = ["--data.image_size=64", "--data.batch_size=8", "--data.num_workers=0", "--trainer.accelerator=cpu"]
SMALL += [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.precision=32-true",  # what is faster may be another in the next run
]
TINY = ["--model.trunk=test_resnet", "--name=tiny", "--seed_everything=1", *SMALL]
GLASSES = "--data.tasks={glasses: {classes: [without, with]}}"


@pytest.fixture
def drawing() -> None:
    """Asked for by tests that look at what a run draws; the others do without."""


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # runs/ is made here
    if "drawing" not in request.fixturenames:
        without_drawing(monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, "vggface2_resnet50", channels=(16, 32, 64, 128))
        yield


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trunk files of random weights, named as the configurations name them."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("vggface2_resnet50", "tf_efficientnet_lite0"):
        save_trunk(folder / f"{name}.safetensors", create_trunk(name).net.state_dict(), {"architecture": name})
    one = write_folded_trunk(folder / "vggface2_mobilenet.safetensors")
    other = write_small_trunk(folder / "lite0_middle.safetensors", seed=1)
    convert.main([str(one), str(other), str(folder / "best.safetensors")])
    return folder


def _json(run: str) -> dict[str, object]:
    return json.loads((Path(run) / "metrics.json").read_text())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs(config: Path, faces: Path, trunks: Path) -> None:
    Path("weights").symlink_to(trunks)
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    root = [] if config.stem == "demo" else [f"--data.root={faces}"]
    shorter = ["--data.root=synthetic:60"] if config.stem == "demo" else ["--data.train_transform=null"]
    results = fit.main([f"--config={config}", *root, *shorter, *SMALL, *few, "--heads=null"])
    run = Path("runs") / config.stem / "version_0"
    kept = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert kept >= {"config.yaml", "rejects.csv", "metrics.json", "predictions.parquet"}
    assert kept >= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert any("events.out.tfevents" in name for name in kept)
    assert results == _json(str(run))
    assert "test/loss" in results


class _Uncopied:
    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("the images were copied")


def test_a_copy_of_the_model_does_not_copy_the_images(faces: Path) -> None:
    made = cli.FaceCLI([*TINY, f"--data.root={faces}"])
    made.datamodule.images = _Uncopied()
    copy.deepcopy(made.model)  # as the average of the weights does


def _curve(tag: str, run: str = "runs/tiny/version_0") -> list[float]:
    return [event.value for event in EventAccumulator(run).Reload().Scalars(tag)]


def _recomputed(table: pd.DataFrame) -> dict[str, float]:
    wanted = {}
    for task in ("gender", "race"):
        truth, guess = table[task].astype(int), table[f"{task}_predicted"]
        wanted[f"test/{task}/accuracy"] = accuracy_score(truth, guess)
        wanted[f"test/{task}/f1_macro"] = f1_score(truth, guess, average="macro", labels=sorted({*truth, *guess}))
    wanted["test/age/mae_years"] = mean_absolute_error(table["age"].astype(int), table["age_predicted"])
    wanted["test/age/cs5"] = ((table["age"] - table["age_predicted"]).abs() <= 5).mean()
    return wanted


def test_what_a_run_leaves(faces: Path, drawing: None) -> None:
    shown = ["--ema=0.5", "--model.tta=flip", "--trainer.max_epochs=3", "--data.test_fraction=0.3"]
    results = fit.main([*TINY, f"--data.root={faces}", *shown])
    run = Path("runs/tiny/version_0")
    table = pd.read_parquet(run / "predictions.parquet")
    assert len(table) == results["faces/tested"] == results["faces/test"] == 24
    wanted = _recomputed(table)
    assert {name: results[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert table.filter(regex="^p_(male|female)$").sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert (table["age_low"] <= table["age_high"]).all()
    assert len(pd.read_csv(run / "rejects.csv")) == results["rejects"] == 5
    assert results["faces_seen"] == 8 * results["steps"]
    everybody = pd.read_parquet(run / "faces.parquet")
    assert everybody["split"].value_counts()["test"] == 24
    assert everybody.merge(table, on=["path", "sha1", "split", *UTKFACE]).shape[0] == 24
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert {"val/gallery", "val/race/confusion", "val/gender/reliability", "val/age/predicted_against_true"} <= {
        *tags["images"]
    }
    curves = tags["scalars"]
    assert {"lr", "train/loss", "val/loss", "val/age/mae_years", "train/race/accuracy", "val/gender/loss"} <= {*curves}

    # the configuration that was kept runs again as it is, and gives the same
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        again = fit.main([f"--config={run / 'config.yaml'}"])
    same = [name for name in results if name.startswith(("test/", "faces/"))]
    assert {name: again[name] for name in same} == {name: results[name] for name in same}
    assert Path("runs/tiny/version_1/metrics.json").exists()

    # evaluate takes the averaged weights of the best epoch from the file alone, as fit's own test should have done
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        found = evaluate.main([f"--ckpt_path={run / 'checkpoints/best.ckpt'}", "--accelerator=cpu"])
    assert {name: found[name] for name in same} == pytest.approx({name: results[name] for name in same}, rel=1e-5)
    everything = evaluate.main(
        [f"--ckpt_path={run / 'checkpoints/best.ckpt'}", "--data.split=all", "--accelerator=cpu"]
    )
    assert everything["faces/tested"] == 80
    assert len(pd.read_parquet("runs/evaluate/version_1/predictions.parquet")) == 80
    assert "trained on 48 of the tested faces" in Page(Path("runs/evaluate/version_1/report.html")).sections["summary"]


@pytest.mark.usefixtures("unrendered")
def test_nothing_is_said_about_training_where_other_faces_are_tested(begun: Path, drawing: None) -> None:
    write_faces(Path("others"), 30, seed=8)
    words = [f"--ckpt_path={begun.with_name('best.ckpt')}", "--data.root=others", "--accelerator=cpu"]
    for split, tested in (("all", 30), ("train", 24)):
        results = evaluate.main([*words, f"--data.split={split}", f"--name={split}"])
        assert (results["faces/tested"], results["split"]) == (tested, split)
        run = Path(f"runs/{split}/version_0")
        assert {*pd.read_parquet(run / "predictions.parquet")["split"]} == {"test"}
        assert pd.read_parquet(run / "faces.parquet")["split"].value_counts().to_dict() == {"test": tested}
        assert not pd.read_csv(run / "suspects.csv")["seen_in_training"].any()
        sections = Page(run / "report.html").sections
        assert "trained on" not in sections["summary"]
        assert "(from the tested faces)" in sections["summary"]
        assert "The training faces are not known" in sections["limits"]


def test_temperatures_are_those_that_make_the_validation_faces_most_probable(faces: Path) -> None:
    words = ["--trainer.max_epochs=2", "--data.val_fraction=0.4", "--model.optimizer.lr=0.01", "--model.tta=flip"]
    results = fit.main([*TINY, f"--data.root={faces}", *words])
    best = "runs/tiny/version_0/checkpoints/best.ckpt"
    heads = read_checkpoint(best).module.model.heads
    kept = {task: head.temperature.item() for task, head in heads.items()}
    assert {f"temperature/{task}": value for task, value in kept.items()} == pytest.approx(
        {name: value for name, value in results.items() if name.startswith("temperature/")}
    )
    evaluate.main([f"--ckpt_path={best}", "--data.split=val", "--accelerator=cpu"])
    table = pd.read_parquet("runs/evaluate/version_0/predictions.parquet")
    for task in classifications(UTKFACE.values()):
        probabilities = table[list(task.probabilities)].to_numpy(float)
        logits = kept[task.name] * np.log(probabilities)  # up to a constant in each row
        truth = table[task.name].to_numpy(int)

        def surprise(temperature: float, logits: np.ndarray = logits, truth: np.ndarray = truth) -> float:
            return float(-log_softmax(logits / temperature, 1)[np.arange(len(truth)), truth].mean())

        lowest = minimize_scalar(surprise, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6})
        assert kept[task.name] != 1
        assert surprise(kept[task.name]) == pytest.approx(lowest.fun, rel=1e-4)


def test_intervals_before_and_after_a_temperature() -> None:
    years = np.arange(117)
    logits = -((years - 40.0) ** 2) / (2 * 4.0**2)
    faces = pd.DataFrame({"path": ["a"], "sha1": ["0"], "split": ["test"], "gender": [0], "race": [1], "age": [40]})
    spread = softmax(logits / 4)[None].astype(np.float32)  # a temperature of 4 doubles the standard deviation
    estimates = {"age": np.array([40.0]), "age_distribution": spread}
    row = predictions_table(faces, estimates, {"gender": 1.0, "race": 1.0, "age": 4.0}, UTKFACE).iloc[0]
    for low, high, sigma in (("age_low_raw", "age_high_raw", 4), ("age_low", "age_high", 8)):
        assert abs(row[low] - norm(40, sigma).ppf(0.05)) <= 1
        assert abs(row[high] - norm(40, sigma).ppf(0.95)) <= 1


class _Kept:
    """Copies of every last.ckpt of a run, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[int, Path] = {}
        original = callbacks.LastCheckpoint._save

        def save(callback: callbacks.LastCheckpoint, trainer: object) -> None:
            original(callback, trainer)
            if trainer.global_step:
                path = Path(f"step_{trainer.global_step}.ckpt")
                shutil.copy(callback.path, path)
                self.files[trainer.global_step] = path

        monkeypatch.setattr(callbacks.LastCheckpoint, "_save", save)
        monkeypatch.setattr(callbacks, "SAVE_EVERY", timedelta(0))  # after every batch


def test_resuming_past_an_unfreezing_goes_on_exactly(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _Kept(monkeypatch)
    schedule = ["--model.schedule.frozen={0: -1, 1: 2, 2: 0}", "--model.schedule.layer_decay=0.7"]
    words = [*TINY, f"--data.root={faces}", *schedule, "--ema=0.9", "--trainer.max_epochs=4"]
    fit.main(words)
    whole = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    steps = whole["global_step"] // 4
    # the end of an epoch before an unfreezing, of one after it, and the middle of an epoch
    for stop in (steps, 3 * steps, 2 * steps + 3):
        fit.main([*words, f"--ckpt_path={kept.files[stop]}", "--data.num_workers=1"])
        version = max(Path("runs/tiny").iterdir(), key=lambda path: int(path.name.split("_")[1]))
        resumed = torch.load(version / "checkpoints/last.ckpt", weights_only=True)
        assert resumed["global_step"] == whole["global_step"]
        for part in ("state_dict", "current_model_state"):
            for name, tensor in whole[part].items():
                assert torch.equal(tensor, resumed[part][name]), f"{part} {name} after {stop} steps"


@pytest.mark.usefixtures("unrendered")
def test_a_resumed_run_goes_on_in_its_folder_and_keeps_its_best(faces: Path, drawing: None) -> None:
    fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=1"])
    last, page = "runs/tiny/version_0/checkpoints/last.ckpt", Path("runs/tiny/version_0/report.html")
    assert "resumed" not in Page(page).sections["summary"]
    results = fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    assert "s since it was resumed" in Page(page).sections["summary"]  # not the time of the whole
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert results["epochs"] == 2
    states = torch.load(last, weights_only=True)["callbacks"].items()
    best = next(state for name, state in states if name.startswith("ModelCheckpoint"))
    assert best["best_model_score"] is not None
    assert best["best_model_score"] == min(_curve("val/loss"))
    assert yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())["ckpt_path"] is None
    best = "runs/tiny/version_0/checkpoints/best.ckpt"  # was written while its epoch was being validated
    fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=3", f"--ckpt_path={best}", "--name=other"])
    assert torch.load("runs/other/version_0/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_the_command_line_wins_over_the_checkpoint(faces: Path) -> None:
    words = [*TINY, f"--data.root={faces}", "--model.optimizer=torch.optim.SGD", "--model.schedule.decay=constant"]
    fit.main([*words, "--model.optimizer.lr=0.01", "--trainer.max_epochs=1"])
    last = "runs/tiny/version_0/checkpoints/last.ckpt"
    fit.main(
        [*words, "--model.optimizer.lr=0.002", "--model.dropout=0.4", "--trainer.max_epochs=2", f"--ckpt_path={last}"]
    )
    checkpoint = torch.load(last, weights_only=True)
    assert {group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {0.002}
    assert checkpoint["hyper_parameters"]["dropout"] == 0.4


def test_frozen_means_frozen_statistics_too(faces: Path, trunks: Path) -> None:
    weights = trunks / "tf_efficientnet_lite0.safetensors"
    frozen = ["--model.trunk=tf_efficientnet_lite0", f"--model.weights={weights}", "--model.schedule.frozen={0: -1}"]
    fit.main([*TINY, *frozen, f"--data.root={faces}", "--trainer.max_epochs=2", "--ema=0.9"])
    state = read_checkpoint("runs/tiny/version_0/checkpoints/best.ckpt").module.model.trunk.net.state_dict()
    before = create_trunk("tf_efficientnet_lite0", weights).net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


def test_labels_may_be_missing(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = manifest_of(faces)
    rows.loc[rows.index[::4], "age"] = "20-29"
    rows.loc[rows.index[1::2], "age"] = ""
    rows.drop(columns="race").to_csv("m.csv", index=False)
    words = [*TINY, "--data.root=m.csv", "--trainer.max_epochs=1", "--model.task_weights=learned"]
    results = fit.main([*words, "--model.tasks=[gender, age]"])
    assert "labels: gender 80, race 0, age 40 of 80 faces" in capsys.readouterr().out.splitlines()
    assert [name for name in results if name.startswith("test/race")] == ["test/race/faces"]
    ages = rows.loc[rows["split"] == "test", "age"]
    counts = {"gender/faces": len(ages), "race/faces": 0}
    counts |= {"age/faces": (ages != "").sum(), "age/ranges": (ages == "20-29").sum()}
    assert {name: results[f"test/{name}"] for name in counts} == counts
    assert 0 < counts["age/ranges"] < counts["age/faces"] < counts["gender/faces"]


def test_a_task_without_labels_is_not_learned_unnoticed(faces: Path) -> None:
    rows = manifest_of(faces)
    rows["eyeglasses"] = "with"
    rows.loc[rows["split"] == "train", "race"] = ""
    rows.loc[rows["split"] == "val", ["gender", "age"]] = ""
    rows.to_csv("m.csv", index=False)
    rows[rows["split"] == "test"].to_csv("tested.csv", index=False)
    rows[["path"]].assign(sexes=rows["gender"]).to_csv("unlabelled.csv", index=False)
    correct = r"correct the name of the column"
    for words, said in (
        ([GLASSES, "--model.tasks=[gender, glasses]"], rf"labels of glasses in m\.csv, .* {correct}, or .* \[gender\]"),
        ([GLASSES], rf"labels of race, glasses in m\.csv, .*{correct}, or set model\.tasks to \[gender, age\]"),
        (["--model.tasks=[race]"], rf"labels of race in m\.csv, but no training face has one; {correct}\."),
        (["--model.tasks=[age]"], r"labels of age in the validation part of m\.csv"),
        (["--data.root=tested.csv"], r"Expected faces in the train part of tested\.csv"),
        (["--data.root=unlabelled.csv"], rf"labels of gender, race, age in unlabelled\.csv, .*{correct}\."),
    ):
        with pytest.raises(UserError, match=said):
            fit.main([*TINY, "--data.root=m.csv", *words])
    assert "test/age/mae_years" in fit.main(
        [*TINY, "--data.root=m.csv", "--model.tasks=[age]", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    )


def test_the_faces_of_the_training_are_split_as_they_were_or_not_at_all(begun: Path, faces: Path) -> None:
    test = [f"--ckpt_path={begun.with_name('best.ckpt')}", "--accelerator=cpu"]
    seeds = ("--data.seed=2", "--data.split_seed=2")
    for option in (GLASSES, *seeds, "--data.val_fraction=0.2", "--data.test_fraction=0.4"):
        name = "data.split_seed" if option in seeds else option[2:].partition("=")[0]
        for more in ([], ["--data.split=all"], [f"--data.root={faces}"]):
            with pytest.raises(UserError, match=rf"Expected {name} .* as in training, .* but got {name} "):
                evaluate.main([*test, option, *more])
    write_faces(Path("others"), 30, seed=8)
    assert evaluate.main([*test, GLASSES, "--data.root=others", "--data.split=all"])["faces/tested"] == 30

    rows = manifest_of(faces)
    rows.to_csv("m.csv", index=False)
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    fit.main([*TINY, *few, "--data.root=m.csv", "--name=manifest"])
    test = ["--ckpt_path=runs/manifest/version_0/checkpoints/best.ckpt", "--accelerator=cpu", "--name=again"]
    evaluate.main([*test, GLASSES, "--data.seed=2"])  # a split that is given depends on neither
    tested = pd.read_parquet("runs/again/version_0/predictions.parquet")["path"]
    assert sorted(tested) == sorted(rows.loc[rows["split"] == "test", "path"])


def test_the_order_of_tasks_splits_otherwise_and_another_seed_draws_other_faces() -> None:
    two = [("hat", {"classes": ["none", "one"]}), ("beard", {"classes": ["none", "one"]})]
    trained = {"root": "synthetic:60", "seed": 1, "val_fraction": 0.1, "test_fraction": 0.1, "split_file": None}
    trained["tasks"] = dict(two)
    check_split(FacesDataModule("synthetic:60", seed=1, tasks=dict(two)), trained)
    with pytest.raises(UserError, match=r"Expected data\.tasks"):
        check_split(FacesDataModule("synthetic:60", seed=1, tasks=dict(reversed(two))), trained)
    check_split(FacesDataModule("synthetic:60", seed=2), trained)
    check_split(FacesDataModule("synthetic:61", seed=1), trained)


@pytest.mark.parametrize("written", ["faces", "./faces", "x/../faces/", "{}/faces", "{}/link", ["faces"]])
def test_faces_are_those_of_training_however_their_place_is_written(
    written: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "faces").mkdir()
    (tmp_path / "link").symlink_to("faces")
    root = written.format(tmp_path) if isinstance(written, str) else written
    trained = {**FacesDataModule(root, seed=1).hparams}
    with pytest.raises(UserError, match=r"Expected data\.test_fraction 0\.\d+ as in training"):
        check_split(FacesDataModule("faces", seed=1, test_fraction=0.5), trained)
    check_split(FacesDataModule("x", seed=1, test_fraction=0.5), trained)


@pytest.mark.parametrize("name", ["amsgrad", "centered", "momentum"])
def test_an_optimizer_that_keeps_other_things_is_refused(name: str) -> None:
    """Torch's would end in a KeyError, but for SGD's."""
    plain, other = ({"class_path": "torch.optim.RMSprop", "init_args": {name: value}} for value in (0, 0.9))
    with pytest.raises(UserError, match=rf"\(model\.optimizer\.init_args\.{name} False\), but got .* True; set it"):
        _check_optimizer("last.ckpt", plain, other)
    _check_optimizer("last.ckpt", plain, plain | {"init_args": {}})
    sgd = [{"class_path": "torch.optim.SGD", "init_args": {"momentum": value}} for value in (0, 0.9)]
    _check_optimizer("last.ckpt", *sgd)


def test_results_of_a_run_that_is_resumed_are_set_aside(tmp_path: Path) -> None:
    assert set_results_aside(tmp_path) == []
    for name in (METRICS, "faces.parquet", f"earlier_{METRICS}"):
        (tmp_path / name).write_text(name)
    assert set_results_aside(tmp_path) == [f"earlier_{METRICS}"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"earlier_{METRICS}": METRICS,
        "faces.parquet": "faces.parquet",
    }


def test_a_split_file_goes_with_its_faces(faces: Path) -> None:
    rows = manifest_of(faces)
    names = [Path(path).name for path in rows["path"]]
    listed = pd.DataFrame({"img_name": names, "is_train": (rows["split"] == "train").astype(int)})
    listed.to_csv("split.csv", index=False)
    words = [*TINY, f"--data.root={faces}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    fit.main([*words, "--data.split_file=split.csv"])
    test = ["--ckpt_path=runs/tiny/version_0/checkpoints/best.ckpt", "--accelerator=cpu", f"--data.root={faces}"]
    assert evaluate.main([*test, GLASSES])["faces/tested"] == (rows["split"] != "train").sum()
    with pytest.raises(UserError, match=r"Expected data\.split_file split\.csv as in training"):
        evaluate.main([*test, "--data.split_file=null"])


@pytest.fixture(scope="module")
def begun(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("begun"))
        without_drawing(patch)
        fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"])
        return Path("runs/tiny/version_0/checkpoints/last.ckpt").resolve()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.tasks=[age, gender]"], r"tasks of \S+ to resume it \(gender; race; age\), but got gender; age;"),
        ([GLASSES], r"\(gender; race; age\), but got gender; race; age; glasses;"),
        ([GLASSES, "--model.tasks=[gender, race, age]"], r"Expected data\.tasks \{\} as in training"),
        (
            ["--data.tasks={race: {classes: [light, dark]}}"],
            r"race: 0 \(white\), .*but got gender; race: 0 \(light\), 1",
        ),
        (["--seed_everything=2"], r"Expected seed_everything 1 as in the run, .* but got 2"),
        (["--data.split_seed=2"], r"Expected data\.split_seed 1 as in training, .* but got data\.split_seed 2"),
        (["--data.test_fraction=0.2"], r"data\.test_fraction 0\.1 as in training"),
        (["--model.hidden=[8]"], r"model of \S+ to resume it \(model\.hidden \[\]\), but got model\.hidden \[8\]"),
        (["--model.age_head=regression"], r"model\.age_head distribution\), but got model\.age_head regression"),
        (["--model.task_weights=learned"], r"model\.task_weights \{\}\), but got model\.task_weights learned"),
    ],
)
def test_a_run_is_not_resumed_as_another(begun: Path, words: list[str], said: str, faces: Path) -> None:
    with pytest.raises(UserError, match=said):
        fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=2", f"--ckpt_path={begun}", *words])


def test_what_is_no_checkpoint_is_not_resumed(faces: Path) -> None:
    Path("text.ckpt").write_text("nothing")
    with pytest.raises(UserError, match="Expected a checkpoint of facecls"):
        fit.main([*TINY, f"--data.root={faces}", "--ckpt_path=text.ckpt"])


def test_a_run_of_version_0_1_goes_on_with_its_own_tasks_and_split_alone() -> None:
    old = Path(__file__).parent / "data/version_0_1.ckpt"
    with pytest.raises(UserError, match=r"Expected data\.tasks \{\} as in training"):
        evaluate.main([f"--ckpt_path={old}", "--accelerator=cpu", GLASSES])
    words = [*TINY, "--data.root=synthetic:300", "--data.test_fraction=0.2", f"--ckpt_path={old}"]
    words += ["--model.trunk=test_efficientnet", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.02"]
    words += ["--ema=null"]
    with pytest.raises(UserError, match=r"\(gender; race; age\), but got gender; race;"):
        fit.main([*words, "--model.tasks=[gender, race]"])
    epoch = torch.load(old, weights_only=True)["epoch"]
    results = fit.main([*words, f"--trainer.max_epochs={epoch + 2}", "--trainer.limit_train_batches=2"])
    assert results["epochs"] == epoch + 2


def test_classes_that_yaml_takes_for_truth_values_are_words_in_quotes(faces: Path) -> None:
    rows = manifest_of(faces)
    wears = np.arange(len(rows)) % 2 == 0
    rows.assign(glasses=np.where(wears, "Yes", "no")).to_csv("m.csv", index=False)
    Path("glasses.yaml").write_text(
        'data: {root: m.csv, tasks: {glasses: {classes: ["no", "yes"]}}}\nmodel: {tasks: [glasses, age]}\n'
    )
    fit.main(["--config=glasses.yaml", *TINY, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"])
    best = "runs/tiny/version_0/checkpoints/best.ckpt"
    evaluate.main([f"--ckpt_path={best}", "--accelerator=cpu"])
    truth = dict(zip(rows["path"], wears.astype(int), strict=True))
    for run in ("tiny", "evaluate"):
        tested = pd.read_parquet(f"runs/{run}/version_0/predictions.parquet")
        assert tested["glasses"].tolist() == [truth[path] for path in tested["path"]]
    fit.main(["--config=runs/tiny/version_0/config.yaml"])  # as it was saved
    assert predict.main([best, rows["path"][0], "--out=out.csv", "--device=cpu"]) == 0
    told = pd.read_csv("out.csv", keep_default_na=False).iloc[0]
    assert told["glasses"] == ("yes" if told["p_glasses_yes"] > 0.5 else "no")


def test_each_epoch_leaves_a_line_with_its_own_numbers(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [word for word in TINY if "enable_progress_bar" not in word]
    fit.main([*shown, f"--data.root={faces}", "--trainer.max_epochs=2"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("epoch ")]
    losses, val_losses = _curve("train/loss"), _curve("val/loss")
    for epoch, line in enumerate(lines):
        assert line.startswith(f"epoch {epoch + 1}/2: loss {losses[epoch]:.3f}, val {val_losses[epoch]:.3f}, gender ")
    assert len(lines) == 2


def test_without_validation_the_last_state_is_tested(faces: Path) -> None:
    results = fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"])
    best, last = (
        torch.load(f"runs/tiny/version_0/checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last")
    )
    assert results["checkpoint"] == "runs/tiny/version_0/checkpoints/best.ckpt"
    assert all(torch.equal(tensor, last["state_dict"][name]) for name, tensor in best["state_dict"].items())


def test_a_development_run_keeps_nothing(faces: Path) -> None:
    assert fit.main([*TINY, f"--data.root={faces}", "--trainer.fast_dev_run=true"]) == {}
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.root=nowhere"], "nowhere"),
        (["--model.trunk=resnet51"], "did you mean"),
        (["--model.weights=none.safetensors"], "python -m facecls.download weights"),
        (["--data.batchsize=3"], "batchsize"),
        (["--trainer.max_epoch=3"], "max_epoch"),  # not taken for max_epochs
        (["--data.tasks={glasses: {classes: [no, yes]}}"], 'words like "no" and "yes" in quotes, but got'),
        (["--data.tasks={glasses: [without, with]}"], "Expected data.tasks such as {glasses: {classes:"),
        (["--model.tasks=[height]"], "height"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["--seed_everything=true"], "seed_everything"),
        (["--model.schedule.warmup=7"], "warmup"),
        (["--ema=1.5"], "ema from 0 to below 1"),
        (["--data.val_fraction=0.9", "--data.test_fraction=0.3"], "fraction"),
        (["--data.val_fraction=0"], "val part"),
        (["--trainer.enable_checkpointing=false"], "checkpoint"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    words: list[str], said: str, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        fit.main([*TINY, f"--data.root={faces}", *words])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("facecls.fit: error:")
    assert said in lines[0]


def test_evaluate_refuses_what_is_no_checkpoint() -> None:
    Path("text.ckpt").write_text("nothing")
    for path, words in (("none.ckpt", "there is none"), ("text.ckpt", "Expected a checkpoint of facecls")):
        with pytest.raises(UserError, match=words):
            evaluate.main([f"--ckpt_path={path}"])
    with pytest.raises(UserError, match="ckpt_path"):
        evaluate.main([])


def test_evaluate_refuses_faces_without_labels(faces: Path) -> None:
    save_checkpoint(Path("best.ckpt"))
    manifest_of(faces)[["path"]].to_csv("m.csv", index=False)
    with pytest.raises(UserError, match=r"Expected labels of gender, race, age in m\.csv, but no face to test has one"):
        evaluate.main(["--ckpt_path=best.ckpt", "--accelerator=cpu", "--data.image_size=64", "--data.root=m.csv"])


def test_evaluate_refuses_other_classes_than_the_model_has() -> None:
    save_checkpoint(Path("best.ckpt"))
    words = ["--ckpt_path=best.ckpt", "--accelerator=cpu", "--data.image_size=64"]
    with pytest.raises(UserError, match=r"Expected --data\.root, since best\.ckpt does not say"):
        evaluate.main(words)
    with pytest.raises(UserError, match=r"Expected data\.tasks with race as the model has learned it"):
        evaluate.main([*words, "--data.root=synthetic:60", "--data.tasks={race: {classes: [light, dark]}}"])
    save_checkpoint(Path("best.ckpt"), task_options=TASK)
    for tasks, said in (
        ("{glasses: {classes: [with, without]}}", r"\(0 \(without\), 1 \(with\)\), but got 0 \(with\), 1 \(without\);"),
        ("{}", r"but got no such task; leave"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.main([*words, "--data.root=synthetic:60", f"--data.tasks={tasks}"])


def _start(faces: Path) -> subprocess.Popen[str]:
    # a shell may have started the tests in the background, where Ctrl-C is ignored, and children inherit that
    start = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "runpy.run_module('facecls.fit', run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-c", start, *TINY, f"--data.root={faces}", "--trainer.max_epochs=1000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    last, deadline = Path("runs/tiny/version_0/checkpoints/last.ckpt"), time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_ctrl_c_ends_cleanly_and_the_last_checkpoint_goes_on(faces: Path) -> None:
    process = _start(faces)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""  # nothing of any library
    said = [line for line in out.splitlines() if line]
    beginnings = [
        "precision ",
        "test_resnet from random weights",
        "80 faces ",
        "predict will find",
        "stopped; to continue",
    ]
    assert [line[: len(start)] for line, start in zip(said, beginnings, strict=True)] == beginnings
    assert said[-1].endswith("--ckpt_path runs/tiny/version_0/checkpoints/last.ckpt")
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    done = torch.load(last, weights_only=True)["epoch"] + 2
    results = fit.main([*TINY, f"--data.root={faces}", f"--trainer.max_epochs={done}", f"--ckpt_path={last}"])
    assert results["epochs"] == done


def test_a_killed_run_goes_on_from_its_last_checkpoint(faces: Path) -> None:
    process = _start(faces)
    process.kill()
    process.communicate(timeout=60)
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    (last.parent / ".best.ckpt.abcdefgh.part").touch()  # as if it had been killed while it wrote that
    done = torch.load(last, weights_only=True)["epoch"] + 2
    results = fit.main([*TINY, f"--data.root={faces}", f"--trainer.max_epochs={done}", f"--ckpt_path={last}"])
    assert results["epochs"] == done
    assert not list(last.parent.glob(".*"))  # nothing half written


def test_a_second_configuration_lies_over_the_first(faces: Path) -> None:
    Path("over.yaml").write_text("name: over\nmodel: {tasks: [gender], tta: none}\n")
    base = next(path for path in CONFIGS if path.stem == "transfer")
    words = [f"--config={base}", "--config=over.yaml", "--model.trunk=test_resnet", "--model.weights=null", *SMALL]
    few = ["--data.train_transform=null", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    fit.main([*words, *few, f"--data.root={faces}"])
    kept = yaml.safe_load(Path("runs/over/version_0/config.yaml").read_text())
    assert kept["model"]["tasks"] == ["gender"]
    assert kept["model"]["tta"] == "none"
    assert kept["model"]["label_smoothing"] == 0.05  # the first one's


def test_a_run_without_an_average_goes_on_from_the_weights_themselves(faces: Path) -> None:
    fit.main([*TINY, f"--data.root={faces}", "--trainer.max_epochs=1", "--ema=0.99"])
    last = "runs/tiny/version_0/checkpoints/last.ckpt"
    before = torch.load(last, weights_only=True)
    still = ["--model.optimizer.lr=0", "--model.optimizer.weight_decay=0"]
    fit.main([*TINY, f"--data.root={faces}", *still, "--ema=null", "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    after = torch.load(last, weights_only=True)["state_dict"]
    for name, weights in before["current_model_state"].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(weights, after[name]), name


def test_the_average_is_that_of_its_definition() -> None:
    rule, wanted = callbacks.ExponentialAverage(0.9), 1.0
    averages = [torch.tensor(1.0), torch.tensor([1.0, 0.5])]
    for step in range(1, 200):
        current = float(step % 7)
        rule(averages, [torch.tensor(current), torch.tensor([current, 0.5])], torch.tensor(step))
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * current
    assert averages[0].item() == pytest.approx(wanted, rel=1e-4)
    assert averages[1].tolist() == [pytest.approx(wanted, rel=1e-4), 0.5]
    constant, kept = torch.rand(1000), torch.arange(5)
    for step in (1, 5, 500):  # at first the share of what is new is above a half
        same = [constant.clone()]
        rule(same, [constant], step)
        assert torch.equal(same[0], constant)
        rule([kept], [torch.arange(5)], step)
        assert torch.equal(kept, torch.arange(5))


def test_clipping_that_a_fused_optimizer_cannot_do_is_refused_and_otherwise_done(faces: Path) -> None:
    words = [*TINY, f"--data.root={faces}", "--trainer.fast_dev_run=1", "--trainer.gradient_clip_val=1"]
    fused = ["--model.optimizer=AdamW", "--model.optimizer.fused=true"]
    for mixed in ("bf16-mixed", "bf16", "16"):
        with pytest.raises(UserError, match=r"fused false with trainer\.gradient_clip_val"):
            fit.main([*words, *fused, f"--trainer.precision={mixed}"])
    fit.main([*words, *fused, "--trainer.precision=32-true"])
    fit.main([*words, "--trainer.precision=bf16-mixed"])


def test_a_precision_that_was_asked_for_wins(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, f"--data.root={faces}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert fit.main([*words, "--trainer.precision=64-true"])["precision"] == "64-true"
    assert "precision 64-true: as asked" in capsys.readouterr().out
