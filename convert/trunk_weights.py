"""Converts an ONNX model to the trunk's state dict, by onnx2torch and a table of names that is strict both ways."""

import math
from pathlib import Path

import onnx2torch
import timm
import torch
from torch import Tensor, fx, nn

from convert.keras.layout import STAGES
from facecls.errors import UserError
from facecls.model.trunk import CLASSIFIER, VGGFACE2, Trunk

_CONV = ("weight",)
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_LINEAR = ("weight", "bias")
_PARTS = (("1x1_reduce", 1), ("3x3", 2), ("1x1_increase", 3))
"""For each convolution on a block's residual branch: the end of its Keras name, and its number in timm."""


def to_module(model: Path) -> fx.GraphModule:
    """Converts an ONNX file to a torch module.

    Args:
        model: The ONNX file; its weights may be in a file beside it.

    Returns:
        onnx2torch's module in evaluation mode; its submodules have the names of the ONNX nodes.
    """
    module: fx.GraphModule = onnx2torch.convert(model)
    module.eval()  # onnx2torch returns it in training mode
    return module


def norm_table() -> dict[str, str]:
    """The 53 BatchNorms: name in onnx2torch's module -> name in the timm model."""
    table = {"conv1/7x7_s2/bn": "bn1"}
    for here, there, projected in _blocks():
        table |= {f"{here}_{part}/bn": f"{there}.bn{number}" for part, number in _PARTS}
        if projected:
            table[f"{here}_1x1_proj/bn"] = f"{there}.downsample.1"
    return table


def conv_table() -> dict[str, str]:
    """The 53 convolutions: name in onnx2torch's module -> name in the timm model."""
    table = {"conv1/7x7_s2.1": "conv1"}  # .0 is the padding, a module of its own in onnx2torch where it is uneven
    for here, there, projected in _blocks():
        table |= {f"{here}_{part}": f"{there}.conv{number}" for part, number in _PARTS}
        if projected:
            table[f"{here}_1x1_proj"] = f"{there}.downsample.0"
    return table


def tensor_table(classifier: bool) -> dict[str, str]:
    """All tensors: name in onnx2torch's state dict -> name in a trunk file.

    Args:
        classifier: Whether to include the classifier.

    Returns:
        One entry per tensor; names are unique on both sides.
    """
    kinds = [(conv_table(), _CONV), (norm_table(), _NORM), ({CLASSIFIER: CLASSIFIER} if classifier else {}, _LINEAR)]
    return {
        f"{here}.{tensor}": f"{there}.{tensor}"
        for modules, tensors in kinds
        for here, there in modules.items()
        for tensor in tensors
    }


def _blocks() -> list[tuple[str, str, bool]]:
    """For each block, its name in Keras, its name in timm, and whether it has a projection."""
    return [
        (f"conv{stage}_{block}", f"layer{stage - 1}.{block - 1}", block == 1)
        for stage, blocks, _ in STAGES
        for block in range(1, blocks + 1)
    ]


def trunk_state(module: fx.GraphModule, classifier: bool) -> dict[str, Tensor]:
    """Renames the tensors of onnx2torch's module to those of a trunk file.

    The module takes BGR and the trunk RGB: the input channels of the first convolution are reversed here, and nowhere
    else.

    Args:
        module: As returned by ``to_module``.
        classifier: Whether it has the classifier.

    Returns:
        Tensors by their names in a trunk file; all but the first convolution's kernel share memory with the module.

    Raises:
        UserError: If a tensor is missing or left over.
    """
    table = tensor_table(classifier)
    tensors = module.state_dict()
    if odd := table.keys() ^ tensors.keys():
        name = min(odd)
        raise UserError(
            f"Expected the graph of VGGFace2's ResNet-50, but its tensor {name} is "
            f"{'missing' if name in table else 'not known'}; use the file of keras-vggface."
        )
    state = {there: tensors[here] for here, there in table.items()}
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    return state


def to_trunk(module: fx.GraphModule, state: dict[str, Tensor]) -> Trunk:
    """Creates the trunk from converted tensors and checks that its BatchNorms have the same settings.

    Args:
        module: As returned by ``to_module``.
        state: As returned by ``trunk_state``.

    Returns:
        The trunk in evaluation mode; it shares memory with ``state``.

    Raises:
        UserError: If a tensor is missing, left over or of another shape, or a BatchNorm's epsilon or momentum differs.
    """
    with torch.device("meta"):  # initialising 23 million weights at random would take a quarter of a second
        net = timm.create_model(VGGFACE2, num_classes=0)
    trunk = Trunk(net, VGGFACE2)
    own = {name: tensor for name, tensor in state.items() if not name.startswith(f"{CLASSIFIER}.")}
    try:
        trunk.net.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"Expected the tensors of the trunk, but: {error}") from None
    for here, there in norm_table().items():
        _check_norm(here, module.get_submodule(here), trunk.net.get_submodule(there))
    trunk.eval()
    return trunk


def _check_norm(name: str, converted: nn.Module, own: nn.Module) -> None:
    for setting in ("eps", "momentum"):
        # ONNX stores both as float32, and torch's momentum is 1 minus Keras'
        if not math.isclose(getattr(converted, setting), getattr(own, setting), rel_tol=1e-4):
            raise UserError(
                f"Expected BatchNorm {name} to have the {setting} {getattr(own, setting):g}, but it has "
                f"{getattr(converted, setting):g}; use the file of keras-vggface."
            )
