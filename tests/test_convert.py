"""The conversion against Keras 2 itself, every way of writing a file, and every refusal.

One file, because all of it needs the files that Keras writes once (keras_files.py), and workers share no fixtures.
"""

import doctest
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from convert.onnx_graph import to_onnx
from numpy.typing import NDArray

import facecls.model.trunk
from convert import parity, trunk_weights
from convert.__main__ import main
from convert.keras.h5 import open_keras
from facecls._version import __version__
from facecls.errors import UserError
from facecls.model.trunk import create_trunk, read_trunk

pytestmark = pytest.mark.slow

KINDS = ("whole", "weights", "notop")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What keras_files.py writes; made in another process, so that TensorFlow stays out of this one."""
    path = tmp_path_factory.mktemp("keras")
    script = Path(__file__).with_name("keras_files.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict[str, Path]:
    """All three files converted, with the classifier where there is one, and the ONNX model of the whole one."""
    dests = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    main([str(folder / "whole.h5"), str(dests["whole"]), "--keep-classifier", "--onnx", str(folder / "whole.onnx")])
    main([str(folder / "weights.h5"), str(dests["weights"]), "--keep-classifier"])
    main([str(folder / "notop.h5"), str(dests["notop"])])
    return dests


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, of the largest value expected."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The same as Keras


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_gives_what_keras_gives(kind: str, converted: dict[str, Path], oracle: dict[str, NDArray[Any]]) -> None:
    trunk = create_trunk("vggface2_resnet50", converted[kind]).eval()
    with torch.inference_mode():
        features = trunk(torch.from_numpy(oracle["images"])).numpy()
    assert relative(features, oracle["features"]) < TOLERANCE
    state, metadata = read_trunk(converted[kind])
    assert metadata["classes"] == (0 if kind == "notop" else 8631)
    if kind != "notop":
        logits = features @ state["classifier.weight"].numpy().T + state["classifier.bias"].numpy()
        odds = np.exp(logits - logits.max(1, keepdims=True))
        assert relative(odds / odds.sum(1, keepdims=True), oracle["probabilities"]) < TOLERANCE


def test_oracle_tells_images_apart(oracle: dict[str, NDArray[Any]]) -> None:
    features, probabilities = oracle["features"], oracle["probabilities"]
    assert np.isfinite(features).all()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(features[one] - features[other]).mean() > 0.1 * features.std()
        assert np.abs(probabilities[one] - probabilities[other]).max() > 0.01


def test_all_three_files_give_the_same_tensors(converted: dict[str, Path]) -> None:
    states = {kind: read_trunk(path)[0] for kind, path in converted.items()}
    assert states["whole"].keys() == states["weights"].keys()
    assert states["whole"].keys() - states["notop"].keys() == {"classifier.weight", "classifier.bias"}
    for kind in ("weights", "notop"):
        assert all(torch.equal(states["whole"][name], tensor) for name, tensor in states[kind].items())


def test_metadata_says_what_it_is(converted: dict[str, Path], folder: Path) -> None:
    _, metadata = read_trunk(converted["whole"])
    at_most = metadata["parity"].pop("at_most")
    assert set(at_most) == {
        f"{who} {what}" for who in ("onnx2torch", "trunk") for what in ("features", "probabilities")
    }
    assert all(0 < bound <= 1e-5 for bound in at_most.values())
    assert metadata == {
        "architecture": "vggface2_resnet50",
        "source": "whole.h5",
        "source_sha256": hashlib.sha256((folder / "whole.h5").read_bytes()).hexdigest(),
        "input": {
            "size": 224,
            "channels": "RGB",
            "range": [0, 255],
            "mean": [131.0912, 103.8827, 91.4953],
            "std": [1, 1, 1],
        },
        "classes": 8631,
        "parity": {"reference": "onnxruntime", "images": 2, "seed": 0, "limit": 1e-5},
        "converter": f"facecls {__version__}",
    }


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], check=False)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""
"""Runs a command and prints its peak memory. A small process, because a child's peak begins with its parent's."""


def test_whole_command_in_little_memory_and_the_same_bytes(
    converted: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "again.safetensors"
    command = [sys.executable, "-W", "error", "-m", "convert", folder / "whole.h5", dest, "--keep-classifier"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        env=os.environ | {"COLUMNS": "150"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < 1.4e9
    assert dest.read_bytes() == converted["whole"].read_bytes()
    sha256 = hashlib.sha256((folder / "whole.h5").read_bytes()).hexdigest()
    for fact in (
        "whole model, Keras 2.",
        "176 layers, 41,246,071 parameters",
        sha256,
        "trunk probabilities",
        str(dest),
    ):
        assert fact in done.stdout


def test_help_does_not_wait_for_the_big_libraries() -> None:
    code = (
        "import sys, convert.__main__ as c\ntry: c.main(['-h'])\nfinally: assert not {'torch', 'onnx'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--keep-classifier" in done.stdout


# ONNX


def test_onnx_model_does_what_keras_does(
    converted: dict[str, Path], folder: Path, oracle: dict[str, NDArray[Any]]
) -> None:
    assert converted
    session = onnxruntime.InferenceSession(folder / "whole.onnx", providers=["CPUExecutionProvider"])
    bgr = oracle["images"][:, ::-1] - np.array([91.4953, 103.8827, 131.0912], np.float32).reshape(3, 1, 1)
    for batch in (bgr, bgr[:1]):
        features, probabilities = session.run(["features", "probabilities"], {"images": batch})
        assert relative(features, oracle["features"][: len(batch)]) < TOLERANCE
        assert relative(probabilities, oracle["probabilities"][: len(batch)]) < TOLERANCE


def test_onnx_model_has_one_node_a_layer_and_written_out_pads(converted: dict[str, Path], folder: Path) -> None:
    assert converted
    onnx.checker.check_model(folder / "whole.onnx", full_check=True)
    model = onnx.load(folder / "whole.onnx")
    kinds = [node.op_type for node in model.graph.node]
    with h5py.File(folder / "whole.h5") as file:
        layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    assert len(kinds) == len(layers) - 1 + 1  # no node for the input, one for the softmax that the classifier has fused
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Conv": 53,
        "BatchNormalization": 53,
        "Relu": 49,
        "MaxPool": 1,
        "Add": 16,
        "AveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
        "Softmax": 1,
    }
    assert 13 <= model.opset_import[0].version <= 17
    attributes = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
    ]
    assert not any("auto_pad" in attribute for attribute in attributes)
    assert attributes[0]["pads"] == [2, 2, 3, 3]
    assert attributes[3]["pads"] == [0, 0, 0, 0]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)] == [
        "N"
    ] * 3


# Names


def test_name_table_covers_the_trunk_and_timm_s_own_names() -> None:
    table = trunk_weights.tensor_table(classifier=True)
    names = set(timm.create_model("resnet50", num_classes=0).state_dict())
    assert set(table.values()) == names | {"classifier.weight", "classifier.bias"}
    assert len(table) == len(set(table.values())) == 53 + 5 * 53 + 2
    assert table["conv4_6_1x1_increase.weight"] == "layer3.5.conv3.weight"
    assert table["conv3_1_1x1_proj/bn.running_var"] == "layer2.0.downsample.1.running_var"


@pytest.mark.parametrize(("change", "expected"), [("drop", "is missing"), ("add", "is not known")])
def test_a_tensor_too_few_or_too_many_is_refused(change: str, expected: str) -> None:
    tensors = {name: torch.zeros(1, 3) for name in trunk_weights.tensor_table(classifier=False)}
    if change == "drop":
        del tensors["conv2_1_3x3.weight"]
    else:
        tensors["conv9.weight"] = torch.zeros(1)

    class Module(torch.nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return tensors

    with pytest.raises(UserError, match=rf"conv\S+\.weight {expected}"):
        trunk_weights.trunk_state(Module(), classifier=False)  # type: ignore[arg-type]


# Parity


def test_swapped_names_are_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = trunk_weights.conv_table()
    one, other = "conv4_2_3x3", "conv4_3_3x3"
    table[one], table[other] = table[other], table[one]
    monkeypatch.setattr(trunk_weights, "conv_table", lambda: table)
    assert_refused(folder / "notop.h5", tmp_path, capsys, "features of trunk within 1e-05 .* nothing was written")


@pytest.mark.parametrize("wrong", [2.00003, np.nan, np.inf])
def test_difference_above_the_limit_or_no_number_is_refused(wrong: float) -> None:
    features, probabilities = np.array([[0.5, 2.0]], np.float32), np.array([[0.1, 0.2]], np.float32)
    measured = parity.differences(
        "x", [features, probabilities], [features + np.float32(8e-6), probabilities + np.float32(3e-6)]
    )
    assert measured == {
        "x features": pytest.approx(4e-6, rel=0.05),  # of the largest, which is 2
        "x probabilities": pytest.approx(3e-6, rel=0.05),
    }
    with pytest.raises(UserError, match="features of x within 1e-05"):
        parity.differences("x", [features], [np.array([[0.5, wrong]], np.float32)])
    with pytest.raises(UserError, match="features of x within 1e-05"):
        parity.differences("x", [0 * features], [0 * features])
    with pytest.raises(UserError, match="probabilities of x within 1e-05"):
        parity.differences("x", [features, probabilities], [features, np.array([[0.1, wrong - 1.8]], np.float32)])


def test_seeded_images_are_always_the_same_and_use_the_whole_range() -> None:
    images = parity.seeded_images()
    assert images.shape == (2, 3, 224, 224)
    assert (images == parity.seeded_images()).all()
    assert (images.min(), images.max()) == (0, 254)


def test_docstrings() -> None:
    assert doctest.testmod(parity).failed == 0


# All the ways in which Keras 2 has written files

Config = dict[str, Any]


def copy_linked(source: Path, dest: Path) -> None:
    """Makes a small file that reads as ``source`` does: groups link to it, only attributes and edited groups differ."""
    with h5py.File(source) as old, h5py.File(dest, "w") as new:
        groups = [("/", old)] if "model_weights" not in old else [("/", old), ("model_weights", old["model_weights"])]
        for name, group in groups:
            made = new.require_group(name)
            for key, value in group.attrs.items():
                made.attrs[key] = value
            for child in group:
                if child != "model_weights":
                    made[child] = h5py.ExternalLink(source, f"{group.name}/{child}")


def own_group(group: Any, name: str) -> Any:
    """Replaces a link by a copy of what it leads to, so that it can be edited."""
    link = group.get(name, getlink=True)
    del group[name]
    with h5py.File(link.filename, "r") as source:  # following the link would open it for writing
        source.copy(link.path, group, name)
    return group[name]


def weights_of(file: Any) -> Any:
    return file.get("model_weights", file)


def edit_config(file: Any, edit: Callable[[Config], None]) -> None:
    config = json.loads(file.attrs["model_config"])
    edit(config)
    file.attrs["model_config"] = json.dumps(config)


def layer_of(config: Config, name: str) -> Config:
    (layer,) = [layer for layer in config["config"]["layers"] if layer["name"] == name]
    return layer


def write_bytes_attributes(file: Any) -> None:
    """2018: ``encode("utf8")`` on everything."""
    group = weights_of(file)
    for holder, name in ((file, "model_config"), (file, "keras_version"), (group, "keras_version"), (group, "backend")):
        if name in holder.attrs:
            holder.attrs[name] = holder.attrs[name].encode()
    group.attrs["layer_names"] = [name.encode() for name in group.attrs["layer_names"]]
    names = own_group(group, "classifier").attrs
    names["weight_names"] = [name.encode() for name in names["weight_names"]]


def write_split_attributes(file: Any) -> None:
    """Lists too long for one attribute."""
    group = weights_of(file)
    names = group.attrs["layer_names"]
    del group.attrs["layer_names"]
    for part, some in enumerate(np.array_split([name.encode() for name in names], 3)):
        group.attrs[f"layer_names{part}"] = some
    names = own_group(group, "classifier").attrs
    for part, name in enumerate(names["weight_names"]):
        names[f"weight_names{part}"] = [name]
    del names["weight_names"]


def write_other_shapes_of_attributes(file: Any) -> None:
    """A scalar where there is one name, an array where there is one version, or no version at all."""
    group = weights_of(file)
    names = own_group(group, "conv2_1_3x3").attrs
    names["weight_names"] = names["weight_names"][0]
    group.attrs["keras_version"] = np.array([b"2.2.4"])
    if "model_config" in file.attrs:
        file.attrs.create("model_config", [file.attrs["model_config"]], dtype=h5py.string_dtype())


def write_numbered_scopes(file: Any) -> None:
    """A model built twice in a session: the scope in front of a weight's name gets a number."""
    group = own_group(weights_of(file), "conv2_1_3x3")
    group.move("conv2_1_3x3/kernel:0", "conv2_1_3x3_1/kernel:0")
    group.attrs["weight_names"] = ["conv2_1_3x3_1/kernel:0"]


