"""ONNX files of others: what torch exports, odd operators and settings, refusals. Torch or ONNX Runtime is right."""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx2torch
import onnxruntime
import pytest
import timm
import torch
from face_networks import iresnet18, mobilefacenet
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from plain_networks import small_network
from torch import nn

from convert.__main__ import main
from convert.finish import FEATURES, finish, last_map
from convert.graph_trunk import describe
from convert.onnx.network import read_onnx
from convert.plain.network import INPUT, PLAIN_OPERATORS, Asked, Network
from facecls.analysis.gradcam import grad_cam
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.model.heads import HeadOptions
from facecls.model.network import FaceModel
from facecls.model.trunk import Trunk, create_trunk, load_graph, read_trunk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's older exporter
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZE = 64
GENDER = UTKFACE["gender"]
ASKED = Asked(channels="rgb", mean=(127.5,) * 3, std=(127.5,) * 3)


class _SqueezeExcite(nn.Module):
    """With the hard activations of MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.conv(x))
        gate = nn.functional.hardsigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return (x * gate).mean((2, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "iresnet": lambda: iresnet18(8, SIZE, 16),
    "mobilefacenet": lambda: mobilefacenet(8, SIZE, 16),
    "squeeze": _SqueezeExcite,
    "ghostnet": lambda: timm.create_model("ghostnet_050", num_classes=0),
    "vit": lambda: timm.create_model("test_vit", num_classes=0, img_size=SIZE),
}
WAYS = [
    (False, 9, False),
    (False, 11, True),
    (False, 13, False),
    (False, 17, True),
    (True, 18, False),
    (True, 21, True),
]
"""By which exporter, to which opset, and whether with a free batch."""
CASES = [
    (name, *way)
    for name, way in product(NETWORKS, WAYS)
    if not (name == "vit" and way[1] < 14)  # torch can't export its attention to them
    # the new exporter takes long for large networks
    and not (name == "ghostnet" and way[0])
    and (name in ("squeeze", "vit") or way[:2] != (True, 18))
]


def _export(net: nn.Module, path: Path, dynamo: bool, opset: int, free: bool) -> None:
    if dynamo:
        shapes = ({0: torch.export.Dim("batch")},) if free else None
        image = torch.randn(2 if free else 1, 3, SIZE, SIZE)
        torch.onnx.export(net, (image,), path, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False)
        return
    axes = {"image": {0: "batch"}} if free else None
    image = torch.randn(1, 3, SIZE, SIZE)
    torch.onnx.export(net, (image,), path, dynamo=False, opset_version=opset, input_names=["image"], dynamic_axes=axes)


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    """The networks, with BatchNorm statistics far from 0 and 1."""
    torch.manual_seed(0)
    made = {name: make().eval() for name, make in NETWORKS.items()}
    for net in made.values():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.2)
    return made


def _images(size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (2, 3, size, size), np.uint8)


def _check(network: Network, expected: NDArray[Any], images: NDArray[np.uint8]) -> None:
    """The model is plain, and ONNX Runtime, onnx2torch and the trunk compute from it what is expected."""
    shapes = finish(network)
    graph = network.model.graph
    assert {node.op_type for node in graph.node} <= PLAIN_OPERATORS
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in graph.input] == [(INPUT, "N")]
    assert not any("auto_pad" in {each.name for each in node.attribute} for node in graph.node)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    inputs = network.contract.prepare(images)
    session = onnxruntime.InferenceSession(network.model.SerializeToString(), providers=["CPUExecutionProvider"])
    module = onnx2torch.convert(network.model).eval()
    trunk = load_graph(description, state, "test").eval()
    with torch.inference_mode():
        results = {
            "ONNX Runtime": session.run([FEATURES], {INPUT: inputs})[0],
            "onnx2torch": module(torch.from_numpy(inputs)).numpy(),
            "trunk": trunk(torch.from_numpy(images)).numpy(),
        }
    for name, found in results.items():
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize(("name", "dynamo", "opset", "free"), CASES)
def test_what_torch_exports(
    name: str, dynamo: bool, opset: int, free: bool, nets: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    _export(nets[name], path, dynamo, opset, free)
    images = _images()
    network = read_onnx(path, ASKED)
    with torch.inference_mode():
        expected = nets[name](torch.from_numpy(network.contract.prepare(images))).numpy()
    assert network.reference is not None
    np.testing.assert_allclose(network.reference(network.contract.prepare(images)), expected, atol=1e-4)
    _check(network, expected, images)


def _small(edit: Callable[[onnx.ModelProto], None], tmp_path: Path, size: int = 32) -> Path:
    """``small_network`` after a change, as a file."""
    model = small_network(size)
    edit(model)
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def _expected(images: NDArray[np.uint8], size: int = 32) -> NDArray[Any]:
    """What ``small_network`` computes, in ONNX Runtime."""
    session = onnxruntime.InferenceSession(small_network(size).SerializeToString(), providers=["CPUExecutionProvider"])
    centred = (images.astype(np.float32) - 127.5) / 127.5
    found: NDArray[Any] = session.run(None, {INPUT: centred})[0]
    return found.reshape(len(images), -1)


def _weights_among_inputs(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3


def _constants_as_nodes(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.initializer[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _named_like_the_input(model: onnx.ModelProto) -> None:
    """The input has another name, and a value inside has the plain one."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = {INPUT: "data", "n4": INPUT}.get(name, name)
    model.graph.input[0].name = "data"


