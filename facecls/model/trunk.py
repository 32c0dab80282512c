"""The trunk: RGB faces 0..255 in, features out; the VGGFace2 ResNet-50, any other timm model, or a converted graph.

Its weights come from a *trunk file*: safetensors with the tensors of the model and one metadata key, ``facecls``,
whose value is a JSON object that describes them. One key, because safetensors writes several in random order.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from timm.models import register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from facecls.errors import UserError
from facecls.files import replacing
from facecls.model.checksums import check_finite, digest_of
from facecls.model.graph import GRAPH, GraphNet, create_graph
from facecls.model.timm_trunk import PRETRAINED, create_timm

VGGFACE2 = "vggface2_resnet50"
VGGFACE2_MEAN = (131.0912, 103.8827, 91.4953)
"""RGB, 0..255: what keras-vggface subtracts for its version 2 models (github.com/rcmalli/keras-vggface, utils.py)."""
MIN_SIZE = 64
"""Pixels; below it the last feature map of a ResNet-50 is smaller than 2x2."""
CLASSIFIER = "classifier"
"""Begins the names of a classifier's tensors in a trunk file, ``classifier.weight`` (C, D) and ``classifier.bias``."""
_METADATA_KEY, _DIGEST = "facecls", "sha256"
_PIECE = 16
"""Faces that go through the net at a time on a CPU where nothing is learned; the maps of larger batches don't fit its
caches, and convolutional networks are about half as fast."""


