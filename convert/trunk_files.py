"""Reads trunk files as a network: one, to take other layers of it, or several, whose features are joined."""

import difflib
import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convert.onnx.network import read_model
from convert.plain.network import MAX_WEIGHTS, Asked, Contract, Network
from convert.plain.shapes import has_channels_last, value_names
from convert.plain.source import digest
from facecls.errors import UserError
from facecls.model.graph import GraphNet
from facecls.model.onnx_file import export
from facecls.model.trunk import CLASSIFIER, Trunk, create_trunk, read_trunk

_OPSET = 18
"""The first that torch's exporter writes."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where it writes the module of a node: the names of all modules around it, from the outside, then its own."""
_WRAPPERS = re.compile(r"^(?:(\d+\.)net\.)?(?:nodes\.)?")
"""What ``Trunk`` and ``GraphNet`` put before the names of modules and of nodes, which have no dots."""


class _Source(NamedTuple):
    """A trunk file.

    Attributes:
        path: The file.
        sha256: SHA-256 of its bytes, in hexadecimal.
        trunk: Its trunk, in evaluation mode.
        size: Side of the images in pixels that it was made for.
        has_classifier: Whether the file has a classifier, too.
    """

    path: Path
    sha256: str
    trunk: Trunk
    size: int
    has_classifier: bool


class _Joined(nn.ModuleList):
    """Trunks side by side."""

    def forward(self, images: Tensor) -> Tensor:
        """Joins features: (N, 3, S, S) float32 RGB, 0..255, to (N, D), in the order of the trunks."""
        return torch.cat([trunk(images) for trunk in self], 1)


def read_trunks(paths: Sequence[Path], asked: Asked) -> Network:
    """Reads a network from one or several trunk files.

    A trunk takes its images as its file says. Joined ones take RGB, 0..255, and each prepares it in the network. Layers
    have the names of their modules in timm's model or in the graph.

    Args:
        paths: The files.
        asked: What the user says: a size, and of one file other layers for its features.

    Returns:
        The network. The name of its source lists the files.

    Raises:
        UserError: If a file is no trunk file, or the trunks can't be joined or exported, or more is asked.
    """
    _check_asked(paths, asked)
    sources = [_read(path) for path in paths]
    size = asked.size or sources[0].size
    trunks = [_sized(source, size) for source in sources]
    name = " + ".join(path.name for path in paths)
    total = 4 * sum(tensor.numel() for trunk in trunks for tensor in trunk.state_dict().values())
    if total > MAX_WEIGHTS:
        raise UserError(f"Expected at most {MAX_WEIGHTS:,} bytes of weights, but {name} have {total:,}.")
    is_one = len(paths) == 1
    net = trunks[0].net if is_one else _Joined(trunks).eval()
    contract = _contract(trunks[0], size) if is_one else Contract(size, "rgb", (0.0,) * 3, (1.0,) * 3)
    model = export(net, name, torch.zeros(2, 3, size, size), ["features"], _OPSET, optimise=False)
    _drop_biases(model.graph)
    layers = _layers(model.graph)
    chosen = [layer for layer in (asked.output, *asked.also) if layer is not None]
    _check_chosen(chosen, layers, paths[0])
    _name_values(model.graph, layers, chosen)
    told = replace(asked, size=size, channels=contract.channels, mean=contract.mean, std=contract.std)
    try:
        network = read_model(paths[0].with_name(name), model, " + ".join(source.sha256 for source in sources), told)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"Expected trunks that can be a graph, but {name} can't: {reason}; take another.") from None
    left_out = [layer for layer in network.left_out if layer in layers]
    left_out += [CLASSIFIER] * any(source.has_classifier for source in sources)
    kinds = " + ".join(trunk.name for trunk in trunks)
    return replace(
        network,
        features=network.features if is_one else ", ".join(path.stem for path in paths),
        left_out=tuple(left_out),
        summary={"kind": f"trunk file{'' if is_one else 's'}: {kinds}", "size": network.summary["size"]},
        reference=_reference(net, asked.output, asked.also, network.model.graph),
    )


def _check_asked(paths: Sequence[Path], asked: Asked) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("channels", "mean", "std", "keep_classifier")
        if getattr(asked, name) not in (None, False)
    ]
    if given:
        raise UserError(
            f"Expected no {', '.join(given)} with a trunk file, which says how it takes images; leave it out."
        )
    if len(paths) > 1 and (asked.output or asked.also):
        raise UserError(
            "Expected no --output and --also with several trunk files, since each has layers of its own; take other "
            "layers of one when it is converted on its own."
        )


