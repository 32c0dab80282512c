"""Makes the trunk of a network, and measures how far each stage of the conversion is from ONNX Runtime."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import parity
from convert.plain.network import Network
from convert.trunk_weights import to_module, to_trunk, trunk_state
from facecls.errors import UserError
from facecls.model.trunk import CLASSIFIER, Trunk, load_graph

_WEIGHT, _BIAS = f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"

Graph = tuple[dict[str, Any], dict[str, Tensor]]
"""A description and its tensors, as ``describe`` returns them."""


def verify(path: Path, network: Network, graph: Graph | None) -> tuple[dict[str, Tensor], Trunk, dict[str, float]]:
    """Makes the trunk and compares the source file, the plain model, onnx2torch's module and the trunk.

    Args:
        path: The plain ONNX model, finished.
        network: Where it comes from.
        graph: What ``describe`` returned; ``None`` for VGGFace2's ResNet-50, whose tensors get timm's names.

    Returns:
        The tensors of the trunk file; the trunk, in evaluation mode; the differences from ONNX Runtime by name.

    Raises:
        UserError: If a stage can't be run or differs, or there is nothing to train.
    """
    images = parity.seeded_images(network.contract.size)
    inputs = network.contract.prepare(images)
    expected = parity.run_onnx(path, inputs)
    measured: dict[str, float] = {}
    if network.reference:
        by_file = network.reference(inputs)  # without what --also joins to them
        own = [expected[0][:, : by_file.shape[1]]]
        measured |= parity.differences("plain ONNX", [by_file], own, "the file")
    with _told(network, "onnx2torch"):
        module = to_module(path)
        outputs = parity.run_module(module, inputs)
    measured |= parity.differences("onnx2torch", expected, outputs)
    if graph is None:
        state = trunk_state(module, network.classifier is not None)
        trunk = to_trunk(module, state)
    else:
        description, state = graph
        trunk = load_graph(description, state, network.source).eval()
        if not any(True for _ in trunk.parameters()):
            raise UserError(
                f"Expected a network with weights, but {network.source} has none up to {network.features}; name a "
                "layer after it by --output."
            )
        if network.classifier:
            weight, bias = network.classifier
            state = state | {_WEIGHT: torch.tensor(weight), _BIAS: torch.tensor(bias)}
    classifier = (state[_WEIGHT], state[_BIAS]) if network.classifier else None
    with _told(network, "a trunk"):
        outputs = parity.run_trunk(trunk, classifier, images)
    measured |= parity.differences("trunk", expected, outputs)
    return state, trunk, measured


@contextmanager
def _told(network: Network, name: str) -> Iterator[None]:
    """Says in one line what onnx2torch or torch can't compute; they raise many kinds."""
    try:
        yield
    except (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"Expected a network that {name} can compute, but for {network.source} it raises {type(error).__name__}: "
            f"{reason}; name a layer before that by --output."
        ) from None
