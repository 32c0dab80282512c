"""Gallery: faces, and the mistakes that the model was surest of."""

import base64

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from facecls.analysis.duplicates import Pixels
from facecls.analysis.gradcam import grad_cam, overlay
from facecls.analysis.tables import AGE_WRONG, labelled, tested_tasks
from facecls.data.tasks import CLASSES, TASKS, Task
from facecls.data.transforms import EvalTransform
from facecls.model.heads import FaceModel
from facecls.report.blocks import Block, Content, Missing, Section, Text, Tile, Tiles, words
from facecls.run import Run

SHOWN = 24
"""Faces of the grid; with the mistakes and the suspects few enough for a page of 2 MB."""
MISTAKES = 12
"""Of each task."""
SIDE = 112
"""Pixels of a face on the page."""
_QUALITY = 82
"""Of JPEG; at this size a face takes 4 kB."""
NO_PICTURES = "The pictures were not at hand; `python -m facecls.report {} --data.root WHERE` adds them."


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A picture as a small JPEG inside a link.

    Args:
        pixels: RGB (H, W, 3), 0..255.

    Returns:
        ``data:image/jpeg;base64,...``
    """
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def gallery(run: Run, image: Pixels | None, model: FaceModel | None, seed: int) -> Section:
    """Faces with what was predicted, and the mistakes that the model was surest of.

    Args:
        run: With its predictions.
        image: Row number of the predictions -> the face; ``None`` without pictures.
        model: Shows what the head looked at; ``None`` without.
        seed: Of the faces that are drawn for the grid.
    """
    table = run.predictions
    if image is None:
        return Section("Gallery", [Missing(NO_PICTURES.format(run.folder))])
    rows = np.sort(np.random.default_rng(seed).permutation(len(table))[:SHOWN])
    tiles = [Tile([(data_uri(image(row)), f"face {row}")], _lines(table, row)) for row in rows.tolist()]
    size = int(run.data.get("image_size", 224))
    blocks: list[Block] = [
        Text(
            f"{len(tiles)} faces drawn at random: the labels above, what was predicted below them; ✗ and red where "
            f"that is wrong, an age where it is more than {AGE_WRONG} years off."
        ),
        Tiles("Faces drawn at random", tiles),
    ]
    why_not = "the checkpoint was not at hand." if model is None else _unexplainable(model, image(0), size)
    for task in tested_tasks(table):
        explains = model is not None and not why_not and task in model.heads
        blocks += _mistakes(table, task, image, model if explains else None, size)
    if why_not:
        blocks.append(Missing(f"What the heads looked at is not shown: {why_not}"))
    return Section("Gallery", blocks)


def _unexplainable(model: FaceModel, pixels: npt.NDArray[np.uint8], size: int) -> str:
    """Why Grad-CAM can't explain a model, such as a CrossViT, whose features are two maps; nothing if it can."""
    try:
        grad_cam(model, _resized(pixels, size), next(task for task in TASKS if task in model.heads))
    except ValueError as error:
        return str(error)
    return ""


def _resized(pixels: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """A face as the model sees it, (3, size, size) uint8."""
    return torch.from_numpy(EvalTransform(size)(image=pixels)["image"]).permute(2, 0, 1)


def confident_mistakes(table: pd.DataFrame, task: Task, number: int) -> list[int]:
    """The mistakes that the model was surest of.

    For gender and race those with the highest probability of the predicted class; for age those that are more than
    ``AGE_WRONG`` years off, by how many widths of their interval they are, or by years where there are no intervals.

    Args:
        table: Predictions, its rows numbered from 0.
        task: Which.
        number: How many at most.

    Returns:
        Row numbers, the surest first.
    """
    known = labelled(table, task)
    if task == "age":
        off = (known["age_predicted"].astype(float) - known["age"].astype(float)).abs()
        width = known["age_high"] - known["age_low"] + 1 if "age_low" in known else 1
        wrong = (off / width)[off > AGE_WRONG]
    else:
        sure = known[[f"p_{name}" for name in CLASSES[task]]].max(axis=1)
        wrong = sure[known[task] != known[f"{task}_predicted"]]
    return [int(row) for row in wrong.sort_values(ascending=False, kind="stable").index[:number]]


def _mistakes(table: pd.DataFrame, task: Task, image: Pixels, model: FaceModel | None, size: int) -> list[Block]:
    rows = confident_mistakes(table, task, MISTAKES)
    heading = words("<strong>{}: the mistakes that the model was surest of</strong>", task.capitalize())
    if not rows:
        return [Text(heading), Text("There are none.")]
    tiles: list[Tile] = []
    blocks: list[Block] = [Text(heading)]
    for row in rows:
        pixels = image(row)
        images = [(data_uri(pixels), f"face {row}")]
        if model is not None:
            face = _resized(pixels, size)
            laid = overlay(face, grad_cam(model, face, task))
            images.append((data_uri(laid), f"what the {task} head looked at in face {row}"))
        tiles.append(Tile(images, _lines(table, row), [_confidence(table, task, row)]))
    if model is not None:
        what = "makes the estimated age higher" if task == "age" else "speaks for what was predicted"
        blocks.append(
            Text(f"Beside each face, what {what} (Grad-CAM of the {task} head): the more, the more coloured.")
        )
    return [*blocks, Tiles(f"Confident mistakes of {task}", tiles)]


def _lines(table: pd.DataFrame, row: int) -> list[Content]:
    """The labels of a face, and the predictions, marked where they are wrong."""
    true, said = [], []
    for task in TASKS:
        if f"{task}_predicted" not in table:
            continue
        label, predicted = table[task].iloc[row], float(table[f"{task}_predicted"].iloc[row])
        true.append("no label" if pd.isna(label) else _named(task, float(label)))
        wrong = not pd.isna(label) and abs(predicted - label) > (AGE_WRONG if task == "age" else 0)
        said.append(words("<b>✗ {}</b>" if wrong else "{}", _named(task, predicted)))
    return [", ".join(true), words(", ").join(said)]


def _named(task: Task, value: float) -> str:
    return f"{value:.0f}" if task == "age" else CLASSES[task][int(value)]


def _confidence(table: pd.DataFrame, task: Task, row: int) -> str:
    if task != "age":
        return f"{100 * table[[f'p_{name}' for name in CLASSES[task]]].iloc[row].max():.1f} % sure"
    if "age_low" in table:
        return f"90 % interval {table['age_low'].iloc[row]} to {table['age_high'].iloc[row]}"
    return f"{table['age_predicted'].iloc[row] - table['age'].iloc[row]:+.1f} years off"
