"""The frame of aligned faces: where eyes, nose and mouth lie in the images that a model was trained on.

A face of a photo is brought into that frame by a similarity transform, so that the model sees it as it saw the faces of
its training.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facecls.finding.detector import Face
from facecls.finding.warp import Pixels, Points, sample, similarity

MEASURED = 1_000
"""Faces of the training that are looked at."""
_LEAST_FOUND = 0.5
"""Share of faces that must be found for a frame."""
_TRIED = 100
"""Faces after which it is given up if so few are found."""
_QUANTILE = 0.95
_FRAMED = 1.5
"""Spreads by which a point may be off in a picture that counts as aligned."""


class Frame(NamedTuple):
    """Where five points lie in aligned faces.

    Attributes:
        points: (5, 2) x and y as shares of the image's sides, in the order of ``Face.points``.
        spread: (5,) share of the image's side within which 95 % of the faces have the point.
        source: What it was measured on, in words.
    """

    points: Points
    spread: npt.NDArray[np.float64]
    source: str

    def options(self) -> dict[str, Any]:
        """Plain values, which files can keep."""
        rounded = {"points": self.points, "spread": self.spread}
        return {"source": self.source, **{name: np.round(values, 5).tolist() for name, values in rounded.items()}}


UTKFACE_FRAME = Frame(
    np.array([[0.2952, 0.2910], [0.6862, 0.2967], [0.4770, 0.5031], [0.3172, 0.6836], [0.6478, 0.6894]]),
    np.array([0.0515, 0.0529, 0.0677, 0.0727, 0.0682]),
    "UTKFace",
)
"""What ``measure`` finds in UTKFace's own aligned faces; older checkpoints do not say theirs."""


def read_frame(about: Mapping[str, Any]) -> tuple[Frame | None, bool]:
    """Reads how the faces of a model's training lie, from what its file says about it.

    Args:
        about: With ``face_frame``: what ``Frame.options`` gave, or ``None`` where no faces were found. Older files lack
            it.

    Returns:
        The frame, and whether it is not the file's but UTKFace's.

    Raises:
        ValueError: If it is something else.
    """
    if "face_frame" not in about:
        return UTKFACE_FRAME, True
    if (options := about["face_frame"]) is None:
        return None, False
    points, spread = np.array(options["points"], float), np.array(options["spread"], float)
    if points.shape != (5, 2) or spread.shape != (5,) or not (np.isfinite(points).all() and np.isfinite(spread).all()):
        raise ValueError("the frame of its faces is not five points")
    return Frame(points, spread, str(options["source"])), False


def measure(found: Iterable[Points | None], source: str) -> Frame | None:
    """Measures the frame of aligned faces.

    Args:
        found: For each image the points of its face, (5, 2) shares of its sides, or ``None`` where none was found.
        source: What they are, in words.

    Returns:
        The median of each point, or ``None`` if fewer than half of the faces were found.
    """
    count, shares = 0, list[Points]()
    for points in found:
        count += 1
        shares += [] if points is None else [points]
        if count == _TRIED and len(shares) < _LEAST_FOUND * count:
            return None
    if not shares or len(shares) < _LEAST_FOUND * count:
        return None
    middle = np.median(shares, axis=0)
    off = np.linalg.norm(np.array(shares) - middle, axis=2)  # (F, 5)
    return Frame(middle, np.quantile(off, _QUANTILE, axis=0), source)


def is_framed(face: Face, image: Pixels, frame: Frame) -> bool:
    """Whether a picture already is an aligned face, which needs no transform.

    Args:
        face: The face that was found in it.
        image: (H, W, 3).
        frame: The frame.
    """
    height, width = image.shape[:2]
    off = np.linalg.norm((face.points + 0.5) / (width, height) - frame.points, axis=1)
    return abs(height - width) <= 0.05 * max(height, width) and bool((off <= _FRAMED * frame.spread).all())


def align(image: Pixels, face: Face, frame: Frame, size: int) -> Pixels:
    """Brings a face into the frame: turned, scaled and moved, so that its points lie nearest to the frame's.

    What lies beyond the photo's edge is its reflection.

    Args:
        image: RGB (H, W, 3).
        face: The face in it.
        frame: The frame.
        size: Side S of the result in pixels.

    Returns:
        RGB (S, S, 3).
    """
    return sample(image, similarity(face.points, frame.points * size - 0.5), size, cv2.BORDER_REFLECT_101)
