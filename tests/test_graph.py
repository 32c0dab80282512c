"""Graph trunks: every operator against ONNX Runtime, layers and maps on networks whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from plain_networks import Node, build, network_of, small_network, write_small_trunk

from convert.finish import FEATURES, finish, last_map
from convert.graph_trunk import describe
from convert.plain.network import INPUT, PLAIN_OPERATORS
from convert.plain.shapes import value_shapes
from facecls.errors import UserError
from facecls.model.graph import GRAPH, GraphNet, create_graph, cut_points
from facecls.model.trunk import create_trunk, load_graph, save_trunk

SIZE = 16
RNG = np.random.default_rng(0)


def _random(*shape: int) -> NDArray[Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def _positive(*shape: int) -> NDArray[Any]:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def _ints(*values: int) -> NDArray[Any]:
    return np.array(values, np.int64)


_VECTOR: list[Node] = [("ReduceMean", [INPUT], {"axes": [2, 3], "keepdims": 0})]  # (N, 3)
_TOKENS: list[Node] = [
    ("Reshape", [INPUT, "tokens"], {}),
    ("Transpose", ["n0"], {"perm": [0, 2, 1]}),
]  # (N, 256, 3)
_TOKEN_SHAPE = {"tokens": _ints(0, 3, -1)}

Case = tuple[list[Node], dict[str, NDArray[Any]]]

CASES: dict[str, Case] = {
    "conv": ([("Conv", [INPUT, "w", "b"], {"pads": [1, 1, 1, 1]})], {"w": _random(4, 3, 3, 3), "b": _random(4)}),
    "conv uneven": (
        [("Conv", [INPUT, "w"], {"pads": [0, 1, 1, 2], "strides": [2, 1], "dilations": [1, 2]})],
        {"w": _random(4, 3, 3, 3)},
    ),
    "conv groups": ([("Conv", [INPUT, "w"], {"group": 3})], {"w": _random(6, 1, 2, 2)}),
    "conv 1d": (
        [*_VECTOR, ("Unsqueeze", ["n0", "one"], {}), ("Conv", ["n1", "w"], {"pads": [1, 1]})],
        {"w": _random(1, 1, 3), "one": _ints(1)},
    ),
    "batch norm": (
        [("BatchNormalization", [INPUT, "g", "b", "m", "v"], {"epsilon": 0.01})],
        {"g": _positive(3), "b": _random(3), "m": _random(3), "v": _positive(3)},
    ),
    "batch norm of a vector": (
        [*_VECTOR, ("BatchNormalization", ["n0", "g", "b", "m", "v"], {})],
        {"g": _positive(3), "b": _random(3), "m": _random(3), "v": _positive(3)},
    ),
    "batch norm without statistics": (
        [("BatchNormalization", [INPUT, "g", "b", "m", "v"], {"epsilon": 1e-3})],
        {"g": _positive(3), "b": _random(3), "m": np.zeros(3, np.float32), "v": np.full(3, 0.999, np.float32)},
    ),
    "instance norm": ([("InstanceNormalization", [INPUT, "g", "b"], {})], {"g": _positive(3), "b": _random(3)}),
    "layer norm": (
        [*_TOKENS, ("LayerNormalization", ["n1", "g", "b"], {"epsilon": 1e-3})],
        {**_TOKEN_SHAPE, "g": _positive(3), "b": _random(3)},
    ),
    "gemm": (
        [*_VECTOR, ("Gemm", ["n0", "w", "b"], {"transB": 1})],
        {"w": _random(5, 3), "b": _random(5)},
    ),
    "gemm not transposed": ([*_VECTOR, ("Gemm", ["n0", "w"], {})], {"w": _random(3, 5)}),
    "matmul with a matrix": ([*_TOKENS, ("MatMul", ["n1", "w"], {})], {**_TOKEN_SHAPE, "w": _random(3, 4)}),
    "matmul of two": (
        [*_TOKENS, ("Transpose", ["n1"], {"perm": [0, 2, 1]}), ("MatMul", ["n2", "n1"], {})],
        _TOKEN_SHAPE,
    ),
    "prelu": ([("PRelu", [INPUT, "s"], {})], {"s": _random(3, 1, 1)}),
    "prelu of one": ([("PRelu", [INPUT, "s"], {})], {"s": _random(1)}),
    "add a constant": ([("Add", [INPUT, "c"], {})], {"c": _random(3, 1, 1)}),
    "sub from a constant": ([("Sub", ["c", INPUT], {})], {"c": _random(1, 3, 1, 1)}),
    "pow": ([("Abs", [INPUT], {}), ("Pow", ["n0", "p"], {})], {"p": np.array(1.5, np.float32)}),
    "same twice": ([("Mul", [INPUT, INPUT], {})], {}),
    "div": ([("Exp", [INPUT], {}), ("Div", [INPUT, "n0"], {})], {}),
    "several": (
        [
            ("Max", [INPUT, "c"], {}),
            ("Min", ["n0", "d"], {}),
            ("Sum", ["n1", "n0", "c"], {}),
            ("Mean", ["n2", "d"], {}),
        ],
        {"c": _random(3, 1, 1), "d": _random(3, 1, 1)},
    ),
    "concat": ([("Relu", [INPUT], {}), ("Concat", ["n0", INPUT, "c"], {"axis": 1})], {"c": _random(2, 3, 16, 16)}),
    "slice": (
        [("Slice", [INPUT, "from", "to", "axes", "steps"], {})],
        {"from": _ints(1, -9), "to": _ints(3, 2**62), "axes": _ints(1, 3), "steps": _ints(1, 2)},
    ),
    "slice backwards": (
        [("Slice", [INPUT, "from", "to", "axes", "steps"], {})],
        {"from": _ints(-1), "to": _ints(-(2**63) + 1), "axes": _ints(1), "steps": _ints(-1)},
    ),
    "gather one": ([*_TOKENS, ("Gather", ["n1", "at"], {"axis": 1})], {**_TOKEN_SHAPE, "at": np.array(0)}),
    "gather some": ([("Gather", [INPUT, "at"], {"axis": 1})], {"at": _ints(2, 0)}),
    "pad": (
        [("Pad", [INPUT, "pads", "value"], {})],
        {"pads": _ints(0, 1, 2, 0, 0, 0, 1, 3), "value": np.array(1.5, np.float32)},
    ),
    "pad by reflection": ([("Pad", [INPUT, "pads"], {"mode": "reflect"})], {"pads": _ints(0, 0, 2, 1, 0, 0, 1, 3)}),
    "crop": ([("Pad", [INPUT, "pads"], {})], {"pads": _ints(0, 0, -2, 0, 0, 0, -1, -3)}),
    "flatten": ([("Flatten", [INPUT], {})], {}),
    "squeeze": (
        [("GlobalAveragePool", [INPUT], {}), ("Squeeze", ["n0", "axes"], {}), ("Unsqueeze", ["n1", "axes"], {})],
        {"axes": _ints(2, 3)},
    ),
    "expand": (
        [("GlobalAveragePool", [INPUT], {}), ("Expand", ["n0", "shape"], {})],
        {"shape": _ints(1, 3, 4, 5)},
    ),
    "tile": ([("Tile", [INPUT, "times"], {})], {"times": _ints(1, 2, 1, 3)}),
    "max pool": ([("MaxPool", [INPUT], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})], {}),
    "max pool uneven": (
        [("MaxPool", [INPUT], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]})],
        {},
    ),
    "average pool": ([("AveragePool", [INPUT], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})], {}),
    "average pool with padding": (
        [("AveragePool", [INPUT], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1})],
        {},
    ),
    "resize": (
        [("Resize", [INPUT, "", "scales"], {"mode": "linear"})],
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize to the nearest": (
        [
            (
                "Resize",
                [INPUT, "", "scales"],
                {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            )
        ],
        {"scales": np.array([1, 1, 2, 3], np.float32)},
    ),
    "pixel shuffle": (
        [("Tile", [INPUT, "t"], {}), ("DepthToSpace", ["n0"], {"blocksize": 2, "mode": "CRD"})],
        {"t": _ints(1, 4, 1, 1)},
    ),
    "local response norm": ([("LRN", [INPUT], {"size": 3, "alpha": 0.1, "bias": 2.0})], {}),
    "softmax": ([("Softmax", [INPUT], {"axis": 1}), ("Log", ["n0"], {})], {}),
    "clip": (
        [("Clip", [INPUT, "low", "high"], {})],
        {"low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)},
    ),
    "clip below": ([("Clip", [INPUT, "low"], {})], {"low": np.array(0.1, np.float32)}),
    "clip above": ([("Clip", [INPUT, "", "high"], {})], {"high": np.array(0.1, np.float32)}),
    "overwritten": (
        [("Conv", [INPUT, "w"], {}), ("Relu", ["n0"], {}), ("Add", ["n1", INPUT], {}), ("Relu", ["n2"], {})],
        {"w": _random(3, 3, 1, 1)},
    ),
    "not overwritten": (
        [("Conv", [INPUT, "w"], {}), ("Relu", ["n0"], {}), ("Sub", ["n1", "n0"], {})],
        {"w": _random(3, 3, 1, 1)},
    ),
    **{
        kind: ([(kind, [INPUT], settings)], {})
        for kind, settings in {
            "Celu": {"alpha": 0.7},
            "Elu": {"alpha": 0.7},
            "Selu": {},
            "LeakyRelu": {"alpha": 0.3},
            "HardSigmoid": {"alpha": 1 / 6},
            "HardSwish": {},
            "Sigmoid": {},
            "Tanh": {},
            "Erf": {},
            "Neg": {},
            "Softplus": {},
            "Softsign": {},
            "LogSoftmax": {"axis": 1},
            "ReduceL2": {"axes": [1], "keepdims": 1},
            "ReduceMax": {"axes": [2, 3], "keepdims": 0},
            "ReduceMin": {"axes": [3]},
            "ReduceSumSquare": {"axes": [1]},
        }.items()
    },
    "reduce sum": ([("ReduceSum", [INPUT, "axes"], {"keepdims": 0})], {"axes": _ints(2, 3)}),
    "reciprocal": ([("Exp", [INPUT], {}), ("Reciprocal", ["n0"], {})], {}),
    "square root": ([("Abs", [INPUT], {}), ("Sqrt", ["n0"], {})], {}),
}


def _model(case: Case) -> onnx.ModelProto:
    """The operators of a case, with their output flattened to features."""
    nodes, constants = case
    model = build([*nodes, ("Flatten", [f"n{len(nodes) - 1}"], {})], constants, SIZE)
    return model


def _features(model: onnx.ModelProto, inputs: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run([FEATURES], {INPUT: inputs})[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_onnx_runtime_computes(name: str) -> None:
    network = network_of(_model(CASES[name]), SIZE)
    shapes = finish(network)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    images = RNG.integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)
    expected = _features(network.model, network.contract.prepare(images))
    net = load_graph(description, state, "test").net.eval()
    rgb = np.ascontiguousarray(network.contract.prepare(images)[:, ::-1])  # the network turns it to BGR itself
    with torch.inference_mode():
        found = net(torch.from_numpy(rgb)).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_operators_can_be_trained(name: str) -> None:
    network = network_of(_model(CASES[name]), SIZE)
    description, state = describe(network.model, finish(network), network.contract, None)
    net = load_graph(description, state, "test").net.train()
    inputs = torch.from_numpy(_random(2, 3, SIZE, SIZE)).requires_grad_()
    net(inputs).square().mean().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_bias_of_a_layer_on_tokens_is_trained() -> None:
    """Exporters write it as a product and a sum, on either side."""
    for operands in (["n1", "bias"], ["bias", "n1"]):
        tokens = ("Reshape", [INPUT, "shape"], {})
        nodes: list[Node] = [tokens, ("MatMul", ["n0", "w"], {}), ("Add", operands, {}), ("Flatten", ["n2"], {})]
        constants = {"shape": _ints(0, 3, SIZE * SIZE), "w": _random(SIZE * SIZE, 5), "bias": _random(5)}
        network = network_of(build(nodes, constants, SIZE), SIZE)
        shapes = finish(network)
        description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
        assert [node["op"] for node in description["nodes"]] == ["Reshape", "MatMul", "Flatten"]
        net = load_graph(description, state, "test").net.eval()
        assert {name: tuple(each.shape) for name, each in net.named_parameters()} == {
            "nodes.n1.weight": (5, SIZE * SIZE),
            "nodes.n1.bias": (5,),
        }
        images = RNG.integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)
        inputs = network.contract.prepare(images)
        rgb = np.ascontiguousarray(inputs[:, ::-1])
        with torch.inference_mode():
            found = net(torch.from_numpy(rgb)).numpy()
        expected = _features(network.model, inputs)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_plain_operator_has_a_case() -> None:
    covered = {node[0] for nodes, _ in CASES.values() for node in nodes}
    assert covered == PLAIN_OPERATORS


def test_without_statistics_no_batchnorm_is_left() -> None:
    network = network_of(_model(CASES["batch norm without statistics"]), SIZE)
    description, _ = describe(network.model, finish(network), network.contract, None)
    assert [node["op"] for node in description["nodes"]] == ["ScaleAndShift", "Flatten"]


# Layers, maps, sizes


def test_cut_points_of_a_residual_block() -> None:
    steps = [("a", [INPUT]), ("b", ["a"]), ("c", ["b"]), ("add", ["c", "a"]), ("d", ["add"])]
    assert cut_points(steps) == [0, 3, 4]


def test_small_network_has_three_layers_and_its_last_map(tmp_path: Path) -> None:
    trunk = create_trunk("graph", write_small_trunk(tmp_path / "small.safetensors"))
    net = trunk.net
    assert isinstance(net, GraphNet)
    matcher = net.group_matcher()
    layers = {name: matcher(name) for name, _ in net.named_parameters()}
    assert {name.split(".")[1]: layer for name, layer in layers.items()} == {
        **dict.fromkeys(("n0", "n1", "n2"), 0),
        **dict.fromkeys(("n3", "n4", "n5"), 1),  # depthwise and pointwise
        "n7": 2,
    }
    assert (trunk.features, net.num_features, trunk.fixed_size) == (16, 16, None)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        net.eval()
        last = net.forward_features((images - trunk.mean) / trunk.std)
        assert last.shape == (2, 16, 16, 16)
        assert torch.equal(net.forward_head(last), trunk(images))


def test_a_network_with_a_dense_layer_on_a_map_takes_one_size(tmp_path: Path) -> None:
    nodes: list[Node] = [("Conv", [INPUT, "w"], {}), ("Flatten", ["n0"], {}), ("Gemm", ["n1", "v"], {})]
    network = network_of(build(nodes, {"w": _random(2, 3, 1, 1), "v": _random(2 * 64 * 64, 4)}, 64), 64)
    shapes = finish(network)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    trunk = load_graph(description, state, "test")
    assert trunk.fixed_size == 64
    assert description["map"] == {"name": "n0", "channels": 2, "prefix": 0}
    with pytest.raises(ValueError, match=r"with H and W 64, but got \(1, 3, 96, 96\)"):
        trunk(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))


def test_a_map_turned_to_keras_order_is_not_the_last_map() -> None:
    """Before Keras' Flatten the channels are last, and Grad-CAM takes them first."""
    nodes: list[Node] = [("Conv", [INPUT, "w"], {}), ("Transpose", ["n0"], {"perm": [0, 2, 3, 1]})]
    nodes += [("Flatten", ["n1"], {}), ("Gemm", ["n2", "v"], {})]
    network = network_of(build(nodes, {"w": _random(2, 3, 1, 1), "v": _random(2 * 64 * 64, 4)}, 64), 64)
    found = last_map(network.model, finish(network))
    assert found
    assert (found.name, found.shape) == ("n0", (2, 64, 64))


