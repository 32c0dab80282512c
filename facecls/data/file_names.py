"""Labels in the file names of UTKFace."""

import re
from collections.abc import Mapping
from functools import lru_cache

from facecls.data.parsing import LabelError
from facecls.data.tasks import UTKFACE

_NAME = re.compile(r"(\d{1,9})_(\d{1,9})_(\d{1,9})_\d{8,}.*", re.ASCII)
_PHOTO = re.compile(r"(\d{1,9}_\d{1,9}_\d{1,9}_\d{17})(?!\d)", re.ASCII)
"""Labels and a time in milliseconds, which no two photos of UTKFace share."""
_ALIGNED = ".chip.jpg"
_FIELDS = ("age", "gender", "race")


@lru_cache(maxsize=100_000)  # a dataset has few different combinations
def _labels_of_codes(age: int, gender: int, race: int) -> Mapping[str, str]:
    labels = {}
    for name, value in zip(_FIELDS, (age, gender, race), strict=True):
        try:
            UTKFACE[name].parse(str(value))
        except LabelError:
            raise LabelError(f"{name} out of range") from None
        labels[name] = UTKFACE[name].text(value)
    return labels


def parse_name(name: str) -> Mapping[str, str]:
    """Reads the labels from a UTKFace file name, ``AGE_GENDER_RACE_TIMESTAMP...``.

    The timestamp is what tells a complete name from one with a field left out (``61_1_20170109142408075.jpg``), so it
    must be there; what follows it does not matter, since two faces of UTKFace have odd endings.

    Args:
        name: File name without its folder.

    Returns:
        Labels as texts by task: names of classes, since another data set's codes may mean others.

    Raises:
        LabelError: If the name is malformed or a value is out of range.

    Examples:
        >>> dict(parse_name("26_1_2_20170116174525125.jpg.chip.jpg"))
        {'age': '26', 'gender': 'female', 'race': 'asian'}
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise LabelError("malformed name")
    age, gender, race = map(int, match.groups())
    return _labels_of_codes(age, gender, race)


def photo_of(name: str) -> tuple[str, bool] | None:
    """Tells which photo of UTKFace a file shows, in whichever of its copies.

    Args:
        name: File name without its folder.

    Returns:
        What all files of the photo share, and whether the face was cut out and aligned; ``None`` for another name.

    Examples:
        >>> photo_of("26_1_2_20170116174525125.jpg.chip.jpg"), photo_of("26_1_2_20170116174525125.jpg")
        (('26_1_2_20170116174525125', True), ('26_1_2_20170116174525125', False))
    """
    match = _PHOTO.match(name)
    return (match[1], name.endswith(_ALIGNED)) if match else None
