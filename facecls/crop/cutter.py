"""A photo -> the faces of it that are wanted, aligned, as files."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image

from facecls.crop.labels import Box, LabelledFace
from facecls.data.transforms import EvalTransform
from facecls.finding.detector import Detector, Face
from facecls.finding.frame import Frame, align, is_framed
from facecls.predict.finder import take_from
from facecls.predict.inputs import NO_FACE, Input
from facecls.predict.pictures import MARK, save

Pixels = npt.NDArray[np.uint8]
_QUALITY = 95
"""Of a JPEG; the faces will be learned from."""
_HALF = 0.25
"""Share of the photo's diagonal by which a face of twice the area may lie further off the middle."""
_SAME = 0.5
"""Overlap from which two faces are one."""


class Job(NamedTuple):
    """A photo and what is to be taken from it.

    Attributes:
        given: The photo.
        faces: The faces that are wanted.
        files: Where each is written.
        origin: Tells the photo, its state and what else the faces follow from apart from others.
        reasons: Why a face is not taken, or ``None``, by face.
    """

    given: Input
    faces: Sequence[LabelledFace]
    files: Sequence[PurePath]
    origin: str
    reasons: Sequence[str | None]


class Cutter:
    """Takes faces out of photos; may be used by several threads.

    Args:
        detector: Finds them.
        frame: Into which they are brought.
        size: Side of the faces in pixels.
        folder: Where their files are written.
    """

    def __init__(self, detector: Detector, frame: Frame, size: int, folder: Path) -> None:
        self._detector = detector
        self._frame = frame
        self._size = size
        self._resize = EvalTransform(size)
        self._folder = folder
        self._made_by = f"{size} {frame.options()}"

    def cut(self, job: Job) -> Job:
        """Writes the faces of a photo that are not there yet.

        Args:
            job: What to do.

        Returns:
            The same, with the reasons why faces were not taken.

        Raises:
            UserError: If a file can't be written.
        """
        wanted = [number for number, reason in enumerate(job.reasons) if reason is None]
        marks = {number: self._mark(job, job.faces[number]) for number in wanted}
        if all(_mark_of(self._folder / job.files[number]) == marks[number] for number in wanted):
            return job
        boxes = [job.faces[number].box for number in wanted]
        taken = take_from(job.given.load, lambda image: self._take(image, boxes))
        reasons = list(job.reasons)
        for place, number in enumerate(wanted):
            face = taken if isinstance(taken, str) else taken[place]
            if isinstance(face, str):
                reasons[number] = face
            else:
                save(self._folder / job.files[number], face, _QUALITY, marks[number])
        return job._replace(reasons=reasons)

    def _mark(self, job: Job, face: LabelledFace) -> str:
        """What the file of a face says of its origin: another one means that it must be cut again."""
        return " " + hashlib.sha256(f"{job.origin} {face.box} {self._made_by}".encode()).hexdigest()

    def _take(self, image: Pixels, boxes: Sequence[Box | None]) -> list[Pixels | str]:
        """The wanted faces of a photo, (S, S, 3), or why there is none."""
        if boxes == [None]:
            return [self._main(image)]
        inside = [(box, self._near(image, box)) for box in boxes if box is not None]
        found = _assigned(
            [[(_overlap(face, box), face) for face in faces if _is_in(face, box)] for box, faces in inside]
        )
        return [
            "no face found in its box" if face is None else align(image, face, self._frame, self._size)
            for face in found
        ]

    def _main(self, image: Pixels) -> Pixels | str:
        """The largest and most central face."""
        found = self._detector.find(image)
        if not found:
            return NO_FACE
        face = max(found, key=lambda each: _weight(each, image.shape))
        if len(found) == 1 and is_framed(face, image, self._frame):
            whole: Pixels = self._resize(image=image)["image"]
            return whole
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


def _mark_of(file: Path) -> str | None:
    """What a file says of its origin; ``None`` if it is missing or damaged."""
    try:
        with PIL.Image.open(file) as image:
            comment: bytes = image.info.get("comment", b"")
            return comment.decode(errors="replace").removeprefix(MARK)
    except OSError:
        return None


def _assigned(candidates: Sequence[Sequence[tuple[float, Face]]]) -> list[Face | None]:
    """A face for each box, none for two of them, those with the largest overlap first."""
    chosen: list[Face | None] = [None] * len(candidates)
    pairs = [(overlap, box, face) for box, faces in enumerate(candidates) for overlap, face in faces]
    for _, box, face in sorted(pairs, key=lambda pair: -pair[0]):
        place = (face.x, face.y, face.width, face.height)
        if chosen[box] is None and not any(other is not None and _overlap(other, place) > _SAME for other in chosen):
            chosen[box] = face
    return chosen


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
