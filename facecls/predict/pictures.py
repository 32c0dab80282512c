"""Photos with what was predicted drawn into them, and the faces as the model saw them, as files."""

import hashlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
import pandas as pd
import PIL.Image
from PIL import ImageDraw, ImageFont

from facecls.data.archives import UnreadableError
from facecls.data.tasks import Task, Tasks
from facecls.errors import UserError
from facecls.files import make_folder, replacing, resolved
from facecls.predict.faces import Batch
from facecls.predict.inputs import Input, may_be_photo

_LEAST_SIDE = 480
"""Pixels; smaller photos are enlarged, so that texts can be read."""
_TEXT, _LEAST_TEXT = 1 / 45, 13
"""Height of the text as a share of the photo's longer side, and at least in pixels."""
_COLOUR, _INK = (255, 196, 0), (0, 0, 0)
_QUALITY, _LONGEST = 92, 200
"""Of a JPEG; bytes of the longest name that is kept."""


MARK = "made by facecls"
"""The comment in each picture: only a file with it is ever replaced."""


def check_folder(option: str, folder: Path, is_resumed: bool, inputs: Iterable[str]) -> None:
    """Rejects a folder for pictures that holds something, which might be the photos themselves.

    Args:
        option: Its name, for messages.
        folder: The folder; it is created if need be.
        is_resumed: Whether it may hold the pictures of a run that is continued.
        inputs: As on the command line.

    Raises:
        UserError: If it is such a folder, or can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"Expected a folder for {option} at {folder}, but {error.strerror}; name another.") from None
    if not (is_empty or is_resumed):
        raise UserError(f"Expected a new or empty folder for {option}, but {folder} holds something; name another.")
    own = resolved(folder)
    for place in map(resolved, inputs):
        if not is_empty and (place == own or own in place.parents):
            raise UserError(f"Expected a folder for {option} without photos, but {place} is an input; name another.")


class Pictures:
    """Writes pictures of predictions.

    Args:
        tasks: What is predicted.
        annotated: Folder of the photos with boxes and texts; ``None`` for none.
        crops: Folder of the faces as the model saw them; ``None`` for none.
    """

    def __init__(self, tasks: Tasks, annotated: Path | None, crops: Path | None) -> None:
        self.tasks = tasks
        self.annotated = annotated
        self.crops = crops

    def add(self, batch: Batch) -> None:
        """Writes the pictures of a batch.

        Args:
            batch: Predictions; photos without any are left out.

        Raises:
            UserError: If a file can't be written.
        """
        rows = zip(batch.inputs, batch.table.to_dict("records"), batch.pixels, strict=True)
        known = [(given, row, pixels) for given, row, pixels in rows if pixels is not None]
        if self.crops is not None:
            for given, row, pixels in known:
                number = row.get("face")
                _save_own(self.crops, given, None if number is None else int(number), pixels)
        if self.annotated is not None:
            for _, group in groupby(known, key=lambda each: id(each[0])):
                faces = list(group)
                given = faces[0][0]
                try:
                    photo = annotate(given.load(), pd.DataFrame([row for _, row, _ in faces]), self.tasks)
                except UnreadableError as error:
                    raise UserError(f"Expected {given.path} as it was a moment ago, but it is: {error}.") from None
                _save_own(self.annotated, given, None, photo)


def _save_own(folder: Path, given: Input, number: int | None, pixels: npt.NDArray[np.uint8]) -> None:
    """Writes a picture, under another name if its own is another photo's, as ``a``'s and ``a.jpg``'s are one.

    The pictures themselves say whose they are, so that a run that goes on and other processes know it, and file systems
    that do not tell ``a`` from ``A``.
    """
    about = hashlib.sha1(f"{given.path}\0{number}".encode()).hexdigest()
    file = folder / file_name(given, number)
    if (found := _comment(file)) is not None and found.startswith(MARK) and found != MARK + about:
        file = file.with_name(f"{file.stem[: _LONGEST // 4]}-{about}.jpg")
    save(file, pixels, about=about)


def file_name(given: Input, number: int | None = None) -> PurePath:
    """Where the picture of a photo is written: in folders as the photo is. Two photos may have one.

    Args:
        given: The photo.
        number: Of its face; ``None`` for the whole photo.

    Examples:
        >>> str(file_name(Input("../photos/anna.jpg", load=lambda: None)))
        'up/photos/anna.jpg'
        >>> str(file_name(Input("/photos/anna.png", load=lambda: None), number=2))
        'photos/anna.png.2.jpg'
    """
    path = PurePath(str(given.path))
    parts = ["up" if part == ".." else part for part in path.parts if part != path.anchor]
    # no folder is called as a picture may be
    folders = (_short(part) + "_" * part.lower().endswith(".jpg") for part in parts[:-1])
    name = parts[-1]
    stem = name.removesuffix(".jpg")
    if "." not in stem or not may_be_photo(stem):  # else a.png and a.png.jpg would be one
        name = stem
    return PurePath(*folders, f"{_short(name)}{'' if number is None else f'.{number}'}.jpg")


def _short(name: str) -> str:
    """A name of a file or folder, which may have 255 bytes."""
    if len(name.encode()) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 4]}-{hashlib.sha1(name.encode()).hexdigest()}"


def annotate(photo: npt.NDArray[np.uint8], faces: pd.DataFrame, tasks: Tasks) -> npt.NDArray[np.uint8]:
    """Draws boxes around faces, with what was predicted.

    Args:
        photo: RGB (H, W, 3).
        faces: Their rows of the table of predictions; without places, the texts stand at the top.
        tasks: What is predicted.

    Returns:
        RGB; a small photo is enlarged.
    """
    scale = max(1, -(-_LEAST_SIDE // max(photo.shape[:2])))
    height, width = (side * scale for side in photo.shape[:2])
    image = PIL.Image.fromarray(photo).resize((width, height), PIL.Image.Resampling.BICUBIC)
    size = max(_LEAST_TEXT, round(_TEXT * max(width, height)))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for row in faces.to_dict("records"):
        box = [scale * row[name] for name in ("x", "y", "width", "height")] if "x" in row else [0, 0, width, height]
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        pen.rectangle((left, top, right, bottom), outline=_COLOUR, width=max(2, size // 8))
        text = ", ".join(_value(task, row[task.name]) for task in tasks.values())
        across = pen.textlength(text, font)
        x = min(max(0, left), max(0, width - across - size // 2))
        y = top - 1.4 * size if top >= 1.4 * size else min(bottom, height - 1.4 * size)
        pen.rectangle((x, y, x + across + size // 2, y + 1.35 * size), fill=_COLOUR)
        pen.text((x + size // 4, y + 0.1 * size), text, _INK, font)
    return np.asarray(image)


def _value(task: Task, value: float | str) -> str:
    return value if isinstance(value, str) else task.text(value)


def save(dest: Path, pixels: npt.NDArray[np.uint8], quality: int = _QUALITY, about: str = "") -> None:
    """Writes a picture, and the folders that it needs.

    Args:
        dest: A JPEG file to write or replace.
        pixels: RGB (H, W, 3).
        quality: Of the JPEG, 1..100.
        about: More to be kept in the file, after ``MARK``.

    Raises:
        UserError: If it can't be written, or there is a file that is no such picture.
    """
    check_replaceable(dest)
    make_folder(dest.parent)
    with replacing(dest) as part:
        PIL.Image.fromarray(pixels).save(part, "JPEG", quality=quality, comment=MARK + about)


def check_replaceable(dest: Path) -> None:
    """Refuses to write a picture over anything but another picture of this program.

    Args:
        dest: The file to write; it may be missing.

    Raises:
        UserError: If it is something else.
    """
    if (comment := _comment(dest)) is not None and not comment.startswith(MARK):
        raise UserError(f"Expected no photo in the place of a picture to write, but {dest} may be one; name another.")


def _comment(file: Path) -> str | None:
    """The comment in a picture, nothing if there is none in it or it is no picture; ``None`` for no file."""
    try:
        if not file.exists():
            return None
        with PIL.Image.open(file) as image:
            comment = image.info.get("comment") or image.info.get("Comment") or ""  # in JPEG and in PNG
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        return ""
    return comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)
