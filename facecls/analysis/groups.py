"""For whom a model works: the scores by gender, race and age band, and the largest gaps between groups."""

from itertools import product
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.scores import CONFIDENCE, SCORES, Numbers, intervals, resampled_sums, score_parts, task_labels
from facecls.data.tasks import CLASSES, MAX_AGE

Axis = Literal["gender", "race", "age_band"]
"""What faces are grouped by."""

AGE_BANDS: dict[str, tuple[int, int]] = {
    "0-9": (0, 9),
    "10-19": (10, 19),
    "20-29": (20, 29),
    "30-39": (30, 39),
    "40-59": (40, 59),
    "60+": (60, MAX_AGE),
}
"""First and last age of each band, in years, both included."""
AXES: dict[Axis, tuple[str, ...]] = {
    "gender": CLASSES["gender"],
    "race": CLASSES["race"],
    "age_band": tuple(AGE_BANDS),
}
"""Names of the groups on each axis, by code."""
ALL = "all"
"""Stands on an axis by which a group is not split."""
MIN_FACES = 20
"""A score over fewer labelled faces is not given."""


class Gap(NamedTuple):
    """The largest difference between two groups in one score.

    Attributes:
        score: Name in ``SCORES``.
        by: The axis on which the groups differ; ``group`` for groups by all axes at once.
        better: Name of the group with the best value.
        worse: Name of the group with the worst value.
        better_value: Its score.
        worse_value: Its score.
        difference: By how much ``worse`` is worse, never negative; a share or years.
        low: Lower end of the interval on ``difference``; above 0, the gap is more than chance.
        high: Upper end.
    """

    score: str
    by: Literal["gender", "race", "age_band", "group"]
    better: str
    worse: str
    better_value: float
    worse_value: float
    difference: float
    low: float
    high: float


class _Grouped(NamedTuple):
    """names: gender, race, age_band, faces of G groups; by score: values (G,), replicates (R, G), labelled faces (G,).

    A group's value is shown where ``shown`` (G,) is true.
    """

    names: pd.DataFrame
    values: dict[str, Numbers]
    replicates: dict[str, Numbers]
    faces: dict[str, Numbers]
    shown: dict[str, npt.NDArray[np.bool_]]


def age_bands(ages: Numbers) -> npt.NDArray[np.int64]:
    """The code of each age's band: (N,) years -> (N,) 0..5, 6 for NaN."""
    starts = [first for first, _ in AGE_BANDS.values()]
    return np.where(np.isnan(ages), len(starts), np.digitize(ages, starts) - 1)


