"""Section with faces: a random sample, and the most confident mistakes."""

import base64
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from facecls.analysis.duplicates import ImageLoader
from facecls.analysis.gradcam import grad_cam, overlay
from facecls.analysis.labels import column_values, label_ends, label_texts, prediction_texts
from facecls.analysis.tables import tested_tasks
from facecls.data.tasks import WRONG_YEARS, Classification, Task, ages
from facecls.data.transforms import EvalTransform
from facecls.model.network import FaceModel
from facecls.report.blocks import (
    NONE,
    Block,
    Content,
    Missing,
    Section,
    Text,
    Tile,
    Tiles,
    sentence,
    subheading,
)
from facecls.run import Run

SHOWN = 24
"""Faces of the sample; with the mistakes and the suspects few enough for a page of 2 MB."""
MISTAKES = 12
"""Mistakes shown of each task."""
SIDE = 112
"""Width and height of a face on the page in pixels."""
_QUALITY = 82
"""JPEG quality; at this size a face takes 4 kB."""
NO_PICTURES = "The images were not found; `python -m facecls.report {} --data.root WHERE` adds them."


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encodes an image as a small JPEG in a data URI.

    Args:
        pixels: RGB (H, W, 3), 0..255.

    Returns:
        ``data:image/jpeg;base64,...``
    """
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def gallery(run: Run, image: ImageLoader | None, model: FaceModel | None, seed: int) -> Section:
    """A random sample of faces with their predictions, and the most confident mistakes.

    Args:
        run: The run.
        image: Row number of the predictions -> the face; ``None`` without images.
        model: For Grad-CAM maps of its heads; ``None`` for none.
        seed: Of the sample.
    """
    table = run.predictions
    if image is None:
        return Section("gallery", "Gallery", [Missing(NO_PICTURES.format(run.folder))])
    rows = np.sort(np.random.default_rng(seed).permutation(len(table))[:SHOWN]).tolist()
    tiles = [
        Tile([(data_uri(image(row)), f"face {row}")], [labels], [predictions])
        for row, (labels, predictions) in zip(rows, _captions(run, rows), strict=True)
    ]
    size = int(run.data.get("image_size", 224))
    margin = f"; an age counts as wrong if it is more than {WRONG_YEARS} years off" if ages(run.tasks.values()) else ""
    blocks: list[Block] = [
        Text(
            f"{len(tiles)} random face{'' if len(tiles) == 1 else 's'}: labels above, predictions below; wrong "
            f"predictions are red and marked ✗{margin}."
        ),
        Tiles("Random faces", tiles),
    ]
    why_not = "the checkpoint was not found." if model is None else _why_unexplainable(model, image(0), size)
    for task in tested_tasks(table, run.tasks):
        explains = model is not None and not why_not and task.name in model.heads
        blocks += _mistakes(run, task, image, model if explains else None, size)
    if why_not:
        blocks.append(Missing(f"There are no Grad-CAM maps: {why_not}"))
    return Section("gallery", "Gallery", blocks)


def _why_unexplainable(model: FaceModel, pixels: npt.NDArray[np.uint8], size: int) -> str:
    """Why Grad-CAM does not work for a model, such as a CrossViT, whose features are two maps; empty if it does."""
    try:
        grad_cam(model, _resized(pixels, size), next(iter(model.tasks.values())))
    except ValueError as error:
        return str(error)
    return ""


def _resized(pixels: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """A face as the model sees it, (3, size, size) uint8."""
    return torch.from_numpy(EvalTransform(size)(image=pixels)["image"]).permute(2, 0, 1)


def confident_mistakes(table: pd.DataFrame, task: Task, number: int) -> list[int]:
    """The mistakes that the model was most confident of.

    Of a classification, those with the highest probability of the predicted class. Of an age, those more than
    ``WRONG_YEARS`` off, by their error in widths of the predicted interval, or in years if there are no intervals.

    Args:
        table: Predictions, with rows numbered from 0.
        task: The task.
        number: Largest number of mistakes.

    Returns:
        Row numbers, the most confident first.
    """
    wrong = np.flatnonzero(_is_wrong(table, task))
    if isinstance(task, Classification):
        confidence = table[list(task.probabilities)].max(axis=1).to_numpy(float)[wrong]
    else:
        width = table[f"{task.name}_high"] - table[f"{task.name}_low"] + 1 if f"{task.name}_low" in table else 1
        confidence = (_years_off(table, task) / np.asarray(width, float))[wrong]
    return [int(row) for row in wrong[np.argsort(-confidence, kind="stable")[:number]]]


def _is_wrong(table: pd.DataFrame, task: Task) -> npt.NDArray[np.bool_]:
    """Whether each prediction is a mistake; where the label is a range, it is compared with the nearest end."""
    (low, high), predicted = label_ends(table, task), column_values(table, f"{task.name}_predicted")
    pairs = zip(np.clip(predicted, low, high), predicted, strict=True)
    return np.array([not np.isnan(label) and task.is_wrong(label, guess) for label, guess in pairs], np.bool_)


def _years_off(table: pd.DataFrame, task: Task) -> npt.NDArray[np.float64]:
    """(N,) how far each predicted age is from its label, or from the nearest end of its range."""
    (low, high), predicted = label_ends(table, task), column_values(table, f"{task.name}_predicted")
    return np.abs(predicted - np.clip(predicted, low, high))


def _mistakes(run: Run, task: Task, image: ImageLoader, model: FaceModel | None, size: int) -> list[Block]:
    rows = confident_mistakes(run.predictions, task, MISTAKES)
    blocks: list[Block] = [subheading(f"{task.title}: most confident mistakes")]
    if not rows:
        return [*blocks, Text("There are none.")]
    tiles: list[Tile] = []
    for row, (labels, predictions) in zip(rows, _captions(run, rows), strict=True):
        pixels = image(row)
        images = [(data_uri(pixels), f"face {row}")]
        if model is not None:
            face = _resized(pixels, size)
            map_of_face = overlay(face, grad_cam(model, face, task))
            images.append((data_uri(map_of_face), f"Grad-CAM map of the {task.title.lower()} head for face {row}"))
        tiles.append(Tile(images, [labels], [predictions, _confidence(run.predictions, task, row)]))
    if model is not None:
        what = "the predicted class" if isinstance(task, Classification) else "a higher age"
        name = task.title.lower()
        blocks.append(Text(f"Beside each face, a Grad-CAM map of the {name} head: colour marks what supports {what}."))
    return [*blocks, Tiles(f"Confident mistakes about {task.title.lower()}", tiles)]


def _captions(run: Run, rows: Sequence[int]) -> list[tuple[Content, Content]]:
    """The labels of each face, and its predictions, marked where they are wrong."""
    table = run.predictions.iloc[list(rows)]
    tasks = [task for name, task in run.tasks.items() if f"{name}_predicted" in table]
    columns = [
        zip(label_texts(table, task), prediction_texts(table, task), _is_wrong(table, task), strict=True)
        for task in tasks
    ]
    captions: list[tuple[Content, Content]] = []
    for face in zip(*columns, strict=True):  # a label, a prediction and whether it is wrong, for each task
        labels = ", ".join(label or "no label" for label, _, _ in face)
        marked = [sentence("<b>✗ {}</b>" if wrong else "{}", predicted or NONE) for _, predicted, wrong in face]
        captions.append((labels, sentence(", ").join(marked)))
    return captions


def _confidence(table: pd.DataFrame, task: Task, row: int) -> str:
    face = table.iloc[row]
    if isinstance(task, Classification):
        return f"confidence {100 * face[list(task.probabilities)].max():.1f} %"
    if f"{task.name}_low" in table:
        return f"90 % interval {face[f'{task.name}_low']} to {face[f'{task.name}_high']}"
    return f"{_years_off(table.iloc[[row]], task)[0]:.1f} years off"
