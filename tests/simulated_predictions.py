"""Tables of predictions whose errors are known, because they were drawn with them."""

import numpy as np
import pandas as pd

from facecls.data.tasks import UTKFACE, Classification, Task, Tasks, create_tasks

RACE_SHARES = (0.43, 0.19, 0.14, 0.17, 0.07)
"""As in UTKFace."""
FAIRFACE: Tasks = create_tasks(
    {
        "race": {
            "classes": [
                "White",
                "Black",
                "Latino_Hispanic",
                "East Asian",
                "Southeast Asian",
                "Indian",
                "Middle Eastern",
            ]
        },
        "glasses": {"classes": ["without", "with"]},
    }
)
"""Tasks with the seven races of FairFace and a fourth attribute."""
FAIRFACE_AGES = ((0, 2), (3, 9), (10, 19), (20, 29), (30, 39), (40, 49), (50, 59), (60, 69), (70, 116))
"""First and last year of FairFace's groups of ages."""
_QUALITY = {"gender": 0.93, "race": 0.85, "age": 5.0}


def simulated_labels(faces: int, seed: int, tasks: Tasks = UTKFACE) -> pd.DataFrame:
    """Faces with labels, independent of each other; those of UTKFace's tasks in its proportions."""
    rng = np.random.default_rng(seed)
    names = [f"{number}.jpg" for number in range(faces)]
    table = pd.DataFrame(
        {"path": names, "sha1": [f"{number:040x}" for number in range(faces)], "split": "test"},
    )
    for name, task in tasks.items():
        table[name] = pd.array(_labels(task, faces, rng), dtype="Int16")
    return table


def _labels(task: Task, faces: int, rng: np.random.Generator) -> np.ndarray:
    if not isinstance(task, Classification):
        return np.clip(rng.gamma(3, 11, faces), 0, task.highest).astype(int)
    if task == UTKFACE["race"]:
        return rng.choice(5, faces, p=RACE_SHARES)
    return rng.integers(0, len(task.classes), faces)


def simulated(faces: int, seed: int, tasks: Tasks = UTKFACE, **quality: float | np.ndarray) -> pd.DataFrame:
    """Predictions with a known chance to be right for each classification, and a known mean absolute error of age."""
    return predicted(simulated_labels(faces, seed, tasks), seed + 1_000_000, tasks, **quality)


def predicted(labels: pd.DataFrame, seed: int, tasks: Tasks = UTKFACE, **quality: float | np.ndarray) -> pd.DataFrame:
    """The same for labels that are there; none of them may be missing."""
    rng = np.random.default_rng(seed)
    table = labels.copy()
    for name, task in tasks.items():
        of_task = quality.get(name, _QUALITY.get(name, 0.9))
        if not isinstance(task, Classification):
            off = rng.laplace(0, of_task, len(table))
            table[f"{name}_predicted"] = (table[name].to_numpy(np.float64) + off).astype(np.float32)
            continue
        classes = len(task.classes)
        wrong = rng.random(len(table)) >= of_task
        codes = (table[name].to_numpy(np.int64) + wrong * rng.integers(1, classes, len(table))) % classes
        table[f"{name}_predicted"] = codes.astype(np.int16)
        for code, column in enumerate(task.probabilities):
            table[column] = np.where(codes == code, 0.6, 0.4 / (classes - 1)).astype(np.float32)
    return table


def without_some_labels(table: pd.DataFrame, seed: int, tasks: Tasks = UTKFACE) -> pd.DataFrame:
    """The table with a fifth of the labels of each task missing."""
    rng = np.random.default_rng(seed)
    return table.assign(**{name: table[name].mask(rng.random(len(table)) < 0.2, pd.NA) for name in tasks})


def with_ranges(table: pd.DataFrame, chosen: np.ndarray | bool = True) -> pd.DataFrame:
    """The table with FairFace's ranges in place of the chosen ages; all of them may be known to the year before."""
    chosen = np.broadcast_to(chosen, len(table)) & table["age"].notna().to_numpy(bool)
    group = (
        np.searchsorted([first for first, _ in FAIRFACE_AGES], table["age"].to_numpy(float, na_value=0), "right") - 1
    )
    low, high = (pd.array(ends, "Int16") for ends in np.array(FAIRFACE_AGES)[group].T)
    return table.assign(
        age=table["age"].mask(chosen),
        age_from=pd.Series(low, table.index).where(chosen),
        age_to=pd.Series(high, table.index).where(chosen),
    )