def write_old_config(file: Any) -> None:
    """What Keras 2.2 wrote: class Model, other automatic names, no module beside an initializer, fewer keys."""

    def edit(config: Config) -> None:
        config["class_name"] = "Model"
        for layer in config["config"]["layers"]:
            settings = layer["config"]
            for key in ("dtype", "groups", "optional", "ragged"):
                settings.pop(key, None)
            for key, value in settings.items():
                if key.endswith("_initializer"):
                    settings[key] = {"class_name": value["class_name"], "config": value["config"]}
            if layer["class_name"] == "BatchNormalization":
                settings["axis"] = 3
            layer["inbound_nodes"] = [
                [[renumbered(name), *rest[:2]] for name, *rest in node] for node in layer["inbound_nodes"]
            ]
            layer["name"] = settings["name"] = renumbered(layer["name"])

    edit_config(file, edit)


def renumbered(name: str) -> str:
    """The name that a layer without weights gets in a second model of a session."""
    return re.sub(r"^(input|activation|max_pooling2d|add|flatten)(_\d+)?$", r"\1\2_7", name)


def write_new_config(file: Any) -> None:
    """What late versions write: batch_shape, a policy as dtype, one flat reference to the output."""

    def edit(config: Config) -> None:
        for layer in config["config"]["layers"]:
            settings = layer["config"]
            settings["dtype"] = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}}
            if layer["class_name"] == "InputLayer":
                settings["batch_shape"] = settings.pop("batch_input_shape")
        config["config"]["output_layers"] = config["config"]["output_layers"][0]

    edit_config(file, edit)


