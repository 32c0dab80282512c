"""A trained model, from a checkpoint or an ONNX file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facecls.data.tasks import Age, Task, Tasks, create_tasks
from facecls.errors import UserError
from facecls.finding.frame import Frame, read_frame
from facecls.model.checkpoint import Checkpoint, check_side
from facecls.model.checksums import is_intact
from facecls.model.views import Tta, views

Device = Literal["auto", "cpu", "cuda"]
Estimates = Mapping[str, npt.NDArray[np.float32]]
_PIECE = 64
"""Faces that go through a trunk in ONNX Runtime at a time; its memory grows with them."""


class Predictor(Protocol):
    """What a trained model can do, whatever file it comes from.

    Attributes:
        image_size: Side S of the faces that it takes, in pixels.
        tasks: What it predicts, by name.
        outputs: Names of its estimates (``Head.outputs``).
        engine: What runs it, in words.
        frame: How the faces that it was trained on lie in their images; ``None`` if none were found in them.
        is_frame_assumed: Whether its file does not say it, and the frame is UTKFace's.
    """

    image_size: int
    tasks: Tasks
    outputs: tuple[str, ...]
    engine: str
    frame: Frame | None
    is_frame_assumed: bool

    def estimate(self, images: Tensor) -> Estimates:
        """Estimates labels in float32.

        Args:
            images: (N, 3, S, S) uint8 RGB.

        Returns:
            As ``FaceModel.estimate``: ``<task>`` (N, C) probabilities or (N,) years, and ``<task>_distribution`` (N, A)
            probabilities of each year, by ``outputs``.
        """


class TorchPredictor:
    """The model of a checkpoint.

    Args:
        checkpoint: The checkpoint; its model is moved to the device and set to evaluation mode.
        device: Where to compute.
        tta: Over which views to average.
    """

    engine = "torch"

    def __init__(self, checkpoint: Checkpoint, device: torch.device, tta: Tta = "none") -> None:
        model = checkpoint.module.model
        self.model = model.to(device).eval()
        self.image_size: int = checkpoint.module.hparams["image_size"]
        self.frame = checkpoint.frame
        self.is_frame_assumed = checkpoint.is_frame_assumed
        self.tasks: Tasks = model.tasks
        self.outputs = tuple(name for head in model.heads.values() for name in head.outputs)
        self.device = device
        self.tta = tta

    @torch.inference_mode()
    def estimate(self, images: Tensor) -> Estimates:
        """As ``Predictor.estimate``."""
        images = images.to(self.device)
        logits = self.model.averaged(images, self.tta)
        return {name: values.float().cpu().numpy() for name, values in self.model.estimate(logits).items()}


class OnnxPredictor:
    """An ONNX file of ``facecls.export`` in ONNX Runtime.

    Args:
        file: Its path, or its bytes.
        device: Where to compute.
        tta: Over which views to average.
        gpu: Number of the GPU, if there is one.

    Raises:
        UserError: If it is no such file, or the device is missing.
    """

    engine = "ONNX Runtime"

    def __init__(self, file: Path | bytes, device: Device = "auto", tta: Tta = "none", gpu: int = 0) -> None:
        import onnxruntime

        path = file if isinstance(file, Path) else "memory"
        if isinstance(file, Path) and not file.is_file():
            raise UserError(
                f"Expected a model at {path}, but there is none; create one with `python -m facecls.export`."
            )
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if device == "cuda" and not cuda:
            raise UserError(
                "Expected a GPU, but ONNX Runtime has none here; install onnxruntime-gpu or use --device cpu."
            )
        on_gpu = [("CUDAExecutionProvider", {"device_id": gpu})] if cuda and device != "cpu" else []
        providers = [*on_gpu, "CPUExecutionProvider"]
        data = file if isinstance(file, bytes) else file.read_bytes()
        if not is_intact(data):
            raise UserError(f"Expected {path} as it was written, but it is damaged; get or export it again.")
        try:
            self.session = _start(data, providers)
        except Exception as error:  # ONNX Runtime raises exceptions of its own for all that may be wrong
            raise UserError(
                f"Expected an ONNX file written by facecls.export, but could not load {path}: {error}"
            ) from None
        about = self.session.get_modelmeta().custom_metadata_map.get("facecls")
        if about is None:
            raise UserError(
                f"Expected an ONNX file written by facecls.export, but {path} lacks its metadata; export a checkpoint."
            )
        self.outputs = tuple(output.name for output in self.session.get_outputs())
        self.tta = tta
        try:
            self._read(json.loads(about))
        except UserError:
            raise
        except Exception as error:  # the metadata may be any JSON, and the graph any that ONNX Runtime loads
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            raise UserError(
                f"Expected an ONNX file written by facecls.export, but what {path} says of itself is none of its: "
                f"{reason}; export the checkpoint again."
            ) from None

    def _read(self, metadata: Mapping[str, Any]) -> None:
        """Takes what the file says of itself, if it fits the graph."""
        self.image_size = check_side(metadata["image_size"])
        self.frame, self.is_frame_assumed = read_frame(metadata)
        self.tasks = _tasks(metadata)
        self.temperatures: Mapping[str, float] = {
            str(name): float(value) for name, value in metadata["temperatures"].items()
        }
        inputs = [(given.name, given.type, given.shape) for given in self.session.get_inputs()]
        side = self.image_size
        if len(inputs) != 1 or inputs[0][:2] != ("image", "tensor(uint8)") or inputs[0][2][1:] != [3, side, side]:
            raise ValueError(f"its inputs are {inputs}, not an image of 3 x {side} x {side}")
        if not set(self.tasks) <= set(self.outputs):
            raise ValueError(f"its outputs are {', '.join(self.outputs)}, without {', '.join(self.tasks)}")

    def estimate(self, images: Tensor) -> Estimates:
        """As ``Predictor.estimate``."""
        estimates = [self._run(view) for view in views(images, self.tta)]
        return averaged(self.tasks, estimates, self.temperatures)

    def _run(self, images: Tensor) -> Estimates:
        values = self.session.run(self.outputs, {"image": images.contiguous().numpy()})
        return dict(zip(self.outputs, values, strict=True))


class OnnxTrunk:
    """A trunk in ONNX Runtime, on a CPU.

    Args:
        file: As ``trunk_to_onnx`` returns it.
    """

    engine = OnnxPredictor.engine

    def __init__(self, file: bytes) -> None:
        self._session = _start(file, ["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        """Computes features.

        Args:
            images: (N, 3, S, S) uint8 RGB, N at least 1.

        Returns:
            (N, D) float32.
        """
        parts = [
            self._session.run(None, {"image": part.contiguous().numpy()})[0] for part in torch.split(images, _PIECE)
        ]
        return torch.from_numpy(np.concatenate(parts))


def _start(file: bytes, providers: Sequence[Any]) -> Any:
    """A session of ONNX Runtime with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its own default counts the cores of the machine
    return onnxruntime.InferenceSession(file, options, providers=providers)


