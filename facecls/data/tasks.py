"""Names and codes of gender, race and age, and how a UTKFace file name carries them."""

import re
from typing import Literal, NamedTuple

Task = Literal["gender", "race", "age"]
"""What is learned from a face; also the name of its column, batch key, head and log keys."""

TASKS: tuple[Task, ...] = ("gender", "race", "age")
GENDERS = ("male", "female")
"""Names by code; the codes are UTKFace's own (https://susanqq.github.io/UTKFace)."""
RACES = ("white", "black", "asian", "indian", "others")
"""Names by code; the codes are UTKFace's own."""
CLASSES: dict[Task, tuple[str, ...]] = {"gender": GENDERS, "race": RACES}
MAX_AGE = 116
"""Years; the oldest face of UTKFace. Ages run from 0 to this, both included."""
HIGHEST: dict[Task, int] = {"gender": len(GENDERS) - 1, "race": len(RACES) - 1, "age": MAX_AGE}
"""The largest value of each label; the smallest is 0."""
EXPECTED: dict[Task, str] = {
    **{task: ", ".join(f"{code} ({name})" for code, name in enumerate(names)) for task, names in CLASSES.items()},
    "age": f"a whole number of years from 0 to {MAX_AGE}",
}
"""What a label must be, in words, after "is not" or "expected"."""
MISSING = -1
"""Stands in a batch for a label that a face does not have."""

_NAME = re.compile(r"(\d{1,9})_(\d{1,9})_(\d{1,9})_\d{8,}.*", re.ASCII)


class Labels(NamedTuple):
    """The labels of one face: age in years, codes of gender and race."""

    age: int
    gender: int
    race: int


class LabelError(ValueError):
    """Why a file name or a value gives no labels; the text is the reason of a reject."""


def parse_name(name: str) -> Labels:
    """Reads the labels from a UTKFace file name, ``AGE_GENDER_RACE_TIMESTAMP...``.

    The timestamp is what tells a complete name from one with a field left out (``61_1_20170109142408075.jpg``), so it
    must be there; what follows it does not matter, since two faces of UTKFace have odd endings.

    Args:
        name: File name without its folder.

    Returns:
        The labels, each within its range.

    Raises:
        LabelError: If the name is malformed or a value is out of range.

    Examples:
        >>> parse_name("26_1_2_20170116174525125.jpg.chip.jpg")
        Labels(age=26, gender=1, race=2)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise LabelError("malformed name")
    labels = Labels(*map(int, match.groups()))
    for task in TASKS:
        if getattr(labels, task) > HIGHEST[task]:
            raise LabelError(f"{task} out of range")
    return labels
