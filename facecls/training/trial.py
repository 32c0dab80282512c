"""How fast a model is in each of several precisions: a few steps on a copy of it, after which all is as it was."""

import copy
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor

from facecls.errors import is_out_of_memory
from facecls.model.engine import least_seconds
from facecls.model.network import FaceModel
from facecls.model.schedule import Schedule, freeze

_FEW = 2
"""Faces of the first steps, which tell how many can be timed."""
_SECONDS = 0.7
"""How long a timed step in float32 may take; where a whole batch takes longer, a part of it is timed."""


def time_precisions(
    precisions: Sequence[str],
    model: FaceModel,
    shape: tuple[int, int],
    device: torch.device,
    schedule: Schedule | None,
    epoch: int = 0,
) -> dict[str, float]:
    """Times steps of a model: forward and backward pass of a training, or the forward pass alone.

    No optimizer steps, and neither the model nor the state of a random generator changes.

    Args:
        precisions: Lightning's names, ``32-true`` first; others are mixed ones.
        model: Trunk and heads.
        shape: Faces N of a batch, and their side in pixels; the faces are noise.
        device: Where to compute.
        schedule: What is frozen in the training; ``None`` for the forward pass alone.
        epoch: Of the training.

    Returns:
        Faces per second by precision; 0 where numbers overflow or the memory is too small.
    """
    count, size = shape
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from it
        copied = copy.deepcopy(model).to(device).train(schedule is not None)
        if schedule is not None:
            for norm in freeze(copied.trunk.net, schedule, epoch):
                norm.eval()
        noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        images = noise.contiguous(memory_format=torch.channels_last).to(device)
        runs = {name: partial(_step, copied, name) for name in precisions}
        few = images[:_FEW]
        _works(runs[precisions[0]], few)  # at first torch allocates memory and chooses algorithms
        started = time.perf_counter()
        _works(runs[precisions[0]], few)
        most = _SECONDS / (time.perf_counter() - started) * len(few)
        part = images[: max(_FEW, round(most))]
        runs = {name: run for name, run in runs.items() if _works(run, part)}
        seconds = least_seconds(list(runs.values()), part) if runs else []
    if device.type == "cuda":
        del copied, runs
        torch.cuda.empty_cache()
    return dict.fromkeys(precisions, 0.0) | {name: len(part) / each for name, each in zip(runs, seconds, strict=True)}


def _works(run: "partial[float]", images: Tensor) -> bool:
    """Whether a step fits into memory, and overflows nowhere."""
    try:
        return math.isfinite(run(images))
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)):
            raise
        return False


def _step(model: FaceModel, precision: str, images: Tensor) -> float:
    """A step, and a number that is finite if all logits are; reading it waits for a GPU."""
    with torch.inference_mode(not model.training):
        if precision == "32-true":
            logits = model(images)
        else:
            plugin: Any = MixedPrecision(precision, images.device.type)  # type: ignore[arg-type]
            with plugin.forward_context():
                logits = model(images)
        loss: Tensor = torch.stack([values.float().mean() for values in logits.values()]).sum()
        if model.training:
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
    return loss.item()
