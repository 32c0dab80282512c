"""Drawn faces whose gender, race and age can be read off the picture, under real UTKFace file names.

They stand in for photographs in the demo and in the tests. Race shows in skin tone, hair colour and hairline; gender in
hair length, brows, lips and beard; age in the head's proportions, the size of the eyes, wrinkles and grey hair. On
request about half of them wear glasses, which say nothing about gender, race or age.

Shapes are given in head units: x to the right, y down, the middle of the head at (0, 0), its top at y = -1 and its chin
at y = 1. ``_Pen`` maps them onto the image. Colours are RGB, 0..255.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facecls.data.tasks import UTKFACE, ages, classifications

_Array = npt.NDArray[Any]

GENDERS, RACES = (task.classes for task in classifications(UTKFACE.values()))
MAX_AGE = ages(UTKFACE.values())[0].highest

_BLACK = np.array([15.0, 12.0, 12.0])
_GREY = np.array([212.0, 210.0, 208.0])
_EYE_WHITE = np.array([240.0, 238.0, 234.0])
_LIP_RED = np.array([196.0, 45.0, 70.0])
_BLUSH = np.array([235.0, 110.0, 100.0])

_HEAD_UNIT = 0.365
"""Half of the head's height as a share of the image's width; leaves room for hair, as UTKFace's crops do."""
_APPARENT_AGE_SD = 1.5
"""Years by which a face looks older or younger than it is."""
_GLASSES = 1
"""Marks the generator of the glasses, which is independent of the one that draws everything else."""
_GLINT = np.array([214.0, 214.0, 218.0])
_FRAMES = ((28.0, 26.0, 30.0), (96.0, 30.0, 34.0), (30.0, 44.0, 92.0), (22.0, 112.0, 78.0))
_SUBPIXEL_BITS = 4
_ALONG = np.linspace(0, 1, 16)
"""Steps along a line."""
_ROUND = np.linspace(0, 1, 48)
"""Steps along an oval."""


class _Labels(NamedTuple):
    """What a file name says: years, and codes of UTKFace."""

    age: int
    gender: int
    race: int


class _Look(NamedTuple):
    """What a race's faces are drawn with; ``hairline`` gives the height above the base line at x from -1 to 1."""

    skin: tuple[float, float, float]
    hair: tuple[tuple[float, float, float], ...]
    eyes: tuple[tuple[float, float, float], ...]
    eye_height: float
    hair_volume: float
    hairline: Callable[[_Array], _Array]


_BROWN_EYES = ((74.0, 46.0, 28.0), (48.0, 30.0, 20.0))
_LOOKS: dict[str, _Look] = {
    "white": _Look(
        (238, 198, 178),
        ((196, 150, 84), (128, 84, 50), (160, 82, 44)),
        ((84, 128, 170), (92, 124, 84), (90, 60, 38)),
        1.0,
        0.10,
        lambda x: 0.22 * x - 0.05,  # side parting
    ),
    "black": _Look((104, 66, 46), ((26, 20, 18), (36, 26, 22)), _BROWN_EYES, 1.0, 0.24, lambda x: 0.04 * x**2),
    "asian": _Look(
        (236, 206, 150),
        ((22, 20, 26), (34, 28, 30)),
        _BROWN_EYES,
        0.72,
        0.11,
        lambda x: -0.22 + 0.06 * x**2,  # fringe
    ),
    "indian": _Look(
        (164, 110, 72),
        ((24, 18, 18), (40, 26, 20)),
        _BROWN_EYES,
        1.08,
        0.11,
        lambda x: 0.12 - 0.50 * np.abs(x),  # centre parting
    ),
    "others": _Look(
        (206, 156, 108),
        ((84, 52, 34), (66, 40, 28)),
        ((104, 80, 44), (74, 46, 28)),
        0.92,
        0.16,
        lambda x: -0.16 + 0.42 * np.abs(x),  # widow's peak
    ),
}


