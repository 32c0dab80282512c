"""Tables of predictions whose faults are known, because they were drawn with them."""

import numpy as np
import pandas as pd

from facecls.data.tasks import CLASSES

RACE_SHARES = (0.43, 0.19, 0.14, 0.17, 0.07)
"""As in UTKFace."""


def simulated_labels(faces: int, seed: int) -> pd.DataFrame:
    """Faces with labels in UTKFace's proportions, independent of each other."""
    rng = np.random.default_rng(seed)
    names = [f"{number}.jpg" for number in range(faces)]
    return pd.DataFrame(
        {
            "path": names,
            "sha1": [f"{number:040x}" for number in range(faces)],
            "split": "test",
            "gender": pd.array(rng.integers(0, 2, faces), dtype="Int16"),
            "race": pd.array(rng.choice(5, faces, p=RACE_SHARES), dtype="Int16"),
            "age": pd.array(np.clip(rng.gamma(3, 11, faces), 0, 116).astype(int), dtype="Int16"),
        }
    )


def simulated(
    faces: int,
    seed: int,
    *,
    gender: float | np.ndarray = 0.93,
    race: float | np.ndarray = 0.85,
    age: float | np.ndarray = 5.0,
) -> pd.DataFrame:
    """Predictions with a known chance to be right for gender and race, and a known mean absolute error of age."""
    return predicted(simulated_labels(faces, seed), seed + 1_000_000, gender=gender, race=race, age=age)


def predicted(
    labels: pd.DataFrame,
    seed: int,
    *,
    gender: float | np.ndarray = 0.93,
    race: float | np.ndarray = 0.85,
    age: float | np.ndarray = 5.0,
) -> pd.DataFrame:
    """The same for labels that are there; none of them may be missing."""
    rng = np.random.default_rng(seed)
    table = labels.copy()
    for task, chance in (("gender", gender), ("race", race)):
        classes = len(CLASSES[task])
        wrong = rng.random(len(table)) >= chance
        codes = (table[task].to_numpy(np.int64) + wrong * rng.integers(1, classes, len(table))) % classes
        table[f"{task}_predicted"] = codes.astype(np.int16)
        for code, name in enumerate(CLASSES[task]):
            table[f"p_{name}"] = np.where(codes == code, 0.6, 0.4 / (classes - 1)).astype(np.float32)
    table["age_predicted"] = (table["age"].to_numpy(np.float64) + rng.laplace(0, age, len(table))).astype(np.float32)
    return table


def without_some_labels(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table with a fifth of the labels of each task missing."""
    rng = np.random.default_rng(seed)
    return table.assign(
        **{task: table[task].mask(rng.random(len(table)) < 0.2, pd.NA) for task in ("gender", "race", "age")}
    )
