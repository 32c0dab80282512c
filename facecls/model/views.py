"""Views of a face: what the test averages over, and a probe learns from."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Tta = Literal["none", "flip", "zoom"]
"""What the logits of a face are averaged over: nothing, its mirror image, or also both from further away."""
_SCALES: dict[Tta, tuple[float, ...]] = {"none": (1.0,), "flip": (1.0,), "zoom": (1.0, 0.92, 0.85)}
"""Sizes of the face. Networks that learnt on looser crops than UTKFace's gain most from smaller ones."""


def count_views(tta: Tta) -> int:
    """How many views ``views`` gives."""
    return len(_SCALES[tta]) * (1 if tta == "none" else 2)


def views(images: Tensor, tta: Tta) -> Iterator[Tensor]:
    """Gives the views one after the other, the images themselves first.

    Args:
        images: (N, 3, S, S) RGB, 0..255, uint8 or float.
        tta: Which.

    Yields:
        (N, 3, S, S) of the same type; where a face is smaller, the border of its image is repeated around it.
    """
    for scale in _SCALES[tta]:
        seen = _smaller(images, scale) if scale < 1 else images
        yield seen
        if tta != "none":
            yield seen.flip(3)


def _smaller(images: Tensor, scale: float) -> Tensor:
    side = images.shape[3]
    margin = round(side * (1 / scale - 1) / 2)
    padded = F.pad(images.float(), [margin] * 4, mode="replicate")
    shrunk = F.interpolate(padded, size=(side, side), mode="bilinear", antialias=True)
    return shrunk if images.is_floating_point() else shrunk.round().to(torch.uint8)
