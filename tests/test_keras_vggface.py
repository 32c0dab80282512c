"""keras-vggface's networks against Keras itself, and every way in which people keep its ResNet-50."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from convert.finish import finish
from convert.keras import known
from convert.keras.network import read_keras
from convert.plain.network import Asked, Contract, Network
from convert.trunk_weights import conv_table, norm_table
from facecls.errors import UserError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
VERSION_1, VERSION_2 = (93.5940, 104.7624, 129.1863), (91.4953, 103.8827, 131.0912)
CAFFE = (103.939, 116.779, 123.68)
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "resnet50.h5": ("classifier",),
    "resnet50.keras": ("classifier",),
    "keras3.h5": (),
    "nested.h5": ("own",),
    "heads.h5": ("fc1", "gender", "age"),
    "free.h5": (),
    "nested_weights.h5": ("own",),
    "heads_weights.h5": ("fc1", "gender", "age"),
    "dim_proj_weights.h5": ("dim_proj", "classifier"),
}
"""By file of the same ResNet-50: the layers that are not its trunk."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What keras_vggface_files.py writes; made in another process, so that TensorFlow stays out of this one."""
    path = tmp_path_factory.mktemp("vggface")
    script = Path(__file__).with_name("keras_vggface_files.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def resnet50(folder: Path) -> dict[str, NDArray[Any]]:
    return tensors(read_keras(folder / "resnet50.h5", Asked()))


def tensors(network: Network) -> dict[str, NDArray[Any]]:
    """The weights by the names of nodes, as trunk_weights needs them, and of their inputs."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.model.graph.initializer}
    return {
        f"{node.name} {place}": arrays[name]
        for node in network.model.graph.node
        for place, name in enumerate(node.input)
        if name in arrays
    }


def run(network: Network, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    finish(network)
    session = onnxruntime.InferenceSession(network.model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {"images": network.contract.prepare(images)})
    return outputs


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, of the largest value expected."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["resnet50", "senet50", "senet50_weights"])
def test_network_gives_what_keras_gives(name: str, folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / f"{name}.h5", Asked(keep_classifier=True))
    kind = name.partition("_")[0]
    assert network.contract == Contract(224, "bgr", VERSION_2, (1.0,) * 3)
    assert network.layout == ("vggface2_resnet50" if kind == "resnet50" else "graph")
    assert network.left_out == ()
    features, probabilities = run(network, oracle["images"])
    assert relative(features, oracle[kind]) < TOLERANCE
    assert relative(probabilities, oracle[f"{kind}/probabilities"]) < TOLERANCE
    assert network.classifier is not None
    assert network.classifier[0].shape == (10, 2048)


def test_senet50_without_classifier(folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / "senet50_notop.h5", Asked())
    assert "SENet-50" in network.summary["network"]
    assert relative(run(network, oracle["images"])[0], oracle["senet50"]) < TOLERANCE
    with pytest.raises(UserError, match="no classifier to keep"):
        read_keras(folder / "senet50_notop.h5", Asked(keep_classifier=True))


@pytest.mark.parametrize("name", ["vgg16_notop", "vgg16_notop_weights"])
def test_vgg16_without_its_top(name: str, folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / f"{name}.h5", Asked(size=64))
    assert network.contract == Contract(64, "bgr", VERSION_1, (1.0,) * 3)
    assert (network.layout, network.features) == ("graph", "pool5")
    assert relative(run(network, oracle["images"][..., :64, :64])[0], oracle["vgg16_notop"]) < TOLERANCE


@pytest.mark.parametrize("name", ["vgg16", "vgg16_weights"])
def test_vgg16_with_its_top(
    name: str, folder: Path, oracle: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrower than the real one, which has 580 MB."""
    monkeypatch.setattr("convert.keras.layout._VGG16", ((2, 3), (2, 4), (3, 5), (3, 6), (3, 7)))
    monkeypatch.setattr("convert.keras.layout._VGG16_DENSE", 16)
    # what networks look like is computed once
    monkeypatch.setattr(known, "_reference", known._reference.__wrapped__)
    network = read_keras(folder / f"{name}.h5", Asked(size=64, keep_classifier=True))
    assert network.contract == Contract(64, "bgr", VERSION_1, (1.0,) * 3)
    assert (network.layout, network.features, network.left_out) == ("graph", "fc7/relu", ())
    features, probabilities = run(network, oracle["images"][..., :64, :64])
    assert relative(features, oracle["vgg16"]) < TOLERANCE
    assert relative(probabilities, oracle["vgg16/probabilities"]) < TOLERANCE
    assert network.classifier is not None
    assert network.classifier[0].shape == (10, 16)


def test_mobilenet_is_known_by_its_names(folder: Path, tmp_path: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / "mobilenet.h5", Asked())
    assert network.contract == Contract(64, "bgr", CAFFE, (1.0,) * 3)
    assert (network.layout, network.features) == ("graph", "global_pooling")
    assert relative(run(network, oracle["images"][..., :64, :64])[0], oracle["mobilenet"]) < TOLERANCE

    path = tmp_path / "edited.h5"
    shutil.copy(folder / "mobilenet.h5", path)
    with h5py.File(path, "r+") as file:
        config = file.attrs["model_config"].replace("global_pooling", "pooling")
        file.attrs["model_config"] = config
        file["model_weights"].move("global_pooling", "pooling")
        names = file["model_weights"].attrs
        names["layer_names"] = ["pooling" if name == "global_pooling" else name for name in names["layer_names"]]
    with pytest.raises(UserError, match="does not say how its images are prepared"):
        read_keras(path, Asked())
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = config.replace('"name": "any"', '"name": "vgg2_mobilenet"')
    assert read_keras(path, Asked()).contract == network.contract


@pytest.mark.parametrize("file", LEFT_OUT)
def test_every_file_of_the_resnet50_gives_the_same_trunk(
    file: str, folder: Path, resnet50: dict[str, NDArray[Any]]
) -> None:
    network = read_keras(folder / file, Asked())
    assert (network.layout, network.left_out) == ("vggface2_resnet50", LEFT_OUT[file])
    assert network.contract == Contract(224, "bgr", VERSION_2, (1.0,) * 3)
    found = tensors(network)
    assert found.keys() == resnet50.keys()
    assert all((found[name] == resnet50[name]).all() for name in found)


def test_nodes_have_the_names_that_the_trunk_needs(resnet50: dict[str, NDArray[Any]]) -> None:
    nodes = {name.partition(" ")[0] for name in resnet50}
    assert nodes == {name.removesuffix(".1") for name in conv_table()} | norm_table().keys()


def test_what_the_user_says_goes_first(folder: Path) -> None:
    told = read_keras(folder / "resnet50.h5", Asked(channels="rgb", mean=(1.0, 2.0, 3.0)))
    assert told.contract == Contract(224, "rgb", (1.0, 2.0, 3.0), (1.0,) * 3)
    other = read_keras(folder / "resnet50.h5", Asked(output="conv4_1_1x1_increase/bn"))
    # the trunk file of the ResNet-50 has neither another order of channels nor other features
    assert (told.layout, other.layout) == ("graph", "graph")


def test_own_head_is_kept_as_the_classifier(folder: Path) -> None:
    network = read_keras(folder / "nested.h5", Asked(keep_classifier=True))
    assert "classifier 1" in tensors(network)
    assert network.classifier is not None
    assert network.classifier[0].shape == (2, 2048)


def without(*names: str) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        file.attrs["layer_names"] = [name for name in file.attrs["layer_names"] if name not in names]

    return edit


def renamed(old: str, new: str) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        file.attrs["layer_names"] = [new if name == old else name for name in file.attrs["layer_names"]]
        file.move(old, new)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("conv5_3_3x3/bn"), r"ResNet-50 .*: 4 of its 265 weights missing, such as conv5_3_3x3/bn/gamma"),
        (without("conv2_1_1x1_down"), r"SENet-50 .*: 2 of its 329 weights missing, .*ResNet-50 .*: unlike it"),
    ],
    ids=["batchnorm", "squeeze"],
)
def test_weights_that_lack_some_are_refused(
    edit: Callable[[Any], None], message: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "edited.h5"
    shutil.copy(folder / "senet50_notop.h5", path)
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(UserError, match=message):
        read_keras(path, Asked())


def move_stride(text: str) -> str:
    """As in torchvision's ResNet-50."""
    reduce, middle = '"name": "conv3_1_1x1_reduce"', '"name": "conv3_1_3x3"'
    for name, old, new in ((reduce, "[2, 2]", "[1, 1]"), (middle, "[1, 1]", "[2, 2]")):
        place = text.index(f'"strides": {old}', text.index(name))
        text = text[:place] + f'"strides": {new}' + text[place + len(f'"strides": {old}') :]
    return text


@pytest.mark.parametrize(
    "edit",
    [
        move_stride,
        lambda text: text.replace('"epsilon": 0.001', '"epsilon": 1e-05', 1),
        lambda text: text.replace('"padding": "same"', '"padding": "valid"', 1),
        lambda text: text.replace("conv4_2_3x3", "conv4_2_other"),
    ],
    ids=["stride", "epsilon", "stem", "name"],
)
def test_another_network_with_the_same_names_is_not_taken_for_it(
    edit: Callable[[str], str], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "edited.h5"
    shutil.copy(folder / "heads.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = edit(file.attrs["model_config"])
    with pytest.raises(UserError, match="does not say how its images are prepared; give --channels, --mean, --std"):
        read_keras(path, Asked())
