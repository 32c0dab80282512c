"""How good predictions are: scores with bootstrap intervals, and how they compare with a constant guess."""

from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from enum import Enum
from functools import singledispatch
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.labels import Numbers, column_values
from facecls.data.tasks import Age, Classification, Task, Tasks

Key = TypeVar("Key", bound=Hashable)

CONFIDENCE = 0.95
"""Level of all intervals."""
REPLICATES = 1000
"""Bootstrap replicates; Efron & Tibshirani 1993, "An Introduction to the Bootstrap", recommend 1,000 for intervals."""
YEARS = 5
"""Largest error of an age that counts as right in ``cs5``, as in papers on UTKFace."""
_AT_ONCE = 100
"""Replicates held in memory at the same time: 20 MB for 24,000 faces."""
_FEWEST = 6
"""Faces needed to call a model better than a guess: if it is better on all of them, the two-sided p-value of a sign
test is 2 / 2**6 = 0.03; for five faces it is 0.06."""


class Verdict(Enum):
    """How a model compares with a constant guess, beyond what chance explains."""

    BETTER = "better"
    UNCLEAR = "unclear"
    WORSE = "worse"
    TOO_FEW = "too few"
    """There are too few labelled faces to tell."""


class Guess(NamedTuple):
    """A constant guess.

    Attributes:
        value: A code or an age in years.
        description: Such as ``most common class``.
        from_reference: Whether it was taken from the reference faces; if not, from the tested ones.
    """

    value: float
    description: str
    from_reference: bool


class Interval(NamedTuple):
    """A score, its 95 % interval, and the number of labelled faces it was computed on."""

    value: float
    low: float
    high: float
    faces: int


class Score(NamedTuple):
    """One score of one task, as a function of sums over faces, so that a bootstrap replicate is a weighted sum.

    Attributes:
        task: The task that is scored.
        title: For headings.
        unit: ``share`` for 0..1, ``years`` for 0 and above.
        higher_is_better: False for errors.
        over_classes: True for a mean over classes, which is meaningless on faces of a single class.
        parts: Table of N predictions -> (N, K). The first column is 1 for faces that have the label, and rows of other
            faces are 0.
        value: Sums of the parts (..., K) -> scores (...), NaN where no face has a label.
    """

    task: Task
    title: str
    unit: Literal["share", "years"]
    higher_is_better: bool
    over_classes: bool
    parts: Callable[[pd.DataFrame], Numbers]
    value: Callable[[Numbers], Numbers]

    @property
    def heading(self) -> str:
        """The title, with the unit if it is years."""
        return f"{self.title} (years)" if self.unit == "years" else self.title


def scores_of(tasks: Tasks) -> dict[str, Score]:
    """The scores of each task, its main one first.

    Args:
        tasks: The tasks.

    Returns:
        By log key without its stage. ``accuracy`` is the share of faces that are right, ``f1_macro`` the plain mean
        over the classes that occur among labels or predictions, as in scikit-learn and torchmetrics. ``mae_years`` is
        the mean absolute error, ``cs5`` the share of faces whose age is at most five years off; both are over labels
        in years. ``band_accuracy`` is over labels that are ranges: the share of faces whose predicted age, rounded to
        whole years, lies in the range.

    Examples:
        >>> from facecls.data.tasks import UTKFACE
        >>> list(scores_of({"age": UTKFACE["age"]}))
        ['age/mae_years', 'age/cs5', 'age/band_accuracy']
    """
    return {f"{task.name}/{name}": score for task in tasks.values() for name, score in _scores(task).items()}


def main_scores(names: Container[str], tasks: Tasks) -> dict[str, str]:
    """The score that stands for each task where there is room for one.

    Args:
        names: The scores that there are, such as the keys of ``score`` or the columns of a group table.
        tasks: The tasks.

    Returns:
        Names of scores by task: the first of ``scores_of`` that there is. Tasks without any are left out.
    """
    main: dict[str, str] = {}
    for name, score in scores_of(tasks).items():
        if name in names:
            main.setdefault(score.task.name, name)
    return main


@singledispatch
def _scores(task: Task) -> dict[str, Score]:
    """Scores by the second part of their name."""
    raise NotImplementedError(type(task))


