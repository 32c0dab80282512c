"""A trained model, from a checkpoint or an ONNX file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facecls.data.tasks import MAX_AGE, TASKS, Task
from facecls.errors import UserError
from facecls.model.heads import AgeHead, FaceModel
from facecls.model.module import load_module

Device = Literal["auto", "cpu", "cuda"]
Tta = Literal["none", "flip"]
"""``flip`` averages the logits of a face and its mirror image."""


class Predictor(Protocol):
    """What a trained model can do, whatever file it comes from.

    Attributes:
        image_size: Side S of the faces that it takes, in pixels.
        tasks: What it tells, in the order gender, race, age.
        age_head: Whether it knows how ages are distributed, if it tells ages at all.
    """

    image_size: int
    tasks: list[Task]
    age_head: AgeHead

    def estimate(self, images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        """Estimates, in float32.

        Args:
            images: (N, 3, S, S) uint8 RGB.

        Returns:
            As ``FaceModel.estimate``: ``gender`` (N, 2) and ``race`` (N, 5) probabilities, ``age`` (N,) years,
            ``age_distribution`` (N, 117) probabilities, those that the model has.
        """


class TorchPredictor:
    """A ``FaceModel``.

    Args:
        model: The model; it is moved to the device and set to evaluation.
        image_size: Side of the faces it was trained with, in pixels.
        device: Where to compute.
        tta: Whether to average over mirror images.
    """

    def __init__(self, model: FaceModel, image_size: int, device: torch.device, tta: Tta = "none") -> None:
        self.model = model.to(device).eval()
        self.image_size = image_size
        self.tasks: list[Task] = list(model.heads)  # type: ignore[arg-type]
        self.age_head = model.age
        self.device = device
        self.tta = tta

    @torch.inference_mode()
    def estimate(self, images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        """As ``Predictor.estimate``."""
        images = images.to(self.device)
        logits = self.model.mirror_averaged(images) if self.tta == "flip" else self.model(images)
        return {name: values.float().cpu().numpy() for name, values in self.model.estimate(logits).items()}


class OnnxPredictor:
    """An ONNX file of ``facecls.export`` in ONNX Runtime.

    Args:
        path: The file.
        device: Where to compute.
        tta: Whether to average over mirror images.
        gpu: Number of the GPU, where it is one.

    Raises:
        UserError: If it is no such file, or the device is missing.
    """

    def __init__(self, path: Path, device: Device = "auto", tta: Tta = "none", gpu: int = 0) -> None:
        import onnxruntime

        if not path.is_file():
            raise UserError(f"Expected a model at {path}, but there is none; make one with `python -m facecls.export`.")
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if device == "cuda" and not cuda:
            raise UserError(
                "Expected a GPU, but ONNX Runtime has none here; install onnxruntime-gpu or say --device cpu."
            )
        on_gpu = [("CUDAExecutionProvider", {"device_id": gpu})] if cuda and device != "cpu" else []
        providers = [*on_gpu, "CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(path, providers=providers)
        except Exception as error:  # ONNX Runtime has an exception of its own for everything that may be wrong
            raise UserError(f"Expected a model of facecls.export, but could not load {path}: {error}") from None
        about = self.session.get_modelmeta().custom_metadata_map.get("facecls")
        if about is None:
            raise UserError(f"Expected a model of facecls.export, but {path} is another one; export a checkpoint.")
        told = json.loads(about)
        self.names = [output.name for output in self.session.get_outputs()]
        self.image_size: int = told["image_size"]
        self.tasks: list[Task] = [task for task in TASKS if task in told["tasks"]]
        self.age_head: AgeHead = "distribution" if "age_distribution" in self.names else "regression"
        self.age_temperature = float(told["temperatures"]["age"])
        self.tta = tta

    def estimate(self, images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        """As ``Predictor.estimate``."""
        found = self._run(images)
        if self.tta == "flip":
            return averaged(found, self._run(images.flip(3)), self.age_temperature)
        return found

    def _run(self, images: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        values = self.session.run(self.names, {"image": images.contiguous().numpy()})
        return dict(zip(self.names, values, strict=True))


def averaged(
    one: Mapping[str, npt.NDArray[np.float32]], other: Mapping[str, npt.NDArray[np.float32]], age_temperature: float
) -> dict[str, npt.NDArray[np.float32]]:
    """Averages the logits behind two estimates, of which only the estimates are left.

    A softmax forgets nothing of its logits but a constant, so the softmax of mean logits is the normalised geometric
    mean of the probabilities. The age is the mean of the distribution before its temperature, p ** T.

    Args:
        one: As ``FaceModel.estimate`` gives them.
        other: The same of other pictures of the same faces.
        age_temperature: What the logits behind ``age_distribution`` were divided by.

    Returns:
        The same.
    """
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, values in one.items():
        first, second = values.astype(np.float64), other[name].astype(np.float64)
        if name != "age":
            found[name] = _normalised(np.sqrt(first * second)).astype(np.float32)
        elif "age_distribution" not in one:  # age = MAX_AGE x sigmoid
            odds = np.sqrt(first / (MAX_AGE - first) * second / (MAX_AGE - second))
            found[name] = (MAX_AGE * odds / (1 + odds)).astype(np.float32)
    if "age_distribution" in found:
        untempered = _normalised(found["age_distribution"].astype(np.float64) ** age_temperature)
        found["age"] = (untempered @ np.arange(MAX_AGE + 1)).astype(np.float32)
    return found


def _normalised(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = shares.sum(1, keepdims=True)
    return shares / total


def open_predictor(path: str | Path, device: Device = "auto", tta: Tta = "none", process: int = 0) -> Predictor:
    """Loads a trained model.

    Args:
        path: A checkpoint of ``facecls.fit``, or a ``.onnx`` file of ``facecls.export``.
        device: ``auto`` for a GPU where there is one. Computes in float32 everywhere.
        tta: Whether to average over mirror images.
        process: Number of this process on its node; each takes a GPU of its own, as far as there are enough.

    Returns:
        The model, ready.

    Raises:
        UserError: If there is no such file, it is none of these, or the device is missing.
    """
    path = Path(path)
    gpu = process % max(1, torch.cuda.device_count())
    if path.suffix.lower() == ".onnx":
        return OnnxPredictor(path, device, tta, gpu)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("Expected a GPU, but there is none that torch can use; leave --device out or say cpu.")
    module = load_module(path)
    use_cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", gpu) if use_cuda else torch.device("cpu")
    return TorchPredictor(module.model, module.hparams["image_size"], where, tta)
