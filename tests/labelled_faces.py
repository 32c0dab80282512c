"""Drawn faces with manifests as people write them."""

from pathlib import Path

import pandas as pd

from facecls.data.datamodule import FacesDataModule
from facecls.data.file_names import parse_name
from facecls.data.synthetic import draw_faces, wears_glasses

FAIRFACE_RACES = ["White", "Black", "East Asian", "Indian", "Middle Eastern", "Southeast Asian", "Latino_Hispanic"]
"""FairFace's own names; its data set is not in UTKFace's classes."""
_FAIRFACE_RACES_OF = {
    "white": ("White",),
    "black": ("Black",),
    "asian": ("East Asian", "Southeast Asian"),
    "indian": ("Indian",),
    "others": ("Middle Eastern", "Latino_Hispanic"),
}
_FAIRFACE_AGES = (0, 3, 10, 20, 30, 40, 50, 60, 70)


def write_glasses(folder: Path, count: int, seed: int, size: int = 200) -> Path:
    """Writes faces of which about half wear glasses, and a manifest with all their labels in words.

    Args:
        folder: Created if missing.
        count: How many faces.
        seed: As in ``draw_faces``.
        size: Width and height in pixels.

    Returns:
        The manifest ``faces.csv``, with the columns path, gender, race, age, glasses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (name, encoded) in enumerate(draw_faces(count, seed, size, glasses=True)):
        (folder / f"{index}.jpg").write_bytes(encoded)
        glasses = "with" if wears_glasses(seed, index) else "without"
        rows.append({"path": f"{index}.jpg", **parse_name(name), "glasses": glasses})
    pd.DataFrame(rows).to_csv(folder / "faces.csv", index=False)
    return folder / "faces.csv"


def write_fairface(folder: Path, count: int, seed: int, size: int = 200) -> Path:
    """Writes faces and a CSV file exactly as FairFace's: ``file,age,gender,race,service_test``, ages as ranges.

    Args:
        folder: Created if missing.
        count: How many faces.
        seed: As in ``draw_faces``.
        size: Width and height in pixels.

    Returns:
        The file ``fairface_label_train.csv``.
    """
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (name, encoded) in enumerate(draw_faces(count, seed, size), start=1):
        file = f"train/{index}.jpg"
        (folder / file).write_bytes(encoded)
        labels = parse_name(name)
        races = _FAIRFACE_RACES_OF[labels["race"]]
        rows.append(
            {
                "file": file,
                "age": _fairface_age(int(labels["age"])),
                "gender": labels["gender"].capitalize(),
                "race": races[index % len(races)],
                "service_test": index % 2 == 0,
            }
        )
    pd.DataFrame(rows).to_csv(folder / "fairface_label_train.csv", index=False)
    return folder / "fairface_label_train.csv"


def manifest_of(faces: Path) -> pd.DataFrame:
    """The faces of a folder as rows of a manifest, with their labels and a split that tests 30 % of them, as text.

    Args:
        faces: The folder.

    Returns:
        Text by path, gender, race, age, split.
    """
    data = FacesDataModule(str(faces), image_size=64, test_fraction=0.3)
    data.setup()
    rows = data.faces[["path", "gender", "race", "age", "split"]].astype("str")
    return rows.assign(path=[str(faces / path) for path in rows["path"]])


def _fairface_age(age: int) -> str:
    if age >= _FAIRFACE_AGES[-1]:
        return "more than 70"
    band = sum(age >= first for first in _FAIRFACE_AGES)
    return f"{_FAIRFACE_AGES[band - 1]}-{_FAIRFACE_AGES[band] - 1}"
