"""Reads trunk files as a network: one, to take other layers of it, or several, whose features are joined."""

import re
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convert.onnx.network import read_model
from convert.plain.network import Asked, Contract, Network
from convert.plain.shapes import rename
from facecls.errors import UserError
from facecls.files import sha256
from facecls.model.onnx_file import export
from facecls.model.trunk import Trunk, create_trunk, read_trunk

_OUTPUT = "features"
_OPSET = 18
"""The first that torch's exporter writes."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where it writes the module of a node: the names of all modules around it, from the outside, then its own."""
_WRAPPERS = re.compile(r"(?<![^.])(net|nodes)(\.|$)")
"""What ``Trunk`` and ``GraphNet`` add to the names of modules."""


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
    _check(paths, asked)
    size = asked.size or _size_of(create_trunk(_architecture(paths[0]), paths[0]))
    trunks = [_open(path, size) for path in paths]
    is_one = len(paths) == 1
    net = trunks[0].net if is_one else _Joined(trunks).eval()
    contract = _contract(trunks[0], size) if is_one else Contract(size, "rgb", (0.0,) * 3, (1.0,) * 3)
    name = " + ".join(path.name for path in paths)
    model = export(net, name, torch.zeros(2, 3, size, size), [_OUTPUT], _OPSET, optimise=False)
    layers = _name_layers(model.graph, (asked.output, *asked.also))
    told = replace(asked, size=size, channels=contract.channels, mean=contract.mean, std=contract.std)
    network = read_model(paths[0].with_name(name), model, " + ".join(map(sha256, paths)), told)
    kinds = " + ".join(trunk.name for trunk in trunks)
    return replace(
        network,
        features=network.features if is_one else ", ".join(path.stem for path in paths),
        left_out=tuple(layer for layer in network.left_out if layer in layers),
        summary={"kind": f"trunk file{'' if is_one else 's'}: {kinds}", "size": network.summary["size"]},
        reference=network.reference if asked.output else lambda inputs: _run(net, inputs),
    )


def _check(paths: Sequence[Path], asked: Asked) -> None:
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


def _architecture(path: Path) -> str:
    name: str = read_trunk(path)[1]["architecture"]
    return name


def _size_of(trunk: Trunk) -> int:
    config: Any = trunk.net.pretrained_cfg
    size: int = trunk.fixed_size or config["input_size"][-1]
    return size


def _open(path: Path, size: int) -> Trunk:
    try:
        return create_trunk(_architecture(path), path, size).eval()
    except UserError as error:
        raise UserError(f"Expected trunks for images of {size} pixels (--size), but for {path}: {error}") from None


def _contract(trunk: Trunk, size: int) -> Contract:
    mean, std = (tuple(values.flatten().tolist()) for values in (trunk.mean, trunk.std))
    return Contract(size, "rgb", mean, std)


def _run(net: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        features: NDArray[np.float32] = net(torch.from_numpy(inputs)).numpy()
    return features


def _name_layers(graph: onnx.GraphProto, asked: Sequence[str | None]) -> set[str]:
    """Names values after the modules that they are the output of, in place: after those asked for, or the inner one.

    Returns:
        The names.
    """
    values: dict[str, str] = {}  # by module
    for node in graph.node:
        about = {each.key: each.value for each in node.metadata_props}
        scopes = literal_eval(about.get(_SCOPES, "[]"))[1:-1]
        values |= {_WRAPPERS.sub("", scope).rstrip("."): node.output[0] for scope in scopes}
    inner_last = sorted(values, key=lambda module: (module in asked, module.count(".")))
    names = {values[module]: module for module in inner_last}
    taken = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    new = {value: name for value, name in names.items() if name and name not in taken}
    for value, name in new.items():
        rename(graph, value, name)
    return set(new.values())
