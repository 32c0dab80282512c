"""Predictions as a table: of a stream of photos in batches, and of images in memory."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import PIL.Image
import torch
from torch import Tensor

from facecls.analysis.predictions import check_finite, estimate_columns
from facecls.data.archives import UnreadableError
from facecls.data.limits import BYTES_AHEAD
from facecls.data.parallel import in_order
from facecls.data.store import pillow_pixels
from facecls.finding.detector import Detector
from facecls.model.predictor import Estimates, Predictor
from facecls.predict.finder import Faces, Finder, Taken, take_from
from facecls.predict.inputs import NO_FACE, Input, stream

Image = str | Path | npt.NDArray[np.uint8] | PIL.Image.Image
"""The path of an image file, RGB pixels (H, W, 3), or a Pillow image."""
BATCH_SIZE = 64
"""Faces that go through the model at a time."""
_LONGEST_WAIT = 5.0
"""Seconds after which the faces found so far are predicted, so that an interruption loses little."""
_HIGHEST_NORMALISED = 3
"""Above the highest float of an image in 0..1 or standardised: 2.64 by ImageNet's mean and standard deviation."""


class Batch(NamedTuple):
    """Photos that were predicted together.

    Attributes:
        table: One row per face, as ``FacePredictor.predict`` returns them.
        pixels: Per row, uint8 (S, S, 3) as the model saw it, or None for a photo that can't be read or has no face.
        inputs: Per row, the photo.
        photos: How many photos the rows are of.
    """

    table: pd.DataFrame
    pixels: list[npt.NDArray[np.uint8] | None]
    inputs: list[Input]
    photos: int


class _Photo(NamedTuple):
    given: Input
    faces: list[Taken]
    error: str | None = None


class _Row(NamedTuple):
    """A face of a photo, or what stands for one that can't be read or has none."""

    given: Input
    number: int | None
    taken: Taken | None
    error: str | None


def predict_stream(
    predictor: Predictor, finder: Finder, inputs: Iterator[Input], batch_size: int = BATCH_SIZE
) -> Iterator[Batch]:
    """Predicts the faces of photos in batches, while threads read, decode and search the next photos.

    Args:
        predictor: The model.
        finder: Takes faces out of photos.
        inputs: Taken as they are needed.
        batch_size: Faces that are predicted together.

    Yields:
        Whole photos in the order of the inputs, with at least ``batch_size`` faces together, or fewer where it takes
        long to find them, and at the end.
    """
    photos = in_order(partial(_prepare, finder), inputs, ahead=2 * batch_size, held=lambda given: given.held)
    waiting: list[_Photo] = []
    since = time.monotonic()
    for photo in photos:
        waiting.append(photo)
        is_full = sum(max(1, len(each.faces)) for each in waiting) >= batch_size
        is_full |= sum(each.given.held for each in waiting) > BYTES_AHEAD
        if is_full or time.monotonic() - since >= _LONGEST_WAIT:
            yield _predict(predictor, finder, waiting, batch_size)
            waiting, since = [], time.monotonic()
    if waiting:
        yield _predict(predictor, finder, waiting, batch_size)


def _prepare(finder: Finder, given: Input) -> _Photo:
    taken = take_from(given.load, finder.take)
    if isinstance(taken, str):
        return _Photo(given, [], taken)
    return _Photo(given, taken, None if taken else NO_FACE)


