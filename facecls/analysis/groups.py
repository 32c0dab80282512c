"""Fairness: scores by group, such as each race and age band, and the largest gaps between groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, singledispatch
from itertools import product
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.labels import Numbers, column_values, label_ends
from facecls.analysis.scores import (
    CONFIDENCE,
    Score,
    intervals,
    main_scores,
    resampled_sums_in_chunks,
    score_parts,
    scores_of,
)
from facecls.data.tasks import UTKFACE, Age, Classification, Task, Tasks

Codes = npt.NDArray[np.int64]

REPORT_AGE_BANDS = (0, 10, 20, 30, 40, 60)
"""First age of each band in years; the last band is open."""
ANY_GROUP = "all"
"""Stands on an axis by which a group is not split."""
COMBINATION = "combination"
"""``Gap.by`` for groups that are split by several axes."""
COMBINED_AXES, MAX_COMBINATIONS = 3, 200
"""Combinations are formed over the first axes only, and without an axis whose groups would make them more than this.
Their number multiplies with each axis (60 for UTKFace's three), so that with more of them most would have fewer than
``MIN_FACES`` faces. The other axes get their single groups."""
MIN_FACES = 20
"""Scores on fewer labelled faces are not reported."""


@dataclass(frozen=True)
class Axis:
    """A way to group faces by a label.

    Attributes:
        name: Column of a group table, such as ``race`` or ``age_band``.
        groups: Names of the groups by code.
        codes: Table of N faces -> (N,) code of each face's group, ``len(groups)`` for a face in none.
    """

    name: str
    groups: tuple[str, ...]
    codes: Callable[[pd.DataFrame], Codes]

    @property
    def title(self) -> str:
        """The name in words, such as ``age band``."""
        return axis_title(self.name)


class Gap(NamedTuple):
    """The largest difference between two groups in one score.

    Attributes:
        score: Name in ``scores_of``.
        by: Name of the axis on which the groups differ, or ``COMBINATION``.
        better: Name of the group with the best value.
        worse: Name of the group with the worst value.
        better_value: Score of that group.
        worse_value: Score of that group.
        difference: By how much ``worse`` is worse, 0 or above; a share or years.
        low: Lower end of the interval of ``difference``; above 0, the gap is more than chance.
        high: Upper end.
    """

    score: str
    by: str
    better: str
    worse: str
    better_value: float
    worse_value: float
    difference: float
    low: float
    high: float


class WorstGroup(NamedTuple):
    """The group on which a task's main score is worst.

    Attributes:
        score: Name in ``scores_of``.
        axis: Name of the axis that the group is on.
        group: Name of the group.
        value: Its score.
        low: Lower end of the 95 % interval.
        high: Upper end.
        faces: Number of faces in the group that have a label of the task.
    """

    score: str
    axis: str
    group: str
    value: float
    low: float
    high: float
    faces: int


class ScoredGroups(NamedTuple):
    """The scores of G groups, on all faces and on R bootstrap samples.

    Attributes:
        tasks: The tasks.
        names: Name on each axis, and number of faces.
        values: (G,) by score.
        replicates: (R, G) by score.
        faces: (G,) number of labelled faces by score.
        shown: (G,) by score: whether it is reported.
    """

    tasks: Tasks
    names: pd.DataFrame
    values: dict[str, Numbers]
    replicates: dict[str, Numbers]
    faces: dict[str, Numbers]
    shown: dict[str, npt.NDArray[np.bool_]]


def report_bands(task: Age) -> dict[str, tuple[int, int]]:
    """The bands of ages in reports.

    Args:
        task: The age.

    Returns:
        First and last age by name, both included; the last band ends at the task's highest age.

    Examples:
        >>> report_bands(Age("age", highest=50))
        {'0-9': (0, 9), '10-19': (10, 19), '20-29': (20, 29), '30-39': (30, 39), '40+': (40, 50)}
    """
    firsts = [first for first in REPORT_AGE_BANDS if first <= task.highest]
    lasts = [first - 1 for first in firsts[1:]]
    bands = {f"{first}-{last}": (first, last) for first, last in zip(firsts, lasts, strict=False)}
    return bands | {f"{firsts[-1]}+": (firsts[-1], task.highest)}


def axes_of(table: pd.DataFrame, tasks: Tasks) -> dict[str, Axis]:
    """The axes that faces can be grouped by: the classes of each classification, the report bands of each age.

    Args:
        table: Faces with labels.
        tasks: The tasks.

    Returns:
        By name, in the order of the tasks; only axes on which some face is in a group. A face whose age is a range is
        in a band if all of the range is.
    """
    axes = [_axis(task) for task in tasks.values()]
    return {axis.name: axis for axis in axes if (axis.codes(table) < len(axis.groups)).any()}


@singledispatch
def _axis(task: Task) -> Axis:
    raise NotImplementedError(type(task))


@_axis.register
def _class_axis(task: Classification) -> Axis:
    return Axis(task.name, task.classes, partial(_class_codes, task))


@_axis.register
def _age_axis(task: Age) -> Axis:
    return Axis(f"{task.name}_band", tuple(report_bands(task)), partial(_band_codes, task))


def _class_codes(task: Classification, table: pd.DataFrame) -> Codes:
    return np.nan_to_num(column_values(table, task.name), nan=len(task.classes)).astype(np.int64)


def _band_codes(task: Age, table: pd.DataFrame) -> Codes:
    firsts = [first for first, _ in report_bands(task).values()]
    low, high = (np.where(np.isnan(ends), np.nan, np.digitize(ends, firsts) - 1) for ends in label_ends(table, task))
    return np.where(low == high, low, len(firsts)).astype(np.int64)


def axis_columns(groups: pd.DataFrame) -> list[str]:
    """The columns of a group table that name the group: one per axis."""
    return list(groups.columns[: groups.columns.get_loc("faces")])


def axis_title(name: str) -> str:
    """The name of an axis in words, such as ``age band``."""
    return name.replace("_", " ")


def axes_split(groups: pd.DataFrame) -> npt.NDArray[np.int64]:
    """By how many axes each group of a group table is split: 0 for all faces."""
    return (groups[axis_columns(groups)] != ANY_GROUP).sum(axis=1).to_numpy(np.int64)


def group_title(group: Mapping[Any, str]) -> str:
    """A group in words; where the axis is not one of UTKFace's, a name such as ``with`` needs that of its axis.

    Args:
        group: Its name by axis, ``ANY_GROUP`` where it is not split.

    Examples:
        >>> group_title({"gender": "female", "race": "asian", "age_band": "20-29"})
        'female, asian, 20-29'
        >>> group_title({"gender": "female", "glasses": "with", "beard": "all"})
        'female, glasses with'
    """
    familiar = [_axis(task).name for task in UTKFACE.values()]
    names = {axis: name for axis, name in group.items() if name != ANY_GROUP}
    parts = [name if axis in familiar else f"{axis_title(axis)} {name}" for axis, name in names.items()]
    return ", ".join(parts) or "all faces"


def score_groups(table: pd.DataFrame, tasks: Tasks, seed: int = 0) -> ScoredGroups:
    """Scores all faces, each group of each axis, and the combinations of groups of the first axes.

    Groups are defined by labels, not by predictions; a face without a label is in no group of that axis.

    Args:
        table: Predictions.
        tasks: The tasks.
        seed: Of the bootstrap.

    Returns:
        What ``group_table`` and ``gaps`` are made from: all faces first, then each group of each axis of ``axes_of``,
        then each combination, also those without faces.
    """
    axes, scores, parts = list(axes_of(table, tasks).values()), scores_of(tasks), score_parts(table, tasks)
    combined = _combined_axes(axes)
    blocks = [(combined, _group_names(combined))]
    blocks += [([axis], [(name,) for name in axis.groups]) for axis in axes if axis not in combined]
    sums: dict[str, list[Numbers]] = {name: [] for name in parts}
    replicates: dict[str, list[Numbers]] = {name: [] for name in parts}
    tables = []
    for block, groups in blocks:  # each with cells of its own, which would multiply; the same seed draws the same faces
        cells, members = _cells(block, table), _members(block, groups)
        each_face = members.T[cells]  # (N, G)
        chunks: dict[str, list[Numbers]] = {name: [] for name in parts}
        for drawn in resampled_sums_in_chunks(parts, cells, members.shape[1], seed):
            for name in parts:  # only the scores are kept, since all sums would fill the memory
                chunks[name].append(scores[name].value(members @ drawn[name]))
        for name, columns in parts.items():
            sums[name].append(each_face.T @ columns)
            replicates[name].append(np.concatenate(chunks[name]))
        named = pd.DataFrame(groups, range(len(groups)), [axis.name for axis in block])
        tables.append(named.assign(faces=each_face.sum(0).astype(np.int64)))

    names = pd.concat(tables, ignore_index=True).reindex(columns=[*(axis.name for axis in axes), "faces"])
    names = names.fillna(ANY_GROUP)
    order = _reading_order(names)
    names = names.iloc[order].reset_index(drop=True)
    joined = {name: np.concatenate(each)[order] for name, each in sums.items()}  # (G, K)
    faces = {name: each[:, 0] for name, each in joined.items()}
    return ScoredGroups(
        tasks=tasks,
        names=names,
        values={name: scores[name].value(each) for name, each in joined.items()},
        replicates={name: np.concatenate(each, 1)[:, order] for name, each in replicates.items()},
        faces=faces,
        shown={name: (faces[name] >= MIN_FACES) & ~_is_one_class(names, scores[name]) for name in parts},
    )


def group_table(groups: ScoredGroups) -> pd.DataFrame:
    """Every score of every group.

    Macro F1 is not reported for groups of one class of its task, where it is a rescaled accuracy.

    Args:
        groups: As ``score_groups`` returns them.

    Returns:
        A column per axis (names of groups, ``ANY_GROUP`` where the group is not split by it) and ``faces``; then for
        each score NAME: NAME, NAME_low and NAME_high (95 %, see ``scores.intervals``; not corrected for the number of
        groups), NaN for fewer than ``MIN_FACES`` labelled faces, and NAME_faces, their number.
    """
    scores = scores_of(groups.tasks)
    columns: dict[str, Any] = {}
    for name, values in groups.values.items():
        shown = groups.shown[name]
        ends = np.full((3, len(values)), np.nan)
        if shown.any():  # np.nanquantile fails on zero columns
            of_shown = values[shown], groups.replicates[name][:, shown], groups.faces[name][shown]
            ends[:, shown] = values[shown], *intervals(scores[name], *of_shown)
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        columns[f"{name}_faces"] = groups.faces[name].astype(np.int64)
    return groups.names.assign(**columns)


def worst_groups(groups: pd.DataFrame, tasks: Tasks) -> dict[str, WorstGroup]:
    """The group on which the main score of each task is worst.

    Args:
        groups: As ``group_table`` returns them.
        tasks: The tasks.

    Returns:
        By task. Combinations are left out, and so are axes on which only one group has a score, and tasks without any.
    """
    scores, axes = scores_of(tasks), axis_columns(groups)
    is_single = axes_split(groups) == 1
    worst: dict[str, WorstGroup] = {}
    for task, name in main_scores(groups.columns, tasks).items():
        by_axis = {axis: groups[is_single & (groups[axis] != ANY_GROUP) & groups[name].notna()] for axis in axes}
        rows = [(axis, row) for axis, some in by_axis.items() if len(some) > 1 for row in some.to_dict("records")]
        if not rows:
            continue
        sign = 1 if scores[name].higher_is_better else -1
        axis, row = min(rows, key=lambda each: sign * each[1][name])
        worst[task] = WorstGroup(
            name, axis, row[axis], row[name], row[f"{name}_low"], row[f"{name}_high"], row[f"{name}_faces"]
        )
    return worst


def gaps(groups: ScoredGroups) -> list[Gap]:
    """The largest gap per score and axis, with an interval that is corrected for the search.

    All pairs of groups on an axis get an interval at the level 1 - 0.05 / pairs (Bonferroni), so that with 95 %
    confidence all of them cover their true differences at once, including the largest. A group's own interval is
    Wilson's (1927) for shares of faces, which keeps its level near 0 and 1 and in small groups, and the normal one with
    the bootstrap's standard error for macro F1 and errors in years. Two of them are combined into the interval of a
    difference as in Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I) and Zou &
    Donner 2008 (doi:10.1002/sim.3095). Percentiles of 1,000 replicates do not reach that far into the tails.

    Args:
        groups: As ``score_groups`` returns them.

    Returns:
        By score in the order of ``scores_of``, then by axis, combinations last. No gap where fewer than two groups have
        ``MIN_FACES`` labelled faces.
    """
    names, split, scores = groups.names, axes_split(groups.names), scores_of(groups.tasks)
    rows = {axis: (split == 1) & names[axis].ne(ANY_GROUP).to_numpy() for axis in axis_columns(names)}
    rows[COMBINATION] = split > 1
    largest: list[Gap] = []
    for name in groups.values:
        for by, chosen in rows.items():
            among = np.flatnonzero(chosen & groups.shown[name])
            if len(among) > 1:
                largest.append(_largest(groups, name, scores[name], by, among))
    return largest


def describe(gap: Gap, tasks: Tasks) -> str:
    """A gap in a sentence, with its interval, and whether it may be due to chance."""
    score = scores_of(tasks)[gap.score]
    scale, unit, of_gap = (100, "%", "points") if score.unit == "share" else (1, "years", "years")
    best, worst, difference, low, high = (f"{scale * value:.1f}" for value in gap[4:])
    verdict = "" if gap.low > 0 else "; the interval includes 0, so the gap may be due to chance"
    return (
        f"{score.title} by {axis_title(gap.by)}: worst for {gap.worse} ({worst} {unit}), best for {gap.better} "
        f"({best} {unit}), a gap of {difference} {of_gap} (95 % interval {low} to {high}){verdict}."
    )


def _combined_axes(axes: Iterable[Axis]) -> list[Axis]:
    """The axes whose combinations are scored."""
    combined: list[Axis] = []
    number = 1
    for axis in axes:
        if len(combined) < COMBINED_AXES and number * len(axis.groups) <= MAX_COMBINATIONS:
            combined.append(axis)
            number *= len(axis.groups)
    return combined


def _reading_order(names: pd.DataFrame) -> npt.NDArray[np.intp]:
    """Row numbers: all faces, the groups of each axis in turn, combinations."""
    split = (names[axis_columns(names)] != ANY_GROUP).to_numpy()
    axis = split.argmax(1) if split.shape[1] else np.zeros(len(names), np.intp)
    number = split.sum(1).clip(max=2)
    return np.lexsort((np.where(number == 1, axis, 0), number))  # stable


def _group_names(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """All faces, each group of each axis, each combination: names on all axes."""
    names = [(ANY_GROUP,) * len(axes)]
    names += [tuple(name if axis is by else ANY_GROUP for axis in axes) for by in axes for name in by.groups]
    if len(axes) > 1:
        names += product(*(axis.groups for axis in axes))
    return names


def _cells(axes: Sequence[Axis], table: pd.DataFrame) -> Codes:
    """(N,) one code per combination of groups; an axis has one more group for faces without the label."""
    cells = np.zeros(len(table), np.int64)
    for axis in axes:
        cells = cells * (len(axis.groups) + 1) + axis.codes(table)
    return cells


def _members(axes: Sequence[Axis], groups: Sequence[tuple[str, ...]]) -> Numbers:
    """(G, cells): 1 where a cell belongs to the group."""
    rows = []
    for group in groups:
        cell: Numbers = np.ones(1)
        for name, axis in zip(group, axes, strict=True):
            inside = np.array([name in (ANY_GROUP, other) for other in (*axis.groups, None)], np.float64)
            cell = np.outer(cell, inside).ravel()
        rows.append(cell)
    return np.stack(rows)


def _is_one_class(groups: pd.DataFrame, score: Score) -> npt.NDArray[np.bool_]:
    if score.over_classes:
        return groups[score.task.name].ne(ANY_GROUP).to_numpy()
    return np.zeros(len(groups), np.bool_)


def _largest(groups: ScoredGroups, name: str, score: Score, by: str, among: npt.NDArray[np.intp]) -> Gap:
    """The gap between the best and the worst of at least two groups, given by their row numbers."""
    ranked = among[np.argsort(groups.values[name][among], kind="stable")]
    ends = ranked[[0, -1]]  # the lowest and the highest value
    pairs = len(among) * (len(among) - 1) / 2
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * pairs))
    values = groups.values[name][ends]
    if score.unit == "share" and not score.over_classes:
        low, high = _wilson(values, groups.faces[name][ends], z)
    else:
        margin = z * np.nanstd(groups.replicates[name][:, ends], axis=0, ddof=1)
        low, high = values - margin, values + margin
    difference = values[1] - values[0]
    named = [group_title(group) for group in groups.names[axis_columns(groups.names)].iloc[ends].to_dict("records")]
    worse, better = (0, 1) if score.higher_is_better else (1, 0)
    return Gap(
        score=name,
        by=by,
        better=named[better],
        worse=named[worse],
        better_value=float(values[better]),
        worse_value=float(values[worse]),
        difference=float(difference),
        low=float(difference - np.hypot(values[1] - low[1], high[0] - values[0])),
        high=float(difference + np.hypot(high[1] - values[1], values[0] - low[0])),
    )


def _wilson(share: Numbers, faces: Numbers, z: float) -> tuple[Numbers, Numbers]:
    """Wilson 1927 (doi:10.1080/01621459.1927.10502953): the shares from which ``share`` is z standard errors off."""
    middle = share + z**2 / (2 * faces)
    margin = z * np.sqrt(share * (1 - share) / faces + z**2 / (4 * faces**2))
    return (middle - margin) / (1 + z**2 / faces), (middle + margin) / (1 + z**2 / faces)