def _tasks(metadata: Mapping[str, Any]) -> Tasks:
    options = metadata["tasks"]
    if isinstance(options, list):  # version 0.1, whose ages end at 116
        classes = metadata["classes"]
        options = {name: {"classes": classes[name]} if name in classes else None for name in options}
    created = create_tasks(options)
    return {name: created[name] for name in options}


def averaged(tasks: Tasks, estimates: Sequence[Estimates], temperatures: Mapping[str, float]) -> Estimates:
    """Averages estimates in logit space, given only the estimates.

    Args:
        tasks: What is estimated.
        estimates: As ``FaceModel.estimate`` returns them, of one or more views of the same faces.
        temperatures: What the logits of each task were divided by before the softmax.

    Returns:
        The estimates from the mean logits.
    """
    if len(estimates) == 1:
        return estimates[0]
    mean: dict[str, npt.NDArray[np.float32]] = {}
    for name, task in tasks.items():
        mean |= _averaged(task, estimates, temperatures.get(name, 1.0))
    return mean


def _averaged(task: Task, estimates: Sequence[Estimates], temperature: float) -> Estimates:
    name, distribution = task.name, f"{task.name}_distribution"
    if not isinstance(task, Age):
        return {name: _mean_softmax([each[name] for each in estimates]).astype(np.float32)}
    if distribution in estimates[0]:  # the age is the mean of the distribution before its temperature, p ** T
        p = _mean_softmax([each[distribution] for each in estimates]).astype(np.float32)
        untempered = _normalised(p.astype(np.float64) ** temperature)
        return {name: (untempered @ np.arange(task.highest + 1)).astype(np.float32), distribution: p}
    ages = np.stack([each[name].astype(np.float64) for each in estimates])  # highest age x sigmoid
    odds = np.exp(np.log(ages / (task.highest - ages)).mean(0))
    return {name: (task.highest * odds / (1 + odds)).astype(np.float32)}


def _mean_softmax(probabilities: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    """The softmax of the mean logits: the normalised geometric mean.

    It can be computed from probabilities, since softmax discards only a constant added to the logits.
    """
    power = 1 / len(probabilities)  # of each, since the product of many small ones is 0
    return _normalised(np.prod([each.astype(np.float64) ** power for each in probabilities], axis=0))


def _normalised(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = shares.sum(1, keepdims=True)
    return shares / total
