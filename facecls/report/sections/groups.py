"""Section about groups: for whom the model works, and for whom less well."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from facecls.analysis.groups import (
    ANY_GROUP,
    COMBINATION,
    MIN_FACES,
    Gap,
    axes_split,
    axis_columns,
    axis_title,
    describe,
    group_title,
)
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
    sentence,
    subheading,
)


def groups(table: pd.DataFrame, gaps: Sequence[Gap], tasks: Tasks) -> Section:
    """For whom the model works, and for whom less well.

    Args:
        table: As ``analysis.groups.group_table`` returns it.
        gaps: As ``analysis.groups.gaps`` returns them.
        tasks: The tasks of the run.
    """
    scores = {name: score for name, score in scores_of(tasks).items() if name in table}
    axes = axis_columns(table)
    if not scores or not axes:
        return Section("groups", "Groups", [Missing("The tested faces have no labels to group them by.")])
    split = axes_split(table)
    single, combined = table[split <= 1], table[split > 1]
    note = (
        f"Groups are defined by the labels, not by the predictions. No scores are given for groups of fewer than "
        f"{MIN_FACES} labelled faces. The intervals (95 %) are not corrected for the number of groups; those of the "
        "gaps are, for the number of pairs compared."
    )
    shown = [_figure(table, tasks, name) for name in scores if table[name].notna().any()]
    blocks = [*_gaps(gaps, axes, tasks), Figures(shown), *_tables("group", single, tasks), Text(note)]
    if len(combined):
        axes_combined = [axis_title(axis) for axis in axes if combined[axis].ne(ANY_GROUP).any()]
        by = f"{', '.join(axes_combined)}: all {len(combined)} combinations"
        blocks += _tables(by, combined, tasks, fold=True)
    return Section("groups", "Groups", blocks)


def group_name(group: Mapping[str, str]) -> str:
    """A group in words.

    Args:
        group: Its name on each axis.

    Examples:
        >>> group_name({"glasses": "with", "race": "all"}), group_name({"glasses": "with", "race": "asian"})
        ('with (glasses)', 'glasses with, asian')
    """
    names = {axis: name for axis, name in group.items() if name != ANY_GROUP}
    if len(names) == 1:
        ((axis, name),) = names.items()
        return f"{name} ({axis_title(axis)})"
    return group_title(group)


def group_key(group: Mapping[str, str]) -> str:
    """The first part of the names of a group's numbers on the page, such as ``group/female/all/20-29``."""
    return "/".join(("group", *group.values()))


def _gaps(gaps: Sequence[Gap], axes: Sequence[str], tasks: Tasks) -> list[Block]:
    blocks: list[Block] = []
    for by in (*axes, COMBINATION):
        certain = [describe(gap, tasks) for gap in gaps if gap.by == by and gap.low > 0]
        if certain:
            blocks += [subheading(f"Gaps by {axis_title(by)}"), Bullets(certain)]
    chance = [describe(gap, tasks) for gap in gaps if gap.low <= 0]
    if chance:
        blocks.append(Bullets(chance, fold=f"Gaps that may be due to chance ({len(chance)})"))
    return blocks or [Missing(f"No two groups have {MIN_FACES} tested faces each, so there are no gaps to report.")]


def _tables(by: str, table: pd.DataFrame, tasks: Tasks, fold: bool = False) -> list[Table]:
    """One table per task, since all scores side by side are wider than the page."""
    tables: list[Table] = []
    for task in tasks.values():
        scores = {name: score for name, score in scores_of({task.name: task}).items() if name in table}
        if scores:
            tables.append(_table(f"{task.title} by {by}", table, scores, fold))
    return tables


def _table(caption: str, table: pd.DataFrame, scores: Mapping[str, Score], fold: bool) -> Table:
    axes = axis_columns(table)
    rows: list[list[Content]] = []
    for row in table.to_dict("records"):
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


def _figure(table: pd.DataFrame, tasks: Tasks, name: str) -> Figure:
    score, axes = scores_of(tasks)[name], axis_columns(table)
    caption = sentence("All faces: {}.", _score(table.iloc[0].to_dict(), axes, name, score))
    single = table[axes_split(table) == 1].dropna(subset=name)
    if len(single):
        best_first = single.sort_values(name, ascending=not score.higher_is_better).to_dict("records")
        parts: list[Content] = []
        for row in (best_first[0], best_first[-1]):
            parts += [group_name({axis: row[axis] for axis in axes}), _score(row, axes, name, score)]
        caption += sentence(" Best for {}: {}; worst for {}: {}.", *parts)
    drawing = figures.group_scores(table, tasks, name)
    return figure(drawing, f"groups-{name.replace('/', '-')}", score.heading, caption)
