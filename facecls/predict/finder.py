"""Photos -> the faces in them, as a model takes them."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from facecls.data.archives import UnreadableError
from facecls.data.transforms import EvalTransform
from facecls.finding.detector import Detector, Face, largest, usual_detector
from facecls.finding.frame import Frame, align, is_framed
from facecls.model.predictor import Predictor

Pixels = npt.NDArray[np.uint8]
_T = TypeVar("_T")
Faces = Literal["all", "largest", "whole"]
"""Which faces of a photo are predicted: all, the largest, or the photo as if it were one."""
COLUMNS = {"face": "Int16", "x": "Int32", "y": "Int32", "width": "Int32", "height": "Int32", "score": "float32"}
"""Columns about a face in a photo: its number from left to right, its box in pixels, the detector's score."""


class Taken(NamedTuple):
    """A face as the model sees it.

    Attributes:
        pixels: RGB (S, S, 3).
        face: Where it is in the photo; ``None`` for a photo that was taken as it is.
    """

    pixels: Pixels
    face: Face | None = None


class Finder:
    """Takes the faces out of photos; may be used by several threads.

    Args:
        predictor: The model, whose frame faces are brought into.
        faces: Which faces; photos are taken as they are, too, if the model has no frame.
        detector: Finds them; ``None`` for the usual one.

    Attributes:
        columns: Types of the columns about a face, by name; empty if photos are taken as they are.
    """

    def __init__(self, predictor: Predictor, faces: Faces = "all", detector: Detector | None = None) -> None:
        self._resize = EvalTransform(predictor.image_size)
        self._size = predictor.image_size
        self._frame: Frame | None = predictor.frame if faces != "whole" else None
        self._only_largest = faces == "largest"
        self.columns = dict(COLUMNS) if self._frame is not None else {}
        if self._frame is not None:
            self._detector = usual_detector() if detector is None else detector

    def take(self, image: Pixels) -> list[Taken]:
        """Takes the faces out of a photo.

        A photo that already is an aligned face is taken as it is.

        Args:
            image: RGB (H, W, 3).

        Returns:
            The faces from left to right, none if none is found.
        """
        if self._frame is None:
            return [Taken(self._whole(image))]
        found = self._detector.find(image)
        if self._only_largest and (face := largest(found)) is not None:
            found = [face]
        if len(found) == 1 and is_framed(found[0], image, self._frame):
            return [Taken(self._whole(image), found[0])]
        return [Taken(align(image, face, self._frame, self._size), face) for face in found]

    def _whole(self, image: Pixels) -> Pixels:
        resized: Pixels = self._resize(image=image)["image"]
        return resized


def take_from(load: Callable[[], Pixels], take: Callable[[Pixels], list[_T]]) -> list[_T] | str:
    """Reads a photo and takes something out of it.

    Args:
        load: Returns the photo.
        take: Is called with it.

    Returns:
        What was taken, or why the photo can't be read.
    """
    try:
        return take(load())
    except UnreadableError as error:
        return str(error)
    except (cv2.error, MemoryError):  # of a photo that decodes but is too large to be searched
        return "too large"