def _automatic_padding(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]  # pads [0, 0, 1, 1] at even sizes
    kept = [each for each in node.attribute if each.name != "pads"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("auto_pad", "SAME_UPPER")])


def _classifier(model: onnx.ModelProto) -> None:
    rng = np.random.default_rng(0)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((16, 5)).astype(np.float32), "cw"))
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(5).astype(np.float32), "cb"))
    model.graph.node.extend(
        [
            helper.make_node("Flatten", ["n10"], ["flat"]),
            helper.make_node("Dropout", ["flat"], ["dropped"]),
            helper.make_node("MatMul", ["dropped", "cw"], ["product"]),
            helper.make_node("Add", ["product", "cb"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ]
    )
    model.graph.output[0].name = "probabilities"


def _classifier_of_constant_nodes(model: onnx.ModelProto) -> None:
    """As Paddle writes it."""
    _classifier(model)
    _constants_as_nodes(model)


EDITS = [
    _weights_among_inputs,
    _constants_as_nodes,
    _fixed_batch,
    _named_like_the_input,
    _automatic_padding,
    _classifier,
    _classifier_of_constant_nodes,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_way_of_writing_gives_the_same(edit: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    network = read_onnx(_small(edit, tmp_path), ASKED)
    _check(network, _expected(_images(32)), _images(32))
    if edit in (_classifier, _classifier_of_constant_nodes):
        assert network.features == "flat"
        assert network.left_out == ("dropped", "product", "logits", "probabilities")


@pytest.mark.parametrize("opset", [14, 17])
def test_class_token_of_a_graph_is_explained_as_that_of_timm(opset: int, tmp_path: Path) -> None:
    """At opset 14 its norms are written out, and its position embedding is a constant with the shape of tokens."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, depth=2).eval()
    _export(net, tmp_path / "net.onnx", dynamo=False, opset=opset, free=True)
    network = read_onnx(tmp_path / "net.onnx", ASKED)
    shapes = finish(network)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    own = FaceModel(load_graph(description, state, "test"), [GENDER], HeadOptions()).eval()
    timms = FaceModel(Trunk(net, "vit"), [GENDER], HeadOptions()).eval()
    timms.heads.load_state_dict(own.heads.state_dict())
    image = torch.from_numpy(_images()[0])
    for target in (0, 1):
        assert np.abs(grad_cam(own, image, GENDER, target) - grad_cam(timms, image, GENDER, target)).max() < 1e-3


def test_weights_beside_the_file_are_read_and_nowhere_else(tmp_path: Path) -> None:
    model = small_network(32)
    onnx.save_model(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    _check(read_onnx(tmp_path / "net.onnx", ASKED), _expected(_images(32)), _images(32))
    (tmp_path / "net.bin").rename(tmp_path / "away.bin")
    with pytest.raises(UserError, match=r"in .*net\.bin, but there is no such file"):
        read_onnx(tmp_path / "net.onnx", ASKED)
    (tmp_path / "net.bin").symlink_to(tmp_path / "away.bin")
    with pytest.raises(UserError, match="Expected weights beside"):
        read_onnx(tmp_path / "net.onnx", ASKED)
    (tmp_path / "net.bin").unlink()
    (tmp_path / "net.bin").write_bytes((tmp_path / "away.bin").read_bytes()[:-8])
    with pytest.raises(UserError, match="but it is shorter"):
        read_onnx(tmp_path / "net.onnx", ASKED)
    twin = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    for tensor in twin.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../net.bin"
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(twin.SerializeToString())
    with pytest.raises(UserError, match="Expected weights beside"):
        read_onnx(folder / "net.onnx", ASKED)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_precisions_are_widened(kind: int, tmp_path: Path) -> None:
    model = small_network(32)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    expected = small_network(32)
    for tensor, twin in zip(model.graph.initializer, expected.graph.initializer, strict=True):
        array = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        twin.CopyFrom(numpy_helper.from_array(array.astype(np.float32), twin.name))
    model.graph.input[0].type.tensor_type.elem_type = kind
    onnx.save(model, tmp_path / "net.onnx")
    network = read_onnx(tmp_path / "net.onnx", ASKED)
    assert "computed in float32" in network.summary["precision"]
    session = onnxruntime.InferenceSession(expected.SerializeToString(), providers=["CPUExecutionProvider"])
    images = _images(32)
    _check(network, session.run(None, {INPUT: network.contract.prepare(images)})[0].reshape(2, -1), images)


def test_channels_last_is_taken(tmp_path: Path) -> None:
    model = small_network(32)
    nodes = [helper.make_node("Transpose", ["pixels"], ["first"], perm=[0, 3, 1, 2]), *model.graph.node]
    nodes[1].input[0] = "first"
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copied)
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 32, 32, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    _check(read_onnx(tmp_path / "net.onnx", ASKED), _expected(_images(32)), _images(32))


Nodes = list[onnx.NodeProto]
_FLOATS = {
    "scales": np.array([1, 1, 2, 2], np.float32),
    "weight": np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32),
    "columns": np.random.default_rng(3).standard_normal(64).astype(np.float32),
    "channels": np.random.default_rng(4).standard_normal((1, 3, 1, 1)).astype(np.float32),
    "row": np.random.default_rng(5).standard_normal((1, 64)).astype(np.float32),
}
ODD: dict[str, tuple[int, Nodes]] = {
    "uneven average": (
        11,
        [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
    ),
    "uneven average, padding counted": (
        11,
        [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1)],
    ),
    "max pooling beyond the border": (
        12,
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
    ),
    "same below": (11, [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_LOWER")]),
    "global maximum": (11, [helper.make_node("GlobalMaxPool", ["x"], ["y"])]),
    "upsample": (9, [helper.make_node("Upsample", ["x", "scales"], ["y"], mode="nearest")]),
    "length": (
        11,
        [
            helper.make_node("GlobalAveragePool", ["x"], ["m"]),
            helper.make_node("LpNormalization", ["m"], ["y"], axis=1),
        ],
    ),
    "gelu": (20, [helper.make_node("Gelu", ["x"], ["y"])]),
    "gelu by tanh": (20, [helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")]),
    "mish": (18, [helper.make_node("Mish", ["x"], ["y"])]),
    "split into equal parts": (
        18,
        [
            helper.make_node("Split", ["x"], ["a", "b"], axis=2, num_outputs=2),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
    ),
    "factors of a product": (
        11,
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
            helper.make_node("Gemm", ["m", "weight"], ["y"], alpha=0.5),
        ],
    ),
    "far average": (11, [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[2, 2, 2, 2])]),
    "cast": (
        13,
        [helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT), helper.make_node("Relu", ["a"], ["y"])],
    ),
    "double for a while": (
        13,
        [
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.DOUBLE),
            helper.make_node("Mul", ["a", "a"], ["b"]),
            helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
        ],
    ),
    "squeezed": (
        11,
        [helper.make_node("GlobalAveragePool", ["x"], ["m"]), helper.make_node("Squeeze", ["m"], ["y"])],
    ),
    "axes from the end": (
        13,
        [
            helper.make_node("Constant", [], ["axes"], value_ints=[-1, -2]),
            helper.make_node("GlobalAveragePool", ["x"], ["m"]),
            helper.make_node("Squeeze", ["m", "axes"], ["v"]),
            helper.make_node("Unsqueeze", ["v", "axes"], ["gate"]),
            helper.make_node("Mul", ["x", "gate"], ["y"]),
        ],
    ),
    "blocks before channels": (
        13,
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Tanh", ["x"], ["b"]),
            helper.make_node("Concat", ["x", "a", "b", "a"], ["wide"], axis=1),
            helper.make_node("DepthToSpace", ["wide"], ["y"], blocksize=2),
        ],
    ),
    "power of an integer": (
        13,
        [helper.make_node("Constant", [], ["two"], value_int=2), helper.make_node("Pow", ["x", "two"], ["y"])],
    ),
    "slopes by place": (11, [helper.make_node("PRelu", ["x", "columns"], ["y"])]),
    "slopes by channel": (11, [helper.make_node("PRelu", ["x", "channels"], ["y"])]),
    "selu of its own": (11, [helper.make_node("Selu", ["x"], ["y"], alpha=2.0, gamma=0.5)]),
    "scale for all rows": (17, [helper.make_node("LayerNormalization", ["x", "row"], ["y"], axis=2)]),
    "places of the largest": (12, [helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[3, 3])]),
    "average of a line": (
        13,
        [
            helper.make_node("Constant", [], ["line"], value_ints=[0, 3, -1]),
            helper.make_node("Reshape", ["x", "line"], ["long"]),
            helper.make_node("GlobalAveragePool", ["long"], ["m"]),
            helper.make_node("Flatten", ["m"], ["y"]),
        ],
    ),
    "names of ours": (
        13,
        [
            helper.make_node("Relu", ["x"], ["features"]),
            helper.make_node("Sigmoid", ["features"], ["probabilities"]),
            helper.make_node("Mul", ["features", "probabilities"], ["images"]),
            helper.make_node("Tanh", ["images"], ["y"]),
        ],
    ),
    "shape arithmetic": (
        13,
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Constant", [], ["zero"], value_ints=[0]),
            helper.make_node("Gather", ["s", "zero"], ["first"], axis=0),
            helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
            helper.make_node("Concat", ["first", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ],
    ),
}


def _odd(name: str) -> onnx.ModelProto:
    opset, nodes = ODD[name]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 64, 64])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    read = {each for node in nodes for each in node.input}
    tensors = [numpy_helper.from_array(array, key) for key, array in _FLOATS.items() if key in read]
    graph = helper.make_graph(nodes, "odd", [image], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("name", ODD)
def test_odd_operators(name: str, tmp_path: Path) -> None:
    onnx.save(_odd(name), tmp_path / "odd.onnx")
    network = read_onnx(tmp_path / "odd.onnx", ASKED)
    images = _images()
    session = onnxruntime.InferenceSession(tmp_path / "odd.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": network.contract.prepare(images)})[0]
    pooled = expected.mean((2, 3)) if expected.ndim == 4 else expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(network, pooled.reshape(2, -1), images)


def _map_to_last(nodes: Nodes, opset: int = 13) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 64, 64])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "last", [image], [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_map_in_keras_order_is_pooled_over_height_and_width(tmp_path: Path) -> None:
    """As tf2onnx ends a network without a head."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[2, 4], strides=[2, 4]),
        helper.make_node("Transpose", ["small"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Sigmoid", ["last"], ["y"]),
    ]
    onnx.save(_map_to_last(nodes), tmp_path / "last.onnx")
    network = read_onnx(tmp_path / "last.onnx", ASKED)
    inputs = network.contract.prepare(_images())
    expected = (1 / (1 + np.exp(-inputs.reshape(2, 3, 32, 2, 16, 4).max((3, 5))))).mean((2, 3))
    assert network.reference
    assert np.abs(network.reference(inputs) - expected).max() < 1e-6
    _check(network, expected, _images())


def test_map_whose_order_is_not_clear_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["shape"], value_ints=[0, 64, 64, 3]),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    onnx.save(_map_to_last(nodes), tmp_path / "last.onnx")
    with pytest.raises(UserError, match="as if its channels were last; name a value before it"):
        read_onnx(tmp_path / "last.onnx", ASKED)


def _dilated() -> onnx.ModelProto:
    return _map_to_last([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], dilations=[2, 2])], 19)


def _linear() -> onnx.ModelProto:
    scales = helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(_FLOATS["scales"]))
    return _map_to_last([scales, helper.make_node("Upsample", ["x", "s"], ["y"], mode="linear")], 9)


def _padded_far() -> onnx.ModelProto:
    return _map_to_last([helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], pads=[2, 2, 2, 2])])


