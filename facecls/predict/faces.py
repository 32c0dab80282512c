"""Predictions as a table: of a stream of inputs in batches, and of images in memory."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import PIL.Image
import torch
from torch import Tensor

from facecls.analysis.predictions import estimate_columns
from facecls.data.archives import UnreadableError
from facecls.data.parallel import in_order
from facecls.data.store import pillow_pixels
from facecls.data.transforms import EvalTransform
from facecls.model.predictor import Estimates, Predictor
from facecls.predict.inputs import Input, on_disk

Image = str | Path | npt.NDArray[np.uint8] | PIL.Image.Image
"""The path of an image file, RGB pixels (H, W, 3), or a Pillow image."""
BATCH_SIZE = 64
"""Faces that go through the model at a time."""
_HIGHEST_NORMALISED = 3
"""Above the highest float of an image in 0..1 or standardised: 2.64 by ImageNet's mean and standard deviation."""


class Batch(NamedTuple):
    """Inputs that were predicted together.

    Attributes:
        table: One row per input, as ``FacePredictor.predict`` returns them.
        pixels: Per row, uint8 (S, S, 3) as the model saw it, or None for an input that can't be read.
        labels: Per row, the labels of a manifest as texts by task; empty without one.
    """

    table: pd.DataFrame
    pixels: list[npt.NDArray[np.uint8] | None]
    labels: list[Mapping[str, str]]


class _Face(NamedTuple):
    given: Input
    pixels: npt.NDArray[np.uint8] | None = None
    error: str | None = None


def predict_stream(predictor: Predictor, inputs: Iterator[Input], batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Predicts inputs in batches, while threads read and decode at most the next two.

    Args:
        predictor: The model.
        inputs: Taken as they are needed.
        batch_size: Rows that are predicted together.

    Yields:
        ``batch_size`` rows at a time in the order of the inputs, fewer in the last batch.
    """
    prepare = partial(_prepare, EvalTransform(predictor.image_size))
    faces = in_order(prepare, inputs, ahead=2 * batch_size)
    while batch := list(islice(faces, batch_size)):
        yield _predict(predictor, batch)


def _prepare(resize: EvalTransform, given: Input) -> _Face:
    try:
        return _Face(given, pixels=resize(image=given.load())["image"])
    except UnreadableError as error:
        return _Face(given, error=str(error))


def _predict(predictor: Predictor, faces: Sequence[_Face]) -> Batch:
    pixels = [face.pixels for face in faces]
    estimates: Estimates = {}
    if readable := [image for image in pixels if image is not None]:
        estimates = predictor.estimate(torch.from_numpy(np.stack(readable)).permute(0, 3, 1, 2))
    table = _table(predictor, [face.given.path for face in faces], [face.error for face in faces], estimates)
    return Batch(table, pixels, [face.given.labels for face in faces])


def columns(predictor: Predictor) -> dict[str, str]:
    """The columns of the table, in order.

    Args:
        predictor: The model; its tasks and outputs decide which columns there are.

    Returns:
        ``str``, ``float32`` or ``Int16`` by name.
    """
    types = {"path": "str"}
    for name, task in predictor.tasks.items():
        has_interval = f"{name}_distribution" in predictor.outputs
        of_interval = () if has_interval else (f"{name}_low", f"{name}_high")
        types |= {column: dtype for column, dtype in task.prediction_columns.items() if column not in of_interval}
    return types | {"error": "str"}


def _table(
    predictor: Predictor, paths: Sequence[str | None], errors: Sequence[str | None], estimates: Estimates
) -> pd.DataFrame:
    types = columns(predictor)
    values: dict[str, Any] = {}
    for name, task in predictor.tasks.items():
        if name in estimates:
            values |= estimate_columns(task, estimates)
            if types[name] == "str":
                values[name] = [task.text(code) for code in values[name]]
    is_readable = np.array([error is None for error in errors], bool)
    cells: dict[str, Sequence[Any]] = {"path": paths, "error": errors}
    for name in types.keys() - cells:
        spread = np.full(len(paths), None, object)
        if name in values:
            spread[is_readable] = values[name]
        cells[name] = spread.tolist()
    return pd.DataFrame({name: pd.Series(cells[name], dtype=dtype) for name, dtype in types.items()})


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
        """Tasks and size of the images."""
        size = self.predictor.image_size
        return f"FacePredictor({', '.join(self.predictor.tasks)}; {size} x {size} pixels)"

    def predict(self, images: Image | Tensor | Sequence[Image], batch_size: int = BATCH_SIZE) -> pd.DataFrame:
        """Predicts faces, each of which fills its image.

        Args:
            images: One or many: paths of image files (str or ``Path``; no folders or archives), RGB pixels as uint8
                arrays (H, W, 3), Pillow images, of any sizes, also mixed; or one uint8 or float tensor (N, 3, H, W),
                RGB, 0..255. Floats are rounded. All are resized to the model's size.
            batch_size: How many go through the model at a time.

        Returns:
            One row per image, in order: ``path`` (str, missing for what is not a path); for each task of the model its
            columns; ``error`` (str, why an image can't be read; the columns of the tasks are missing then). A
            classification such as gender has ``gender`` (str, a class) and the probability of each class, ``p_male``
            and ``p_female`` (float32; ``p_<task>_<class>`` for tasks other than gender and race). An age has ``age``
            (float32, years) and, from a distribution, ``age_low`` and ``age_high`` (Int16, years), which bound 90 % of
            it.

        Raises:
            TypeError: If an image is of no such kind.
            ValueError: If an array or a tensor has another shape, or float values that look like 0..1 or standardised.
        """
        inputs = [_input(image) for image in _separated(images)]
        tables = [batch.table for batch in predict_stream(self.predictor, iter(inputs), batch_size)]
        return pd.concat(tables or [_table(self.predictor, [], [], {})], ignore_index=True)


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


def _input(image: Any) -> Input:
    if isinstance(image, str | Path):
        return on_disk(Path(image))
    if isinstance(image, PIL.Image.Image):
        return Input(None, partial(_of_pillow, image))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"Expected paths, uint8 arrays, Pillow images or a tensor, but got {type(image).__name__}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"Expected uint8 pixels of shape (H, W, 3), but got {image.dtype} of shape {image.shape}.")
    return Input(None, partial(np.ascontiguousarray, image))


def _of_pillow(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    try:
        return pillow_pixels(image)
    except OSError as error:  # Pillow reads its files late
        raise UnreadableError("not an image") from error
