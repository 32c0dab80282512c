"""What the test averages over, against Pillow."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facecls.model.views import count_views, views


def smaller(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Faces from further away, drawn by Pillow: the border is repeated around them."""
    side = images.shape[3]
    margin = round((side / scale - side) / 2)
    padded = np.pad(images.numpy().transpose(0, 2, 3, 1), [(0, 0), *2 * [(margin, margin)], (0, 0)], mode="edge")
    drawn = [Image.fromarray(each).resize((side, side), Image.Resampling.BILINEAR) for each in padded]
    return torch.from_numpy(np.stack(drawn).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(("tta", "scales"), [("none", []), ("flip", [1.0]), ("zoom", [1.0, 0.92, 0.85])])
@pytest.mark.parametrize("side", [64, 97])
def test_views_are_those_that_pillow_draws(tta: Any, scales: list[float], side: int) -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (3, 3, side, side), dtype=np.uint8))
    seen = list(views(images, tta))
    expected = [view for scale in scales for view in (smaller(images, scale), smaller(images, scale).flip(3))] or [
        images
    ]
    assert len(seen) == len(expected) == count_views(tta)
    assert torch.equal(seen[0], images)
    for view, truth in zip(seen, expected, strict=True):
        assert view.dtype == torch.uint8
        assert (view.int() - truth.int()).abs().max() <= 1  # grey levels: Pillow rounds after each direction


def test_views_of_floats_are_floats() -> None:
    images = 255 * torch.rand(2, 3, 64, 64)
    for exact, rounded in zip(views(images, "zoom"), views(images.to(torch.uint8), "zoom"), strict=True):
        assert exact.dtype == torch.float32
        assert (exact - rounded).abs().max() <= 1.5
