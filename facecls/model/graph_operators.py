"""ONNX operators as torch modules, for trunks whose trunk file describes their graph.

Names, settings and their defaults are those of ONNX' operators at opset 17 (onnx.ai/onnx/operators); an input that is
constant, such as the shape of ``Reshape``, is a setting under its formal name. Tensors have the names and layouts of
torch's own layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Settings = Mapping[str, Any]
Shapes = Mapping[str, Sequence[int]]
"""Shapes of an operator's tensors, by name."""


def create_operator(kind: str, settings: Settings, shapes: Shapes) -> nn.Module:
    """Creates the module of an operator, with tensors that are yet to be loaded.

    Args:
        kind: Name of the operator, such as ``Conv``.
        settings: Its attributes and constant inputs; ``in_place`` if an activation may overwrite its input.
        shapes: Shapes of its tensors.

    Returns:
        A module that takes the operator's other inputs.

    Raises:
        KeyError: If the operator is not known, or a setting is missing.
        ValueError: If torch has no equivalent of a setting.
    """
    if kind in _LAYERS:
        return _LAYERS[kind](settings, shapes)
    return _Function(_FUNCTIONS[kind](settings))


def is_known(kind: str) -> bool:
    """Whether there is an operator of that name."""
    return kind in _LAYERS or kind in _FUNCTIONS


