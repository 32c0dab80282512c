"""A frozen trunk is run once: its features are kept, never used when stale, and the result is an ordinary model."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from plain_networks import write_small_trunk
from run_folders import without_drawing
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from facecls import evaluate, fit
from facecls.data.datamodule import FacesDataModule
from facecls.data.synthetic import write_faces
from facecls.data.transforms import EvalTransform
from facecls.errors import UserError
from facecls.model import engine, onnx_file
from facecls.model.checkpoint import read_checkpoint
from facecls.model.engine import open_predictor
from facecls.model.onnx_file import trunk_to_onnx
from facecls.model.predictor import OnnxTrunk
from facecls.model.trunk import Trunk, create_trunk, load_graph, save_trunk
from facecls.training import probe as probing
from facecls.training.cli import FaceCLI
from facecls.training.probe import features_key

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent.parent / "configs/probe.yaml"
KEPT = Path("runs/probe/features.safetensors")
BEST = "runs/probe/version_0/checkpoints/best.ckpt"
SMALL = [f"--config={CONFIG}", "--model.trunk=test_resnet", "--data.image_size=64", "--data.batch_size=16"]
SMALL += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=2"]
SMALL += ["--model.optimizer.init_args.lr=0.03"]
SMALL += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)


@pytest.fixture(scope="module")
def results(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What a first run says; all tests of this file go on in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("probe"))
        without_drawing(patch)
        torch.manual_seed(0)
        net = create_trunk("test_resnet").net
        save_trunk(Path("trunk.safetensors"), net.state_dict(), {"architecture": "test_resnet"})
        yield _fit(faces)


def _fit(faces: Path, *more: str) -> dict[str, object]:
    return fit.main([*SMALL, f"--data.root={faces}", "--model.weights=trunk.safetensors", *more])


def _tested(results: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in results.items() if name.startswith("test/")}


def _refuse(*args: object) -> torch.Tensor:
    raise AssertionError("the trunk was run again")


def test_the_features_are_those_of_the_trunk(results: dict[str, object], faces: Path) -> None:
    features = load_file(KEPT)["features"]
    data = FacesDataModule(str(faces), image_size=64, num_workers=0)
    data.setup()
    trunk = create_trunk("test_resnet", "trunk.safetensors").eval()
    for row in range(0, len(data.faces), 9):
        face = EvalTransform(64)(data.picture(row))["image"]
        with torch.inference_mode():
            expected = trunk(torch.from_numpy(face.copy()).permute(2, 0, 1)[None])[0]
        np.testing.assert_allclose(features[row, 0], expected, atol=1e-5)


def test_the_trunk_has_seen_each_training_face_once(results: dict[str, object]) -> None:
    assert results["faces_seen"] == results["faces/train"]


def test_the_heads_learn(results: dict[str, object]) -> None:
    losses = [event.value for event in EventAccumulator("runs/probe/version_0").Reload().Scalars("train/loss")]
    assert losses[-1] < 0.95 * losses[0]


def test_the_result_is_an_ordinary_model_on_an_unchanged_trunk(results: dict[str, object]) -> None:
    module = read_checkpoint(BEST).module
    for name, tensor in load_file("trunk.safetensors").items():
        assert torch.equal(module.model.trunk.net.state_dict()[name], tensor), name
    assert list(open_predictor(BEST).tasks) == ["gender", "race", "age"]
    words = [f"--ckpt_path={BEST}", "--accelerator=cpu", "--precision=32-true", "--data.num_workers=0"]
    again = evaluate.main(words)  # from the images
    assert _tested(again) == pytest.approx(_tested(results), abs=1e-5)
    one, other = (pd.read_parquet(f"runs/{run}/version_0/predictions.parquet") for run in ("probe", "evaluate"))
    pd.testing.assert_frame_equal(one, other, atol=1e-4)


def test_a_training_starts_from_the_heads_of_a_probe(
    results: dict[str, object], faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = [word for word in SMALL if not word.startswith(("--config", "--model.optimizer"))]
    tuned += [f"--data.root={faces}", "--model.weights=trunk.safetensors", "--name=tuned", f"--heads={BEST}"]
    tuned += ["--seed_everything=1", "--model.hidden=[512]", "--model.dropout=0.2", "--model.feature_norm=true"]
    still = ["--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0}}", "--ema=null"]
    fit.main([*tuned, *still, "--model.schedule.batchnorm=frozen"])
    assert f"heads of gender, race, age from {BEST}" in capsys.readouterr().out
    began, probed = (
        read_checkpoint(path).module.model for path in ("runs/tuned/version_0/checkpoints/best.ckpt", BEST)
    )
    for name, tensor in probed.state_dict().items():
        of_head, kind = name.startswith("heads."), name.rpartition(".")[2]
        if of_head and kind == "num_batches_tracked":
            assert began.state_dict()[name] > tensor > 0
        # temperatures are fitted anew, and heads go on measuring features
        elif not (of_head and kind in ("temperature", "running_mean", "running_var")):
            assert torch.equal(tensor, began.state_dict()[name]), name
    few = ["--model.tasks=[age]", "--model.task_weights={}"]
    fit.main([*tuned, *few, "--trainer.limit_train_batches=1"])
    assert f"heads of age from {BEST}" in capsys.readouterr().out

    trained = "runs/tuned/version_1/checkpoints/best.ckpt"
    for words, said in (
        (["--model.hidden=[8]"], "that of gender has other layers; set model.hidden"),
        (["--model.feature_norm=false"], r"that of gender has other layers; set .*model\.feature_norm"),
        ([f"--heads={trained}"], "but the trunk of .* is another or was trained"),
        (["--model.trunk=test_vit", "--model.weights=null"], "but the trunk of .* is another"),
        (["--heads=none.ckpt"], "Expected a checkpoint at none.ckpt"),
        (["--data.tasks={gender: {classes: [man, woman]}}", "--model.tasks=[gender]"], "Expected heads of gender, but"),
    ):
        with pytest.raises(UserError, match=said):
            fit.main([*tuned, *words])


@pytest.fixture
def from_heads(results: dict[str, object]) -> Callable[..., Path]:
    """Begins a training from the heads of the probe, or of another checkpoint, and gives the folder of its run."""
    words = [word for word in SMALL if not word.startswith(("--config", "--model.optimizer"))]
    words += ["--model.weights=trunk.safetensors", "--seed_everything=1", "--data.split_seed=7"]
    words += ["--model.hidden=[512]", "--model.feature_norm=true", "--trainer.limit_train_batches=1"]

    def begin(root: Path, name: str, heads: str = BEST, *more: str) -> Path:
        fit.main([*words, f"--data.root={root}", f"--name={name}", f"--heads={heads}", *more])
        return Path("runs") / name / "version_0"

    return begin


def _parts(run: Path | str) -> "pd.Series[str]":
    return pd.read_parquet(Path(run) / "faces.parquet").set_index("sha1")["split"].sort_index()


@pytest.mark.parametrize("where", ["there", "elsewhere", "with a task"])
def test_what_the_heads_were_trained_on_is_not_tested(
    where: str,
    from_heads: Callable[..., Path],
    faces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, more = faces, list[str]()
    if where == "elsewhere":
        root = tmp_path / "elsewhere"
        shutil.copytree(faces, root)
    if where == "with a task":
        more = ["--data.tasks={glasses: {classes: [without, with]}}", "--model.tasks=[gender, race, age]"]
    run = from_heads(root, f"kept {where}", BEST, *more)
    assert "all faces keep the part that they had for the heads" in capsys.readouterr().out
    pd.testing.assert_series_equal(_parts(run), _parts("runs/probe/version_0"))


def test_other_faces_of_the_same_names_are_split_anew(
    from_heads: Callable[..., Path], faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others"
    write_faces(others, 80, seed=8)
    for other, face in zip(sorted(others.iterdir()), sorted(faces.iterdir()), strict=False):
        other.rename(others / face.name)
    run = from_heads(others, "others")
    assert "0 faces of the run keep their part" in capsys.readouterr().out
    data = FacesDataModule(str(others), split_seed=7, image_size=64, num_workers=0)
    data.setup()
    parts = _parts(run)
    own = parts[parts.index.isin(data.faces["sha1"])]
    pd.testing.assert_series_equal(own, data.faces.set_index("sha1")["split"].sort_index())
    # what the heads were trained on stays on record
    trained = _parts("runs/probe/version_0")
    assert set(trained[trained == "train"].index) <= set(parts[parts == "train"].index)


def test_where_the_faces_of_the_heads_are_lost_it_is_said(
    from_heads: Callable[..., Path], faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = tmp_path / "heads.ckpt"
    shutil.copy(BEST, heads)
    with pytest.raises(UserError, match=r"Expected data\.split_seed 0 as in training.*but got data\.split_seed 7"):
        from_heads(faces, "lost", str(heads))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(faces, elsewhere)
    from_heads(elsewhere, "lost", str(heads))
    assert "whether its heads were trained on faces to test is not known" in capsys.readouterr().out


def test_a_resumed_run_knows_the_heads_it_began_with(
    from_heads: Callable[..., Path], faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = from_heads(faces, "resumed")
    more = [f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.max_epochs=3"]
    with pytest.raises(UserError, match=rf"Expected heads {BEST} as when the run of .* but got other.ckpt; set it"):
        from_heads(faces, "resumed", "other.ckpt", *more)
    with monkeypatch.context() as patch:  # a resumed run has heads of its own
        patch.setattr(fit, "load_heads", _refuse)
        from_heads(faces, "resumed", BEST, *more)
    assert yaml.safe_load((run / "config.yaml").read_text())["heads"] == BEST


def test_features_are_computed_once(results: dict[str, object], faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "compute_features", _refuse)
    assert _tested(_fit(faces)) == _tested(results)


def _other_weights(trunk: Trunk, data: FacesDataModule) -> None:
    next(trunk.parameters()).data[0] += 1e-6


def _other_statistics(trunk: Trunk, data: FacesDataModule) -> None:
    next(buffer for name, buffer in trunk.named_buffers() if name.endswith("running_var"))[0] *= 1.0001


def _other_mean(trunk: Trunk, data: FacesDataModule) -> None:
    trunk.mean[0, 0] += 1


def _other_face(trunk: Trunk, data: FacesDataModule) -> None:
    data.faces.loc[3, "sha1"] = "0" * 40


def _other_order(trunk: Trunk, data: FacesDataModule) -> None:
    data.faces = data.faces[::-1]


def _other_size(trunk: Trunk, data: FacesDataModule) -> None:
    data.eval_transform = EvalTransform(96)


@pytest.mark.parametrize(
    "change", [_other_weights, _other_statistics, _other_mean, _other_face, _other_order, _other_size]
)
def test_whatever_features_follow_from_is_in_their_key(
    results: dict[str, object], faces: Path, change: Callable[[Trunk, FacesDataModule], None]
) -> None:
    data = FacesDataModule(str(faces), image_size=64, num_workers=0)
    data.setup()
    trunk = create_trunk("test_resnet", "trunk.safetensors")
    key = features_key(trunk, data, "32-true", False)
    assert features_key(trunk, data, "bf16-mixed", False) != key
    assert features_key(trunk, data, "32-true", True) != key
    assert features_key(create_trunk("test_resnet", "trunk.safetensors"), data, "32-true", False) == key
    change(trunk, data)
    assert features_key(trunk, data, "32-true", False) != key


def test_the_graph_is_in_the_key_too(faces: Path, tmp_path: Path) -> None:
    data = FacesDataModule(str(faces), image_size=64, num_workers=0)
    data.setup()
    trunk = create_trunk("graph", write_small_trunk(tmp_path / "trunk.safetensors"))
    other = copy.deepcopy(trunk.net.description)
    next(node for node in other["nodes"] if node["op"] == "GlobalAveragePool")["op"] = "Abs"  # the same tensors
    twin = load_graph(other, trunk.net.state_dict(), "test")
    assert features_key(trunk, data, "32-true", False) != features_key(twin, data, "32-true", False)


@pytest.fixture(scope="module")
def trunk(results: dict[str, object]) -> Trunk:
    return create_trunk("test_resnet", "trunk.safetensors").eval()


@pytest.fixture(scope="module")
def exported(trunk: Trunk) -> bytes:
    return trunk_to_onnx(trunk, 64, engine.OPSET)


@pytest.fixture
def _quick_export(exported: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that was exported before, since an export takes seconds."""
    monkeypatch.setattr(onnx_file, "trunk_to_onnx", lambda *_: exported)


