"""A trunk of any architecture, built from the description of its graph that a trunk file holds.

The description is plain data, so that a file or a checkpoint alone is enough to build the network::

    {
        "input": {"size": 224, "channels": "bgr", "mean": [...], "std": [...]},
        "nodes": [{"name": "conv1", "op": "Conv", "inputs": ["images"], "settings": {...}, "tensors": {...}}, ...],
        "map": {"name": "conv_pw_13_relu", "channels": 1024, "prefix": 0},
        "features": 1024,
        "any_size": true
    }

Each node is an ONNX operator; its output has its name, ``tensors`` has the shapes of its weights. ``map`` is the last
node whose output has locations and on which alone the features depend: a map (N, C, h, w), or tokens (N, L, C) of which
the first ``prefix`` have no location; null if there is none.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from facecls.data.limits import SIDE
from facecls.errors import UserError
from facecls.model.graph_operators import create_operator

GRAPH = "graph"
"""The architecture of such trunks, in trunk files and as ``model.trunk``."""
INPUT = "images"
"""What nodes call the network's input."""
_MAX_PARAMETERS = 2**29
_EPSILON = 1e-5
"""What BatchNorms add to a variance, torch's default."""
_NORMS = ("BatchNormalization", "ScaleAndShift")
_UNREAD = ("Conv", *_NORMS, "Gemm", "Add")
"""Operators whose backward pass does not read their output."""


class GraphNet(nn.Module):
    """The network of a description, with the interface of a timm model without its classifier.

    Args:
        description: As above.

    Raises:
        UserError: If it is not as described above.

    Attributes:
        description: The description.
        head_hidden_size: Length D of the features.
        fixed_size: The only side of its images in pixels; ``None`` if it takes any.
        num_features: Channels C of the map.
        num_prefix_tokens: Tokens of the map without a location.
        joined: For each of several networks that only meet in the last node, the names of its nodes on whose output
            alone all its later ones depend; empty for a single network.
        pretrained_cfg: ``mean`` and ``std`` in RGB, as shares of 255, and ``input_size``.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.description = description
        try:
            contract, last_map = description["input"], description["map"]
            self.is_bgr = {"rgb": False, "bgr": True}[contract["channels"]]
            order = -1 if self.is_bgr else 1
            _check_contract(contract)
            self.pretrained_cfg = {
                "input_size": (3, contract["size"], contract["size"]),
                "mean": tuple(float(value) / 255 for value in contract["mean"][::order]),
                "std": tuple(float(value) / 255 for value in contract["std"][::order]),
            }
            self.fixed_size = None if description["any_size"] else int(contract["size"])
            self.head_hidden_size = int(description["features"])
            self.num_features = int(last_map["channels"]) if last_map else 0
            self.num_prefix_tokens = int(last_map["prefix"]) if last_map else 0
            nodes = description["nodes"]
            self.constants = {node["name"] for node in nodes if node["op"] == "Constant"}
            steps = [(node["name"], tuple(node["inputs"])) for node in nodes if node["name"] not in self.constants]
            _check_order(steps, self.constants)
            self.nodes = nn.Module()
            overwriting = _overwriting(nodes, steps)
            for node in nodes:
                settings = {**node.get("settings", {}), "in_place": node["name"] in overwriting}
                self.nodes.add_module(node["name"], create_operator(node["op"], settings, node.get("tensors", {})))
            names = [name for name, _ in steps]
            self.map_end = names.index(last_map["name"]) + 1 if last_map else len(names)
            branches = _branches(steps)
            self.layers = _layers(nodes, branches)
            self.joined = [[own[cut][0] for cut in cut_points(own)] for own in branches if len(branches) > 1]
        except Exception as error:  # over what a file says, torch raises any kind
            raise UserError(
                f"Expected the description of a graph, but it can't be understood ({error!r}); convert the network "
                "again."
            ) from None
        self.steps = steps
        self.unused = _last_uses(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Computes features.

        Args:
            x: (N, 3, H, W) float, RGB, centred and scaled.

        Returns:
            (N, D) float.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes the map, or the features if there is none."""
        values = {INPUT: x.flip(1) if self.is_bgr else x}
        return self._run(values, 0, self.map_end)

    def forward_head(self, x: Tensor) -> Tensor:
        """Computes features from what ``forward_features`` returns."""
        return self._run({self.steps[self.map_end - 1][0]: x}, self.map_end, len(self.steps))

    def _run(self, values: dict[str, Tensor], start: int, end: int) -> Tensor:
        """Runs some of the nodes; values are dropped after their last use, to save memory."""
        output = next(reversed(values.values()))
        for step in range(start, end):
            name, inputs = self.steps[step]
            output = getattr(self.nodes, name)(*(self._value(values, each) for each in inputs))
            values[name] = output
            for each in self.unused[step]:
                values.pop(each, None)
        return output

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        value: Tensor = getattr(self.nodes, name)() if name in self.constants else values[name]
        return value

    def group_matcher(self, coarse: bool = False) -> Any:
        """As for timm's models: what maps the name of a parameter to the number of its layer, from 0 at the input."""
        return lambda parameter: self.layers[parameter.removeprefix("nodes.").rpartition(".")[0]]


