"""Whether an ONNX file says what the torch model says, on real faces, and how fast."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from facecls.data.datamodule import BatchPlan
from facecls.data.tasks import CLASSES, MISSING, TASKS
from facecls.errors import UserError

Estimates = dict[str, npt.NDArray[Any]]
"""What ``FaceModel.estimate`` says of N faces, by output."""
TOLERANCE = 1e-4
"""Largest difference from torch: of probabilities, and of ages relative to the age."""
BATCHES = (1, 7, 32)
"""Sizes of the batches for verification; all further ones have the last size."""


def draw(loader: Any, count: int, sizes: Sequence[int] = BATCHES) -> Any:
    """Picks faces at random, always the same.

    Args:
        loader: Of ``FacesDataModule``, over the faces to pick from.
        count: How many at most.
        sizes: Of the batches; the last one goes on.

    Returns:
        A loader over them.
    """
    rows = np.random.default_rng(0).permutation(loader.sampler.faces)[:count]
    ends = [*np.cumsum(sizes), *range(sum(sizes) + sizes[-1], len(rows), sizes[-1])]
    plans: Any = [BatchPlan(part, None) for part in np.split(rows, ends) if len(part)]
    return DataLoader(loader.dataset, sampler=plans, batch_size=None)


def session(model: bytes) -> Callable[[Tensor], Estimates]:
    """Opens a model in ONNX Runtime, on the CPU with as many threads as torch.

    Args:
        model: The bytes of the file.

    Returns:
        Images (N, 3, S, S) uint8 RGB -> what the file says of them.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    opened = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]
    return lambda images: dict(zip(names, opened.run(names, {"image": images.contiguous().numpy()}), strict=True))


def run(estimate: Callable[[Tensor], Estimates], faces: Iterable[Mapping[str, Tensor]]) -> tuple[Estimates, float]:
    """What a model says of faces, and how fast.

    Args:
        estimate: The model.
        faces: As ``draw`` gives them.

    Returns:
        The estimates of all of them, and faces per second.
    """
    found: list[Estimates] = []
    seconds, count, sizes = 0.0, 0, set()
    for batch in faces:
        images = batch["image"]
        if len(images) not in sizes:  # the first batch of a size also pays for preparations
            sizes.add(len(images))
            estimate(images)
        start = time.perf_counter()
        found.append(estimate(images))
        seconds += time.perf_counter() - start
        count += len(images)
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}, count / seconds


def check(wanted: Estimates, found: Estimates) -> None:
    """Refuses a file that says something else.

    Args:
        wanted: What torch says.
        found: What ONNX Runtime says of the same faces.

    Raises:
        UserError: If an output differs by more than ``TOLERANCE``.
    """
    for name, value in _differences(wanted, found).items():
        if not value <= TOLERANCE:  # nor where it is not a number
            raise UserError(
                f"Expected ONNX Runtime to agree with torch within {TOLERANCE:g}, but {name} differs by {value:.1e}; "
                "nothing was written; try another --opset or another release of onnxruntime."
            )


def compared(estimates: Mapping[str, Estimates], faces: Any) -> dict[str, float]:
    """Differences, decisions and scores of each model.

    Args:
        estimates: By model; one is torch.
        faces: As ``draw`` gave them.

    Returns:
        ``faces``, ``difference/OUTPUT/MODEL``, ``changed/TASK/MODEL``, ``accuracy/TASK/MODEL``, ``mae_years/MODEL``.
    """
    wanted, labels = estimates["torch"], _labels(faces)
    facts: dict[str, float] = {"faces": len(labels["age"])}
    for model, found in estimates.items():
        if model != "torch":
            facts |= {f"difference/{name}/{model}": value for name, value in _differences(wanted, found).items()}
        for task in [task for task in TASKS if task in found]:
            known = labels[task] != MISSING
            if task in CLASSES:
                decided = found[task].argmax(1)
                if model != "torch":
                    facts[f"changed/{task}/{model}"] = float((decided != wanted[task].argmax(1)).mean())
                if known.any():
                    facts[f"accuracy/{task}/{model}"] = float((decided == labels[task])[known].mean())
            elif known.any():
                facts[f"mae_years/{model}"] = float(np.abs(found[task] - labels[task])[known].mean())
    return facts


def _labels(faces: Any) -> dict[str, npt.NDArray[np.int64]]:
    rows = np.concatenate([plan.faces for plan in faces.sampler])
    return dict(zip(TASKS, faces.dataset.labels[rows].T, strict=True))


def _differences(wanted: Estimates, found: Estimates) -> dict[str, float]:
    """By output the largest absolute difference; of ages relative to the age, or to one year where it is less."""
    apart = {name: np.abs(found[name] - values) for name, values in wanted.items()}
    if "age" in apart:
        apart["age"] /= np.maximum(wanted["age"], 1)
    return {name: float(values.max()) for name, values in apart.items()}