def write_relu_layers(file: Any) -> None:
    """Classes that do the same: ReLU, and a softmax of its own."""

    def edit(config: Config) -> None:
        layer = layer_of(config, "activation_3")
        layer["class_name"] = "ReLU"
        layer["config"] = {"name": "activation_3", "max_value": None, "negative_slope": 0.0, "threshold": 0.0}

    edit_config(file, edit)


WAYS: list[tuple[str, Callable[[Any], None]]] = [
    ("whole", write_bytes_attributes),
    ("weights", write_bytes_attributes),
    ("whole", write_split_attributes),
    ("weights", write_split_attributes),
    ("whole", write_other_shapes_of_attributes),
    ("weights", write_other_shapes_of_attributes),
    ("weights", write_numbered_scopes),
    ("whole", write_old_config),
    ("whole", write_new_config),
    ("whole", write_relu_layers),
]


def onnx_of(path: Path) -> onnx.ModelProto:
    """The model, but for the hash of the source and the names of layers without weights."""
    with open_keras(path) as file:
        model = to_onnx(file, classifier=True)
    del model.metadata_props[:]
    names: dict[str, str] = {}
    for node in model.graph.node:
        node.name = "" if not len(node.input) > 1 or node.op_type == "Add" else node.name
        node.input[:] = [names.get(name, name) for name in node.input]
        if node.output[0] not in ("features", "probabilities"):
            names[node.output[0]] = f"value{len(names)}"
            node.output[0] = names[node.output[0]]
    return model


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, onnx.ModelProto]:
    return {kind: onnx_of(folder / f"{kind}.h5") for kind in ("whole", "weights")}


