"""Whole models of every kind against Keras 2 and 3 themselves: nested, sequential, with heads, in every format."""

import json
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from convert.finish import finish
from convert.keras import h5
from convert.keras.network import read_keras
from convert.plain.network import Asked, Network
from facecls.errors import UserError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
CONTRACT: dict[str, Any] = {"channels": "rgb", "mean": (0.0,) * 3, "std": (1.0,) * 3}
FEATURES = {
    "plain": "pool",
    "no_classifier": "pool",
    "map_only": "base_relu",
    "depthwise": "depthwise",
    "conv_classifier": "pool",
    "heads": "common",
    "nested": "pool",
    "same_names": "both",
    "called_twice": "features",
    "sequential": "flat",
    "nested_sequential": "pool",
    "any_size": "base_relu",
    "numbers": "pool",
    "layers_as_activations": "pool",
    "lambda_after": "embedding",
}
"""By model: the layer that is the features by default, but for ``lambda_after``, where the user names it."""
LEFT_OUT = {
    "plain": ["classifier", "dropout"],
    "conv_classifier": ["classifier", "dropout", "end", "reshape"],
    "heads": ["one", "two"],
    "nested": ["classifier"],
    "sequential": ["classifier", "end"],
    "nested_sequential": ["classifier"],
    "lambda_after": ["doubled"],
}
FILES = [f"{version}_{name}.{ending}" for version in ("k2", "k3") for name in FEATURES for ending in ("h5", "keras")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What keras_model_files.py writes; made in another process, so that TensorFlow stays out of this one."""
    path = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("keras_model_files.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


def ask(name: str, **more: Any) -> Asked:
    told = CONTRACT | ({"output": "embedding"} if name == "lambda_after" else {})
    return Asked(**(told | ({"size": 32} if name == "any_size" else {}) | more))


def run(network: Network, images: NDArray[Any]) -> list[NDArray[Any]]:
    """What the model computes, channels last."""
    session = onnxruntime.InferenceSession(network.model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images})
    return [output.transpose(0, 2, 3, 1) if output.ndim == 4 else output for output in outputs]


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, of the largest value expected."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("file", FILES)
def test_model_gives_what_keras_gives(file: str, folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    stem = file.partition(".")[0]
    name = stem[3:]
    network = read_keras(folder / file, ask(name))
    assert (network.features, network.layout, network.contract.size) == (FEATURES[name], "graph", 32)
    numbered = [re.sub(r"_\d+$", "", each) for each in network.left_out]
    assert sorted(numbered) == LEFT_OUT.get(name, [])
    (features,) = run(network, oracle["images"])
    assert relative(features, oracle[f"{stem}/features"]) < TOLERANCE
    assert network.summary["format"].startswith(f"whole model, Keras {'2.' if stem.startswith('k2') else '3.'}")


@pytest.mark.parametrize("name", ["plain", "conv_classifier", "nested", "sequential", "nested_sequential"])
@pytest.mark.parametrize("version", ["k2", "k3"])
def test_classifier_is_kept(version: str, name: str, folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / f"{version}_{name}.h5", ask(name, keep_classifier=True))
    features, probabilities = run(network, oracle["images"])
    assert relative(probabilities, oracle[f"{version}_{name}/probabilities"]) < TOLERANCE
    assert network.classifier is not None
    kernel, bias = network.classifier
    logits = features.reshape(2, -1) @ kernel.T + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    assert relative(odds / odds.sum(1, keepdims=True), probabilities) < TOLERANCE
    assert network.left_out == ()


@pytest.mark.parametrize("name", ["heads", "no_classifier", "lambda_after"])
def test_classifier_that_is_not_there_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match="no classifier to keep"):
        read_keras(folder / f"k2_{name}.h5", ask(name, keep_classifier=True))


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("nested", "base_relu"),
        ("nested", "middle_conv"),
        ("nested", "middle"),
        ("same_names", "two/base_relu"),
        ("called_twice", "base_conv/2"),
        ("called_twice", "shared"),
        ("nested_sequential", "block"),
    ],
)
def test_any_layer_can_be_named(name: str, output: str, folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(folder / f"k2_{name}.h5", ask(name, output=output))
    assert network.features == output
    assert output not in network.left_out
    (features,) = run(network, oracle["images"])
    assert features.ndim == 4


@pytest.mark.parametrize(("name", "also"), [("nested", ["base_relu"]), ("nested", ["middle_conv", "base_relu"])])
def test_averages_of_layers_are_joined_to_the_features(
    name: str, also: list[str], folder: Path, oracle: dict[str, NDArray[Any]]
) -> None:
    alone = [run(read_keras(folder / f"k2_{name}.h5", ask(name, output=layer)), oracle["images"])[0] for layer in also]
    network = read_keras(folder / f"k2_{name}.h5", ask(name, also=tuple(also)))
    shapes = finish(network, also)
    (features,) = run(network, oracle["images"])
    own = oracle[f"k2_{name}/features"]
    parts = [each.mean((1, 2)) if each.ndim == 4 else each for each in (own, *alone)]
    assert relative(features, np.concatenate(parts, 1)) < TOLERANCE
    assert shapes["features"] == features.shape[1:]


def test_layer_that_is_not_before_the_features_is_not_joined(folder: Path) -> None:
    for also in ("base_rel", "images", "features"):
        network = read_keras(folder / "k2_nested.h5", ask("nested"))
        with pytest.raises(UserError, match=rf"Expected --also with the name of a layer .* got {also}; did you mean"):
            finish(network, (also,))


@pytest.mark.parametrize("also", [("base_relu", "base_relu"), ("middle_conv", "base_relu", "middle_conv")])
def test_a_layer_is_joined_once(also: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(UserError, match="other layers than the features, each once"):
        finish(read_keras(folder / "k2_nested.h5", ask("nested")), also)


def test_same_names_are_told_apart(folder: Path, oracle: dict[str, NDArray[Any]]) -> None:
    both = oracle["k2_same_names/features"]
    for part, output in enumerate(("one/base_relu", "two/base_relu")):
        (features,) = run(read_keras(folder / "k2_same_names.h5", ask("", output=output)), oracle["images"])
        assert relative(features, both[..., 4 * part : 4 * part + 4]) < TOLERANCE


def test_name_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="got base_rel; did you mean base_relu"):
        read_keras(folder / "k2_nested.h5", ask("", output="base_rel"))


def test_lambda_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match=r"doubled in .* is a Lambda.*--output embedding"):
        read_keras(folder / "k2_lambda_after.h5", Asked(**CONTRACT))


def test_size_and_contract_that_are_not_known_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="how large its images are; give --size"):
        read_keras(folder / "k2_any_size.h5", Asked(**CONTRACT))
    with pytest.raises(UserError, match=r"give --mean, --std as .*--channels rgb --mean 127\.5 --std"):
        read_keras(folder / "k2_plain.h5", Asked(channels="rgb"))


def test_other_size_is_taken_where_the_graph_allows(folder: Path) -> None:
    assert read_keras(folder / "k2_plain.h5", ask("", size=48)).contract.size == 48
    with pytest.raises(UserError, match=r"images of --size 48, but .* was made for 32 and says: .*classifier/kernel"):
        read_keras(folder / "k2_sequential.h5", ask("", size=48, output="classifier"))


# All the ways in which files are written

Edit = Callable[[Any], None]


def configured(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Edits the description of the model."""

    def edit(file: Any) -> None:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)

    return edit


