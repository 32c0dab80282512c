"""What a model says about faces: as a table, in batches from a stream, and as a library."""

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

from facecls.analysis.predictions import age_interval
from facecls.data.parallel import in_order
from facecls.data.sources import UnreadableError
from facecls.data.store import pillow_pixels
from facecls.data.tasks import CLASSES, Labels
from facecls.data.transforms import EvalTransform
from facecls.model.predictor import Predictor
from facecls.predict.inputs import Input, on_disk

Image = str | Path | npt.NDArray[np.uint8] | PIL.Image.Image
"""The path of an image file, RGB pixels (H, W, 3), or a picture of Pillow's."""
BATCH_SIZE = 64
"""Faces that go through the model at a time."""
_TOP = 3
"""Above the highest float of a picture in 0..1, or standardised: 2.64 by ImageNet's mean and standard deviation."""


class Batch(NamedTuple):
    """What was predicted together.

    Attributes:
        table: A row for each input, as ``Faces.predict`` gives them.
        pixels: Of each row, uint8 (S, S, 3) as the model saw it, or None for an input that can't be read.
        labels: Of each row, what a manifest says about it.
    """

    table: pd.DataFrame
    pixels: list[npt.NDArray[np.uint8] | None]
    labels: list[Labels | None]


class _Face(NamedTuple):
    path: str | None
    pixels: npt.NDArray[np.uint8] | None
    error: str | None
    labels: Labels | None


def predict_stream(predictor: Predictor, inputs: Iterator[Input], batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Predicts faces in batches; the next two are read and decoded in threads meanwhile, and no more are held.

    Args:
        predictor: The model.
        inputs: The faces, taken as they are needed.
        batch_size: How many rows are predicted together.

    Yields:
        ``batch_size`` rows at a time in the order of the inputs, fewer in the last batch.
    """
    prepare = partial(_prepare, EvalTransform(predictor.image_size))
    faces = in_order(prepare, inputs, ahead=2 * batch_size)
    while batch := list(islice(faces, batch_size)):
        yield _predict(predictor, batch)


def _prepare(resize: EvalTransform, given: Input) -> _Face:
    try:
        return _Face(given.path, resize(image=given.load())["image"], None, given.labels)
    except UnreadableError as error:
        return _Face(given.path, None, str(error), given.labels)


def _predict(predictor: Predictor, faces: Sequence[_Face]) -> Batch:
    pixels = [face.pixels for face in faces]
    estimates = {}
    if readable := [image for image in pixels if image is not None]:
        estimates = predictor.estimate(torch.from_numpy(np.stack(readable)).permute(0, 3, 1, 2))
    table = _table(predictor, [face.path for face in faces], [face.error for face in faces], estimates)
    return Batch(table, pixels, [face.labels for face in faces])


def columns(predictor: Predictor) -> dict[str, str]:
    """The columns of the table, in order, and their types.

    Args:
        predictor: The model; it decides which columns there are.

    Returns:
        ``str``, ``float32`` or ``Int16`` by name.
    """
    found = {"path": "str"}
    for task, names in CLASSES.items():
        if task in predictor.tasks:
            found |= {task: "str"} | {f"p_{name}": "float32" for name in names}
    if "age" in predictor.tasks:
        found["age"] = "float32"
        if predictor.age_head == "distribution":
            found |= {"age_low": "Int16", "age_high": "Int16"}
    return found | {"error": "str"}


def _table(
    predictor: Predictor,
    paths: Sequence[str | None],
    errors: Sequence[str | None],
    estimates: Mapping[str, npt.NDArray[np.float32]],
) -> pd.DataFrame:
    values: dict[str, npt.NDArray[Any]] = {}
    for task, names in CLASSES.items():
        if task in estimates:
            values[task] = np.array(names, object)[estimates[task].argmax(1)]
            values |= {f"p_{name}": estimates[task][:, code] for code, name in enumerate(names)}
    if "age" in estimates:
        values["age"] = estimates["age"]
    if "age_distribution" in estimates:
        values["age_low"], values["age_high"] = age_interval(estimates["age_distribution"])
    readable = np.array([error is None for error in errors], bool)
    cells: dict[str, Sequence[Any]] = {"path": paths, "error": errors}
    for name in columns(predictor):
        if name not in cells:
            spread = np.full(len(paths), None, object)
            if name in values:
                spread[readable] = values[name]
            cells[name] = spread.tolist()
    return pd.DataFrame({name: pd.Series(cells[name], dtype=dtype) for name, dtype in columns(predictor).items()})


class Faces:
    """A trained model as a library has it; ``facecls.load`` makes one.

    Args:
        predictor: The model.

    Attributes:
        predictor: The model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, images: Image | Tensor | Sequence[Image], batch_size: int = BATCH_SIZE) -> pd.DataFrame:
        """Predicts gender, race and age of faces, each the whole of a picture.

        Args:
            images: One or many: paths of image files (str or ``Path``; no folders or archives), RGB pixels as uint8
                arrays (H, W, 3), pictures of Pillow's, of any sizes, also mixed; or one uint8 or float tensor
                (N, 3, H, W), RGB, 0..255. Floats are rounded. All are resized to the model's size.
            batch_size: How many go through the model at a time.

        Returns:
            A row for each, in their order: ``path`` (str, missing for what is not a path); ``gender`` (name),
            ``p_male``, ``p_female``; ``race`` (name), ``p_white``, ``p_black``, ``p_asian``, ``p_indian``,
            ``p_others``; ``age`` (float32, years); ``age_low`` and ``age_high`` (Int16, years, between which 90 % of
            the age distribution lies); ``error`` (str, why a file can't be read; the other columns are missing then).
            A task that the model was not trained for has no columns.

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
        if images.numel() and not (top := images.max().item()) > _TOP:
            raise ValueError(
                f"Expected values 0..255, but got floats up to {top:g}, which look like 0..1 or standardised; give "
                "them as they were read."
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
        raise TypeError(
            f"Expected paths, uint8 arrays, pictures of Pillow's or a tensor, but got {type(image).__name__}."
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"Expected uint8 pixels of shape (H, W, 3), but got {image.dtype} of shape {image.shape}.")
    return Input(None, partial(np.ascontiguousarray, image))


def _of_pillow(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    try:
        return pillow_pixels(image)
    except OSError as error:  # Pillow reads its files late
        raise UnreadableError("not an image") from error