@pytest.mark.parametrize(("kind", "write"), WAYS, ids=lambda part: getattr(part, "__name__", part))
def test_every_way_of_writing_gives_the_same_graph(
    kind: str, write: Callable[[Any], None], folder: Path, tmp_path: Path, plain: dict[str, onnx.ModelProto]
) -> None:
    path = tmp_path / "other.h5"
    copy_linked(folder / f"{kind}.h5", path)
    with h5py.File(path, "r+") as file:
        write(file)
    assert onnx_of(path) == plain[kind]


def test_whole_model_without_its_top_gives_what_keras_gives(
    folder: Path, tmp_path: Path, oracle: dict[str, NDArray[Any]]
) -> None:
    path = tmp_path / "notop.h5"
    copy_linked(folder / "whole.h5", path)

    def cut(config: Config) -> None:
        del config["config"]["layers"][-2:]
        config["config"]["output_layers"] = [["avg_pool", 0, 0]]

    with h5py.File(path, "r+") as file:
        edit_config(file, cut)
        file["model_weights"].attrs["layer_names"] = file["model_weights"].attrs["layer_names"][:-2]
    dest = tmp_path / "trunk.safetensors"
    main([str(path), str(dest)])
    trunk = create_trunk("vggface2_resnet50", dest).eval()
    with torch.inference_mode():
        features = trunk(torch.from_numpy(oracle["images"])).numpy()
    assert relative(features, oracle["features"]) < TOLERANCE