def layer(config: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in config["config"]["layers"] if each["config"]["name"] == name]
    return found  # type: ignore[no-any-return]


def setting(name: str, **settings: Any) -> Edit:
    return configured(lambda config: layer(config, name)["config"].update(settings))


def bytes_attributes(file: Any) -> None:
    """2018: ``encode("utf8")`` on everything."""
    group = file["model_weights"]
    for holder, name in ((file, "model_config"), (file, "keras_version"), (group, "keras_version")):
        holder.attrs[name] = holder.attrs[name].encode()
    for holder, name in ((group, "layer_names"), (group["conv"], "weight_names")):
        holder.attrs[name] = [each.encode() for each in holder.attrs[name]]


def split_attributes(file: Any) -> None:
    """Lists too long for one attribute."""
    group = file["model_weights"]
    for holder, name in ((group, "layer_names"), (group["conv"], "weight_names")):
        for part, some in enumerate(np.array_split([each.encode() for each in holder.attrs[name]], 2)):
            holder.attrs[f"{name}{part}"] = some
        del holder.attrs[name]


def other_shapes_of_attributes(file: Any) -> None:
    """A scalar where there is one name, an array where there is one version or description."""
    group = file["model_weights"]
    del group["classifier/classifier/bias:0"]
    names = group["classifier"].attrs
    names["weight_names"] = names["weight_names"][0]
    group.attrs["keras_version"] = np.array([b"2.2.4"])
    file.attrs.create("model_config", [file.attrs["model_config"]], dtype=h5py.string_dtype())