@_scores.register
def _classification_scores(task: Classification) -> dict[str, Score]:
    title = task.title
    right = _error_parts(task, lambda error: (error == 0).astype(np.float64))
    return {
        "accuracy": Score(task, f"{title} accuracy", "share", True, False, right, _mean),
        "f1_macro": Score(task, f"{title} macro F1", "share", True, True, _confusion_parts(task), _macro_f1),
    }


@_scores.register
def _age_scores(task: Age) -> dict[str, Score]:
    title = task.title
    within = _error_parts(task, lambda error: (np.abs(error) <= YEARS).astype(np.float64))
    mae_title = f"Mean absolute error of {title.lower()}"
    return {
        "mae_years": Score(task, mae_title, "years", False, False, _error_parts(task, np.abs), _mean),
        "cs5": Score(task, f"{title} within five years", "share", True, False, within, _mean),
        "band_accuracy": Score(task, f"{title} within its range", "share", True, False, _range_parts(task), _mean),
    }


def _error_parts(task: Task, of_error: Callable[[Numbers], Numbers]) -> Callable[[pd.DataFrame], Numbers]:
    def parts(table: pd.DataFrame) -> Numbers:
        labels, predicted = column_values(table, task.name), column_values(table, f"{task.name}_predicted")
        known = ~np.isnan(labels)
        return np.stack([known, np.where(known, of_error(predicted - labels), 0)], 1)  # (N, 2)

    return parts


def _range_parts(task: Age) -> Callable[[pd.DataFrame], Numbers]:
    def parts(table: pd.DataFrame) -> Numbers:
        first, last = (column_values(table, column) for column in task.range)
        years = np.round(column_values(table, f"{task.name}_predicted"))
        return np.stack([~np.isnan(first), (first <= years) & (years <= last)], 1).astype(np.float64)  # (N, 2)

    return parts


def _mean(sums: Numbers) -> Numbers:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 1] / sums[..., 0])


def _confusion_parts(task: Classification) -> Callable[[pd.DataFrame], Numbers]:
    codes = np.arange(len(task.classes))

    def parts(table: pd.DataFrame) -> Numbers:
        labels, predicted = column_values(table, task.name), column_values(table, f"{task.name}_predicted")
        known = ~np.isnan(labels)[:, None]
        true = labels[:, None] == codes  # (N, C)
        guessed = (predicted[:, None] == codes) & known
        return np.concatenate([known, true & guessed, guessed, true], 1).astype(np.float64)  # (N, 1 + 3 * C)

    return parts


def _macro_f1(sums: Numbers) -> Numbers:
    hits, guessed, true = np.split(sums[..., 1:], 3, axis=-1)  # (..., C)
    seen = guessed + true > 0
    each = 2 * hits / np.where(seen, guessed + true, 1)
    with np.errstate(invalid="ignore"):
        return np.asarray(each.sum(-1) / seen.sum(-1))


def score_parts(table: pd.DataFrame, tasks: Tasks) -> dict[str, Numbers]:
    """The parts of each score, see ``Score.parts``.

    Args:
        table: N predictions.
        tasks: The tasks.

    Returns:
        (N, K) by name; only scores for which there are predictions and at least one labelled face.
    """
    by_name: dict[str, Numbers] = {}
    for name, score in scores_of(tasks).items():
        if f"{score.task.name}_predicted" in table and (parts := score.parts(table))[:, 0].any():
            by_name[name] = parts
    return by_name


def score(table: pd.DataFrame, tasks: Tasks, seed: int = 0) -> dict[str, Interval]:
    """The scores of predictions, each with a 95 % bootstrap interval over faces.

    Args:
        table: Predictions of N >= 0 faces.
        tasks: The tasks.
        seed: Of the bootstrap.

    Returns:
        By the names of ``scores_of``, those for which there are predictions and labels; see ``intervals`` for the
        method.
    """
    scores, parts = scores_of(tasks), score_parts(table, tasks)
    replicates = resampled_sums(parts, np.zeros(len(table), np.int64), 1, seed)
    estimates: dict[str, Interval] = {}
    for name, columns in parts.items():
        sums = columns.sum(0, keepdims=True)  # (1, K)
        value, faces = scores[name].value(sums), sums[:, 0]
        low, high = intervals(scores[name], value, scores[name].value(replicates[name]), faces)
        estimates[name] = Interval(float(value[0]), float(low[0]), float(high[0]), int(faces[0]))
    return estimates