def test_images_too_small_for_a_graph_are_refused(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Conv", [INPUT, "w"], {"strides": [4, 4]}),
        ("MaxPool", ["n0"], {"kernel_shape": [4, 4], "strides": [4, 4]}),
        ("Conv", ["n1", "w"], {"strides": [3, 3]}),
    ]
    network = network_of(build(nodes, {"w": _random(3, 3, 4, 4)}, 224), 224)
    shapes = finish(network)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    path = tmp_path / "trunk.safetensors"
    save_trunk(path, state, {"architecture": GRAPH, GRAPH: description})
    assert create_trunk(GRAPH, path, 96)(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 3)
    with pytest.raises(UserError, match=r"Expected data.image_size of at least 224 or so, .* but with 32 it can't"):
        create_trunk(GRAPH, path, 32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = build([("Add", [INPUT, "w"], {})], {"w": _random(7, 1, 1)}, 64)
    with pytest.raises(UserError, match="Expected a graph whose shapes fit together"):
        value_shapes(model)


# Descriptions that are wrong


def _small_description() -> dict[str, Any]:
    network = network_of(small_network(), 64)
    shapes = finish(network)
    return describe(network.model, shapes, network.contract, last_map(network.model, shapes))[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("input"),
        lambda d: d["input"].update(channels="gray"),
        lambda d: d["input"].update(mean=None),
        lambda d: d["nodes"].clear(),
        lambda d: d["nodes"][0].update(op="Loop"),
        lambda d: d["nodes"][0].update(inputs=["nowhere"]),
        lambda d: d["nodes"][1].update(name="n0"),
        lambda d: d["nodes"][0].update(name="a.b"),
        lambda d: d["nodes"][0]["tensors"].update(weight=[1]),
        lambda d: d["nodes"][0]["tensors"].update(weight="many"),
        lambda d: d["nodes"][0]["settings"].update(strides=5),
        lambda d: d["map"].update(name="nowhere"),
        lambda d: d.update(nodes=7),
    ],
)
def test_wrong_descriptions_are_refused(change: Any) -> None:
    description = _small_description()
    create_graph(description)
    change(description)
    with pytest.raises(UserError, match="Expected the description of a graph, but it can't be understood"):
        create_graph(description)


def test_too_many_weights_are_refused_before_memory_is_taken() -> None:
    description = _small_description()
    description["nodes"][0]["tensors"]["weight"] = [100_000, 100_000, 3, 3]
    with pytest.raises(UserError, match="Expected a trunk of at most"):
        create_graph(description)