# Refusals


def assert_refused(
    source: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    message: str,
    options: Sequence[str] = (),
    dest: Path | None = None,
) -> None:
    """Runs the command: it ends with status 2 and one line, a file that was there stays, and none is left."""
    old = folder / "trunk.safetensors"
    old.write_bytes(b"an older trunk")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main([str(source), str(dest or old), *options])
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("convert: error: ")
    assert re.search(message, said.err), said.err
    assert old.read_bytes() == b"an older trunk"
    assert sorted(folder.rglob("*")) == before


FORMATS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text": (lambda folder: b"<!DOCTYPE html><html>quota exceeded", "HDF5 file, but .* begins with b'<!DOCTYPE html>"),
    "empty": (lambda folder: b"", "HDF5 file, but .* begins with b''"),
    "pointer": (
        lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 165549684\n",
        "Git LFS pointer .* run `git lfs pull`",
    ),
    "short": (
        lambda folder: (folder / "notop.h5").read_bytes()[:60_000_000],
        r"cut short or damaged \(.*truncated file",
    ),
    "head": (lambda folder: (folder / "whole.h5").read_bytes()[:50], "cut short or damaged"),
    "keras3": (lambda folder: (folder / "keras3.keras").read_bytes(), r"\.keras files .* as \.h5 with Keras 2"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = FORMATS[name]
    path = tmp_path / "other.h5"
    path.write_bytes(make(folder))
    assert_refused(path, tmp_path, capsys, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg16.h5", "265 missing, such as conv1/7x7_s2/kernel and 30 unknown, such as conv1_1/kernel"),
        ("senet50.h5", "64 unknown, such as conv2_1_1x1_down/kernel"),
        ("resnet101.h5", "255 unknown, such as conv4_7_1x1_reduce/kernel"),
        ("dense.h5", "265 missing, such as conv1/7x7_s2/kernel"),
        ("keras3.h5", "265 missing, such as conv1/7x7_s2/kernel"),
    ],
)
def test_other_architectures_are_refused(
    name: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(folder / name, tmp_path, capsys, f"VGGFace2 ResNet-50, but .*{message}")


def delete_weight(file: Any) -> None:
    del own_group(file, "conv2_1_3x3")["conv2_1_3x3/kernel:0"]


def delete_layer(file: Any) -> None:
    file.attrs["layer_names"] = [name for name in file.attrs["layer_names"] if name != "conv5_3_3x3/bn"]


def add_weight(file: Any) -> None:
    group = own_group(file, "classifier")
    group["classifier/scale:0"] = np.ones(8631, np.float32)
    group.attrs["weight_names"] = [*group.attrs["weight_names"], "classifier/scale:0"]


def replace_weight(file: Any, value: NDArray[Any]) -> None:
    group = own_group(file, "conv2_1_3x3")
    del group["conv2_1_3x3/kernel:0"]
    group["conv2_1_3x3/kernel:0"] = value


def spoil_weight(file: Any) -> None:
    own_group(file, "conv2_1_3x3")["conv2_1_3x3/kernel:0"][1, 2, 3, 4] = np.nan


def spoil_bias(file: Any) -> None:
    own_group(file, "classifier")["classifier/bias:0"][-1] = -np.inf


def strip_names(file: Any) -> None:
    del file.attrs["layer_names"]


WEIGHTS: list[tuple[Callable[[Any], None], str]] = [
    (delete_weight, "Weight conv2_1_3x3/kernel is named in .* but is not in it"),
    (delete_layer, "4 missing, such as conv5_3_3x3/bn/gamma;"),
    (add_weight, "1 unknown, such as classifier/scale;"),
    (
        lambda file: replace_weight(file, np.zeros((64, 64, 3, 3), np.float32)),
        r"conv2_1_3x3/kernel to be float32 of shape \(3, 3, 64, 64\), but .* is float32 of shape \(64, 64, 3, 3\)",
    ),
    (
        lambda file: replace_weight(file, np.zeros((3, 3, 64, 64), np.float16)),
        "conv2_1_3x3/kernel to be float32 .* it is float16",
    ),
    (spoil_weight, "conv2_1_3x3/kernel in .* holds NaN or Inf"),
    (spoil_bias, "classifier/bias in .* holds NaN or Inf"),
    (strip_names, "names no layers"),
]


@pytest.mark.parametrize(("edit", "message"), WEIGHTS, ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_weights_are_refused_by_name(
    edit: Callable[[Any], None], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edited.h5"
    copy_linked(folder / "weights.h5", path)
    with h5py.File(path, "r+") as file:
        edit(file)
    assert_refused(path, tmp_path, capsys, message, ["--keep-classifier"])  # what is not kept is not read


def setting(name: str, **settings: Any) -> Callable[[Config], None]:
    return lambda config: layer_of(config, name)["config"].update(settings)


def kind(name: str, kind: str) -> Callable[[Config], None]:
    return lambda config: layer_of(config, name).update(class_name=kind)


def source(name: str, *inputs: str) -> Callable[[Config], None]:
    return lambda config: layer_of(config, name).update(inbound_nodes=[[[input_, 0, 0, {}] for input_ in inputs]])


def insert_dropout(config: Config) -> None:
    config["config"]["layers"].insert(
        -1,
        {
            "class_name": "Dropout",
            "name": "dropout",
            "config": {"name": "dropout", "rate": 0.5},
            "inbound_nodes": [[["flatten", 0, 0, {}]]],
        },
    )


CONFIGS: dict[str, tuple[Callable[[Config], None], str]] = {
    "unknown class": (kind("conv2_1_3x3", "SeparableConv2D"), "conv2_1_3x3 in .* is a SeparableConv2D"),
    "inserted layer": (insert_dropout, "dropout in .* is a Dropout"),
    "unknown activation": (setting("activation_5", activation="elu"), "activation_5 .* its activation is elu"),
    "fused activation": (setting("conv2_1_3x3", activation="tanh"), "conv2_1_3x3 .* its activation is tanh"),
    "capped ReLU": (
        lambda config: layer_of(config, "activation_5").update(class_name="ReLU", config={"max_value": 6.0}),
        "activation_5 .* max_value is 6.0, not None",
    ),
    "sequential": (lambda config: config.update(class_name="Sequential"), "class is Sequential"),
    "two outputs": (
        lambda config: config["config"].update(output_layers=[["flatten", 0, 0], ["classifier", 0, 0]]),
        "2 outputs flatten, classifier",
    ),
    "no output": (lambda config: config["config"].update(output_layers=[["gone", 0, 0]]), "output gone is no layer"),
    "no input": (source("conv2_1_3x3"), "conv2_1_3x3 has 0 inputs, not 1"),
    "cycle": (source("conv2_1_3x3", "flatten"), "conv2_1_3x3 takes its input from flatten"),
    "twice": (
        lambda config: layer_of(config, "add_1").update(name="add"),
        "layer add is there twice",
    ),
    "used again": (
        lambda config: layer_of(config, "add_1")["inbound_nodes"][0][0].__setitem__(1, 1),
        "is used more than once",
    ),
    "Keras 3 nodes": (
        lambda config: layer_of(config, "add_1").update(inbound_nodes=[{"args": [], "kwargs": {}}]),
        "is not how Keras 2 refers to layers",
    ),
    "half precision": (setting("conv2_1_3x3", dtype="float16"), "conv2_1_3x3 computes in float16"),
    "dilation": (setting("conv2_1_3x3", dilation_rate=[2, 2]), "conv2_1_3x3 .* dilation_rate is 2, not 1"),
    "channels first": (setting("conv2_1_3x3", data_format="channels_first"), "data_format is channels_first"),
    "other axis": (setting("conv2_1_3x3/bn", axis=[1]), "conv2_1_3x3/bn .* axis is 1, not 3 or -1"),
    "missing setting": (lambda config: layer_of(config, "avg_pool")["config"].pop("strides"), "avg_pool .*strides"),
    "padded mean": (setting("avg_pool", padding="same"), "avg_pool .* padding is same"),
    "other input": (setting("input_1", batch_input_shape=[None, 160, 160, 3]), "input_1 .* shape is .*160"),
    "flattened places": (setting("avg_pool", pool_size=[3, 3], strides=[3, 3]), r"flatten .* flattens \(2, 2\) places"),
    "two layers less": (lambda config: config["config"]["layers"].__delitem__(slice(-2, None)), "is no layer"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_graphs_are_refused_by_name(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = CONFIGS[name]
    path = tmp_path / "edited.h5"
    copy_linked(folder / "whole.h5", path)
    with h5py.File(path, "r+") as file:
        edit_config(file, edit)
    assert_refused(path, tmp_path, capsys, message)


def move_stride(config: Config) -> None:
    """As in torchvision's ResNet-50."""
    layer_of(config, "conv3_1_1x1_reduce")["config"]["strides"] = [1, 1]
    layer_of(config, "conv3_1_3x3")["config"]["strides"] = [2, 2]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (setting("conv3_2_3x3/bn", epsilon=1e-5), "conv3_2_3x3/bn to have the eps 0.001, but it has 1e-05"),
        (setting("conv3_2_3x3/bn", momentum=0.9), "conv3_2_3x3/bn to have the momentum 0.01, but it has 0.1"),
        (source("activation_48", "conv5_3_1x1_increase/bn"), "features of trunk within 1e-05"),
        (move_stride, "features of trunk within 1e-05 .* differ by .*e-0[1-4];"),
        (setting("conv1/7x7_s2", padding="valid"), r"tensor conv1/7x7_s2\.1\.weight is missing"),
    ],
    ids=["epsilon", "momentum", "shortcut", "stride", "stem"],
)
def test_graph_that_the_trunk_does_not_have_is_refused(
    edit: Callable[[Config], None], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edited.h5"
    copy_linked(folder / "whole.h5", path)
    with h5py.File(path, "r+") as file:
        edit_config(file, edit)
    assert_refused(path, tmp_path, capsys, message)


def test_damaged_config_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edited.h5"
    copy_linked(folder / "whole.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"][:1000]
    assert_refused(path, tmp_path, capsys, r"can\'t be understood \(JSONDecodeError")


def test_missing_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(tmp_path / "gone.h5", tmp_path, capsys, "there is none; get one with .*facecls.download weights")


def test_classifier_that_is_not_there_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(folder / "notop.h5", tmp_path, capsys, "no classifier to keep", ["--keep-classifier"])


def test_writing_over_the_source_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "notop.h5"
    assert_refused(path, tmp_path, capsys, "one is named twice", dest=path)


@pytest.mark.parametrize("what", ["gone/trunk.safetensors", "file/trunk.safetensors", "folder"])
def test_place_that_can_not_be_written_is_refused(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert_refused(folder / "notop.h5", tmp_path, capsys, "Can't write|is a folder", dest=tmp_path / what)


def test_onnx_place_that_can_not_be_written_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--onnx", str(tmp_path / "gone" / "model.onnx")]
    assert_refused(folder / "notop.h5", tmp_path, capsys, "Can't write .*model.onnx", options)


def no_room(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "place"),
    [
        (onnx.ModelProto, "SerializeToString", r"\S*model\.onnx"),
        (onnx, "save_model", r"beside \S*trunk\.safetensors"),
        (facecls.model.trunk, "save_file", r"\S*trunk\.safetensors"),
    ],
    ids=["onnx", "scratch", "trunk"],
)
def test_full_disk_is_refused(
    owner: Any,
    name: str,
    place: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, no_room)
    options = ["--onnx", str(tmp_path / "model.onnx")]
    assert_refused(folder / "notop.h5", tmp_path, capsys, f"Can't write {place}: No space left on device", options)


def test_write_that_really_fails_is_refused(folder: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 90 MB of a file; the trunk has 94."""
    dest = tmp_path / "trunk.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "convert", folder / "notop.h5", dest],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90_000_000, 90_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"convert: error: Can't write .*File too large.*\n", done.stderr)
    assert not list(tmp_path.iterdir())