def numbered_scopes(file: Any) -> None:
    """A model built twice in a session: the scope in front of a weight's name gets a number."""
    group = file["model_weights/conv"]
    group.move("conv", "conv_1")
    group.attrs["weight_names"] = [name.replace("conv/", "conv_1/") for name in group.attrs["weight_names"]]


def old_description(file: Any) -> None:
    """What Keras 2.2 wrote: class Model, fewer keys, no module beside an initializer, short references."""

    def change(config: dict[str, Any]) -> None:
        config["class_name"] = "Model"
        for each in config["config"]["layers"]:
            for key in ("dtype", "groups", "optional", "ragged", "keepdims"):
                each["config"].pop(key, None)
            each["inbound_nodes"] = [[ref[:3] for ref in node] for node in each["inbound_nodes"]]

    configured(change)(file)


def half(file: Any) -> None:
    group = file["model_weights/conv/conv"]
    for name in list(group):
        values = group[name][()]
        del group[name]
        group.create_dataset(name, data=values.astype(np.float16).astype(np.float64), compression="gzip")


WAYS: list[Edit] = [
    bytes_attributes,
    split_attributes,
    other_shapes_of_attributes,
    numbered_scopes,
    old_description,
    setting("conv", activation={"class_name": "function", "config": "relu", "registered_name": "relu"}),
    setting("norm", axis=[3], dtype={"class_name": "DTypePolicy", "config": {"name": "mixed_float16"}}),
]


def edited(folder: Path, tmp_path: Path, edit: Edit, name: str = "k2_plain.h5") -> Path:
    path = tmp_path / "edited.h5"
    shutil.copy(folder / name, path)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


@pytest.mark.parametrize("edit", WAYS, ids=lambda edit: edit.__name__)
def test_every_way_of_writing_gives_the_same(edit: Edit, folder: Path, tmp_path: Path) -> None:
    plain = read_keras(folder / "k2_plain.h5", Asked(**CONTRACT))
    other = read_keras(edited(folder, tmp_path, edit), Asked(**CONTRACT))
    assert other.model == plain.model


def test_other_precision_is_said(folder: Path, tmp_path: Path, oracle: dict[str, NDArray[Any]]) -> None:
    network = read_keras(edited(folder, tmp_path, half), Asked(**CONTRACT))
    (features,) = run(network, oracle["images"])
    assert 1e-6 < relative(features, oracle["k2_plain/features"]) < 1e-2  # of float16
    mixed = edited(folder, tmp_path, setting("norm", dtype="mixed_float16"))
    assert read_keras(mixed, Asked(**CONTRACT)).summary["precision"].startswith("mixed_float16 in Keras")


@pytest.mark.parametrize(
    "spelling",
    [
        "relu6",
        {"class_name": "function", "config": "relu6", "module": "keras.applications.mobilenet"},
        "keras.applications.mobilenet.relu6",
        {"class_name": "function", "config": "relu6", "registered_name": "Custom>relu6", "module": "builtins"},
    ],
    ids=str,
)
def test_relu6_of_old_mobilenets_is_known(spelling: Any, folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path, setting("conv", activation=spelling))
    assert "Clip" in [node.op_type for node in read_keras(path, Asked(**CONTRACT)).model.graph.node]


def test_depthwise_convolution_of_old_mobilenets_is_known(
    folder: Path, tmp_path: Path, oracle: dict[str, NDArray[Any]]
) -> None:
    def change(config: dict[str, Any]) -> None:
        layer(config, "depthwise").update(registered_name="Custom>DepthwiseConv2D", module="keras.applications")

    network = read_keras(edited(folder, tmp_path, configured(change), "k2_depthwise.h5"), Asked(**CONTRACT))
    assert relative(run(network, oracle["images"])[0], oracle["k2_depthwise/features"]) < TOLERANCE


def kind(name: str, kind: str) -> Edit:
    return configured(lambda config: layer(config, name).update(class_name=kind))


def argument(name: str, **arguments: Any) -> Edit:
    """Passes further arguments to a layer."""
    return configured(lambda config: layer(config, name)["inbound_nodes"][0][0].__setitem__(3, arguments))


