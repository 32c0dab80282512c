"""A photo -> the faces of it that are wanted, aligned, as files."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facecls.crop.labels import Box, Labels
from facecls.data.transforms import EvalTransform
from facecls.finding.detector import Detector, Face
from facecls.finding.frame import Frame, align, is_framed
from facecls.predict.finder import attempt
from facecls.predict.inputs import NO_FACE, Input
from facecls.predict.pictures import file_name, save

Pixels = npt.NDArray[np.uint8]
_QUALITY = 95
"""Of a JPEG; the faces will be learned from."""
_HALF = 0.25
"""Share of the photo's diagonal by which a face of twice the area may lie further off the middle."""


class Cut(NamedTuple):
    """A face that was taken, or not.

    Attributes:
        photo: Path of its photo.
        labels: Texts by column.
        file: Where it lies, relative to the folder of faces.
        reason: Why it was not taken, or ``None``.
    """

    photo: str
    labels: Mapping[str, str]
    file: PurePath
    reason: str | None = None


class Cutter:
    """Takes faces out of photos; may be used by several threads.

    Args:
        detector: Finds them.
        frame: Into which they are brought.
        size: Side of the faces in pixels.
        folder: Where their files are written.
        labels: What is known of them.
        root: The folder or archive of the photos, as it begins their paths.
    """

    def __init__(self, detector: Detector, frame: Frame, size: int, folder: Path, labels: Labels, root: str) -> None:
        self._detector = detector
        self._frame = frame
        self._size = size
        self._resize = EvalTransform(size)
        self._folder = folder
        self._labels = labels
        self._root = root

    def cut(self, given: Input) -> list[Cut]:
        """Writes the faces of a photo that are not there yet.

        Args:
            given: The photo.

        Returns:
            One or more.

        Raises:
            UserError: If a file can't be written.
        """
        photo = str(given.path)
        inside = photo.removeprefix(f"{self._root}/") if photo != self._root else PurePath(photo).name
        own = given._replace(path=inside)
        try:
            faces = self._labels.of(photo, inside)
        except ValueError as error:
            return [Cut(photo, {}, file_name(own), str(error))]
        files = [file_name(own, number if len(faces) > 1 else None) for number in range(1, len(faces) + 1)]
        taken: list[Pixels | str | None] | str = [None] * len(faces)
        if not all((self._folder / file).exists() for file in files):
            taken = attempt(given.load, lambda image: [self._take(image, each.box) for each in faces])
        if isinstance(taken, str):
            taken = [taken] * len(faces)
        for file, face in zip(files, taken, strict=True):
            if isinstance(face, np.ndarray):
                save(self._folder / file, face, _QUALITY)
        reasons = [face if isinstance(face, str) else None for face in taken]
        return [Cut(photo, face.labels, file, reason) for face, file, reason in zip(faces, files, reasons, strict=True)]

    def _take(self, image: Pixels, box: Box | None) -> Pixels | str:
        """A face of a photo, (S, S, 3), or why there is none."""
        if box is None:
            found = self._detector.find(image)
            if not found:
                return NO_FACE
            face = max(found, key=lambda each: _weight(each, image.shape))
            if len(found) == 1 and is_framed(face, image, self._frame):
                whole: Pixels = self._resize(image=image)["image"]
                return whole
        else:
            inside = [each for each in self._near(image, box) if _is_in(each, box)]
            if not inside:
                return "no face found in its box"
            face = max(inside, key=lambda each: _overlap(each, box))
        return align(image, face, self._frame, self._size)

    def _near(self, image: Pixels, box: Box) -> list[Face]:
        """The faces in and around a box, in which a face is found that is too small for the whole photo."""
        height, width = image.shape[:2]
        left, top = (max(0, math.floor(start - side)) for start, side in zip(box[:2], box[2:], strict=True))
        right, bottom = min(width, math.ceil(box[0] + 2 * box[2])), min(height, math.ceil(box[1] + 2 * box[3]))
        if left >= right or top >= bottom:
            return []
        corner = np.array([left, top])
        found = self._detector.find(np.ascontiguousarray(image[top:bottom, left:right]))
        return [face._replace(x=face.x + left, y=face.y + top, points=face.points + corner) for face in found]


def _weight(face: Face, shape: tuple[int, ...]) -> float:
    """How large and central a face is: its area, halved for each quarter of the diagonal that it is off the middle."""
    height, width = shape[:2]
    off = math.dist((face.x + face.width / 2, face.y + face.height / 2), (width / 2, height / 2))
    return float(face.width * face.height * 0.5 ** (off / (_HALF * math.hypot(width, height))))


def _is_in(face: Face, box: Box) -> bool:
    """Whether the middle of a face lies in a box."""
    x, y = face.x + face.width / 2 - box[0], face.y + face.height / 2 - box[1]
    return 0 <= x <= box[2] and 0 <= y <= box[3]


def _overlap(face: Face, box: Box) -> float:
    """The share of a face and a box, of what they cover together, that both cover."""
    width = min(face.x + face.width, box[0] + box[2]) - max(face.x, box[0])
    height = min(face.y + face.height, box[1] + box[3]) - max(face.y, box[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (face.width * face.height + box[2] * box[3] - both)
