"""Opens trained models, and runs models and trunks on a CPU by the faster of torch and ONNX Runtime."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from facecls.errors import UserError
from facecls.model.agreement import TOLERANCE, differences, relative_difference
from facecls.model.checkpoint import Checkpoint, read_checkpoint
from facecls.model.module import FaceModule
from facecls.model.predictor import Device, Estimates, OnnxPredictor, OnnxTrunk, Predictor, TorchPredictor
from facecls.model.trunk import Trunk
from facecls.model.views import Tta

T = TypeVar("T")
Engine = Literal["auto", "torch", "onnx"]
"""What runs a checkpoint; ``auto`` for the faster on a CPU."""
OPSET = 18
"""Of the graphs that are run here: the first that torch's exporter writes."""
_PATIENCE = 30.0
"""Seconds of work after which ONNX Runtime is tried, or for which: less would save less than its export costs."""
_TRIALS = 2
"""How often each of what is compared runs."""


class FastestPredictor(TorchPredictor):
    """The model of a checkpoint on a CPU, by torch until ONNX Runtime turns out to be faster.

    Args:
        checkpoint: The checkpoint.
        tta: Over which views to average.
        patience: Seconds of work after which ONNX Runtime is tried; ``None`` to take it at once, even if it is slower.

    Attributes:
        engine: What runs the model now.

    Raises:
        UserError: If ONNX Runtime is to be taken at once, but can't run the model.
    """

    def __init__(self, checkpoint: Checkpoint, tta: Tta, patience: float | None) -> None:
        super().__init__(checkpoint, torch.device("cpu"), tta)
        self.engine = super().engine
        self._module: FaceModule | None = checkpoint.module  # as long as ONNX Runtime may be tried
        self._patience = math.inf if patience is None else patience
        self._spent = 0.0
        self._forced = _exported(checkpoint.module, tta) if patience is None else None
        self._taken: OnnxPredictor | None = None

    def estimate(self, images: Tensor) -> Estimates:
        """As ``Predictor.estimate``.

        Raises:
            UserError: If ONNX Runtime is to be taken at once, but does not agree with torch.
        """
        if self._taken is not None:
            return self._taken.estimate(images)
        seconds, estimates = _timed(super().estimate, images)
        self._spent += seconds
        if not len(images):
            return estimates
        if self._forced is not None:
            _check(self._forced, images, estimates)
            self._take(self._forced)
        elif self._spent >= self._patience and self._module is not None:
            module, self._module = self._module, None
            with suppress(Exception):  # torch does it, whatever is wrong with the other
                self._compare(_exported(module, self.tta), images, estimates)
        return estimates

    def _compare(self, other: OnnxPredictor, images: Tensor, estimates: Estimates) -> None:
        """Takes the other if it is faster, and agrees."""
        _check(other, images, estimates)
        by_torch, by_onnx = least_seconds([super().estimate, other.estimate], images)
        if by_onnx < by_torch:
            self._take(other)

    def _take(self, other: OnnxPredictor) -> None:
        self._taken = other
        self.engine = other.engine if self._forced is not None else f"{self.engine}, then {other.engine}"
        self._module = self._forced = None
        del self.model  # ONNX Runtime has its own


def open_predictor(
    path: str | Path, device: Device = "auto", tta: Tta = "none", process: int = 0, engine: Engine = "auto"
) -> Predictor:
    """Loads a trained model.

    Args:
        path: A checkpoint of ``facecls.fit``, or a ``.onnx`` file of ``facecls.export``.
        device: ``auto`` for a GPU where there is one. Computes in float32 everywhere.
        tta: Over which views to average.
        process: Number of this process on its node; processes take the GPUs in turn.
        engine: What runs a checkpoint on a CPU: ``torch``, ``onnx``, or ``auto`` for the faster one.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: If there is no such file, it is neither, the device is missing, or the engine can't run it.
    """
    if engine not in (engines := get_args(Engine)):
        raise UserError(f"Expected an engine among {', '.join(engines)}, but got {engine}.")
    path = Path(path)
    gpu = process % max(1, torch.cuda.device_count())
    if path.suffix.lower() == ".onnx":
        if engine == "torch":
            raise UserError(f"Expected a checkpoint for torch to run, but got {path}; leave --engine out.")
        return OnnxPredictor(path, device, tta, gpu)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("Expected a GPU, but there is none that torch can use; omit --device or use cpu.")
    checkpoint = read_checkpoint(path)
    if device != "cpu" and torch.cuda.is_available():
        if engine == "onnx":
            raise UserError(
                "Expected --device cpu with --engine onnx, which runs checkpoints on a CPU; for a GPU export the model "
                "with `python -m facecls.export`."
            )
        return TorchPredictor(checkpoint, torch.device("cuda", gpu), tta)
    if engine == "torch":
        return TorchPredictor(checkpoint, torch.device("cpu"), tta)
    return FastestPredictor(checkpoint, tta, _PATIENCE if engine == "auto" else None)


def faster_trunk(trunk: Trunk, run: Callable[[Tensor], Tensor], images: Tensor, faces: int) -> OnnxTrunk | None:
    """ONNX Runtime for a trunk on a CPU, where it is worth its export.

    Args:
        trunk: The trunk, in evaluation mode.
        run: How it would run else: images to features, as ``trunk`` but for the precision.
        images: (N, 3, S, S) uint8 RGB, some of the faces.
        faces: How many there are to come.

    Returns:
        The same trunk in ONNX Runtime; ``None`` if there is little to do, if it is not faster than ``run`` or can't run
        the trunk, or if its features are not those of torch in float32.
    """
    run(images)  # at first torch allocates memory and chooses algorithms
    if _timed(run, images)[0] * faces / len(images) < _PATIENCE:
        return None
    with suppress(Exception):  # torch does it, whatever is wrong with the other
        from facecls.model.onnx_file import trunk_to_onnx  # which imports onnx

        other = OnnxTrunk(trunk_to_onnx(trunk, images.shape[3], OPSET))
        if relative_difference(trunk(images), other(images)) <= TOLERANCE:
            by_torch, by_onnx = least_seconds([run, other], images)
            return other if by_onnx < by_torch else None
    return None


def least_seconds(runs: Sequence[Callable[[Tensor], object]], images: Tensor) -> list[float]:
    """Times several ways to process images in turns, so that other load slows them alike.

    Args:
        runs: The ways.
        images: What they take.

    Returns:
        For each how many seconds it took at least.
    """
    seconds = [[_timed(run, images)[0] for run in runs] for _ in range(_TRIALS)]
    return [min(each) for each in zip(*seconds, strict=True)]


def _exported(module: FaceModule, tta: Tta) -> OnnxPredictor:
    """The same model in ONNX Runtime."""
    from facecls.model.onnx_file import metadata, serialise, to_onnx  # which imports onnx

    return OnnxPredictor(serialise(to_onnx(module, OPSET), metadata(module, None)), "cpu", tta)


def _check(other: OnnxPredictor, images: Tensor, estimates: Estimates) -> None:
    """Rejects answers that are not those of torch."""
    apart = max(differences(estimates, other.estimate(images), other.tasks).values())
    if not apart <= TOLERANCE:  # also true of NaN
        raise UserError(
            f"Expected ONNX Runtime to agree with torch within {TOLERANCE:g}, but it differs by {apart:.1e}; leave "
            "--engine out."
        )


def _timed(run: Callable[[Tensor], T], images: Tensor) -> tuple[float, T]:
    started = time.perf_counter()
    result = run(images)
    return time.perf_counter() - started, result