def source(name: str, *inputs: str) -> Edit:
    return configured(
        lambda config: layer(config, name).update(inbound_nodes=[[[input_, 0, 0, {}] for input_ in inputs]])
    )


def weight(name: str, value: Any) -> Edit:
    def edit(file: Any) -> None:
        group = file["model_weights"]
        del group[name]
        group[name] = value

    return edit


def unstored(file: Any) -> None:
    group = file["model_weights/conv/conv"]
    del group["kernel:0"]
    group.create_dataset("kernel:0", (3, 3, 3, 2**20), np.float64)
    setting("conv", filters=2**20, strides=30)(file)
    weight("conv/conv/bias:0", np.zeros(2**20, np.float32))(file)


def grouped(file: Any) -> None:
    file["model_weights/conv/conv"].move("kernel:0", "there")
    file.create_group("model_weights/conv/conv/kernel:0")


def linked(file: Any) -> None:
    group = file["model_weights/conv/conv"]
    group.move("kernel:0", "there")
    group["kernel:0"] = h5py.ExternalLink("elsewhere.h5", "kernel:0")


def deep(config: dict[str, Any]) -> None:
    for _ in range(60):
        inner = dict(config)
        config["class_name"], config["config"] = "Sequential", {"name": "deep", "layers": [inner]}


def many(config: dict[str, Any]) -> None:
    """Models of ten calls of models of ten calls, and so on."""
    layers = config["config"]["layers"]
    nested = {"class_name": "Activation", "config": {"name": "leaf", "activation": "relu"}}
    for depth in range(6):
        calls = [[["in", 0, 0, {}]]] + [[[f"part{depth}", index, 0, {}]] for index in range(9)]
        inner = dict(nested, name=f"part{depth}", inbound_nodes=calls)
        inner["config"] = dict(inner["config"], name=f"part{depth}")
        image = {"class_name": "InputLayer", "config": {"name": "in"}, "name": "in", "inbound_nodes": []}
        ends = {"input_layers": [["in", 0, 0]], "output_layers": [[f"part{depth}", 9, 0]]}
        nested = {"class_name": "Functional", "config": {"name": f"model{depth}", "layers": [image, inner], **ends}}
    layers.append(dict(nested, name="model5", inbound_nodes=[[["image", 0, 0, {}]]]))


def multiplied(config: dict[str, Any]) -> None:
    """Models that only give their two inputs back, ten calls of each within the next."""
    images = [{"class_name": "InputLayer", "config": {"name": name}, "inbound_nodes": []} for name in ("in", "too")]
    ends = {"input_layers": [["in", 0, 0], ["too", 0, 0]]}
    nested = {"class_name": "Functional", "config": {"name": "part", "layers": images, **ends}}
    nested["config"]["output_layers"] = ends["input_layers"]  # type: ignore[index]
    for _ in range(30):
        calls = [[["in", 0, 0, {}], ["too", 0, 0, {}]]]
        calls += [[["part", call, output, {}] for output in (0, 1)] for call in range(1, 10)]
        inner = {"name": "part", **nested, "inbound_nodes": calls}
        outputs = [["part", 10, 0], ["part", 10, 1]]
        config_ = {"name": "part", "layers": [*images, inner], **ends, "output_layers": outputs}
        nested = {"class_name": "Functional", "config": config_}
    calls = [[["image", 0, 0, {}], ["image", 0, 0, {}]]]
    config["config"]["layers"].append({"name": "part", **nested, "inbound_nodes": calls})


def crowded(config: dict[str, Any]) -> None:
    """A model of 10,000 models."""
    image = {"class_name": "InputLayer", "config": {"name": "in"}}
    for place in range(5_001):
        model = {"class_name": "Sequential", "config": {"name": f"model{place}", "layers": [image]}}
        config["config"]["layers"].append({**model, "inbound_nodes": []})


def slow(config: dict[str, Any]) -> None:
    for name, kind, settings in (
        ("conv", "UpSampling2D", {"size": 8}),
        ("norm", "MaxPooling2D", {"pool_size": 4_096, "strides": 1, "padding": "same"}),
    ):
        layer(config, name).update(class_name=kind, config={"name": name, **settings})


