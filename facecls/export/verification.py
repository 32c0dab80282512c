"""Whether an ONNX file agrees with the torch model on real faces, and how fast each of them is."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from facecls.data.datamodule import ResumableLoader
from facecls.data.parsing import MISSING
from facecls.data.sampler import BatchIndices
from facecls.data.tasks import Tasks, classifications
from facecls.errors import UserError
from facecls.model.agreement import TOLERANCE, differences
from facecls.model.heads import Head
from facecls.model.module import Batch, FaceModule

Estimates = dict[str, npt.NDArray[np.float32]]
"""The outputs of ``FaceModel.estimate`` for N faces, by name."""
BATCH_SIZES = (1, 7, 32)
"""Batch sizes used for verification; all further batches have the last size."""


class Run(NamedTuple):
    """The result of running a model over faces.

    Attributes:
        size: Bytes of the file, or of the tensors of the torch model.
        estimates: Estimates of all faces.
        faces_per_second: Speed, not counting the time to read faces.
    """

    size: int
    estimates: Estimates
    faces_per_second: float


def draw_batches(loader: ResumableLoader, count: int, sizes: Sequence[int] = BATCH_SIZES) -> list[Batch]:
    """Draws faces at random, always the same ones.

    Args:
        loader: A loader of ``FacesDataModule`` over the faces to draw from.
        count: How many faces at most.
        sizes: Batch sizes; all further batches have the last size.

    Returns:
        The batches, in memory.
    """
    dataset: Any = loader.dataset
    sampler: Any = loader.sampler
    rows = np.random.default_rng(0).permutation(sampler.faces)[:count]
    ends = [*np.cumsum(sizes), *range(sum(sizes) + sizes[-1], len(rows), sizes[-1])]
    return [dataset[BatchIndices(part, None)] for part in np.split(rows, ends) if len(part)]


def run_torch(module: FaceModule, batches: Sequence[Batch]) -> Run:
    """Runs a torch model.

    Args:
        module: The model, on the CPU and in evaluation mode.
        batches: From ``draw_batches``.

    Returns:
        The result.
    """

    def estimate(images: Tensor) -> Estimates:
        with torch.inference_mode():
            return {name: values.numpy() for name, values in module(images).items()}

    return Run(sum(tensor.nbytes for tensor in module.model.state_dict().values()), *_run(estimate, batches))


def run_onnx(file: bytes, batches: Sequence[Batch]) -> Run:
    """Runs an ONNX file with ONNX Runtime, on the CPU and with as many threads as torch.

    Args:
        file: The bytes of the file.
        batches: From ``draw_batches``.

    Returns:
        The result.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def estimate(images: Tensor) -> Estimates:
        return dict(zip(names, session.run(names, {"image": images.contiguous().numpy()}), strict=True))

    return Run(len(file), *_run(estimate, batches))


def _run(estimate: Callable[[Tensor], Estimates], batches: Sequence[Batch]) -> tuple[Estimates, float]:
    """Estimates of all faces, and faces per second."""
    seconds, warm, parts = 0.0, set(), []
    for batch in batches:
        images = batch["image"]
        if len(images) not in warm:  # the first batch of each size also pays for allocation and choice of kernels
            warm.add(len(images))
            estimate(images)
        start = time.perf_counter()
        parts.append(estimate(images))
        seconds += time.perf_counter() - start
    faces = sum(len(batch["image"]) for batch in batches)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, faces / seconds


def check(reference: Estimates, estimates: Estimates, tasks: Tasks) -> None:
    """Rejects a file that does not agree with torch.

    Args:
        reference: Estimates of torch.
        estimates: Estimates of ONNX Runtime for the same faces.
        tasks: Of the model.

    Raises:
        UserError: If an output differs by more than ``TOLERANCE``.
    """
    for name, value in differences(reference, estimates, tasks).items():
        if not value <= TOLERANCE:  # also true of NaN
            raise UserError(
                f"Expected ONNX Runtime to agree with torch within {TOLERANCE:g}, but {name} differs by {value:.1e}; "
                "nothing was written; try another --opset or another release of onnxruntime."
            )


def compare(runs: Mapping[str, Run], module: FaceModule, batches: Sequence[Batch]) -> dict[str, float]:
    """Compares the models with torch and with the labels.

    Args:
        runs: By model; one is ``torch``.
        module: The model; its heads supply the metrics.
        batches: The faces of the runs.

    Returns:
        ``faces`` and, by MODEL, ``mb/MODEL``, ``faces_per_second/MODEL``, ``difference/OUTPUT/MODEL`` (the largest from
        torch), ``changed/TASK/MODEL`` (share of the faces with another predicted class than torch, 0..1) and, where
        there are labels, ``METRIC/TASK/MODEL`` for each metric of a head, such as ``accuracy/gender/int8``.
    """
    reference, tasks = runs["torch"].estimates, module.model.tasks
    labels = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "image"}
    facts: dict[str, float] = {"faces": len(labels["index"])}
    for model, (size, estimates, speed) in runs.items():
        facts[f"mb/{model}"] = size / 1e6
        facts[f"faces_per_second/{model}"] = speed
        if model != "torch":
            for name, value in differences(reference, estimates, tasks).items():
                facts[f"difference/{name}/{model}"] = value
            for task in classifications(tasks.values()):
                changed = estimates[task.name].argmax(1) != reference[task.name].argmax(1)
                facts[f"changed/{task.name}/{model}"] = float(changed.mean())
        for name, head in module.model.heads.items():
            for metric, value in _scores(head, estimates[name], labels):
                facts[f"{metric}/{name}/{model}"] = value
    return facts


def _scores(
    head: Head, estimates: npt.NDArray[np.float32], labels: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """The metrics of a head over the faces that have a label, by name."""
    metrics = head.create_metrics()
    for kind, targets in head.targets(labels).items():
        known = targets.reshape(len(targets), -1)[:, 0] != MISSING  # both ends of a range are missing, or none
        if known.any():
            for name, value in metrics[kind](torch.from_numpy(estimates)[known], targets[known]).items():
                yield name, float(value)
