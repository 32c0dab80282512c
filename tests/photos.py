"""Photos with faces in known places: drawn faces on drawn backgrounds."""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class Placed(NamedTuple):
    """A face that was put into a photo.

    Attributes:
        x: Of its middle, pixels.
        y: Of its middle.
        size: Side of the square that it fills, pixels.
        angle: By which it leans, degrees, clockwise.
        matrix: (2, 3) from the pixels of the face's own image to those of the photo.
    """

    x: float
    y: float
    size: float
    angle: float
    matrix: npt.NDArray[np.float64]


def background(kind: str, width: int, height: int, seed: int = 0) -> Pixels:
    """A photo without a face: ``noise``, ``gradient`` or ``texture``."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "gradient":
        y, x = np.mgrid[:height, :width]
        colours = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2)
        return colours.astype(np.uint8)
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(coarse, (0, 0), 2)
    return cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR)


def put(photo: Pixels, face: Pixels, x: float, y: float, size: float, angle: float = 0.0) -> Placed:
    """Puts a square picture of a face into a photo, which is changed; what lies outside is cut off."""
    original = side = face.shape[0]
    while side > 2 * size:  # in steps, so that nothing is left out
        face = cv2.resize(face, (side // 2, side // 2), interpolation=cv2.INTER_AREA)
        side = face.shape[0]
    scale, turn = size / side, np.deg2rad(angle)
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.column_stack([rotation, np.array([x, y]) - rotation @ np.full(2, (side - 1) / 2)])
    shape = photo.shape[1::-1]
    mask = cv2.warpAffine(np.full(face.shape[:2], 255, np.uint8), matrix, shape) > 127
    photo[mask] = cv2.warpAffine(face, matrix, shape, borderMode=cv2.BORDER_REPLICATE)[mask]
    by = side / original
    own = np.column_stack([by * matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ np.full(2, 0.5 * by - 0.5)])
    return Placed(x, y, size, angle, own)