@dataclass(frozen=True)
class _Face:
    """One person, before light and camera."""

    labels: _Labels
    years: float  # apparent age as a share of MAX_AGE
    youth: float  # 1 at birth, 0.37 at 12, near 0 from 40 on: what changes fast in childhood
    skin: _Array
    hair: _Array
    iris: _Array
    smile: float
    look: _Look

    @property
    def female(self) -> bool:
        return GENDERS[self.labels.gender] == "female"

    @property
    def width(self) -> float:
        return 0.74 + 0.15 * self.youth + 0.04 * self.years

    @property
    def eyes_y(self) -> float:
        return -0.14 + 0.28 * self.youth

    @property
    def mouth_y(self) -> float:
        return 0.56 + 0.06 * self.youth


class _Pen:
    """Draws shapes given in head units onto an image."""

    def __init__(self, image: _Array, to_image: _Array) -> None:
        self.image = image
        self.to_image = to_image  # (2, 3): head units -> pixels
        self.unit = float(np.hypot(to_image[0, 0], to_image[1, 0]))

    def _pixels(self, points: _Array) -> _Array:
        pixels: _Array = points @ self.to_image[:, :2].T + self.to_image[:, 2]
        fixed: _Array = (pixels * 2**_SUBPIXEL_BITS).astype(np.int32)
        return fixed

    def fill(self, points: _Array, colour: _Array) -> None:
        cv2.fillPoly(self.image, [self._pixels(points)], colour.tolist(), cv2.LINE_AA, _SUBPIXEL_BITS)

    def line(self, points: _Array, colour: _Array, width: float) -> None:
        thickness = max(1, round(width * self.unit))
        cv2.polylines(
            self.image, [self._pixels(points)], False, colour.tolist(), thickness, cv2.LINE_AA, _SUBPIXEL_BITS
        )


def draw_faces(count: int, seed: int, size: int = 200, glasses: bool = False) -> Iterator[tuple[str, bytes]]:
    """Draws faces, one after the other; face i depends on ``seed``, ``size``, ``glasses`` and i alone.

    Genders and races are equally frequent; ages follow UTKFace's mixture of small children, many adults around 30 and a
    tail up to ``MAX_AGE``, with a heavier tail.

    Args:
        count: How many.
        seed: Not negative; the same seed draws the same faces, byte for byte.
        size: Width and height in pixels; UTKFace's crops have 200.
        glasses: Whether the faces that ``wears_glasses`` chooses wear glasses; nothing else about them changes.

    Yields:
        A UTKFace file name with the labels, unique among these faces, and the JPEG file's bytes.

    Examples:
        >>> [name for name, _ in draw_faces(2, seed=0)] == [name for name, _ in draw_faces(2, seed=0)]
        True
    """
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        labels = _draw_labels(rng)
        worn = glasses and wears_glasses(seed, index)
        image = _photograph(
            _draw_person(labels, rng), size, rng, np.random.default_rng([seed, index, _GLASSES]) if worn else None
        )
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80, 96))]
        encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)[1]
        yield _file_name(labels, index, rng), encoded.tobytes()


def wears_glasses(seed: int, index: int) -> bool:
    """Whether a face wears glasses if they are drawn; about half of them do.

    Args:
        seed: As in ``draw_faces``.
        index: Of the face, from 0.
    """
    return bool(np.random.default_rng([seed, index, _GLASSES]).random() < 0.5)


