"""Section about groups: for whom the model works, and for whom less well."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from facecls.analysis.groups import ANY_GROUP, COMBINATION, MIN_FACES, Gap, axis_columns, describe
from facecls.analysis.scores import Score, scores_of
from facecls.data.tasks import Tasks
from facecls.report import figures
from facecls.report.blocks import (
    Block,
    Bullets,
    Content,
    Figure,
    Figures,
    Missing,
    Section,
    Table,
    Text,
    count,
    figure,
    score_interval,
    subheading,
    sentence,
)


def groups(found: pd.DataFrame, gaps: Sequence[Gap], tasks: Tasks) -> Section:
    """For whom the model works, and for whom less well.

    Args:
        found: As ``analysis.groups.group_table`` returns it.
        gaps: As ``analysis.groups.gaps`` returns them.
        tasks: The tasks of the run.
    """
    scores = {name: score for name, score in scores_of(tasks).items() if name in found}
    axes = axis_columns(found)
    if not scores or not axes:
        return Section("groups", "Groups", [Missing("The tested faces have no labels to group them by.")])
    single = found[_split_by(found) <= 1]
    combined = found.drop(index=single.index)
    note = (
        f"Groups are defined by the labels, not by the predictions. No scores are given for groups of fewer than "
        f"{MIN_FACES} labelled faces. The intervals (95 %) are not corrected for the number of groups; those of the "
        "gaps are, for the number of pairs compared."
    )
    shown = [_figure(found, tasks, name) for name in scores if found[name].notna().any()]
    blocks = [*_gaps(gaps, axes, tasks), Figures(shown), _table("Scores by group", single, scores), Text(note)]
    if len(combined):
        axes_combined = [axis.replace("_", " ") for axis in axes if combined[axis].ne(ANY_GROUP).any()]
        title = f"Scores by {', '.join(axes_combined)}: all {len(combined)} combinations"
        blocks.append(_table(title, combined, scores, fold=True))
    return Section("groups", "Groups", blocks)


def group_name(group: Mapping[str, str]) -> str:
    """A group in words.

    Args:
        group: Its name on each axis.

    Examples:
        >>> group_name({"glasses": "with", "race": "all"}), group_name({"glasses": "with", "race": "asian"})
        ('with (glasses)', 'with, asian')
    """
    names = {axis: name for axis, name in group.items() if name != ANY_GROUP}
    if len(names) == 1:
        ((axis, name),) = names.items()
        return f"{name} ({axis.replace('_', ' ')})"
    return ", ".join(names.values()) or "all faces"


def group_key(group: Mapping[str, str]) -> str:
    """The first part of the names of a group's numbers on the page, such as ``group/female/all/20-29``."""
    return "/".join(("group", *group.values()))


def _split_by(found: pd.DataFrame) -> "pd.Series[int]":
    """By how many axes each group is split."""
    return (found[axis_columns(found)] != ANY_GROUP).sum(axis=1)


def _gaps(gaps: Sequence[Gap], axes: Sequence[str], tasks: Tasks) -> list[Block]:
    blocks: list[Block] = []
    for by in (*axes, COMBINATION):
        certain = [describe(gap, tasks) for gap in gaps if gap.by == by and gap.low > 0]
        if certain:
            blocks += [subheading(f"Gaps by {by.replace('_', ' ')}"), Bullets(certain)]
    chance = [describe(gap, tasks) for gap in gaps if gap.low <= 0]
    if chance:
        blocks.append(Bullets(chance, fold=f"Gaps that may be due to chance ({len(chance)})"))
    return blocks or [Missing(f"No two groups have {MIN_FACES} tested faces each, so there are no gaps to report.")]


def _table(caption: str, found: pd.DataFrame, scores: Mapping[str, Score], fold: bool = False) -> Table:
    axes = axis_columns(found)
    rows: list[list[Content]] = []
    for row in found.to_dict("records"):
        group = {axis: row[axis] for axis in axes}
        cells: list[Content] = [group_name(group), count(f"{group_key(group)}/faces", row["faces"])]
        for name, score in scores.items():
            if not np.isnan(row[name]):
                cells.append(_score(row, axes, name, score))
            else:
                cells.append("one class" if figures.is_of_one_class(row, score) else f"< {MIN_FACES} faces")
        rows.append(cells)
    return Table(caption, ["group", "faces", *(score.heading for score in scores.values())], rows, fold)


def _score(row: Mapping[Hashable, Any], axes: Sequence[str], name: str, score: Score) -> Content:
    key = f"{group_key({axis: row[axis] for axis in axes})}/{name}"
    return score_interval(key, row[name], row[f"{name}_low"], row[f"{name}_high"], score.unit)


def _figure(found: pd.DataFrame, tasks: Tasks, name: str) -> Figure:
    score, axes = scores_of(tasks)[name], axis_columns(found)
    caption = sentence("All faces: {}.", _score(found.iloc[0].to_dict(), axes, name, score))
    single = found[_split_by(found) == 1].dropna(subset=name)
    if len(single):
        best_first = single.sort_values(name, ascending=not score.higher_is_better).to_dict("records")
        parts: list[Content] = []
        for row in (best_first[0], best_first[-1]):
            parts += [group_name({axis: row[axis] for axis in axes}), _score(row, axes, name, score)]
        caption += sentence(" Best for {}: {}; worst for {}: {}.", *parts)
    drawing = figures.group_scores(found, tasks, name)
    return figure(drawing, f"groups-{name.replace('/', '-')}", score.heading, caption)