def constant_guesses(table: pd.DataFrame, reference: pd.DataFrame, tasks: Tasks) -> dict[str, Guess]:
    """The constants that fit the labels of each task best.

    Args:
        table: Tested faces with labels.
        reference: Labelled faces to take the guesses from, such as the training split; may be empty. Guesses for tasks
            that none of them is labelled for are taken from ``table``.
        tasks: The tasks.

    Returns:
        By task: the most common class, the median age or, where ages are only known as ranges, the middle of the most
        common range. Tasks without labels are left out.
    """
    guesses: dict[str, Guess] = {}
    for name, task in tasks.items():
        for faces, from_reference in ((reference, True), (table, False)):
            value, description = _guess(task, faces)
            if name not in guesses and not np.isnan(value):
                guesses[name] = Guess(value, description, from_reference)
    return guesses


def trivial(table: pd.DataFrame, reference: pd.DataFrame, tasks: Tasks) -> dict[str, float]:
    """The scores of constant guesses.

    Args:
        table: Predictions; only their labels are used.
        reference: As for ``constant_guesses``.
        tasks: The tasks.

    Returns:
        Scores by the names of ``scores_of``, as ``score``.
    """
    scores = scores_of(tasks)
    parts = score_parts(_guessed(table, reference, tasks), tasks)
    return {name: float(scores[name].value(columns.sum(0))) for name, columns in parts.items()}


def compare_with_guess(table: pd.DataFrame, tasks: Tasks, reference: pd.DataFrame, seed: int = 0) -> dict[str, Verdict]:
    """Whether a model is better than a constant guess, beyond what chance explains.

    Args:
        table: Predictions.
        tasks: The tasks.
        reference: As for ``constant_guesses``.
        seed: Of the bootstrap.

    Returns:
        By task. ``BETTER`` and ``WORSE`` if the 95 % interval of the difference in the main score, paired over the same
        faces, lies on that side of 0, ``UNCLEAR`` if it includes 0, ``TOO_FEW`` below six labelled faces. Tasks without
        a score are left out.
    """
    model, guess = score_parts(table, tasks), score_parts(_guessed(table, reference, tasks), tasks)
    main = main_scores(guess, tasks)
    both = {(name, who): parts[name] for name in main.values() for who, parts in enumerate((guess, model))}
    replicates = resampled_sums(both, np.zeros(len(table), np.int64), 1, seed)
    verdicts: dict[str, Verdict] = {}
    for task, name in main.items():
        score = scores_of(tasks)[name]
        low, high = difference_interval(score, replicates[name, 0], replicates[name, 1])
        if model[name][:, 0].sum() < _FEWEST:
            verdicts[task] = Verdict.TOO_FEW
        elif low <= 0 <= high:
            verdicts[task] = Verdict.UNCLEAR
        else:
            verdicts[task] = Verdict.BETTER if (low > 0) == score.higher_is_better else Verdict.WORSE
    return verdicts


def _guessed(table: pd.DataFrame, reference: pd.DataFrame, tasks: Tasks) -> pd.DataFrame:
    """The labels of a table with constant guesses in place of its predictions."""
    guessed = table[[column for task in tasks.values() for column in task.columns if column in table]].copy()
    for name, guess in constant_guesses(table, reference, tasks).items():
        if f"{name}_predicted" in table:
            guessed[f"{name}_predicted"] = guess.value
    return guessed


@singledispatch
def _guess(task: Task, faces: pd.DataFrame) -> tuple[float, str]:
    """The constant that fits the labels best, NaN without labels, and what it is."""
    raise NotImplementedError(type(task))


@_guess.register
def _guess_class(task: Classification, faces: pd.DataFrame) -> tuple[float, str]:
    return _most_common(column_values(faces, task.name)), "most common class"