def write_faces(folder: Path, count: int, seed: int, malformed: int = 0) -> None:
    """Writes drawn faces as files under the names of ``draw_faces``.

    Args:
        folder: Created if missing.
        count: How many faces with a proper name.
        seed: As in ``draw_faces``.
        malformed: How many more faces whose names give no labels, in turn: race left out, gender empty, no labels at
            all, and age, gender or race out of range. The first two are UTKFace's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, encoded) in enumerate(draw_faces(count + malformed, seed)):
        written = name if index < count else _malform(name, kind=index - count)
        (folder / written).write_bytes(encoded)


def _malform(name: str, kind: int) -> str:
    age, gender, race, rest = name.split("_")
    names = (
        f"{age}_{gender}_{rest}",
        f"{age}__{race}_{rest}",
        f"face{rest}",
        f"{int(age) + MAX_AGE + 1}_{gender}_{race}_{rest}",
        f"{age}_{len(GENDERS)}_{race}_{rest}",
        f"{age}_{gender}_{len(RACES)}_{rest}",
    )
    return names[kind % len(names)]


def _file_name(labels: _Labels, index: int, rng: np.random.Generator) -> str:
    moment = datetime(2017, 1, 1) + timedelta(seconds=index)  # seconds make it unique, UTKFace's own are from 2017
    timestamp = f"{moment:%Y%m%d%H%M%S}{rng.integers(1000):03d}"
    return f"{labels.age}_{labels.gender}_{labels.race}_{timestamp}.jpg.chip.jpg"


def _draw_labels(rng: np.random.Generator) -> _Labels:
    share = rng.random()
    if share < 0.15:
        age = rng.exponential(3.0)
    elif share < 0.30:
        age = rng.uniform(4, 20)
    elif share < 0.70:
        age = rng.normal(32, 9)
    else:
        age = rng.uniform(40, MAX_AGE + 1)
    return _Labels(int(np.clip(age, 0, MAX_AGE)), int(rng.integers(len(GENDERS))), int(rng.integers(len(RACES))))


def _draw_person(labels: _Labels, rng: np.random.Generator) -> _Face:
    look = _LOOKS[RACES[labels.race]]
    apparent = max(0.0, labels.age + rng.normal(0, _APPARENT_AGE_SD))
    years = apparent / MAX_AGE
    grey = _ramp(apparent, 28, 90)
    return _Face(
        labels=labels,
        years=years,
        youth=float(np.exp(-apparent / 12)),
        skin=_mix(np.array(look.skin) * rng.uniform(0.95, 1.05), np.array([190.0, 178.0, 170.0]), 0.18 * years),
        hair=_mix(np.array(look.hair[rng.integers(len(look.hair))]) * rng.uniform(0.9, 1.1), _GREY, grey),
        iris=np.array(look.eyes[rng.integers(len(look.eyes))]),
        smile=float(rng.uniform(-0.02, 0.09)),
        look=look,
    )


def _photograph(face: _Face, size: int, rng: np.random.Generator, glasses: np.random.Generator | None) -> _Array:
    """Takes a picture, uint8 ``(size, size, 3)``, with background, pose, light and noise.

    Glasses, if they are worn, are drawn from a generator of their own.
    """
    blotches = rng.uniform(50, 200) + rng.uniform(-45, 45, (3, 3, 1)) + rng.uniform(-20, 20, (3, 3, 3))
    image = cv2.resize(np.clip(blotches, 0, 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
    unit = _HEAD_UNIT * size * rng.uniform(0.93, 1.07)
    turn = np.deg2rad(rng.uniform(-9, 9))
    middle = size * (np.array([0.5, 0.53]) + rng.uniform(-0.025, 0.025, 2))
    rotation = unit * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    pen = _Pen(image, np.column_stack([rotation, middle]))
    _draw(face, pen, rng)
    if glasses is not None:
        _draw_glasses(face, pen, glasses)

    lit = rng.random((size, size, 3), np.float32)  # grain; what follows works in place, which halves the time
    lit -= 0.5
    lit *= rng.uniform(6, 20)
    lit += cv2.multiply(image, _light(size, rng), dtype=cv2.CV_32F)
    photo: _Array = cv2.convertScaleAbs(cv2.max(lit, 0.0))
    return photo


def _light(size: int, rng: np.random.Generator) -> _Array:
    """The light's strength, float32 ``(size, size, 3)``: brighter on one side, warm or cold."""
    slope = rng.uniform(-0.14, 0.14, (2, 1))
    warmth = rng.uniform(-0.03, 0.03)
    tint = rng.uniform(0.88, 1.08) * np.array([1 + warmth, 1, 1 - warmth])
    corners = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1]])
    shade = (1 + (slope * corners).sum(axis=0)).reshape(2, 2, 1) * tint
    light: _Array = cv2.resize(shade.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    return light


def _draw(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    _draw_hair_behind(face, pen, rng)
    _draw_neck(face, pen, rng)
    _draw_head(face, pen)
    _draw_wrinkles(face, pen)
    if not face.female:
        _draw_beard(face, pen, rng)
    _draw_mouth(face, pen)
    _draw_nose(face, pen)
    _draw_eyes(face, pen, rng)
    _draw_fringe(face, pen, rng)


def _draw_hair_behind(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    volume = _hair_volume(face)
    top = _oval((0, -0.08), face.width + volume + 0.02, 0.92 + volume, (0.0, 1.0))
    if RACES[face.labels.race] == "black":
        top = top * (1 + 0.035 * np.sin(2 * np.pi * 17 * _ROUND))[:, None]  # curls
    if face.female:
        length = rng.uniform(0.75, 1.7) * (1 - 0.35 * face.youth)
        wide = face.width + volume + rng.uniform(0.02, 0.1)
        sides = np.array([[-wide, -0.1], [-wide - 0.05, length * 0.7], [-wide * 0.75, length]])
        pen.fill(np.concatenate([sides, (sides * [-1, 1])[::-1]]), face.hair * 0.86)
        pen.fill(top, face.hair * 0.86)
    else:
        pen.fill(top[top[:, 1] < 0.05], face.hair * 0.86)


def _draw_neck(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    neck = 0.42 - 0.08 * face.female - 0.06 * face.youth
    pen.fill(np.array([[-neck, 0.6], [neck, 0.6], [neck + 0.05, 2], [-neck - 0.05, 2]]), face.skin * 0.84)
    clothes = rng.uniform(30, 225, 3)
    pen.fill(
        np.array([[-0.6, 1.26], [-0.3, 1.2], [0, 1.4], [0.3, 1.2], [0.6, 1.26], [2, 1.8], [2, 4], [-2, 4], [-2, 1.8]]),
        clothes,
    )


def _draw_head(face: _Face, pen: _Pen) -> None:
    ear = 0.15 + 0.09 * face.years
    for side in (-1, 1):
        pen.fill(_oval((side * face.width, face.eyes_y + 0.16), 0.11, ear), face.skin * 0.9)
    pen.fill(_head_outline(face), face.skin)
    for side in (-1, 1):
        cheek = _oval((side * 0.45 * face.width / 0.74, 0.28 + 0.1 * face.youth), 0.17, 0.13)
        pen.fill(cheek, _mix(face.skin, _BLUSH, 0.04 + 0.22 * face.youth))


def _head_outline(face: _Face) -> _Array:
    """The head's outline: round in children, with a narrower chin in women, sagging at the jaw in old age."""
    taper = (0.34 if face.female else 0.24) * (1 - 0.6 * face.youth) - 0.12 * face.years
    outline = _oval((0, 0), face.width, 1.0)
    lower = np.clip(outline[:, 1], 0, 1)
    outline[:, 0] *= 1 + 0.25 * lower * (1 - lower) * face.years - taper * lower**2
    return outline


def _draw_wrinkles(face: _Face, pen: _Pen) -> None:
    age = face.years * MAX_AGE
    eyes = face.eyes_y

    def crease(points: _Array, first: float, full: float) -> None:
        depth = _ramp(age, first, full)
        if depth > 0:
            pen.line(points, _mix(face.skin, face.skin * 0.58, depth), 0.02 + 0.025 * depth)

    for row in range(4):  # forehead, from the brows up, one after the other
        crease(_arc((0, eyes - 0.36 - 0.11 * row), 0.42 - 0.03 * row, -0.035), 22 + 14 * row, 70 + 14 * row)
    for side in (-1.0, 1.0):
        crease(_bow((side * 0.2, 0.26), (side * 0.42, face.mouth_y + 0.08), side * 0.07), 18, 100)  # beside the mouth
        crease(_arc((side * 0.34, eyes + 0.2), 0.15, 0.05), 20, 85)  # bags under the eyes
        crease(_bow((side * 0.5, 0.3), (side * 0.54, 0.66), side * 0.04), 60, 116)  # cheeks
        for ray in (-1, 0, 1):  # crow's feet
            crease(np.array([[side * 0.54, eyes + 0.04 * ray], [side * 0.68, eyes + 0.12 * ray]]), 30, 95)
    crease(np.array([[0, eyes - 0.14], [0.0, eyes - 0.27]]), 35, 90)


def _draw_beard(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    density = rng.uniform(0.35, 0.9)
    kind = rng.random()
    if face.labels.age < 17 or kind < 0.2:
        return
    colour = _mix(face.skin, face.hair * 0.9, density)
    if kind < 0.75:
        jaw = _head_outline(face)
        jaw = jaw[(jaw[:, 1] > 0.12)]
        inner = _arc((0, 0.36), 0.98 * face.width, 0.12)
        pen.fill(np.concatenate([jaw * [0.99, 1.0], inner if jaw[0, 0] > 0 else inner[::-1]]), colour)
    moustache = np.concatenate(
        [_arc((0, face.mouth_y - 0.13), 0.26, -0.06), _arc((0, face.mouth_y - 0.03), 0.32, -0.04)[::-1]]
    )
    pen.fill(moustache, colour)


def _draw_mouth(face: _Face, pen: _Pen) -> None:
    half = 0.2 + 0.06 * min(1.0, face.years * 3) - 0.02 * face.female
    full = (0.085 if face.female else 0.05) * (1 - 0.45 * face.years)
    colour = _mix(face.skin * 0.8, _LIP_RED, 0.72 - 0.42 * face.youth if face.female else 0.15)
    middle = (0.0, face.mouth_y)
    line = _arc(middle, half, face.smile)
    pen.fill(np.concatenate([line, _arc(middle, half, face.smile - 1.6 * full)[::-1]]), colour * 0.92)
    pen.fill(np.concatenate([line, _arc(middle, half, face.smile + 2.2 * full)[::-1]]), colour)
    pen.line(line, colour * 0.5, 0.03)


def _draw_nose(face: _Face, pen: _Pen) -> None:
    tip = 0.27 + 0.03 * face.youth + 0.05 * face.years
    half = 0.1 + 0.05 * face.years + (0.0 if face.female else 0.02)
    shade = face.skin * 0.72
    pen.line(_bow((-0.05, face.eyes_y + 0.12), (-half, tip - 0.05), 0.03), shade, 0.025)
    pen.line(_arc((0, tip), half, 0.06), shade, 0.04)


def _draw_eyes(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    half = 0.165 + 0.075 * face.youth - 0.035 * face.years
    high = (0.095 + 0.085 * face.youth - 0.045 * face.years) * face.look.eye_height
    brow_width = (0.045 if face.female else 0.095) * (1 - 0.45 * face.youth)
    glance = rng.uniform(-0.03, 0.03)
    lid = _mix(face.skin, _BLACK, 0.9 if face.female else 0.55)
    for side in (-1, 1):
        x, y = side * (0.34 + 0.03 * face.youth), face.eyes_y
        pen.fill(_oval((x, y), half, high), _EYE_WHITE)
        pen.fill(_oval((x + glance, y), min(high, 0.1) * 0.95, high * 0.95), face.iris)
        pen.fill(_oval((x + glance, y), 0.04, min(0.045, high * 0.6)), _BLACK)
        pen.line(_oval((x, y), half, high, (0.5, 1.0)), lid, 0.055 if face.female else 0.025)
        pen.line(_arc((x, y - high - 0.11), 0.19, -0.05), _mix(face.hair, face.skin, 0.15) * 0.85, brow_width)


def _draw_glasses(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    """Draws round to almost square frames around both eyes, a bridge, and temples to the ears."""
    colour = np.array(_FRAMES[rng.integers(len(_FRAMES))]) * rng.uniform(0.8, 1.2)
    thick = rng.uniform(0.045, 0.075)
    half, high = rng.uniform(0.23, 0.27), rng.uniform(0.19, 0.25)
    squareness = rng.uniform(1.0, 1.8)
    x, y = 0.34 + 0.03 * face.youth, face.eyes_y + 0.02
    rim = _oval((0, 0), 1, 1)
    rim = np.sign(rim) * np.abs(rim) ** (1 / squareness) * [half, high]  # a superellipse
    lines = [_arc((0, y - 0.1 * high), x - half, -0.05)]
    for side in (-1, 1):
        temple = np.array([[side * (x + half), y - 0.3 * high], [side * face.width, y - 0.1]])
        lines += [rim + np.array([side * x, y]), temple]
    for shade, width in ((_GLINT, thick + 0.05), (colour, thick)):  # a light edge, so that they show on dark skin
        for line in lines:
            pen.line(line, shade, width)


def _draw_fringe(face: _Face, pen: _Pen, rng: np.random.Generator) -> None:
    """Draws the hair in front, from the hairline to the top."""
    volume = _hair_volume(face)
    receding = 0.0 if face.female else 0.28 * face.years
    x = np.linspace(-1, 1, 25)
    skull = -np.sqrt(1 - (0.999 * x) ** 2)  # the head's outline
    base = -0.56 - receding - 0.1 * face.youth
    hairline = np.clip(base - face.look.hairline(x * rng.choice([-1, 1])), skull + 0.03, -0.15)
    temples = np.where(np.abs(x) > 0.9, np.maximum(hairline, -0.2), hairline)
    across = x * (face.width + 0.01)
    crown = _oval((0, -0.08), face.width + volume, 0.92 + volume, (0.52, 0.98))
    pen.fill(np.concatenate([np.column_stack([across, temples])[::-1], crown]), face.hair)
    for strand in rng.uniform(-0.8, 0.8, 7):
        root = (strand * 0.6, -0.9 - 0.6 * volume)
        tip = (strand * face.width, float(np.interp(strand, x, temples)) - 0.03)
        pen.line(_bow(root, tip, 0.06 * strand), face.hair * rng.uniform(0.75, 1.15), 0.02)


def _hair_volume(face: _Face) -> float:
    thin = 0.6 * face.youth + (0.0 if face.female else 0.35 * face.years)
    return face.look.hair_volume * (1 - thin)


def _oval(
    middle: tuple[float, float], half_width: float, half_height: float, turns: tuple[float, float] = (0, 1)
) -> _Array:
    """Points ``(48, 2)`` on an ellipse, clockwise from the right; ``turns`` 0.5 to 1 is the upper half."""
    angle = 2 * np.pi * (turns[0] + (turns[1] - turns[0]) * _ROUND)
    return np.column_stack([middle[0] + half_width * np.cos(angle), middle[1] + half_height * np.sin(angle)])


def _arc(middle: tuple[float, float], half_width: float, sag: float) -> _Array:
    """Points ``(16, 2)`` from left to right, the middle ``sag`` lower than the ends."""
    x = 2 * _ALONG - 1
    return np.column_stack([middle[0] + half_width * x, middle[1] + sag * (1 - x**2)])


def _bow(start: tuple[float, float], end: tuple[float, float], out: float) -> _Array:
    """Points ``(16, 2)`` from start to end, the middle ``out`` further to the right."""
    t = _ALONG[:, None]
    points: _Array = (1 - t) * np.array(start) + t * np.array(end)
    points[:, 0] += out * 4 * (t * (1 - t))[:, 0]
    return points


def _mix(first: _Array, second: _Array, share: float) -> _Array:
    mixed: _Array = (1 - share) * first + share * second
    return mixed


def _ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high`` and a straight line between."""
    return float(np.clip((value - low) / (high - low), 0, 1))
