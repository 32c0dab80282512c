"""What is damaged or no number is refused: models of which a bit was turned, losses, weights and transforms."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from plain_networks import write_small_trunk
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained_model import SIZE, save_checkpoint

from facecls.data.datamodule import FacesDataModule
from facecls.data.synthetic import write_faces
from facecls.errors import UserError
from facecls.fit import main as fit
from facecls.model import onnx_file
from facecls.model.checkpoint import read_checkpoint
from facecls.model.predictor import OnnxPredictor
from facecls.model.trunk import create_trunk, load_graph, read_trunk, save_trunk
from facecls.predict.__main__ import main as predict
from facecls.run import write_results
from facecls.training.probe import read_features, write_features


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, an ONNX file, a trunk file and features."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "best.ckpt")
    module = read_checkpoint(folder / "best.ckpt").module
    about = onnx_file.metadata(module, folder / "best.ckpt")
    (folder / "model.onnx").write_bytes(onnx_file.serialise(onnx_file.to_onnx(module, 18), about))
    save_trunk(folder / "trunk.safetensors", module.model.trunk.net.state_dict(), {"architecture": "test_resnet"})
    write_features(folder / "features.safetensors", "key", torch.randn(30, 2, 64), "torch")
    return folder


def read(path: Path) -> Any:
    """Reads a model as the commands do."""
    if path.suffix == ".ckpt":
        return read_checkpoint(path)
    if path.suffix == ".onnx":
        return OnnxPredictor(path, "cpu")
    return read_features(path, "key") if path.name == "features.safetensors" else read_trunk(path)


def damaged(path: Path, folder: Path, count: int = 40) -> Iterator[Path]:
    """Copies of a file, in each of which a bit in another place is turned."""
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(data), size=count).tolist():
        copy = folder / path.name
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        yield copy


@pytest.mark.parametrize("name", ["best.ckpt", "model.onnx", "trunk.safetensors", "features.safetensors"])
def test_a_turned_bit_is_seen(name: str, models: Path, tmp_path: Path) -> None:
    """Either it is refused, or it stands where nothing is read: then the model is the same."""
    same = read(models / name)
    refused = 0
    for copy in damaged(models / name, tmp_path):
        try:
            found = read(copy)
        except UserError:
            refused += 1
            continue
        if found is None:  # features are computed anew then
            refused += 1
        elif name == "best.ckpt":
            own, other = same.module.state_dict(), found.module.state_dict()
            assert all(torch.equal(own[key], other[key]) for key in own)
        elif name == "trunk.safetensors":
            assert all(torch.equal(same[0][key], found[0][key]) for key in same[0])
        else:
            assert name == "features.safetensors"
            assert torch.equal(same[0], found[0])
            assert same[1] == found[1]
    assert refused > 30


@pytest.mark.parametrize("name", ["model.onnx", "trunk.safetensors"])
def test_files_without_a_checksum_are_read(name: str, models: Path, tmp_path: Path) -> None:
    """As older releases wrote them."""
    path = tmp_path / name
    if name == "model.onnx":
        model = onnx.load(models / name)
        about = json.loads(model.metadata_props[0].value)
        del about["sha256"]
        onnx.helper.set_model_props(model, {"facecls": json.dumps(about)})
        onnx.save(model, path)
    else:
        save_file(load_file(models / name), path, {"facecls": json.dumps({"architecture": "test_resnet"})})
    assert read(path)


def test_the_checksum_is_that_of_the_tensors(models: Path) -> None:
    with safe_open(models / "trunk.safetensors", framework="pt") as file:
        assert len(json.loads(file.metadata()["facecls"])["sha256"]) == 64
    assert read_trunk(models / "trunk.safetensors")[1] == {"architecture": "test_resnet"}


NO_KEY = object()
VALUES = [NO_KEY, "", None, -1, 0, "x", [], {}, [[]], 10**400, float("nan"), float("inf"), 1e308]


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """All that is inside a value of JSON; of lists the first two."""
    inner = list(value) if isinstance(value, dict) else range(len(value))[:2] if isinstance(value, list) else []
    for key in inner:
        yield (*path, key)
        yield from _paths(value[key], (*path, key))


def _changed(about: Any, path: tuple[str | int, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(about))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is NO_KEY:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


def test_a_trunk_file_that_says_something_else_is_one_line(tmp_path: Path) -> None:
    """Every entry of its description is missing or another kind: it is refused, or computes numbers all the same."""
    path = write_small_trunk(tmp_path / "trunk.safetensors", size=16)
    state, about = read_trunk(path)
    images, refused = torch.full((1, 3, 64, 64), 100.0), 0
    for number, place in enumerate(_paths(about["graph"])):
        for value in VALUES[number % 5 :: 5]:
            try:
                load_graph(_changed(about["graph"], place, value), state, path)
                net = create_trunk("graph", None, 64, graph=_changed(about["graph"], place, value))
            except UserError:
                refused += 1
                continue
            with torch.inference_mode():
                assert net.eval()(images).shape == (1, net.features)
    assert refused > 80


@pytest.mark.parametrize(
    "text", ["", "x", "{", "[]", "3", "null", "{}", '{"architecture": 3}', '{"architecture": ""}', "[" * 10**5]
)
def test_metadata_of_another_kind_is_one_line(text: str, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "trunk.safetensors"
    for key in ("facecls", "other"):
        save_file(load_file(models / path.name), path, {key: text})
        with pytest.raises(UserError, match=r"Expected (a trunk file|weights of \w+), but .*trunk\.safetensors"):
            create_trunk("test_resnet", path, SIZE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, models: Path, tmp_path: Path) -> None:
    state = load_file(models / "trunk.safetensors")
    name = next(name for name in state if name.endswith("conv1.weight") or name.endswith("weight"))
    state[name].view(-1)[3] = value
    save_file(state, tmp_path / "trunk.safetensors", {"facecls": json.dumps({"architecture": "test_resnet"})})
    with pytest.raises(UserError, match=rf"finite weights in .*trunk.safetensors, but {name} holds NaN or infinity"):
        create_trunk("test_resnet", str(tmp_path / "trunk.safetensors"), SIZE)
    kept = torch.load(models / "best.ckpt", weights_only=True)
    next(iter(kept["state_dict"].values())).fill_(value)
    torch.save(kept, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"finite weights in .*best.ckpt, but .* holds NaN or infinity"):
        predict([str(tmp_path / "best.ckpt"), "synthetic:2"])


def test_predictions_that_are_no_numbers_are_not_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights can overflow, too."""
    kept = torch.load(models / "best.ckpt", weights_only=True)
    for name, tensor in kept["state_dict"].items():
        if name.startswith("model.heads.age") and name.endswith("weight"):
            tensor.fill_(3e38)
    torch.save(kept, tmp_path / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Expected finite predictions, but age\S* of synthetic:3/\S+ is not; "):
        predict(["best.ckpt", "synthetic:3", "--faces", "whole", "--out", "out.csv", "--engine", "torch"])
    assert not Path("out.csv").exists()


def test_a_metric_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected finite results, but test/age/mae_years is nan"):
        write_results(tmp_path, {"test/age/mae_years": float("nan")}, pd.DataFrame(), {})
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the faces of the batch; the checkpoints of the epochs before it stay."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(Path(__file__).parent.parent / "configs/demo.yaml"), "--data.root=synthetic:60"]
    words += ["--trainer.max_epochs=3", "--model.optimizer.init_args.lr=1e30", "--data.num_workers=0"]
    with pytest.raises(
        UserError,
        match=r"finite losses, but in a (train|val) batch they are .*\b(nan|inf).* \(faces \d.*\.jpg, .* more\)",
    ):
        fit(words)


def _as_float(image: Any, **_: Any) -> Any:
    return image.astype(np.float32) / 255


def _cut(image: Any, **_: Any) -> Any:
    return image[: SIZE // 2]


def _as_grey(image: Any, **_: Any) -> Any:
    return image[..., 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["float", "size", "grey"])
def test_each_image_of_a_transform_is_checked(kind: str, workers: int, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", 60, seed=0)
    odd = {
        "float": A.Lambda(image=_as_float, p=0.3),
        "size": A.Lambda(image=_cut, p=0.3),
        "grey": A.Lambda(image=_as_grey, p=0.3),
    }[kind]
    transform = A.Compose([A.Resize(SIZE, SIZE), odd], seed=1)
    data = FacesDataModule(str(tmp_path / "faces"), SIZE, batch_size=8, num_workers=workers, train_transform=transform)
    gave = {"float": r"float32 of \(64, 64, 3\)", "size": r"uint8 of \(32, 64, 3\)", "grey": r"uint8 of \(64, 64\)"}

    def read_all() -> None:
        data.setup()
        for epoch in range(3):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            list(loader)

    with pytest.raises(UserError) as caught:
        read_all()
    assert str(caught.value).startswith("Expected data.train_transform and data.eval_transform to give uint8 images")
    assert re.search(gave[kind], str(caught.value))