def _lets_engines_take(seconds: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(run: Any, images: torch.Tensor) -> Any:
        return seconds["ONNX Runtime" if isinstance(run, OnnxTrunk) else "torch"], run(images)

    monkeypatch.setattr(engine, "_timed", timed)


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize("faster", ["torch", "ONNX Runtime"])
def test_the_faster_engine_computes_the_features(
    faster: str, trunk: Trunk, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lets_engines_take({"torch": 100.0, "ONNX Runtime": 90.0 if faster == "ONNX Runtime" else 110.0}, monkeypatch)
    kept = Path("runs/engines/features.safetensors")
    kept.unlink(missing_ok=True)
    made = FaceCLI([*SMALL, f"--data.root={faces}", "--model.weights=trunk.safetensors", "--name=engines"])
    made.datamodule.setup()
    said = probing.use_features(made.trainer, made.model, made.datamodule)
    assert said.startswith(f"features of 80 faces computed by {faster} at ")
    features = load_file(kept)["features"]
    face = torch.from_numpy(EvalTransform(64)(made.datamodule.picture(79))["image"].copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(features[79, 0], trunk(face)[0], atol=1e-5)
    assert made.model.model.trunk.training
    monkeypatch.setattr(probing, "compute_features", _refuse)
    said = probing.use_features(made.trainer, made.model, made.datamodule)
    assert said == f"features of 80 faces read from {kept}, computed by {faster}"


def test_both_engines_compute_the_same_features(trunk: Trunk, exported: bytes) -> None:
    images = torch.randint(0, 256, (70, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = trunk(images)
    np.testing.assert_allclose(OnnxTrunk(exported)(images), expected, atol=1e-5)
    np.testing.assert_allclose(OnnxTrunk(exported)(images.flip(3)), trunk(images.flip(3)).detach(), atol=1e-5)


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize(
    ("seconds", "change", "error", "is_taken"),
    [
        (100.0, 0.0, None, True),
        (0.01, 0.0, None, False),  # little to do
        (100.0, 0.01, None, False),  # other features
        (100.0, float("nan"), None, False),
        (100.0, 0.0, UserError("no export"), False),
        (100.0, 0.0, MemoryError(), False),
    ],
)
def test_onnx_runtime_is_taken_where_it_is_worth_it(
    seconds: float,
    change: float,
    error: Exception | None,
    is_taken: bool,
    trunk: Trunk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> bytes:
        assert error is not None
        raise error

    _lets_engines_take({"torch": seconds, "ONNX Runtime": seconds / 2}, monkeypatch)
    run = OnnxTrunk.__call__
    monkeypatch.setattr(OnnxTrunk, "__call__", lambda self, images: run(self, images) + change)
    if error is not None:
        monkeypatch.setattr(onnx_file, "trunk_to_onnx", fails)
    images = torch.full((4, 3, 64, 64), 90, dtype=torch.uint8)
    with torch.no_grad():
        taken = engine.faster_trunk(trunk, trunk, images, 1000)
    assert (taken is not None) == is_taken


def test_mirror_images_are_seen_in_training_and_averaged_in_the_test(faces: Path, results: dict[str, object]) -> None:
    tested = _fit(faces, "--model.tta=flip", "--name=mirrored", "--model.hidden=[8]")
    features = load_file("runs/mirrored/features.safetensors")["features"]
    assert features.shape[1] == 2
    data = FacesDataModule(str(faces), image_size=64, num_workers=0)
    data.setup()
    trunk = create_trunk("test_resnet", "trunk.safetensors").eval()
    face = torch.from_numpy(EvalTransform(64)(data.picture(3))["image"].copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(features[3, 1], trunk(face.flip(3))[0], atol=1e-5)
    words = ["--ckpt_path=runs/mirrored/version_0/checkpoints/best.ckpt", "--accelerator=cpu", "--precision=32-true"]
    again = evaluate.main([*words, "--data.num_workers=0"])  # which averages logits of images
    assert again["test/age/mae_years"] == pytest.approx(tested["test/age/mae_years"], abs=1e-3)


def test_stale_and_damaged_features_are_replaced(results: dict[str, object], faces: Path) -> None:
    first = KEPT.read_bytes()
    KEPT.write_bytes(first[:1000])
    _fit(faces)
    assert KEPT.read_bytes() == first
    _fit(faces, "--data.image_size=96")
    assert KEPT.read_bytes() != first
    assert [path.name for path in KEPT.parent.iterdir() if path.is_file()] == [KEPT.name]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.train_transform=facecls.data.transforms.EvalTransform", "train_transform"),
        ('--model.schedule.frozen={"0": -1, "1": 0}', "trains the heads alone"),
        ('--model.schedule.frozen={"1": -1}', "trains the heads alone"),
    ],
)
def test_what_a_probe_cannot_do_is_refused(results: dict[str, object], faces: Path, option: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        _fit(faces, option)
