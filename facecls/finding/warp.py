"""Similarity transforms of pictures."""

import math

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
"""(2, 3), for column vectors (x, y, 1); the middle of a picture's upper left pixel is (0, 0)."""

_LEAST_SCALE = 0.5
"""Below it a picture is made smaller before it is sampled, or fine patterns would become noise."""


def similarity(source: Points, target: Points) -> Matrix:
    """The rotation, scale and shift that bring points nearest to others, in the sense of least squares.

    Umeyama (IEEE TPAMI 13(4), 1991); in the plane, with points as complex numbers, rotation and scale are one factor.

    Args:
        source: (P, 2).
        target: (P, 2).

    Returns:
        The matrix.
    """
    one, other = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    centred = one - one.mean()
    factor = np.vdot(centred, other - other.mean()) / max(np.vdot(centred, centred).real, 1e-12)
    return _matrix(complex(factor), complex(other.mean() - factor * one.mean()))


def around(centre: tuple[float, float], angle: float, scale: float, size: int) -> Matrix:
    """The matrix that turns and scales what lies around a point into a square.

    Args:
        centre: x and y.
        angle: By which the picture is turned, radians, from the x axis towards the y axis.
        scale: By which it is enlarged.
        size: Side of the square in pixels.
    """
    factor, middle = scale * np.exp(1j * angle), (size - 1) / 2 * (1 + 1j)
    return _matrix(complex(factor), complex(middle - factor * complex(*centre)))


def angle_of(matrix: Matrix) -> float:
    """By which a matrix turns, radians, from the x axis towards the y axis."""
    return float(np.arctan2(matrix[1, 0], matrix[0, 0]))


def scale_of(matrix: Matrix) -> float:
    """By which a matrix enlarges."""
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


def inverse(matrix: Matrix) -> Matrix:
    """The matrix that undoes another."""
    undone: Matrix = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    return undone


def moved(points: Points, matrix: Matrix) -> Points:
    """Applies a matrix to points (P, 2)."""
    result: Points = points @ matrix[:, :2].T + matrix[:, 2]
    return result


def sample(image: Pixels, matrix: Matrix, size: int, border: int) -> Pixels:
    """Samples a square of a transformed picture.

    Args:
        image: RGB (H, W, 3).
        matrix: From its pixels to those of the square.
        size: Side S of the square in pixels.
        border: What lies beyond the picture's edge, one of OpenCV's ``BORDER_...``.

    Returns:
        RGB (S, S, 3).
    """
    scale = scale_of(matrix)
    if scale < _LEAST_SCALE:
        height, width = image.shape[:2]
        shrunk = max(1, round(width * scale / _LEAST_SCALE)), max(1, round(height * scale / _LEAST_SCALE))
        by = np.array([width / shrunk[0], height / shrunk[1]])
        image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
        matrix = np.column_stack([matrix[:, :2] * by, moved(0.5 * by[None] - 0.5, matrix)[0]])
    part, left, top = _needed(image, matrix, size)
    shifted = np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ (left, top)])
    square: Pixels = cv2.warpAffine(part, shifted, (size, size), borderMode=border)
    return square


def _needed(image: Pixels, matrix: Matrix, size: int) -> tuple[Pixels, int, int]:
    """The part of a picture that a square shows or mirrors, with its first x and y; OpenCV takes no large pictures."""
    corners = moved(np.array([[0, 0], [size, 0], [0, size], [size, size]], float), inverse(matrix))
    spans = []
    for low, high, side in zip(corners.min(0), corners.max(0), image.shape[1::-1], strict=True):
        first, last = math.floor(low) - 2, math.ceil(high) + 3
        # what lies beyond an edge is mirrored from as far inside
        start = min(first, 2 * side - last) if last > side else first
        end = max(last, -first) if first < 0 else last
        start = min(max(0, start), side - 1)
        spans.append((start, max(start + 1, min(side, end))))
    (left, right), (top, bottom) = spans
    return image[top:bottom, left:right], left, top


def _matrix(factor: complex, shift: complex) -> Matrix:
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])