def group_table(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Every score of every group.

    Groups are by the labels, not by what was predicted; a face without a label is in no group by that label. Macro F1
    is not given for groups of one class of its task, where it is no more than a rescaled accuracy.

    Args:
        table: Predictions.
        seed: Of the bootstrap.

    Returns:
        ``gender``, ``race``, ``age_band`` (names, ``all`` where the group is not split by it) and ``faces``; then for
        each score NAME that the table has: NAME, NAME_low and NAME_high (95 %, see ``scores.intervals``; not corrected
        for the number of groups), NaN for fewer than ``MIN_FACES`` labelled faces. Rows: all faces, then each gender,
        race and age band, then each combination, empty ones too. Axes of which no face has a label are left out.
    """
    grouped = _group(table, seed)
    columns: dict[str, Numbers] = {}
    for name, values in grouped.values.items():
        shown = grouped.shown[name]
        ends = np.full((3, len(values)), np.nan)
        if shown.any():  # NumPy has no quantiles of no columns
            of_shown = values[shown], grouped.replicates[name][:, shown], grouped.faces[name][shown]
            ends[:, shown] = values[shown], *intervals(name, *of_shown)
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return grouped.names.assign(**columns)


def gaps(table: pd.DataFrame, seed: int = 0) -> list[Gap]:
    """The largest gap per score and axis, with an interval that allows for having searched for it.

    All pairs of groups on an axis get an interval at the level 1 - 0.05 / pairs (Bonferroni), so with 95 % all of them
    cover their true differences at once, the largest one too. A group's own interval is Wilson's (1927) for shares of
    faces, which keeps its level near 0 and 1 and in small groups, and the normal one with the bootstrap's standard
    error for macro F1 and errors in years; both are joined to that of a difference as in Newcombe 1998
    (doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I) and Zou & Donner 2008
    (doi:10.1002/sim.3095). Percentiles of 1,000 replicates do not reach so far out.

    Args:
        table: Predictions.
        seed: Of the bootstrap.

    Returns:
        In the order of ``SCORES``, by gender, race, age band, and all at once; no gap where fewer than two groups have
        ``MIN_FACES`` labelled faces.
    """
    grouped = _group(table, seed)
    split = {axis: grouped.names[axis].ne(ALL).to_numpy() for axis in AXES}
    number = sum(split.values())
    rows = {axis: split[axis] & (number == 1) for axis in AXES} | {"group": number > 1}
    found: list[Gap] = []
    for name in grouped.values:
        for by, chosen in rows.items():
            among = np.flatnonzero(chosen & grouped.shown[name])
            if len(among) > 1:
                found.append(_largest(grouped, name, by, among))  # type: ignore[arg-type]
    return found


def describe(gap: Gap) -> str:
    """A gap in a sentence, with the interval, and whether it may be chance."""
    share = SCORES[gap.score].unit == "share"
    scale, unit, of_gap = (100, "%", "points") if share else (1, "years", "years")
    best, worst, difference, low, high = (f"{scale * value:.1f}" for value in gap[4:])
    by = "combination" if gap.by == "group" else gap.by.replace("_", " ")
    verdict = "" if gap.low > 0 else "; the interval includes 0, so the gap may be chance"
    return (
        f"{SCORES[gap.score].title} by {by}: worst for {gap.worse} ({worst} {unit}), best for {gap.better} "
        f"({best} {unit}), a gap of {difference} {of_gap} (95 % interval {low} to {high}){verdict}."
    )


def _group(table: pd.DataFrame, seed: int) -> _Grouped:
    codes = {
        "gender": np.nan_to_num(task_labels(table, "gender"), nan=len(AXES["gender"])).astype(np.int64),
        "race": np.nan_to_num(task_labels(table, "race"), nan=len(AXES["race"])).astype(np.int64),
        "age_band": age_bands(task_labels(table, "age")),
    }
    shape = [len(names) + 1 for names in AXES.values()]  # one more for faces without the label
    cells = np.ravel_multi_index(list(codes.values()), shape)
    groups = _groups([axis for axis in AXES if (codes[axis] < len(AXES[axis])).any()])
    members = _members(groups)  # (G, cells)

    parts = score_parts(table)
    each_face = members.T[cells]  # (N, G)
    drawn = resampled_sums(parts, cells, members.shape[1], seed)
    sums = {name: each_face.T @ columns for name, columns in parts.items()}  # (G, K)
    faces = {name: values[:, 0] for name, values in sums.items()}
    whole = pd.DataFrame(groups, columns=list(AXES))
    return _Grouped(
        names=whole.assign(faces=each_face.sum(0).astype(np.int64)),
        values={name: SCORES[name].value(values) for name, values in sums.items()},
        replicates={name: SCORES[name].value(members @ values) for name, values in drawn.items()},
        faces=faces,
        shown={name: (faces[name] >= MIN_FACES) & ~_of_one_class(whole, name) for name in parts},
    )


def _groups(axes: list[Axis]) -> list[tuple[str, ...]]:
    """Names on all three axes of: all faces, each group by one of ``axes``, each by all of them."""
    found: list[tuple[str, ...]] = [(ALL, ALL, ALL)]
    found += [tuple(name if axis == by else ALL for axis in AXES) for by in axes for name in AXES[by]]
    if len(axes) > 1:
        found += product(*(AXES[axis] if axis in axes else (ALL,) for axis in AXES))
    return found


def _members(groups: list[tuple[str, ...]]) -> Numbers:
    """(G, cells): 1 where a cell of gender x race x age band, each with one more for no label, is in the group."""
    rows = []
    for group in groups:
        cell: Numbers = np.ones(1)
        for name, names in zip(group, AXES.values(), strict=True):
            inside = np.array([name in (ALL, other) for other in (*names, None)], np.float64)
            cell = np.outer(cell, inside).ravel()
        rows.append(cell)
    return np.stack(rows)


def _of_one_class(groups: pd.DataFrame, name: str) -> npt.NDArray[np.bool_]:
    score = SCORES[name]
    if score.over_classes:
        return groups[score.task].ne(ALL).to_numpy()
    return np.zeros(len(groups), np.bool_)


def _largest(
    grouped: _Grouped, name: str, by: Literal["gender", "race", "age_band", "group"], among: npt.NDArray[np.intp]
) -> Gap:
    """The gap between the best and the worst of the groups ``among`` (row numbers, at least two)."""
    score = SCORES[name]
    ranked = among[np.argsort(grouped.values[name][among], kind="stable")]
    ends = ranked[[0, -1]]  # the lower and the higher value
    pairs = len(among) * (len(among) - 1) / 2
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * pairs))
    values = grouped.values[name][ends]
    if score.unit == "share" and not score.over_classes:
        low, high = _wilson(values, grouped.faces[name][ends], z)
    else:
        margin = z * np.nanstd(grouped.replicates[name][:, ends], axis=0, ddof=1)
        low, high = values - margin, values + margin
    difference = values[1] - values[0]
    named = [
        ", ".join(part for part in group if part != ALL)
        for group in grouped.names[list(AXES)].iloc[ends].itertuples(index=False)
    ]
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