def _predict(predictor: Predictor, finder: Finder, photos: Sequence[_Photo], batch_size: int) -> Batch:
    rows = [row for photo in photos for row in _rows(photo)]
    pixels = [None if row.taken is None else row.taken.pixels for row in rows]
    known = [image for image in pixels if image is not None]
    parts = [known[start : start + batch_size] for start in range(0, len(known), batch_size)]
    found = [predictor.estimate(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in parts]
    estimates: Estimates = {name: np.concatenate([part[name] for part in found]) for name in (found or [{}])[0]}
    check_finite(estimates, [str(row.given.path) for row in rows if row.taken is not None])
    return Batch(_table(predictor, finder, rows, estimates), pixels, [row.given for row in rows], len(photos))


def _rows(photo: _Photo) -> list[_Row]:
    if not photo.faces:
        return [_Row(photo.given, None, None, photo.error)]
    return [_Row(photo.given, number, taken, None) for number, taken in enumerate(photo.faces, 1)]


def columns(predictor: Predictor, finder: Finder) -> dict[str, str]:
    """The columns of the table, in order.

    Args:
        predictor: The model; its tasks and outputs decide which columns there are.
        finder: Decides whether there are columns about the place of a face.

    Returns:
        ``str``, ``float32``, ``Int16`` or ``Int32`` by name.
    """
    types = {"path": "str", **finder.columns}
    for name, task in predictor.tasks.items():
        has_interval = f"{name}_distribution" in predictor.outputs
        of_interval = () if has_interval else (f"{name}_low", f"{name}_high")
        types |= {column: dtype for column, dtype in task.prediction_columns.items() if column not in of_interval}
    return types | {"error": "str"}


def _table(predictor: Predictor, finder: Finder, rows: Sequence[_Row], estimates: Estimates) -> pd.DataFrame:
    types = columns(predictor, finder)
    values: dict[str, Any] = {}
    for name, task in predictor.tasks.items():
        if name in estimates:
            values |= estimate_columns(task, estimates)
            if types[name] == "str":
                values[name] = [task.text(code) for code in values[name]]
    is_known = np.array([row.taken is not None for row in rows], bool)
    cells: dict[str, Sequence[Any]] = {"path": [row.given.path for row in rows], "error": [row.error for row in rows]}
    if finder.columns:
        cells |= _places(rows)
    for name in types.keys() - cells:
        spread = np.full(len(rows), None, object)
        if name in values:
            spread[is_known] = values[name]
        cells[name] = spread.tolist()
    return pd.DataFrame({name: pd.Series(cells[name], dtype=dtype) for name, dtype in types.items()})


def _places(rows: Sequence[_Row]) -> dict[str, Sequence[Any]]:
    """The cells about the place of each face, in whole pixels."""
    faces = [None if row.taken is None else row.taken.face for row in rows]
    boxes = {
        name: [None if face is None else round(getattr(face, name)) for face in faces]
        for name in ("x", "y", "width", "height")
    }
    scores = [None if face is None else face.score for face in faces]
    return {"face": [row.number for row in rows], **boxes, "score": scores}


class FacePredictor:
    """A trained model for use from Python; create one with ``facecls.load``.

    Args:
        predictor: The model.

    Attributes:
        predictor: The model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def __repr__(self) -> str:
        """Tasks, size of the images, and the frame of the faces."""
        size, frame = self.predictor.image_size, self.predictor.frame
        framed = "photos as they are" if frame is None else f"faces in the frame of {frame.source}"
        return f"FacePredictor({', '.join(self.predictor.tasks)}; {size} x {size} pixels; {framed})"

    def predict(
        self,
        images: Image | Tensor | Sequence[Image],
        batch_size: int = BATCH_SIZE,
        faces: Faces = "all",
        detector: Detector | None = None,
    ) -> pd.DataFrame:
        """Predicts the faces in photos.

        Args:
            images: One or many: paths of image files, folders, globs, archives, videos or manifests (str or ``Path``),
                RGB pixels as uint8 arrays (H, W, 3), Pillow images, of any sizes, also mixed; or one uint8 or float
                tensor (N, 3, H, W), RGB, 0..255. Floats are rounded.
            batch_size: How many faces go through the model at a time.
            faces: ``all`` that are found, the ``largest`` of each photo, or ``whole`` for photos that are taken as they
                are, each as one face.
            detector: Finds the faces; ``None`` for the usual one.

        Returns:
            One row per face, photos in order and their faces from left to right; one for a photo that can't be read or
            has no face. ``path`` (str, missing for what is not a path); ``face`` (Int16, from 1), ``x``, ``y``,
            ``width``, ``height`` (Int32, pixels) and ``score`` (float32, 0..1) of its box, unless photos are taken as
            they are; for each task of the model its columns; ``error`` (str, why there is no prediction; the other
            columns are missing then). A classification such as gender has ``gender`` (str, a class) and the probability
            of each class, ``p_male`` and ``p_female`` (float32; ``p_<task>_<class>`` for tasks other than gender and
            race). An age has ``age`` (float32, years) and, from a distribution, ``age_low`` and ``age_high`` (Int16,
            years), which bound 90 % of it.

        Raises:
            TypeError: If an image is of no such kind.
            ValueError: If an array or a tensor has another shape, or float values that look like 0..1 or standardised.
        """
        finder = Finder(self.predictor, faces, detector)
        inputs = chain.from_iterable(map(_inputs, _separated(images)))
        tables = [batch.table for batch in predict_stream(self.predictor, finder, inputs, batch_size)]
        return pd.concat(tables or [_table(self.predictor, finder, [], {})], ignore_index=True)


def _separated(images: Any) -> Sequence[Any]:
    if isinstance(images, Tensor):
        return list(_bytes(images).permute(0, 2, 3, 1).numpy())  # (H, W, 3) each
    if isinstance(images, str | Path | PIL.Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return list(images)


def _bytes(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected a tensor of shape (N, 3, H, W), but got {tuple(images.shape)}.")
    if images.is_floating_point():
        if images.numel() and not (top := images.max().item()) > _HIGHEST_NORMALISED:
            raise ValueError(
                f"Expected values 0..255, but got floats up to {top:g}, which look like 0..1 or standardised; pass "
                "values as they were read."
            )
        images = images.detach().round().clamp(0, 255).to(torch.uint8)
    if images.dtype != torch.uint8:
        raise ValueError(f"Expected a uint8 or float tensor, but got {images.dtype}.")
    return images.cpu()


def _inputs(image: Any) -> Iterator[Input]:
    if isinstance(image, str | Path):
        yield from stream([str(image)])
    elif isinstance(image, PIL.Image.Image):
        yield Input(None, partial(_of_pillow, image))
    elif not isinstance(image, np.ndarray):
        raise TypeError(f"Expected paths, uint8 arrays, Pillow images or a tensor, but got {type(image).__name__}.")
    elif image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"Expected uint8 pixels of shape (H, W, 3), but got {image.dtype} of shape {image.shape}.")
    else:
        yield Input(None, partial(np.ascontiguousarray, image))


def _of_pillow(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    try:
        return pillow_pixels(image)
    except OSError as error:  # Pillow reads its files late
        raise UnreadableError("not an image") from error