def _check_contract(contract: Mapping[str, Any]) -> None:
    """Refuses images of no size, and numbers that would make all features NaN."""
    size, mean, std = (contract[name] for name in ("size", "mean", "std"))
    if not (isinstance(size, int) and 0 < size <= SIDE):
        raise ValueError(f"images of {size} pixels")
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(f"mean {mean} and std {std}")


def create_graph(description: Mapping[str, Any]) -> GraphNet:
    """Builds the network of a description, with zeros for weights.

    Args:
        description: As described at the top of this file.

    Returns:
        The network.

    Raises:
        UserError: If it is not such a description, or has more weights than any network for faces.
    """
    with torch.device("meta"):  # takes no memory, whatever sizes are described
        net = GraphNet(description)
    count = sum(parameter.numel() for parameter in (*net.parameters(), *net.buffers()))
    if count > _MAX_PARAMETERS:
        raise UserError(f"Expected a trunk of at most {_MAX_PARAMETERS:,} weights, but the graph has {count:,}.")
    net.to_empty(device="cpu")
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.detach().zero_()
    return net


class Statistics(NamedTuple):
    """Of the values that a BatchNorm takes.

    Attributes:
        mean: (C,) float, by channel.
        variance: (C,) float, without Bessel's correction.
        rank: Dimensions of the values.
    """

    mean: Tensor
    variance: Tensor
    rank: int


def with_batchnorms(net: GraphNet, statistics: Mapping[str, Statistics]) -> GraphNet:
    """Makes BatchNorms of nodes that only scale and shift.

    With the statistics that are given they compute what the nodes did, but for rounding.

    Args:
        net: The network, which is left as it is.
        statistics: Of what such a node takes, by its name.

    Returns:
        A network with tensors of its own for these nodes, and those of ``net`` for all others.
    """
    nodes, state = [], net.state_dict()
    for node in net.description["nodes"]:
        if node["name"] in statistics:
            mean, variance, rank = statistics[node["name"]]
            weight, bias = (f"nodes.{node['name']}.{kind}" for kind in ("weight", "bias"))
            scale, shift = state[weight].double(), state[bias].double()
            own = {"weight": scale * (variance + _EPSILON).sqrt(), "bias": shift + scale * mean}
            own |= {"running_mean": mean, "running_var": variance}
            state |= {f"nodes.{node['name']}.{kind}": tensor.to(state[weight].dtype) for kind, tensor in own.items()}
            state[f"nodes.{node['name']}.num_batches_tracked"] = torch.tensor(0)
            shapes = {kind: [*tensor.shape] for kind, tensor in own.items()}
            settings = {"epsilon": _EPSILON, "rank": rank}
            node = {**node, "op": "BatchNormalization", "settings": settings, "tensors": shapes}
        nodes.append(node)
    with torch.device("meta"):
        restored = GraphNet({**net.description, "nodes": nodes})
    restored.load_state_dict(state, assign=True)
    return restored


def is_restored(net: GraphNet, other: GraphNet) -> bool:
    """Whether a network is another one with BatchNorms in place of nodes that only scale and shift."""

    def described(node: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"name": node["name"], "inputs": list(node["inputs"])} if node["op"] in _NORMS else node

    one, two = net.description, other.description
    alike = [list(map(described, each["nodes"])) for each in (one, two)]
    rest = [{key: value for key, value in each.items() if key != "nodes"} for each in (one, two)]
    return one != two and alike[0] == alike[1] and rest[0] == rest[1]


