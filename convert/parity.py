"""Compares ONNX Runtime, onnx2torch's module and the trunk on the same seeded images."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from convert.finish import FEATURES, PROBABILITIES
from convert.plain.network import INPUT
from facecls.errors import UserError
from facecls.model.trunk import Trunk

LIMIT = 1e-5
"""Largest difference accepted, of features relative to the largest one, and of probabilities: about a hundred rounding
errors of float32. Padding on the wrong side makes 3e-2."""
IMAGES, SEED = 2, 0

_PATCHES = 8
"""In each direction; 28 pixels wide at 224."""

Outputs = list[NDArray[np.float32]]
"""Features (N, D) and, with a classifier, class probabilities (N, C)."""


def seeded_images(size: int) -> NDArray[np.uint8]:
    """The inputs: coloured patches with noise on them, so that both coarse and fine mistakes show.

    Args:
        size: Height and width in pixels.

    Returns:
        (IMAGES, 3, size, size) uint8 RGB, always the same.
    """
    random = np.random.default_rng(SEED)
    patches = random.integers(0, 192, (IMAGES, 3, _PATCHES, _PATCHES), np.uint8)
    noise = random.integers(0, 64, (IMAGES, 3, size, size), np.uint8)
    wide = -(-size // _PATCHES)
    images: NDArray[np.uint8] = patches.repeat(wide, 2).repeat(wide, 3)[:, :, :size, :size] + noise
    return images


def run_onnx(model: Path, inputs: NDArray[np.float32]) -> Outputs:
    """Runs an ONNX file with ONNX Runtime, without graph optimisations such as fusing nodes.

    Args:
        model: The ONNX file.
        inputs: (N, 3, S, S) float32, as the network takes them.

    Returns:
        Its outputs.

    Raises:
        UserError: If ONNX Runtime can't run it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # as in _one_thread
    options.enable_cpu_mem_arena = False  # it would keep the memory for a second run
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        names = [output.name for output in session.get_outputs()]
        outputs: Outputs = session.run([name for name in (FEATURES, PROBABILITIES) if name in names], {INPUT: inputs})
    except Exception as error:  # ONNX Runtime raises exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"Expected a network that ONNX Runtime can run, but: {reason}") from None
    return outputs


def run_module(module: fx.GraphModule, inputs: NDArray[np.float32]) -> Outputs:
    """Runs onnx2torch's module on (N, 3, S, S) float32, as the network takes them."""
    with torch.inference_mode(), _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # onnx2torch slices by lists, which torch warns of
        outputs = module(torch.from_numpy(inputs))
    return [output.numpy() for output in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def run_trunk(trunk: Trunk, classifier: tuple[Tensor, Tensor] | None, images: NDArray[np.uint8]) -> Outputs:
    """Runs the trunk, and a classifier's weight (C, D) and bias (C,) if there is one, on (N, 3, S, S) uint8 RGB."""
    with torch.inference_mode(), _one_thread():
        features = trunk(torch.from_numpy(images))
        outputs = [features]
        if classifier:
            outputs.append(F.linear(features, *classifier).softmax(1))
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


def differences(
    name: str, reference: Sequence[NDArray[np.float32]], outputs: Outputs, other: str = "ONNX Runtime"
) -> dict[str, float]:
    """Measures how far outputs differ from those of a reference.

    Args:
        name: Name of the model whose outputs are compared.
        reference: The reference's outputs.
        outputs: The model's outputs, in the same order.
        other: Name of the reference, for the message.

    Returns:
        The largest difference by output: of features relative to the largest one, of probabilities absolute, since
        rounding a logit of 20 already changes a probability by a millionth of itself.

    Raises:
        UserError: If a difference is above ``LIMIT`` or NaN, or the features say nothing, being all the same.
    """
    measured = {}
    for output, expected, actual in zip((FEATURES, PROBABILITIES), reference, outputs, strict=False):
        if expected.shape != actual.shape:
            raise UserError(
                f"Expected {output} of shape {expected.shape}, as {other}'s, but those of {name} are {actual.shape}; "
                "nothing was written."
            )
        if output == FEATURES and (expected == expected[:1]).all():
            raise UserError(
                "Expected features that differ between images, but they are all the same; nothing was written. Are "
                "the weights those that were trained, and is --output a layer that sees the image?"
            )
        scale = np.abs(expected).max() if output == FEATURES else 1.0
        with np.errstate(invalid="ignore"):  # the result is NaN, and is refused
            difference = float(np.abs(expected - actual).max() / scale)
        if not difference <= LIMIT:
            raise UserError(
                f"Expected the {output} of {name} within {LIMIT:g} of {other}'s, but they differ by "
                f"{difference:.1e}; nothing was written. Are the file and the way its images are prepared as published?"
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