@_guess.register
def _guess_age(task: Age, faces: pd.DataFrame) -> tuple[float, str]:
    ages = column_values(faces, task.name)
    if not np.isnan(ages).all():
        return float(np.nanmedian(ages)), "median age"
    first, last = (column_values(faces, column) for column in task.range)
    return _most_common((first + last) / 2), "middle of the most common range"


def _most_common(values: Numbers) -> float:
    different, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    return float(different[counts.argmax()]) if len(different) else float("nan")


def resampled_sums(
    parts: Mapping[Key, Numbers], cells: npt.NDArray[np.int64], number: int, seed: int
) -> dict[Key, Numbers]:
    """Sums over ``REPLICATES`` bootstrap samples of the faces, drawn with replacement.

    All parts share the samples, so differences between their scores are paired.

    Args:
        parts: (N, K) arrays by any key.
        cells: (N,) the cell that each face is summed into.
        number: Number of cells.
        seed: Of the samples; they do not depend on the cells.

    Returns:
        (REPLICATES, number, K) by the same keys.
    """
    chunks = list(resampled_sums_in_chunks(parts, cells, number, seed))
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in parts}


def resampled_sums_in_chunks(
    parts: Mapping[Key, Numbers], cells: npt.NDArray[np.int64], number: int, seed: int
) -> Iterator[dict[Key, Numbers]]:
    """The same some replicates at a time, (R, number, K), for many cells, whose sums would fill the memory."""
    if not parts:
        return
    order = np.argsort(cells, kind="stable")
    columns = np.concatenate(list(parts.values()), 1)[order]  # (N, sum of K), the faces of a cell side by side
    edges = np.searchsorted(cells[order], np.arange(number + 1))
    ends = np.cumsum([values.shape[1] for values in parts.values()])[:-1]
    for counts in _bootstrap_counts(len(order), seed):
        weights = counts[:, order]
        sums = np.zeros((_AT_ONCE, number, columns.shape[1]))
        for cell in np.flatnonzero(np.diff(edges)):
            faces = slice(edges[cell], edges[cell + 1])
            sums[:, cell] = weights[:, faces] @ columns[faces]
        yield dict(zip(parts, np.split(sums, ends, axis=2), strict=True))


def _bootstrap_counts(faces: int, seed: int) -> Iterator[Numbers]:
    """How often each face is drawn: arrays (_AT_ONCE, faces), REPLICATES rows in total."""
    rng = np.random.default_rng(seed)
    firsts = np.arange(_AT_ONCE)[:, None] * faces
    for _ in range(REPLICATES // _AT_ONCE):
        drawn = rng.integers(faces, size=(_AT_ONCE, faces)) + firsts
        counts = np.bincount(drawn.ravel(), minlength=_AT_ONCE * faces)
        yield counts.reshape(_AT_ONCE, faces).astype(np.float64)


def intervals(score: Score, values: Numbers, replicates: Numbers, faces: Numbers) -> tuple[Numbers, Numbers]:
    """95 % intervals by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

    Where all faces are right, or all wrong, the replicates are all equal and would claim certainty; the exact bound of
    Clopper & Pearson 1934 (doi:10.1093/biomet/26.4.404) replaces theirs. An error in years on a single face has no
    interval: NaN.

    Args:
        score: The score.
        values: (G,) its values.
        replicates: (R, G) its values on the bootstrap samples, NaN where no labelled face was drawn.
        faces: (G,) number of labelled faces of each value, at least 1.

    Returns:
        (G,) lower and (G,) upper ends.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail], axis=0)
    if score.unit == "share":
        exact = tail ** (1 / faces)
        low = np.where(values == 1, exact, low)
        high = np.where(values == 0, 1 - exact, high)
    else:
        low, high = (np.where(faces > 1, end, np.nan) for end in (low, high))
    return low, high


def difference_interval(score: Score, first: Numbers, second: Numbers) -> tuple[float, float]:
    """95 % interval of a difference between two scores on the same faces (percentile bootstrap over pairs).

    Args:
        score: The score.
        first: (R, 1, K) sums of the parts on the bootstrap samples, as ``resampled_sums`` returns them.
        second: The same of what is compared with it.

    Returns:
        Lower and upper end of second minus first.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(score.value(second) - score.value(first), [tail, 1 - tail])
    return float(low), float(high)