def _multiplying_functions() -> onnx.ModelProto:
    """Twenty functions, each of which calls the next one twice: a million nodes in a file of two kilobytes."""
    model = _map_to_last([helper.make_node("f0", ["x"], ["y"], domain="own")])
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("own", 1)]
    for number in range(20):
        kind, domain = (f"f{number + 1}", "own") if number < 19 else ("Relu", "")
        calls = [helper.make_node(kind, [a], [b], domain=domain) for a, b in (("a", "m"), ("m", "b"))]
        model.functions.append(helper.make_function("own", f"f{number}", ["a"], ["b"], calls, imports))
    model.opset_import.add(domain="own", version=1)
    return model


def _large_constant() -> onnx.ModelProto:
    return _map_to_last(
        [
            helper.make_node("Constant", [], ["shape"], value_ints=[1 << 20, 1 << 14]),
            helper.make_node("ConstantOfShape", ["shape"], ["large"]),
            helper.make_node("Constant", [], ["axes"], value_ints=[0, 1]),
            helper.make_node("ReduceSum", ["large", "axes"], ["sum"]),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ]
    )


def _long_work() -> onnx.ModelProto:
    """A map of 33 million values, convolved with a window of 151 x 151 pixels."""
    kernel = np.zeros((3, 3, 151, 151), np.float32)
    weight = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(kernel))
    wide = helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.array([1, 1, 50, 50], np.float32)))
    resize = helper.make_node(
        "Resize", ["x", "", "s"], ["large"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    return _map_to_last([weight, wide, resize, helper.make_node("Conv", ["large", "w"], ["y"])])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_dilated, "y averages pixels that are not side by side; take a value before it"),
        (_linear, "y is resized linearly from the corner"),
        (_padded_far, "y pads by more than half of its window"),
        (_multiplying_functions, r"it has 1,048,576 nodes"),
        (_large_constant, "the value large has the shape"),
        (_long_work, "multiplies at most"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_what_torch_or_memory_can_not_do_is_refused(
    make: Callable[[], onnx.ModelProto], message: str, tmp_path: Path
) -> None:
    onnx.save(make(), tmp_path / "net.onnx")
    with pytest.raises(UserError, match=message):
        read_onnx(tmp_path / "net.onnx", ASKED)


def _loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[6].CopyFrom(helper.make_node("Loop", ["n5"], ["n6"], body=body))


def _custom(model: onnx.ModelProto) -> None:
    model.graph.node[6].CopyFrom(helper.make_node("FusedRelu", ["n5"], ["n6"], domain="com.someone"))
    model.opset_import.add(domain="com.someone", version=1)


def _not_there(model: onnx.ModelProto) -> None:
    model.graph.node[6].input[0] = "nowhere"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[6].output[0] = "n4"


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 1_000_000


def _nan(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), np.nan, np.float32), tensor.name))