REFUSED: dict[str, tuple[Edit, str]] = {
    "unknown class": (
        kind("conv", "Attention"),
        "conv in .* is an Attention, none of them; code",
    ),
    "custom class": (
        kind("norm", "Custom>BatchNormalization"),
        "is a Custom>BatchNormalization, none .*--output conv",
    ),
    "unknown activation": (setting("conv", activation="mine"), r"conv \(Conv2D\) .* activation is mine"),
    "own activation": (
        setting("conv", activation={"class_name": "function", "config": "relu", "registered_name": "Custom>relu"}),
        "activation is own function relu",
    ),
    "registered activation": (setting("conv", activation="Pack>swish"), "activation is own function swish"),
    "activation by a lambda": (setting("conv", activation={"value": ["4wAAAA==", None, None]}), "is an own function"),
    "activation with weights": (
        setting("conv", activation={"class_name": "PReLU", "config": {"name": "relu"}}),
        "activation is layer prelu",
    ),
    "channels first": (setting("conv", data_format="channels_first"), "data_format is channels_first"),
    "other axis": (setting("norm", axis=[1]), "norm .* axis is 1, not the last"),
    "causal": (setting("conv", padding="causal"), "padding is causal, not valid or same"),
    "training": (argument("norm", training=True), "norm .* called with training=True"),
    "number": (argument("norm", y=3.0), "norm .* it is called with the number 3"),
    "argument": (argument("norm", axis=2), "norm .* it is called with axis 2"),
    "argument of zero": (argument("norm", axis=0), "norm .* it is called with axis 0"),
    "sum of one": (kind("norm", "Add"), "norm .* it has 1 inputs and 0 numbers"),
    "operation": (
        configured(lambda config: layer(config, "norm").update(class_name="Average", config={"name": "norm"})),
        "norm .* it has 1 inputs",
    ),
    "many filters": (setting("conv", filters=2**27), "weight conv/kernel"),
    "no number": (setting("conv", filters="6"), "its filters is '6', not a whole number"),
    "huge number": (setting("conv", kernel_size=10**30), "kernel_size is 1000"),
    "large kernel": (setting("conv", kernel_size=[33, 33]), "the output of layer conv has the shape"),
    "wrong type": (setting("conv", strides={"a": 1}), "conv .* its strides is .'a': 1., not one number or two"),
    "input": (kind("norm", "InputLayer"), "norm is an input that takes the output of a layer"),
    "cycle": (source("conv", "norm"), "layer conv takes its own output"),
    "gone": (source("conv", "nowhere"), "can't be understood"),
    "no inputs": (source("norm"), "norm .* has 0 inputs"),
    "two inputs": (source("norm", "conv", "conv"), "norm .* has 2 inputs"),
    "deep": (configured(deep), "nested 50 deep"),
    "many": (configured(many), "more than 5,000 layers"),
    "multiplied": (configured(multiplied), "more than 5,000 layers"),
    "crowded": (configured(crowded), "more than 5,000 layers"),
    "slow": (configured(slow), "multiplies more than"),
    "grey": (setting("image", batch_input_shape=[None, 32, 32, 1]), r"of three channels, .* shape \(32, 32, 1\)"),
    "not square": (setting("image", batch_input_shape=[None, 32, 48, 3]), r"square images .* \(32, 48, 3\)"),
    "not a model": (configured(lambda config: config.update(class_name="Mine")), "class is Mine"),
    "other shape": (
        weight("conv/conv/kernel:0", np.zeros((6, 3, 3, 3), np.float32)),
        r"floats of shape \(3, 3, 3, 6\)",
    ),
    "integers": (weight("conv/conv/kernel:0", np.zeros((3, 3, 3, 6), np.int8)), "it is int8 of shape"),
    "not a number": (weight("norm/norm/gamma:0", np.full(6, np.nan, np.float32)), "norm/gamma in .* holds NaN"),
    "too large": (weight("norm/norm/gamma:0", np.full(6, 1e300)), "norm/gamma in .* holds NaN or Inf"),
    "a group": (grouped, "conv/kernel .* is none"),
    "missing weight": (lambda file: file["model_weights/conv/conv"].move("kernel:0", "x"), "is named in .* not in it"),
    "unstored": (unstored, "weights of at most"),
    "linked": (linked, "a link"),
    "no names": (lambda file: file["model_weights"].attrs.__delitem__("layer_names"), "names no layers"),
    "no weight names": (lambda file: file["model_weights/conv"].attrs.__delitem__("weight_names"), "it has none"),
    "half a description": (
        lambda file: file.attrs.__setitem__("model_config", file.attrs["model_config"][:500]),
        "can't be understood",
    ),
    "nothing": (lambda file: file.attrs.__setitem__("model_config", "null"), "can't be understood"),
    "brackets": (lambda file: file.attrs.__setitem__("model_config", "[" * 50_000), "can't be understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    edit, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        read_keras(edited(folder, tmp_path, edit), Asked(**CONTRACT))


def test_training_of_a_nested_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = edited(folder, tmp_path, argument("middle", training=True), "k2_nested.h5")
    with pytest.raises(UserError, match=r"base_conv .* called with training=True"):
        read_keras(path, Asked(**CONTRACT))


@pytest.mark.parametrize("version", ["k2", "k3"])
def test_own_class_of_the_same_name_is_refused(version: str, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(folder / f"{version}_plain.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    layer(config, "norm").update(module=None, registered_name="BatchNormalization")
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "own.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"norm in .* is a BatchNormalization of your own"):
        read_keras(tmp_path / "own.keras", Asked(**CONTRACT))


def test_two_images_are_refused(folder: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        image = json.loads(json.dumps(layer(config, "image")))
        image["name"] = image["config"]["name"] = "other"
        added = {"class_name": "Add", "name": "sum", "config": {"name": "sum"}}
        added["inbound_nodes"] = [[["image", 0, 0, {}], ["other", 0, 0, {}]]]
        config["config"]["layers"] += [image, added]
        config["config"]["input_layers"].append(["other", 0, 0])
        layer(config, "conv")["inbound_nodes"][0][0][0] = "sum"

    with pytest.raises(UserError, match=r"features of one image, but .* needs the inputs image, other"):
        read_keras(edited(folder, tmp_path, configured(change)), Asked(**CONTRACT))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.h5", "holds weights only, .* none of those that are known .*model.save"),
        ("plain.weights.h5", "holds weights only .*model.save"),
        ("saved_model", "a SavedModel folder; load it .*tf2onnx"),
        ("checkpoint", "a folder with a TensorFlow checkpoint"),
        ("checkpoint/weights", "TensorFlow checkpoint"),
        ("checkpoint/weights.index", "TensorFlow checkpoint"),
        ("gone.h5", "there is none; is it misspelt"),
    ],
)
def test_files_without_a_model_are_refused_with_a_way_out(name: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_keras(folder / name, Asked(**CONTRACT))


def test_damaged_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    content = (folder / "k3_plain.keras").read_bytes()
    path = tmp_path / "short.keras"
    half = content.replace(b"config.json", b"others.json", 1)
    for damaged in (content[:1_000], content[:-200], half, half.replace(b"config.json", b"others.json")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|config\.json") as refusal:
            read_keras(path, Asked(**CONTRACT))
        assert len(str(refusal.value)) < 1_000  # zipfile's own message has all of config.json


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "HDF5 crashes over it"),
        ("import time; time.sleep(60)", "not done with it in 0 seconds"),
        ("print('lost'); raise SystemExit(1)", r"damaged \(lost\)"),
    ],
)
def test_crash_of_hdf5_is_told(
    code: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 does crash and hang over damaged files, but on others in each version."""
    (tmp_path / "probe.py").write_text(code)
    monkeypatch.setattr(h5, "__file__", str(tmp_path / "h5.py"))
    monkeypatch.setattr(h5, "_SECONDS", 0.4)
    h5._probe.cache_clear()
    with pytest.raises(UserError, match=message):
        read_keras(folder / "k2_plain.h5", Asked(**CONTRACT))


def test_memory_of_texts_is_bounded(folder: Path, tmp_path: Path) -> None:
    """A text whose declared length is 4 GB."""
    path = tmp_path / "edited.h5"
    shutil.copy(folder / "k2_plain.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = "x" * 12_345
    content = path.read_bytes()
    assert content.count((12_345).to_bytes(4, "little")) >= 1
    path.write_bytes(content.replace((12_345).to_bytes(4, "little"), (2**32 - 1).to_bytes(4, "little")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="damaged"):
        read_keras(path, Asked(**CONTRACT))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


HOLD = "import h5py, sys\nwith h5py.File(sys.argv[1], 'r+'): print(flush=True); sys.stdin.read()"


def test_file_that_is_written_to_is_locked_not_damaged(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "open.h5"
    shutil.copy(folder / "k2_plain.h5", path)
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdin
        holder.stdout.readline()
        with pytest.raises(UserError, match="locked, since another program has it open for writing"):
            read_keras(path, Asked(**CONTRACT))
        holder.stdin.close()
    assert read_keras(path, Asked(**CONTRACT)).features == "pool"
