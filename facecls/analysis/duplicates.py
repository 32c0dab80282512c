"""Near-identical pictures: compressed, recoloured, slightly cropped or mirrored duplicates."""

from collections.abc import Callable, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

ImageLoader = Callable[[int], npt.NDArray[np.uint8]]
"""Row number of a table -> the face, RGB (H, W, 3), 0..255."""
COARSE, FINE = 0.85, 0.88
"""Correlations of 16x16 and of 32x32 thumbnails, without low frequencies, above which two pictures are near-identical.

Measured on 18,697 different files of UTKFace, upright and mirrored: 464 pairs are above 0.88, and by eye each of the
lowest 105 shows a single photograph; of the 17 pairs between 0.86 and 0.88 half do. The coarse step only saves time: it
keeps 689 pairs, among them all of the 464.
"""
_SIDE = 32
"""Side of a thumbnail in pixels."""
_BLUR = 3.0
"""Standard deviation, in pixels of a thumbnail, of the blur that is subtracted: what all aligned faces have in common.

Without that step different faces correlate up to 0.96, more than many duplicates do.
"""
_BLOCK = 512
"""Faces compared with all others at once: 40 MB for 20,000 faces."""
_Floats = npt.NDArray[np.float32]


def near_identical(pixels: ImageLoader, rows: Iterable[int]) -> pd.DataFrame:
    """Finds duplicates of pictures that were compressed, recoloured, slightly cropped or mirrored.

    High-pass filtered grey thumbnails are correlated, all with all. Hashes of 64 bits do not work here, since all
    aligned faces have their eyes and mouths at the same places: 45,000 pairs of UTKFace's difference hashes are within
    5 bits of each other, a hundred times the number of duplicates.

    Args:
        pixels: The faces by row number.
        rows: Which to compare.

    Returns:
        One row per pair, the most similar first: ``first`` and ``second`` (row numbers, in the order given),
        ``correlation`` (``FINE`` to 1) and ``mirrored`` (one is the mirror image of the other).
    """
    numbers = np.fromiter(rows, np.int64)
    details = _details(pixels, numbers)
    fine, coarse = _unit(details), _unit(details.reshape(-1, _SIDE // 2, 2, _SIDE // 2, 2).mean((2, 4)))
    parts = []
    for mirrored in (False, True):
        first, second = _candidates(coarse, mirrored)
        correlation = _correlations(fine, first, second, mirrored)
        columns = {"first": numbers[first], "second": numbers[second], "correlation": correlation}
        parts.append(pd.DataFrame({**columns, "mirrored": np.full(len(first), mirrored)}))
    pairs = pd.concat(parts)
    pairs = pairs[pairs["correlation"] > FINE].sort_values("correlation", ascending=False, kind="stable")
    return pairs.drop_duplicates(["first", "second"], ignore_index=True)  # one may match both upright and mirrored


def _details(pixels: ImageLoader, rows: npt.NDArray[np.int64]) -> _Floats:
    """High-pass filtered grey thumbnails, (N, 32, 32)."""
    details = np.empty((len(rows), _SIDE, _SIDE), np.float32)
    for detail, row in zip(details, rows.tolist(), strict=True):
        grey = cv2.cvtColor(pixels(row), cv2.COLOR_RGB2GRAY)
        thumbnail = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        detail[:] = thumbnail - cv2.GaussianBlur(thumbnail, (0, 0), _BLUR)
    return details


def _unit(details: _Floats) -> _Floats:
    """Standardised to mean 0 and norm 1, so that dot products are correlations; nearly flat pictures stay below 1."""
    unit: _Floats = details - details.mean((1, 2), keepdims=True)
    length = np.sqrt(np.einsum("nij,nij->n", unit, unit))
    unit /= np.maximum(length, details.shape[1])[:, None, None]
    return unit


def _candidates(coarse: _Floats, mirrored: bool) -> npt.NDArray[np.int64]:
    """Pairs whose coarse thumbnails match, the second one mirrored if asked: (2, P), first < second."""
    others = (coarse[:, :, ::-1] if mirrored else coarse).reshape(len(coarse), -1)
    parts = [np.empty((0, 2), np.int64)]
    for start in range(0, len(coarse), _BLOCK):
        some = coarse[start : start + _BLOCK].reshape(-1, others.shape[1])
        pairs = np.argwhere(some @ others[start:].T > COARSE)
        parts.append(pairs[pairs[:, 1] > pairs[:, 0]] + start)
    return np.concatenate(parts).T


def _correlations(
    unit: _Floats, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], mirrored: bool
) -> npt.NDArray[np.float64]:
    """(P,) correlations of pairs, the second one mirrored if asked."""
    others = unit[:, :, ::-1] if mirrored else unit
    correlations = np.empty(len(first))
    for start in range(0, len(first), _BLOCK):
        some = slice(start, start + _BLOCK)
        correlations[some] = (unit[first[some]] * others[second[some]]).sum((1, 2))
    return np.minimum(correlations, 1)  # float32 sums may exceed it
