"""What a reader makes of a source file: a plain ONNX model, its input contract, and what to tell about it.

A *plain* ONNX model is one that onnx2torch and ``graph_trunk`` can both convert: opset 17, float32, one input
``images`` (N, 3, S, S) with a free batch, channels first, explicit padding, every constant an initializer, and no
operators but ``PLAIN_OPERATORS``. Readers bring every source to this form; everything after them knows no other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from facecls.errors import UserError

INPUT = "images"
OPSET = 17
"""The newest that onnx2torch 1.5.15 supports."""
IR_VERSION = 8
"""The one that belongs to opset 17."""
PLAIN_OPERATORS = frozenset(
    {
        "Conv",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LRN",
        "Gemm",
        "MatMul",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softplus",
        "Softsign",
        "Softmax",
        "LogSoftmax",
        "Erf",
        "Exp",
        "Log",
        "Sqrt",
        "Reciprocal",
        "Abs",
        "Neg",
        "Pow",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Min",
        "Max",
        "Mean",
        "Sum",
        "Concat",
        "Slice",
        "Pad",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Tile",
        "Gather",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceL2",
        "ReduceSumSquare",
        "Resize",
        "DepthToSpace",
    }
)
MAX_WORK = 2**39
"""Multiplications for one image; VGG16 at 1,024 pixels takes 320 thousand million."""
MAX_ELEMENTS = 2**28
"""Of any tensor that a network computes for one image; VGG16 at 224 pixels has at most 3.2 million."""
MAX_WEIGHTS = 2**31
"""Bytes of all weights in float32; VGG16 with its classifier has 580 million."""


@dataclass(frozen=True)
class Contract:
    """How a network takes its images.

    Attributes:
        size: Height and width in pixels.
        channels: Order of the channels.
        mean: What is subtracted from pixels 0..255, by channel in that order.
        std: What they are divided by afterwards.
    """

    size: int
    channels: Literal["rgb", "bgr"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turns (N, 3, H, W) uint8 RGB into the float32 input of the network."""
        ordered = images if self.channels == "rgb" else images[:, ::-1]
        mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (self.mean, self.std))
        prepared: NDArray[np.float32] = (ordered.astype(np.float32) - mean) / std
        return prepared


@dataclass(frozen=True)
class Asked:
    """What the user said about the network; ``None`` where nothing.

    Attributes:
        size: Height and width in pixels.
        channels: Order of the channels.
        mean: As in ``Contract``.
        std: As in ``Contract``.
        output: Name of the layer or value whose output is the features.
        also: Names of layers or values before it whose averages are joined to the features.
        keep_classifier: Whether to keep the classifier.
    """

    size: int | None = None
    channels: Literal["rgb", "bgr"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    output: str | None = None
    also: tuple[str, ...] = ()
    keep_classifier: bool = False


@dataclass(frozen=True)
class Network:
    """A network, read from a file.

    Attributes:
        model: The plain ONNX model; its first output is the features, of any rank, its second, if there is one, the
            probabilities of the classifier.
        contract: How it takes images.
        source: The file.
        sha256: SHA-256 of its bytes, in hexadecimal.
        layout: ``vggface2_resnet50`` for that network, whose weights get timm's names; ``graph`` for any other.
        features: Name in the file of the layer or value whose output is the features.
        left_out: Names in the file of the layers after it that are not converted.
        summary: What the screen says about the file: label -> text.
        classifier: Kernel (C, D) and bias (C,) of the classifier; ``None`` if it is not kept.
        reference: Computes features from the network's input, (N, 3, S, S) float32, by the source file itself, where
            ONNX Runtime can run it; ``None`` where only the plain model can be run.
    """

    model: onnx.ModelProto
    contract: Contract
    source: Path
    sha256: str
    layout: Literal["vggface2_resnet50", "graph"]
    features: str
    left_out: tuple[str, ...]
    summary: Mapping[str, str]
    classifier: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    reference: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = field(default=None, compare=False)


def check_size(what: str, shape: Sequence[int]) -> None:
    """Refuses a tensor that no face network needs, before memory is taken for it.

    Args:
        what: What the tensor is, for the message, such as ``the output of layer conv1``.
        shape: Its shape, without the batch.

    Raises:
        UserError: If a dimension is below 1 or the tensor is too large.
    """
    if any(size < 1 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise UserError(
            f"Expected tensors of 1 to {MAX_ELEMENTS:,} elements, but {what} has the shape {tuple(shape)}; "
            "is the file damaged, or the input size wrong?"
        )