class _StrideFirstBottleneck(Bottleneck):  # type: ignore[misc]
    """A bottleneck with its stride in the first 1x1, as in Caffe's ResNet and VGGFace2's; timm's is in the 3x3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, (1, 1)


@register_model  # type: ignore[untyped-decorator]
def vggface2_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The ResNet-50 of VGGFace2 (Cao et al. 2018) with the geometry of keras-vggface's port, registered with timm.

    It differs from timm's ``resnet50`` in four ways: the first convolution pads as TensorFlow's "same" does (2 before
    and 3 after at even sizes), max pooling does not pad, the stride of a stage sits in its first 1x1 convolution, and
    BatchNorm has epsilon 1e-3 and momentum 0.01 (Keras 0.99).

    Args:
        pretrained: Must be false; timm has no weights for it. They come from a trunk file.
        **kwargs: As for any timm ResNet, such as ``num_classes``.

    Returns:
        The timm model; its input is RGB minus ``VGGFACE2_MEAN``.

    Raises:
        ValueError: If ``pretrained`` is true.
    """
    kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None), kwargs.pop("cache_dir", None)
    if pretrained:
        raise ValueError("timm has no weights for vggface2_resnet50; convert them and load the trunk file.")
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    net = ResNet(_StrideFirstBottleneck, (3, 4, 6, 3), norm_layer=norm, **kwargs)
    net.conv1 = Conv2dSame(3, 64, 7, stride=2, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.MaxPool2d(3, stride=2)
    net.pretrained_cfg = net.default_cfg = {
        "architecture": VGGFACE2,
        "input_size": (3, 224, 224),
        "mean": tuple(value / 255 for value in VGGFACE2_MEAN),
        "std": (1 / 255,) * 3,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return net


class Trunk(nn.Module):
    """A timm model without its classifier, or a graph, behind one input contract.

    Attributes:
        net: The model.
        name: Its timm name, or ``graph``.
        features: Length D of the feature vectors.
        fixed_size: The only side of images in pixels that it takes; ``None`` if it takes any from ``least_size`` on.
        least_size: 64, or less if it was trained at less.
        mean: (1, 3, 1, 1) float, in units of 0..255.
        std: (1, 3, 1, 1) float, in units of 0..255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.features: int = net.head_hidden_size  # type: ignore[assignment]
        self.fixed_size: int | None = getattr(net, "fixed_size", None)
        config: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
        self.least_size: int = min(MIN_SIZE, config.get("input_size", (3, MIN_SIZE))[-1])
        for key in ("mean", "std"):
            values = [255 * value for value in config[key]]
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Computes features.

        Args:
            images: (N, 3, H, W) RGB, 0..255, uint8 or float, H and W at least ``least_size``, or ``fixed_size``.

        Returns:
            (N, D) float features after global pooling.

        Raises:
            ValueError: If shape or range are wrong.
        """
        _check(images, self.fixed_size, self.least_size)
        if images.device.type == "cpu" and not (self.training or torch.is_grad_enabled() or _is_exported()):
            return torch.cat([self._features(piece) for piece in torch.split(images, _PIECE)])  # (N, D)
        return self._features(images)

    def _features(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.dtype) - self.mean) / self.std  # (N, 3, H, W); before any zero padding
        features: Tensor = self.net(x)
        return features  # (N, D)


def _is_exported() -> bool:
    """Whether torch is tracing a graph, for ONNX or its own compiler, in which a batch is whole."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _check(images: Tensor, fixed_size: int | None, least_size: int) -> None:
    sizes = tuple(images.shape[2:])
    fits = sizes == (fixed_size, fixed_size) if fixed_size else min(sizes, default=0) >= least_size
    if images.ndim != 4 or images.shape[1] != 3 or not fits:
        wanted = f"H and W {fixed_size}" if fixed_size else f"H and W at least {least_size}"
        raise ValueError(f"Expected images of shape (N, 3, H, W) with {wanted}, but got {tuple(images.shape)}.")
    # batches come as uint8, whose range needs no check; reading values back would make a GPU wait
    if images.is_floating_point() and not _is_exported():
        top = images.max().item() if images.numel() else 255.0
        if top <= 1:
            raise ValueError(
                f"Expected images with values 0..255, but got floats up to {top:g}, which look like 0..1; "
                "multiply them by 255 and don't normalise: the trunk does."
            )


def create_trunk(
    name: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    graph: Mapping[str, Any] | None = None,
) -> Trunk:
    """Creates a trunk.

    Args:
        name: Name of a timm model, of which ``vggface2_resnet50`` is ours, or ``graph``.
        weights: Trunk file to load; ``pretrained`` for timm's own weights; ``None`` for random ones.
        image_size: Side of the images in pixels; ``None`` for what the network was trained at.
        graph: Description of a graph whose weights are loaded later, as from a checkpoint.

    Returns:
        The trunk, in training mode.

    Raises:
        UserError: If timm does not know the name, or the weights are missing or for another architecture, or images of
            that size can't be taken.
    """
    if name == GRAPH:
        trunk = _create_graph(weights, graph)
    else:
        trunk = Trunk(create_timm(name, weights == PRETRAINED, image_size), name)
        if weights not in (None, PRETRAINED):
            _load_timm(trunk, Path(weights))
    if trunk.fixed_size is not None and image_size not in (None, trunk.fixed_size):
        raise UserError(
            f"Expected data.image_size {trunk.fixed_size}, the only one of this trunk, but got {image_size}."
        )
    if isinstance(trunk.net, GraphNet):
        _check_size(trunk.net, image_size or trunk.net.description["input"]["size"])
    return trunk


def _check_size(net: GraphNet, size: int) -> None:
    """Refuses images that are too small for a graph, which says nowhere how small they may be, and other features."""
    with torch.device("meta"):
        try:
            features = GraphNet(net.description).eval()(torch.empty(1, 3, size, size))
            if features.shape != (1, net.head_hidden_size):
                raise ValueError(f"it makes features of shape {(*features.shape,)}, not (1, {net.head_hidden_size})")
        except Exception as error:  # over what a file says, torch raises any kind
            raise UserError(
                f"Expected data.image_size of at least {net.pretrained_cfg['input_size'][1]} or so, at which the trunk "
                f"was trained, but with {size} it can't compute: {str(error).partition(chr(10))[0]}"
            ) from None


def _load_timm(trunk: Trunk, weights: Path) -> None:
    state, metadata = read_trunk(weights)
    if metadata["architecture"] != trunk.name:
        raise UserError(
            f"Expected weights of {trunk.name}, but {weights} holds {metadata['architecture']}; "
            "name another file or set model.trunk to match."
        )
    _load(trunk.net, state, weights)


def _create_graph(weights: str | Path | None, graph: Mapping[str, Any] | None) -> Trunk:
    if weights is None:
        if graph is None:
            raise UserError(
                f"Expected model.weights with model.trunk {GRAPH}, since the trunk file says what the network is; name "
                "one that `python -m convert` wrote."
            )
        return Trunk(create_graph(graph), GRAPH)
    state, metadata = read_trunk(Path(weights))
    if metadata["architecture"] != GRAPH:
        raise UserError(
            f"Expected a trunk file with a graph, but {weights} holds {metadata['architecture']}; set model.trunk to "
            "match, or name another file."
        )
    return load_graph(metadata.get(GRAPH, {}), state, weights)


def load_graph(description: Mapping[str, Any], state: dict[str, Tensor], source: str | Path) -> Trunk:
    """Creates a trunk from the description of a graph and its tensors, without copying them.

    Args:
        description: As in facecls/model/graph.py.
        state: The tensors by name; those of a classifier are ignored.
        source: The file they come from, for messages.

    Returns:
        The trunk, in training mode.

    Raises:
        UserError: If the description can't be understood or the tensors don't fit it.
    """
    with torch.device("meta"):
        net = GraphNet(description)
    _load(net, state, source, assign=True)
    return Trunk(net, GRAPH)


def _load(net: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    wanted = net.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{CLASSIFIER}.")} | {
        name: tensor for name, tensor in state.items() if name in wanted
    }
    wrong = sorted(
        [f"{name} is missing" for name in wanted.keys() - state.keys()]
        + [f"{name} is not part of the trunk" for name in state.keys() - wanted.keys()]
        + [
            f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in wanted.keys() & state.keys()
            if state[name].shape != wanted[name].shape
        ]
    )
    if wrong:
        raise UserError(f"{source} does not fit the trunk: {wrong[0]} ({len(wrong)} such tensors); convert it again.")
    # the weights on the meta device have no memory to copy to
    net.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in state.items()}, assign=assign)


def read_trunk(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a trunk file.

    Args:
        path: The safetensors file.

    Returns:
        Its tensors by name, and its metadata.

    Raises:
        UserError: If the file is missing or not a trunk file.
    """
    if not path.is_file():
        raise UserError(
            f"Expected a trunk file at {path}, but there is none; convert a network with `python -m convert FILE "
            f"{path}` (for FILE see `python -m facecls.download weights`, vgg2_mobilenet or farl), get ImageNet's with "
            "`python -m facecls.download imagenet`, or set --model.weights null for random weights."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
            if not isinstance(metadata, dict) or not isinstance(metadata.get("architecture"), str):
                raise KeyError("architecture")
            state, digest = {name: file.get_tensor(name) for name in sorted(file.keys())}, metadata.pop(_DIGEST, None)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OSError):
        raise UserError(
            f"Expected a trunk file, but {path} is none; make one with `python -m convert` or "
            "`python -m facecls.download imagenet`."
        ) from None
    if digest is not None and digest != digest_of(state):
        raise UserError(f"Expected {path} as it was written, but its tensors are damaged; get or convert it again.")
    check_finite(state, path)
    return state, metadata


def save_trunk(dest: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a trunk file, reads it back and compares it bit for bit before it takes its name.

    Args:
        dest: The safetensors file to create or replace.
        state: Tensors by name.
        metadata: Describes them; at least ``architecture``. The same arguments give the same bytes.

    Raises:
        UserError: If it can't be written, or reading it back gives something else.
    """
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    with replacing(dest) as part:
        try:
            kept = json.dumps({**metadata, _DIGEST: digest_of(state)}, sort_keys=True)
            save_file(state, part, {_METADATA_KEY: kept})
        except SafetensorError as error:  # the safetensors library reports a full disk with its own exception
            raise OSError(str(error)) from None
        back, told = read_trunk(part)
        if told != json.loads(json.dumps(metadata)) or not _equal(state, back):
            raise UserError(f"What was written to {dest} reads back differently; is the disk sound?")


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8))
        for name, tensor in one.items()
    )