class _Function(nn.Module):
    """An operator without tensors."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


# Operators with tensors


class _PadFirst(nn.Module):
    """Pads with zeros before the layer that is its other base class, whose own padding is the same on both sides.

    Attributes:
        before: As for ``F.pad``.
    """

    before: list[int]

    def forward(self, x: Tensor) -> Tensor:
        padded: Tensor = super().forward(F.pad(x, self.before))
        return padded


class _PaddedConv1d(_PadFirst, nn.Conv1d):
    pass


class _PaddedConv2d(_PadFirst, nn.Conv2d):
    pass


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {1: (nn.Conv1d, _PaddedConv1d), 2: (nn.Conv2d, _PaddedConv2d)}
"""By spatial dimensions: with padding that is the same on both sides, and with any."""


def _conv(settings: Settings, shapes: Shapes) -> nn.Module:
    filters, channels, *kernel = shapes["weight"]
    groups = settings.get("group", 1)
    starts, ends = _pads(settings, len(kernel))
    plain, padded = _CONVOLUTIONS[len(kernel)]
    layer: nn.Module = (plain if starts == ends else padded)(
        channels * groups,
        filters,
        tuple(kernel),
        stride=tuple(settings.get("strides", [1] * len(kernel))),
        padding=tuple(starts) if starts == ends else 0,
        dilation=tuple(settings.get("dilations", [1] * len(kernel))),
        groups=groups,
        bias="bias" in shapes,
    )
    if isinstance(layer, _PadFirst):
        layer.before = _torch_pads(starts, ends)
    return layer


def _pads(settings: Settings, dimensions: int) -> tuple[list[int], list[int]]:
    pads = list(settings.get("pads", [0] * 2 * dimensions))
    return pads[:dimensions], pads[dimensions:]


def _torch_pads(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """``F.pad`` begins with the last dimension."""
    return [pad for pair in zip(reversed(starts), reversed(ends), strict=True) for pad in pair]


def _linear(settings: Settings, shapes: Shapes) -> nn.Module:
    filters, channels = shapes["weight"]
    return nn.Linear(channels, filters, bias="bias" in shapes)


def _batch_norm(settings: Settings, shapes: Shapes) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[settings["rank"]]
    momentum = 1 - settings.get("momentum", 0.9)  # of the old value in ONNX, of the new one in torch
    return kind(shapes["weight"][0], eps=settings.get("epsilon", 1e-5), momentum=momentum)


class ScaleAndShift(nn.Module):
    """What a BatchNorm is whose statistics were folded into its weight and bias."""

    def __init__(self, settings: Settings, shapes: Shapes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shapes["weight"]))
        self.bias = nn.Parameter(torch.empty(shapes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        """Scales and shifts (N, C, ...) by channel."""
        # as a normalisation that changes nothing else: one pass forward and back, in the precision of x
        zero, one = torch.zeros_like(self.bias), torch.ones_like(self.bias)
        return F.batch_norm(x, zero, one, self.weight, self.bias, eps=0.0)


class _LayerNorm(nn.Module):
    def __init__(self, settings: Settings, shapes: Shapes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shapes["weight"]))
        self.bias = nn.Parameter(torch.empty(shapes["bias"])) if "bias" in shapes else None
        self.epsilon = settings.get("epsilon", 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class _InstanceNorm(nn.Module):
    def __init__(self, settings: Settings, shapes: Shapes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shapes["weight"]))
        self.bias = nn.Parameter(torch.empty(shapes["bias"]))
        self.epsilon = settings.get("epsilon", 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.epsilon)


class Constant(nn.Module):
    """A constant that another operator reads; it is not trained."""

    value: Tensor

    def __init__(self, settings: Settings, shapes: Shapes) -> None:
        super().__init__()
        self.register_buffer("value", torch.empty(shapes["value"]))

    def forward(self) -> Tensor:
        """Returns the constant."""
        return self.value


_LAYERS: dict[str, Callable[[Settings, Shapes], nn.Module]] = {
    "Conv": _conv,
    "Gemm": _linear,
    "MatMul": lambda settings, shapes: _linear(settings, shapes) if shapes else _Function(torch.matmul),
    "PRelu": lambda settings, shapes: nn.PReLU(shapes["weight"][0]),
    "BatchNormalization": _batch_norm,
    "ScaleAndShift": ScaleAndShift,
    "LayerNormalization": _LayerNorm,
    "InstanceNormalization": _InstanceNorm,
    "Constant": Constant,
}


# Operators without


def _plain(function: Callable[..., Tensor]) -> Callable[[Settings], Callable[..., Tensor]]:
    """An operator without settings."""
    return lambda settings: function


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Settings], Callable[..., Tensor]]:
    """An operator of any number of inputs."""
    return lambda settings: lambda *inputs: reduce(function, inputs)


def _reduction(function: Callable[..., Tensor]) -> Callable[[Settings], Callable[..., Tensor]]:
    """A reduction over axes."""
    return lambda settings: (
        lambda x: function(x, dim=tuple(settings["axes"]), keepdim=bool(settings.get("keepdims", 1)))
    )


def _max_pool(settings: Settings) -> Callable[..., Tensor]:
    kernel, (starts, ends) = settings["kernel_shape"], _pads(settings, 2)
    stride, dilation = settings.get("strides", [1, 1]), settings.get("dilations", [1, 1])
    if starts == ends:
        return lambda x: F.max_pool2d(x, kernel, stride, starts, dilation)
    pads = _torch_pads(starts, ends)
    return lambda x: F.max_pool2d(F.pad(x, pads, value=-math.inf), kernel, stride, 0, dilation)


def _average_pool(settings: Settings) -> Callable[..., Tensor]:
    kernel, (starts, ends) = settings["kernel_shape"], _pads(settings, 2)
    stride, with_padding = settings.get("strides", [1, 1]), bool(settings.get("count_include_pad", 0))
    ceil = bool(settings.get("ceil_mode", 0))
    if starts != ends:
        raise ValueError(f"average pooling pads {starts} before and {ends} after")
    return lambda x: F.avg_pool2d(x, kernel, stride, starts, ceil, with_padding)


def _relu(settings: Settings) -> Callable[..., Tensor]:
    return F.relu_ if settings.get("in_place") else F.relu


def _clip(settings: Settings) -> Callable[..., Tensor]:
    low, high = settings.get("min"), settings.get("max")
    if low is None or high is None:
        return lambda x: x.clamp(low, high)
    return lambda x: F.hardtanh(x, low, high, inplace=bool(settings.get("in_place")))


def _reshape(settings: Settings) -> Callable[..., Tensor]:
    shape = settings["shape"]
    return lambda x: x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def _flatten(settings: Settings) -> Callable[..., Tensor]:
    if settings.get("axis", 1) != 1:
        raise ValueError(f"it flattens from axis {settings['axis']}")
    return lambda x: x.flatten(1)


def _squeeze(settings: Settings) -> Callable[..., Tensor]:
    axes = tuple(settings["axes"])
    return lambda x: x.squeeze(axes)


def _unsqueeze(settings: Settings) -> Callable[..., Tensor]:
    axes = settings["axes"]  # from the front, in order
    return lambda x: reduce(Tensor.unsqueeze, axes, x)


def _transpose(settings: Settings) -> Callable[..., Tensor]:
    order = settings["perm"]
    return lambda x: x.permute(order)


def _expand(settings: Settings) -> Callable[..., Tensor]:
    shape = settings["shape"]
    return lambda x: x + x.new_zeros(shape)


def _tile(settings: Settings) -> Callable[..., Tensor]:
    repeats = settings["repeats"]
    return lambda x: x.repeat(repeats)


def _gather(settings: Settings) -> Callable[..., Tensor]:
    axis, indices = settings.get("axis", 0), settings["indices"]
    if isinstance(indices, int):
        return lambda x: x.select(axis, indices)
    if not all(isinstance(index, int) for index in indices):
        raise ValueError("it gathers by a table of indices")
    return lambda x: torch.stack([x.select(axis, index) for index in indices], axis)


def _slice(settings: Settings) -> Callable[..., Tensor]:
    starts, ends = settings["starts"], settings["ends"]
    axes = settings.get("axes", list(range(len(starts))))
    steps = settings.get("steps", [1] * len(starts))
    flipped = [axis for axis, step in zip(axes, steps, strict=True) if step < 0]
    if any(step < 0 and (step, start) != (-1, -1) for step, start in zip(steps, starts, strict=True)) or any(
        step < 0 and end > -(2**31) for step, end in zip(steps, ends, strict=True)
    ):
        raise ValueError("it reads part of an axis backwards")
    parts = [part for part in zip(axes, starts, ends, steps, strict=True) if part[3] > 0]

    def function(x: Tensor) -> Tensor:
        for axis, start, end, step in parts:
            whole: list[slice] = [slice(None)] * x.ndim
            whole[axis] = slice(start, end, step)
            x = x[tuple(whole)]
        return x.flip(flipped) if flipped else x

    return function


def _pad(settings: Settings) -> Callable[..., Tensor]:
    pads = settings["pads"]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[settings.get("mode", "constant")]
    half = len(pads) // 2
    torch_pads = _torch_pads(pads[:half], pads[half:])
    if mode != "constant":
        if any(torch_pads[4:]):
            raise ValueError(f"it pads more than height and width by {settings['mode']}")
        return lambda x: F.pad(x, torch_pads[:4], mode)
    return lambda x: F.pad(x, torch_pads, mode, settings.get("constant_value", 0.0))


def _resize(settings: Settings) -> Callable[..., Tensor]:
    mode = settings.get("mode", "nearest")
    alignment = settings.get("coordinate_transformation_mode", "half_pixel")
    scales = settings["scales"][2:]
    if mode == "nearest":
        return lambda x: F.interpolate(x, scale_factor=scales, mode="nearest")
    if mode != "linear" or alignment not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"it resizes by {mode} with {alignment}")
    corners = alignment == "align_corners"
    return lambda x: F.interpolate(x, scale_factor=scales, mode="bilinear", align_corners=corners)


def _local_response_norm(settings: Settings) -> Callable[..., Tensor]:
    alpha, beta, bias = settings.get("alpha", 1e-4), settings.get("beta", 0.75), settings.get("bias", 1.0)
    return lambda x: F.local_response_norm(x, settings["size"], alpha, beta, bias)


def _depth_to_space(settings: Settings) -> Callable[..., Tensor]:
    block = settings["blocksize"]
    if settings.get("mode", "DCR") != "CRD":
        raise ValueError("it has the blocks before the channels")
    return lambda x: F.pixel_shuffle(x, block)


_FUNCTIONS: dict[str, Callable[[Settings], Callable[..., Tensor]]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "AveragePool": _average_pool,
    "Celu": lambda s: lambda x: F.celu(x, s.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda s: lambda *inputs: torch.cat(inputs, s["axis"]),
    "DepthToSpace": _depth_to_space,
    "Div": _plain(torch.div),
    "Elu": lambda s: lambda x: F.elu(x, s.get("alpha", 1.0)),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GlobalAveragePool": _plain(lambda x: x.mean((2, 3), keepdim=True)),
    "HardSigmoid": lambda s: lambda x: (s.get("alpha", 0.2) * x + s.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _plain(F.hardswish),
    "LRN": _local_response_norm,
    "LeakyRelu": lambda s: lambda x: F.leaky_relu(x, s.get("alpha", 0.01)),
    "Log": _plain(torch.log),
    "LogSoftmax": lambda s: lambda x: x.log_softmax(s.get("axis", -1)),
    "Max": _many(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _plain(lambda *inputs: reduce(torch.add, inputs) / len(inputs)),
    "Min": _many(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Pad": _pad,
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": _reduction(torch.linalg.vector_norm),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(lambda x, dim, keepdim: x.square().sum(dim, keepdim)),
    "Relu": _relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _plain(torch.selu),
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda s: lambda x: x.softmax(s.get("axis", -1)),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _many(torch.add),
    "Tanh": _plain(torch.tanh),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
