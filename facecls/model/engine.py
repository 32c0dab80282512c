"""Opens trained models, and runs them on a CPU by the faster of torch and ONNX Runtime."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from facecls.errors import UserError
from facecls.model.agreement import TOLERANCE, differences
from facecls.model.checkpoint import Checkpoint, read_checkpoint
from facecls.model.predictor import Device, Estimates, OnnxPredictor, Predictor, TorchPredictor, Tta

Engine = Literal["auto", "torch", "onnx"]
"""What runs a checkpoint; ``auto`` for the faster on a CPU."""
OPSET = 18
"""Of the graphs that are run here: the first that torch's exporter writes."""
_PATIENCE = 30.0
"""Seconds of work after which ONNX Runtime is tried: before, its export would cost more than it saves."""
_TRIALS = 2
"""Batches by which the two are compared."""


class FastestPredictor(TorchPredictor):
    """The model of a checkpoint on a CPU, by torch until ONNX Runtime turns out to be faster.

    Args:
        checkpoint: The checkpoint.
        path: Its file.
        tta: Whether to average over mirror images.
        patience: Seconds of work after which ONNX Runtime is tried.
        is_forced: Whether it is taken even if it is slower.

    Attributes:
        engine: What runs the model now.
    """

    def __init__(
        self, checkpoint: Checkpoint, path: Path, tta: Tta, patience: float = _PATIENCE, is_forced: bool = False
    ) -> None:
        super().__init__(checkpoint, torch.device("cpu"), tta)
        self.engine = super().engine
        self._checkpoint = checkpoint
        self._path = path
        self._patience = patience
        self._is_forced = is_forced
        self._spent = 0.0
        self._is_decided = False
        self._other: OnnxPredictor | None = None

    def estimate(self, images: Tensor) -> Estimates:
        """As ``Predictor.estimate``.

        Raises:
            UserError: If ONNX Runtime is forced, but can't run the model or does not agree with torch.
        """
        if self._other is not None:
            return self._other.estimate(images)
        seconds, estimates = _timed(super().estimate, images)
        self._spent += seconds
        if self._spent < self._patience or self._is_decided:
            return estimates
        self._is_decided = True
        try:
            self._other = self._try(images, estimates)
        except UserError:
            if self._is_forced:
                raise
        if self._other is not None:
            self.engine = self._other.engine
        return estimates

    def _try(self, images: Tensor, estimates: Estimates) -> OnnxPredictor | None:
        """The model in ONNX Runtime, if it is to be taken.

        Raises:
            UserError: If it can't be run there, or the answers differ.
        """
        from facecls.model.onnx_file import metadata, serialise, to_onnx  # which imports onnx

        module = self._checkpoint.module
        other = OnnxPredictor(serialise(to_onnx(module, OPSET), metadata(module, self._path)), "cpu", self.tta)
        apart = max(differences(estimates, other.estimate(images), self.tasks).values())
        if not apart <= TOLERANCE:  # also true of NaN
            raise UserError(
                f"Expected ONNX Runtime to agree with torch within {TOLERANCE:g}, but it differs by {apart:.1e}; "
                "leave --engine out."
            )
        runs = super().estimate, other.estimate
        seconds = [[_timed(run, images)[0] for run in runs] for _ in range(_TRIALS)]
        by_torch, by_onnx = map(min, zip(*seconds, strict=True))
        return other if self._is_forced or by_onnx < by_torch else None


def open_predictor(
    path: str | Path, device: Device = "auto", tta: Tta = "none", process: int = 0, engine: Engine = "auto"
) -> Predictor:
    """Loads a trained model.

    Args:
        path: A checkpoint of ``facecls.fit``, or a ``.onnx`` file of ``facecls.export``.
        device: ``auto`` for a GPU where there is one. Computes in float32 everywhere.
        tta: Whether to average over mirror images.
        process: Number of this process on its node; processes take the GPUs in turn.
        engine: What runs a checkpoint on a CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: If there is no such file, it is neither, the device is missing, or the engine can't run it.
    """
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
    return FastestPredictor(checkpoint, path, tta, _PATIENCE if engine == "auto" else 0.0, is_forced=engine == "onnx")


def _timed(run: Callable[[Tensor], Estimates], images: Tensor) -> tuple[float, Estimates]:
    started = time.perf_counter()
    estimates = run(images)
    return time.perf_counter() - started, estimates