def cut_points(steps: Sequence[tuple[str, Sequence[str]]]) -> list[int]:
    """Indices of the nodes on whose output alone everything after them depends.

    Args:
        steps: For each node its name and those of its inputs, without constants.

    Returns:
        Indices in ascending order; the last node is one.
    """
    last = {name: step for step, (_, inputs) in enumerate(steps) for name in inputs}
    cuts, live_until = [], last.get(INPUT, 0)
    for step, (name, _) in enumerate(steps):
        if live_until <= step:
            cuts.append(step)
        live_until = max(live_until, last.get(name, step))
    return cuts


def _check_order(steps: Sequence[tuple[str, Sequence[str]]], constants: Collection[str]) -> None:
    known = {INPUT, *constants}
    for name, inputs in steps:
        if missing := [each for each in inputs if each not in known]:
            raise ValueError(f"{name} reads {missing[0]}, which does not come before it")
        if name in known:
            raise ValueError(f"{name} is there twice")
        known.add(name)
    if not steps:
        raise ValueError("it has no nodes")


def _overwriting(nodes: Sequence[Mapping[str, Any]], steps: Sequence[tuple[str, Sequence[str]]]) -> set[str]:
    """The nodes that alone read a value that may be overwritten, which saves memory and half of the time of a pass."""
    uses = Counter(each for _, inputs in steps for each in inputs)
    unread = {node["name"] for node in nodes if node["op"] in _UNREAD}
    return {name for name, inputs in steps if len(inputs) == 1 and inputs[0] in unread and uses[inputs[0]] == 1}


def _last_uses(steps: Sequence[tuple[str, Sequence[str]]]) -> list[list[str]]:
    """For each node, the values that no later one reads."""
    last = {name: step for step, (_, inputs) in enumerate(steps) for name in inputs}
    unused: list[list[str]] = [[] for _ in steps]
    for name, step in last.items():
        unused[step].append(name)
    return unused


def _branches(steps: Sequence[tuple[str, Sequence[str]]]) -> list[Sequence[tuple[str, Sequence[str]]]]:
    """The nodes of each network, where several meet in the last node only; all nodes otherwise."""
    groups: dict[str, set[str]] = {}
    for name, inputs in steps[:-1]:
        group = {name}.union(*(groups[each] for each in inputs if each in groups))
        groups.update(dict.fromkeys(group, group))
    apart = {id(group): group for group in groups.values()}.values()
    return [[step for step in steps if step[0] in group] for group in apart] if len(apart) > 1 else [steps]


def _layers(
    nodes: Sequence[Mapping[str, Any]], branches: Sequence[Sequence[tuple[str, Sequence[str]]]]
) -> dict[str, int]:
    """The layer of each node, from 0 at the input; joined networks are counted side by side.

    A layer ends where everything after it depends on a single value, and has at least one convolution that mixes
    channels, or one linear layer: a residual block is one, and so is a depthwise convolution with the pointwise one
    after it.
    """
    by_name = {node["name"]: node for node in nodes}
    layers = dict.fromkeys(by_name, 0)  # constants and what joins networks have no parameters
    for branch in branches:
        layers |= _branch_layers([by_name[name] for name, _ in branch], branch)
    return layers


def _branch_layers(nodes: Sequence[Mapping[str, Any]], steps: Sequence[tuple[str, Sequence[str]]]) -> dict[str, int]:
    """The layers of a single network."""
    cuts = {steps[step][0] for step in cut_points(steps)}
    layers: dict[str, int] = {}
    layer, mixes, ends, since_cut = 0, False, False, list[str]()
    for node in nodes:
        weight = node.get("tensors", {}).get("weight", ())
        if len(weight) > 1:
            if ends:
                layer, mixes, ends = layer + 1, False, False
                layers.update(dict.fromkeys(since_cut, layer))
            mixes |= weight[1] > 1 or node.get("settings", {}).get("group", 1) == 1
        layers[node["name"]] = layer
        since_cut.append(node["name"])
        if node["name"] in cuts:
            since_cut, ends = [], mixes
    return layers