def _two_images(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 16, 8, 8]))
    model.graph.node[8].input[1] = "second"


def _integers(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _odd_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 77


def _nowhere(model: onnx.ModelProto) -> None:
    del model.graph.node[6].output[:]


def _oblong(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 48


def _newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def _no_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


REFUSED: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (_loop, r"n6 in .* is made by Loop; take a value before it, such as --output n5"),
    (_custom, r"n6 in .* is made by FusedRelu"),
    (_not_there, "n6 reads nowhere, which is not there"),
    (_twice, "n4 is computed twice"),
    (_short, "can't be understood"),
    (_nan, "holds NaN or Inf"),
    (_two_images, "needs the inputs images, second"),
    (_integers, "takes UINT8"),
    (_odd_type, "takes type 77"),
    (_nowhere, r"a node \w+ has no output"),
    (_oblong, "takes 32 x 48"),
    (_newer, "Expected opset 1 to 21, but .* has 99"),
    (_no_output, "it has no output"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=lambda part: getattr(part, "__name__", ""))
def test_other_files_are_refused(edit: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_onnx(_small(edit, tmp_path), ASKED)


def test_what_a_trunk_can_not_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias that is computed from the image, and a network without weights."""
    weight = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32)))
    axes = helper.make_node("ReduceMean", ["x"], ["b"], axes=[0, 2, 3], keepdims=0)
    biased = [weight, axes, helper.make_node("Conv", ["x", "w", "b"], ["y"])]
    for nodes, message in (
        (biased, "b is a reduction over the batch"),
        ([helper.make_node("GlobalAveragePool", ["x"], ["y"])], "Expected a network with weights"),
    ):
        onnx.save(_map_to_last(nodes), tmp_path / "net.onnx")
        words = [str(tmp_path / "net.onnx"), str(tmp_path / "net.safetensors"), "--channels", "rgb"]
        with pytest.raises(SystemExit) as left:
            main([*words, "--mean", "127.5", "--std", "127.5"])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "net.safetensors").exists()


def test_a_value_before_what_is_refused_is_taken(tmp_path: Path) -> None:
    network = read_onnx(_small(_loop, tmp_path), Asked(**{**vars(ASKED), "output": "n5"}))
    assert network.features == "n5"
    finish(network)


@pytest.mark.parametrize(
    "content", [b"", b"not protobuf", b"\x08\x08", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"Expected an ONNX (file|model), but"):
        read_onnx(tmp_path / "x.onnx", ASKED)


def test_how_images_are_prepared_must_be_said(tmp_path: Path) -> None:
    path = _small(lambda model: None, tmp_path)
    with pytest.raises(UserError, match=r"give --mean, --std as the network was trained; usual are --channels rgb"):
        read_onnx(path, Asked(channels="rgb"))
    with pytest.raises(UserError, match=r"Expected --size 32, the only one that .* takes, but got 64"):
        read_onnx(path, Asked(**{**vars(ASKED), "size": 64}))
    with pytest.raises(UserError, match="Expected a Keras file with --keep-classifier"):
        read_onnx(path, Asked(**{**vars(ASKED), "keep_classifier": True}))


def test_layers_of_a_model_are_joined_to_its_features(tmp_path: Path) -> None:
    source, dest = tmp_path / "net.onnx", tmp_path / "net.safetensors"
    onnx.save(small_network(64), source)
    taken = ["--channels=rgb", "--mean=127.5", "--std=127.5"]
    main([str(source), str(dest), *taken])
    alone = read_trunk(dest)[1]["graph"]["features"]
    main([str(source), str(dest), *taken, "--also=n6", "--also=n2"])
    _, metadata = read_trunk(dest)
    assert metadata["graph"]["features"] == alone + 16 + 8
    assert metadata["features"].endswith(", n6, n2")
    assert metadata["graph"]["map"]["channels"] == 8  # of n2, on which everything after it depends
    trunk = create_trunk("graph", dest, 64)
    assert trunk(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, alone + 24)


def test_the_command_writes_a_trunk_file_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _small(lambda model: None, tmp_path)
    dest = tmp_path / "trunk.safetensors"
    main(
        [str(path), str(dest), "--channels=bgr", "--mean=90,100,110", "--std=50", "--onnx", str(tmp_path / "out.onnx")]
    )
    said = capsys.readouterr().out
    assert "16 numbers, output of n10" in said
    trunk = create_trunk("graph", dest)
    trunk(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).sum().backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters())
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
