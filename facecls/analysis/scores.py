"""How good predictions are, in numbers with the interval that chance leaves, and what a trivial guess would reach."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.data.tasks import CLASSES, TASKS, Task

Numbers = npt.NDArray[np.float64]
"""Any array of float64."""
Key = TypeVar("Key", bound=Hashable)

CONFIDENCE = 0.95
"""Of all intervals of a study."""
REPLICATES = 1000
"""Resampled sets of faces; Efron & Tibshirani 1993, "An Introduction to the Bootstrap", advise 1,000 for intervals."""
YEARS = 5
"""How far off an age may be to count as right, as in papers on UTKFace."""
_AT_ONCE = 100
"""Replicates held at the same time: 20 MB for 24,000 faces."""


class Interval(NamedTuple):
    """A score, the 95 % interval around it, and how many labelled faces it was taken over."""

    value: float
    low: float
    high: float
    faces: int


class Score(NamedTuple):
    """One number about one task, as a function of sums over faces; so a resampled set only needs weighted sums.

    Attributes:
        task: What is judged.
        title: For headings.
        unit: ``share`` for 0..1, ``years`` for 0 and more.
        higher_is_better: False for errors.
        over_classes: True for a mean over classes, which says nothing about faces that are all of one class.
        parts: Labels (N,), NaN without one, and predictions (N,) -> (N, K), of which the first column is 1 for labelled
            faces, and all are 0 for others.
        value: Sums of the parts (..., K) -> scores (...); NaN where no face has a label.
    """

    task: Task
    title: str
    unit: Literal["share", "years"]
    higher_is_better: bool
    over_classes: bool
    parts: Callable[[Numbers, Numbers], Numbers]
    value: Callable[[Numbers], Numbers]

    @property
    def heading(self) -> str:
        """The title, with years where values are in them."""
        return f"{self.title} (years)" if self.unit == "years" else self.title


def _mean_of(of_error: Callable[[Numbers], Numbers]) -> Callable[[Numbers, Numbers], Numbers]:
    def parts(labels: Numbers, predicted: Numbers) -> Numbers:
        known = ~np.isnan(labels)
        return np.stack([known, np.where(known, of_error(predicted - labels), 0)], 1)  # (N, 2)

    return parts


def _mean(sums: Numbers) -> Numbers:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 1] / sums[..., 0])


def _confusion_of(classes: int) -> Callable[[Numbers, Numbers], Numbers]:
    def parts(labels: Numbers, predicted: Numbers) -> Numbers:
        codes = np.arange(classes)
        known = ~np.isnan(labels)[:, None]
        true = labels[:, None] == codes  # (N, classes)
        guessed = (predicted[:, None] == codes) & known
        return np.concatenate([known, true & guessed, guessed, true], 1).astype(np.float64)  # (N, 1 + 3 * classes)

    return parts


def _macro_f1(sums: Numbers) -> Numbers:
    hits, guessed, true = np.split(sums[..., 1:], 3, axis=-1)  # (..., classes)
    seen = guessed + true > 0
    each = 2 * hits / np.where(seen, guessed + true, 1)
    with np.errstate(invalid="ignore"):
        return np.asarray(each.sum(-1) / seen.sum(-1))


def _accuracy(task: Task) -> Score:
    parts = _mean_of(lambda error: (error == 0).astype(np.float64))
    return Score(task, f"{task.capitalize()} accuracy", "share", True, False, parts, _mean)


def _f1_macro(task: Task) -> Score:
    parts = _confusion_of(len(CLASSES[task]))
    return Score(task, f"{task.capitalize()} macro F1", "share", True, True, parts, _macro_f1)


def _within(error: Numbers) -> Numbers:
    return (np.abs(error) <= YEARS).astype(np.float64)


SCORES: dict[str, Score] = {
    "gender/accuracy": _accuracy("gender"),
    "gender/f1_macro": _f1_macro("gender"),
    "race/accuracy": _accuracy("race"),
    "race/f1_macro": _f1_macro("race"),
    "age/mae_years": Score("age", "Mean absolute error of age", "years", False, False, _mean_of(np.abs), _mean),
    "age/cs5": Score("age", "Ages within five years", "share", True, False, _mean_of(_within), _mean),
}
"""By log key, without its stage. Accuracy is the share of faces that are right; macro F1 is the plain mean over the
classes that occur among labels or predictions, as in scikit-learn and torchmetrics; ``cs5`` is the share of faces whose
age is at most five years off."""


def task_labels(table: pd.DataFrame, task: Task) -> Numbers:
    """The labels of a task: (N,) float64, NaN where a face has none."""
    return table[task].to_numpy(np.float64, na_value=np.nan)


def score_parts(table: pd.DataFrame) -> dict[str, Numbers]:
    """The parts of each score that the table has, as ``Score.parts`` gives them.

    Args:
        table: N predictions.

    Returns:
        (N, K) by name; only tasks that were predicted and of which at least one face has a label.
    """
    found: dict[str, Numbers] = {}
    for name, score in SCORES.items():
        if f"{score.task}_predicted" in table and table[score.task].notna().any():
            predicted = table[f"{score.task}_predicted"].to_numpy(np.float64)
            found[name] = score.parts(task_labels(table, score.task), predicted)
    return found


def score(table: pd.DataFrame, seed: int = 0) -> dict[str, Interval]:
    """The scores of predictions, each with a 95 % bootstrap interval over faces.

    Args:
        table: Predictions of N >= 0 faces.
        seed: Of the resampling.

    Returns:
        By the names of ``SCORES``, those that the table has; see ``intervals`` for the method.
    """
    parts = score_parts(table)
    one = np.zeros(len(table), np.int64)
    replicates = resampled_sums(parts, one, 1, seed)
    found: dict[str, Interval] = {}
    for name, columns in parts.items():
        sums = columns.sum(0, keepdims=True)  # (1, K)
        value, faces = SCORES[name].value(sums), sums[:, 0]
        low, high = intervals(name, value, SCORES[name].value(replicates[name]), faces)
        found[name] = Interval(float(value[0]), float(low[0]), float(high[0]), int(faces[0]))
    return found


def trivial(table: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    """What always guessing the same would reach: the commonest class, and the median age.

    Args:
        table: Predictions; only their labels are looked at.
        reference: Faces with labels that the guess is learned from, such as the training split.

    Returns:
        Scores by the names of ``SCORES``, those that the table has, without tasks of which the reference has no label.
    """
    guesses = table[list(TASKS)].copy()
    for task in TASKS:
        known = reference[task].dropna()
        if f"{task}_predicted" in table and len(known):
            guesses[f"{task}_predicted"] = float(known.median() if task == "age" else known.mode().iloc[0])
    return {name: float(SCORES[name].value(parts.sum(0))) for name, parts in score_parts(guesses).items()}


def resampled_sums(
    parts: Mapping[Key, Numbers], cells: npt.NDArray[np.int64], number: int, seed: int
) -> dict[Key, Numbers]:
    """Sums over ``REPLICATES`` sets of faces, each drawn with replacement from all faces.

    All parts share the draws, so differences between their scores are paired.

    Args:
        parts: (N, K) arrays by any key.
        cells: (N,) which cell each face is summed into.
        number: How many cells there are.
        seed: Of the draws.

    Returns:
        (REPLICATES, number, K) by the same keys.
    """
    if not parts:
        return {}
    order = np.argsort(cells, kind="stable")
    columns = np.concatenate(list(parts.values()), 1)[order]  # (N, all K), the faces of a cell side by side
    edges = np.searchsorted(cells[order], np.arange(number + 1))
    sums = np.zeros((REPLICATES, number, columns.shape[1]))
    for done, drawn in enumerate(_draws(len(order), seed)):
        weights = drawn[:, order]  # a face is drawn as often whatever the cells are
        rows = slice(done * _AT_ONCE, (done + 1) * _AT_ONCE)
        for cell in np.flatnonzero(np.diff(edges)):
            faces = slice(edges[cell], edges[cell + 1])
            sums[rows, cell] = weights[:, faces] @ columns[faces]
    ends = np.cumsum([values.shape[1] for values in parts.values()])[:-1]
    return dict(zip(parts, np.split(sums, ends, axis=2), strict=True))


def _draws(faces: int, seed: int) -> Iterator[Numbers]:
    """How often each face is drawn: arrays (_AT_ONCE, faces), REPLICATES rows together."""
    rng = np.random.default_rng(seed)
    firsts = np.arange(_AT_ONCE)[:, None] * faces
    for _ in range(REPLICATES // _AT_ONCE):
        drawn = rng.integers(faces, size=(_AT_ONCE, faces)) + firsts
        counts = np.bincount(drawn.ravel(), minlength=_AT_ONCE * faces)
        yield counts.reshape(_AT_ONCE, faces).astype(np.float64)


def intervals(name: str, values: Numbers, replicates: Numbers, faces: Numbers) -> tuple[Numbers, Numbers]:
    """95 % intervals by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

    Where every face is right, or every face wrong, all replicates are equal and would claim certainty. There the exact
    bound of Clopper & Pearson 1934 (doi:10.1093/biomet/26.4.404) stands in. An error in years over one face has no
    interval: NaN.

    Args:
        name: Of the score.
        values: (G,) scores.
        replicates: (R, G) the same of resampled faces; NaN where none with a label was drawn.
        faces: (G,) how many labelled faces each score is over; at least 1.

    Returns:
        (G,) lower and (G,) upper ends.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail], axis=0)
    if SCORES[name].unit == "share":
        exact = tail ** (1 / faces)
        low = np.where(values == 1, exact, low)
        high = np.where(values == 0, 1 - exact, high)
    else:
        low, high = (np.where(faces > 1, end, np.nan) for end in (low, high))
    return low, high
