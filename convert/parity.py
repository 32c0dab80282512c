"""Compares ONNX Runtime, onnx2torch's module and the trunk on the same seeded images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from convert.layout import CLASSIFIER, SIZE
from convert.onnx_graph import BGR_MEAN, FEATURES, INPUT, PROBABILITIES
from facecls.errors import UserError
from facecls.model.trunk import Trunk

LIMIT = 1e-5
"""Largest difference accepted, of features relative to the largest one, and of probabilities: about a hundred rounding
errors of float32. Padding on the wrong side makes 3e-2."""
IMAGES, SEED = 2, 0

_PATCH = 28  # pixels; divides 224

Outputs = list[NDArray[np.float32]]
"""Features (N, 2048) and, with a classifier, class probabilities (N, 8631)."""


def seeded_images() -> NDArray[np.uint8]:
    """The inputs: coloured patches with noise on them, so that both coarse and fine mistakes show.

    Returns:
        (IMAGES, 3, 224, 224) uint8 RGB, always the same.
    """
    random = np.random.default_rng(SEED)
    patches = random.integers(0, 192, (IMAGES, 3, SIZE // _PATCH, SIZE // _PATCH), np.uint8)
    noise = random.integers(0, 64, (IMAGES, 3, SIZE, SIZE), np.uint8)
    images: NDArray[np.uint8] = patches.repeat(_PATCH, 2).repeat(_PATCH, 3) + noise
    return images


def keras_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turns (N, 3, H, W) uint8 RGB into the input of the Keras and the ONNX model: float32 BGR minus the mean."""
    centred: NDArray[np.float32] = images[:, ::-1] - np.array(BGR_MEAN, np.float32).reshape(3, 1, 1)
    return centred


def run_onnx(model: Path, images: NDArray[np.uint8]) -> Outputs:
    """Runs an ONNX file with ONNX Runtime, without graph optimisations such as fusing nodes.

    Args:
        model: The ONNX file.
        images: (N, 3, 224, 224) uint8 RGB.

    Returns:
        Its outputs.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # as in _one_thread
    options.enable_cpu_mem_arena = False  # it would keep the memory for a second run
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs: Outputs = session.run(
        [name for name in (FEATURES, PROBABILITIES) if name in names], {INPUT: keras_input(images)}
    )
    return outputs


def run_module(module: fx.GraphModule, images: NDArray[np.uint8]) -> Outputs:
    """Runs onnx2torch's module on (N, 3, 224, 224) uint8 RGB."""
    with torch.inference_mode(), _one_thread():
        outputs = module(torch.from_numpy(keras_input(images)))
    return [output.numpy() for output in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def run_trunk(trunk: Trunk, state: dict[str, Tensor], images: NDArray[np.uint8]) -> Outputs:
    """Runs the trunk, and the classifier if ``state`` has one, on (N, 3, 224, 224) uint8 RGB."""
    with torch.inference_mode(), _one_thread():
        features = trunk(torch.from_numpy(images))
        outputs = [features]
        if f"{CLASSIFIER}.weight" in state:
            outputs.append(F.linear(features, state[f"{CLASSIFIER}.weight"], state[f"{CLASSIFIER}.bias"]).softmax(1))
    return [output.numpy() for output in outputs]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes on one thread: two images take half a second, but ten times that when threads wait for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def differences(name: str, reference: Sequence[NDArray[np.float32]], outputs: Outputs) -> dict[str, float]:
    """Measures how far outputs differ from those of ONNX Runtime.

    Args:
        name: Name of the model whose outputs are compared.
        reference: ONNX Runtime's outputs.
        outputs: The model's outputs, in the same order.

    Returns:
        The largest difference by output: of features relative to the largest one, of probabilities absolute, since
        rounding a logit of 20 already changes a probability by a millionth of itself.

    Raises:
        UserError: If a difference is above ``LIMIT`` or NaN.
    """
    measured = {}
    for output, expected, actual in zip((FEATURES, PROBABILITIES), reference, outputs, strict=False):
        scale = np.abs(expected).max() if output == FEATURES else 1.0
        with np.errstate(invalid="ignore"):  # the result is NaN, and is refused
            difference = float(np.abs(expected - actual).max() / scale)
        if not difference <= LIMIT:
            raise UserError(
                f"Expected the {output} of {name} within {LIMIT:g} of ONNX Runtime's, but they differ by "
                f"{difference:.1e}; nothing was written. Use the unchanged file of keras-vggface."
            )
        measured[f"{name} {output}"] = difference
    return measured


def bound(difference: float) -> float:
    """Rounds a difference up to a power of ten, at least 1e-6, since its exact value depends on the processor.

    Args:
        difference: The difference, 0 or more.

    Returns:
        An upper bound.

    Examples:
        >>> bound(3.7e-7), bound(1.2e-6)
        (1e-06, 1e-05)
    """
    return max(1e-6, float(f"1e{math.ceil(math.log10(difference))}")) if difference else 1e-6
