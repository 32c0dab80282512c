"""Joined models answer with the average of their answers, run a shared trunk once, and test nothing they learnt."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from plain_networks import write_small_trunk
from run_folders import without_drawing
from torch import nn

from convert.__main__ import main
from convert.ensemble import join_models
from facecls import evaluate, fit
from facecls.errors import UserError
from facecls.model.checkpoint import read_checkpoint
from facecls.model.engine import open_predictor
from facecls.model.graph import GRAPH as GRAPH_NAME
from facecls.model.trunk import Trunk, read_trunk, save_trunk

pytestmark = pytest.mark.slow

SMALL = ["--data.image_size=64", "--data.batch_size=16", "--data.num_workers=0", "--data.split_seed=3"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=1"]
SMALL += ["--trainer.limit_test_batches=0", "--trainer.enable_progress_bar=false", "--ema=null"]
SMALL += ["--model.optimizer.class_path=torch.optim.AdamW", "--model.optimizer.init_args.lr=0.01"]
GRAPH = ["--model.trunk=graph", "--model.weights=trunk.safetensors"]
FROZEN = ["--model.schedule.frozen={0: -1}", "--model.schedule.batchnorm=frozen"]
RUNS: Mapping[str, list[str]] = {
    "graph": [*GRAPH, "--model.hidden=[8]"],
    "timm": ["--model.trunk=test_resnet", "--model.hidden=[5]", "--model.feature_norm=true"],
    "one": [*GRAPH, *FROZEN, "--model.hidden=[8]", "--model.feature_norm=true", "--seed_everything=1"],
    "other": [*GRAPH, *FROZEN, "--model.hidden=[6]", "--seed_everything=2"],
    "linear": [*GRAPH, *FROZEN, "--model.feature_norm=true"],
    "linear_timm": ["--model.trunk=test_resnet"],
    "deep": [*GRAPH, "--model.hidden=[8, 4]"],
    "deep_timm": ["--model.trunk=test_resnet", "--model.hidden=[7, 5]", "--model.feature_norm=true"],
    "notebook": ["--model.trunk=test_resnet", "--model.age_head=regression"],
    "few": ["--model.trunk=test_resnet", "--model.tasks=[gender]"],
    "brighter": [GRAPH[0], "--model.weights=brighter.safetensors", *FROZEN, "--model.hidden=[8]"],
    "moved": ["--model.trunk=test_resnet", "--data.split_seed=4"],
}


@pytest.fixture(scope="module", autouse=True)
def _runs(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run of each kind; all tests of this file go on in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ensemble"))
        without_drawing(patch)
        state, about = read_trunk(write_small_trunk(Path("trunk.safetensors")))
        about[GRAPH_NAME]["input"]["mean"] = [60.0, 60.0, 60.0]  # the weights stay
        save_trunk(Path("brighter.safetensors"), state, about)
        for name, words in RUNS.items():
            fit.main([*SMALL, f"--data.root={faces}", f"--name={name}", *words])
        yield


def _best(run: str) -> str:
    return f"runs/{run}/version_0/checkpoints/best.ckpt"


def _answers(checkpoint: str) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 64, 64), np.uint8)
    estimates = open_predictor(checkpoint).estimate(torch.from_numpy(images))
    return {name: np.asarray(values) for name, values in estimates.items()}


def _trunk(checkpoint: str) -> Trunk:
    return read_checkpoint(checkpoint).module.model.trunk


@pytest.mark.parametrize(
    ("runs", "different"),
    [
        (("graph", "timm"), ("graph", "timm")),
        (("one", "other"), ("one",)),
        (("one", "timm", "other"), ("one", "timm")),
        (("linear", "linear_timm", "linear"), ("linear", "linear_timm")),
        (("deep", "deep_timm"), ("deep", "deep_timm")),
        (("one", "brighter"), ("one", "brighter")),
    ],
)
def test_answers_are_the_normalised_geometric_mean(
    runs: tuple[str, ...], different: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    joined = _best("joined_" + "_".join(runs))
    main([*map(_best, runs), joined])
    trunks = len(different)
    assert ("that of all" if trunks == 1 else f"{trunks} side by side") in capsys.readouterr().out
    found, members = _answers(joined), [_answers(_best(run)) for run in runs]
    for name in ("gender", "race", "age_distribution"):
        mean = np.exp(np.mean([np.log(member[name].astype(np.float64)) for member in members], axis=0))
        expected = mean / mean.sum(1, keepdims=True)
        assert np.abs(found[name] - expected).max() < 1e-4, name
        if name == "age_distribution":  # an age is the mean of the distribution without its temperature
            temperatures = [float(read_checkpoint(_best(run)).module.model.heads["age"].temperature) for run in runs]
            plain = expected ** (1 / np.mean([1 / each for each in temperatures]))
            ages = plain @ np.arange(plain.shape[1]) / plain.sum(1)
            assert np.abs(found["age"] - ages).max() < 5e-3
    assert _trunk(joined).features == sum(_trunk(_best(run)).features for run in different)


def test_a_model_joined_with_itself_answers_the_same() -> None:
    """Also with temperatures far from one, which must move no age."""
    Path("runs/hot/version_0/checkpoints").mkdir(parents=True)
    shutil.copy("runs/one/version_0/faces.parquet", "runs/hot/version_0/faces.parquet")
    content = torch.load(_best("one"), weights_only=False)
    for name in ("gender", "race", "age"):
        content["state_dict"][f"model.heads.{name}.temperature"].fill_(1.7)
    torch.save(content, _best("hot"))
    joined = _best("twice")
    main([_best("hot"), _best("hot"), joined])
    found, own = _answers(joined), _answers(_best("hot"))
    assert found.keys() == own.keys()
    for name, values in own.items():
        assert np.abs(found[name] - values).max() < (5e-3 if name == "age" else 1e-5), name


def test_it_is_a_model_like_any_other(faces: Path) -> None:
    joined = _best("whole")
    main([_best("graph"), _best("timm"), joined])
    words = [f"--ckpt_path={joined}", "--accelerator=cpu", "--precision=32-true", "--data.num_workers=0"]
    results = evaluate.main(words)
    assert {"test/gender/accuracy", "test/age/mae_years"} <= results.keys()
    kept, own = (pd.read_parquet(f"runs/{run}/version_0/faces.parquet") for run in ("whole", "graph"))
    pd.testing.assert_frame_equal(kept, own)
    assert any(isinstance(each, nn.BatchNorm2d) for each in _trunk(joined).modules())


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (("graph",), "Expected two checkpoints or more"),
        (("graph", "linear"), "with the same hidden, but"),
        (("linear", "notebook"), "with the same age_head, but"),
        (("linear", "few"), "of the same tasks with the same labels"),
        (("linear", "moved"), "faces that one keeps for validation or test are in the training of another"),
        (("linear", "none"), "but there is none"),
    ],
)
def test_what_can_not_be_averaged_is_refused(runs: tuple[str, ...], said: str) -> None:
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(UserError, match=said):
        join_models([Path(_best(run)) for run in runs], Path(_best("refused")))
    assert sorted(Path("runs").rglob("*")) == before


def test_without_the_faces_of_a_training_nothing_is_joined(tmp_path: Path) -> None:
    shutil.copy(_best("graph"), tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"Expected faces\.parquet in the run of"):
        join_models([Path(_best("timm")), tmp_path / "best.ckpt"], Path(_best("refused")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([_best("one"), _best("other"), _best("graph")], "version_0 has files; name another"),
        ([_best("one"), _best("other"), "joined.ckpt"], "Expected a DEST such as runs/ensemble/version_0/"),
        ([_best("one"), "trunk.safetensors", _best("refused")], "but got trunk.safetensors"),
        ([_best("one"), _best("other"), _best("refused"), "--size=64"], "Expected no --size with checkpoints"),
    ],
)
def test_mistakes_are_a_line_and_nothing_is_written(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert said in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