def _read(path: Path) -> _Source:
    if not path.is_file():
        raise UserError(f"Expected a trunk file at {path}, but there is none; name one that convert or download wrote.")
    sha256, _ = digest(path, "a trunk file")
    state, about = read_trunk(path)
    trunk = create_trunk(about["architecture"], path).eval()
    config: Any = trunk.net.pretrained_cfg
    told = about.get("input", {}).get("size")
    size: int = trunk.fixed_size or (told if isinstance(told, int) else config["input_size"][-1])
    return _Source(path, sha256, trunk, size, f"{CLASSIFIER}.weight" in state)


def _sized(source: _Source, size: int) -> Trunk:
    """The trunk for images of a size, whose weights may be resampled for it."""
    try:
        trunk = create_trunk(source.trunk.name, source.path, size).eval()
        if size < trunk.least_size:
            raise UserError(f"it takes {trunk.least_size} pixels or more")
    except UserError as error:
        raise UserError(
            f"Expected trunks that take images of {size} pixels, but {source.path} can't: {error}"
        ) from None
    return trunk


def _contract(trunk: Trunk, size: int) -> Contract:
    mean, std = (tuple(values.flatten().tolist()) for values in (trunk.mean, trunk.std))
    return Contract(size, "rgb", mean, std)


def _drop_biases(graph: onnx.GraphProto) -> None:
    """Drops the zeros that the exporter adds where a convolution has no bias, in place; they would be trained."""
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and not weights.issuperset(node.input[2:]):
            del node.input[2:]


def _layers(graph: onnx.GraphProto) -> dict[str, str]:
    """By module: the value that it returned last."""
    found = {}
    for node in graph.node:
        about = {each.key: each.value for each in node.metadata_props}
        for scope in literal_eval(about.get(_SCOPES, "[]"))[1:-1]:
            found[_WRAPPERS.sub(r"\1", scope)] = node.output[0]
    return found


def _check_chosen(chosen: Sequence[str], layers: Mapping[str, str], path: Path) -> None:
    values: dict[str, str] = {}
    for layer in chosen:
        if layer not in layers:
            near = difflib.get_close_matches(layer, layers, n=3) or list(layers)[-3:]
            raise UserError(f"Expected the name of a layer of {path}, but got {layer}; did you mean {', '.join(near)}?")
        if layers[layer] in values:
            raise UserError(f"Expected layers of {path} each once, but {values[layers[layer]]} ends in {layer}.")
        values[layers[layer]] = layer


def _name_values(graph: onnx.GraphProto, layers: Mapping[str, str], chosen: Sequence[str]) -> None:
    """Calls values as the modules that return them, in place: as those chosen, or else as the innermost.

    Others get names that no module has, since those of the exporter may be those of modules.
    """
    names = {each: f"value/{place}" for place, each in enumerate(sorted(value_names(graph)))}
    for layer in sorted(layers, key=lambda layer: (layer in chosen, layer.count("."))):
        names[layers[layer]] = layer
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(each, each) for each in values]
    for each in (*graph.initializer, *graph.input, *graph.output):
        each.name = names[each.name]


def _reference(
    net: nn.Module, output: str | None, also: Sequence[str], graph: onnx.GraphProto
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Computes by the trunks what ``finish`` makes of the features, or of what a module returns, and of others."""
    chosen = [*([output] if output else []), *also]
    modules = dict(net.nodes.named_modules() if isinstance(net, GraphNet) else net.named_modules())
    places = {layer: (1, 2) if has_channels_last(graph, layer) else (2, 3) for layer in chosen}
    seen: dict[str, Tensor] = {}

    def see(layer: str, values: Tensor) -> None:
        average = values.mean(places[layer]) if values.ndim == 4 else values
        seen[layer] = average.flatten(1).clone()  # what follows may overwrite it

    def compute(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        hooks = [
            modules[layer].register_forward_hook(lambda _, __, values, layer=layer: see(layer, values))
            for layer in chosen
        ]
        with torch.no_grad():
            features: Tensor = net(torch.from_numpy(inputs))
        for hook in hooks:
            hook.remove()
        parts = [] if output else [features]
        joined: NDArray[np.float32] = torch.cat([*parts, *(seen[layer] for layer in chosen)], 1).numpy()
        return joined

    return compute
