"""Groups: for whom the model works, and for whom less well."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from facecls.analysis.groups import ALL, AXES, MIN_FACES, Gap, describe
from facecls.analysis.scores import SCORES
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
    drawn,
    score_interval,
    words,
)


def groups(found: pd.DataFrame, gaps: Sequence[Gap]) -> Section:
    """For whom the model works, and for whom less well."""
    names = [name for name in SCORES if name in found]
    axes = [axis for axis in AXES if found[axis].ne(ALL).any()]
    if not names or not axes:
        return Section("Groups", [Missing("The tested faces have no labels by which to group them.")])
    blocks: list[Block] = []
    for by, title in (
        ("gender", "Between genders"), ("race", "Between races"), ("age_band", "Between age bands"),
        ("group", "Between combinations of them"),
    ):  # fmt: skip
        certain = [describe(gap) for gap in gaps if gap.by == by and gap.low > 0]
        if certain:
            blocks += [Text(words("<strong>{}</strong>", title)), Bullets(certain)]
    chance = [describe(gap) for gap in gaps if gap.low <= 0]
    if chance:
        blocks.append(Bullets(chance, fold=f"Gaps that may be chance ({len(chance)})"))
    if not blocks:
        blocks.append(Missing(f"No two groups have {MIN_FACES} tested faces each, so there are no gaps to name."))
    shown = [_group_figure(found, name) for name in names if found[name].notna().any()]
    single = found[(found[list(AXES)] != ALL).sum(axis=1) <= 1]
    combined = found.drop(index=single.index)
    note = (
        f"A group is what the labels say, not what was predicted. Groups with fewer than {MIN_FACES} labelled faces "
        "get no numbers. Intervals (95 %) are not corrected for the number of groups; those of the gaps are, for the "
        "number of pairs compared."
    )
    blocks += [Figures(shown), _group_table("Scores by group", single, names), Text(note)]
    if len(combined):
        title = f"Scores by {', '.join(axis.replace('_', ' ') for axis in axes)}: all {len(combined)} combinations"
        blocks.append(_group_table(title, combined, names, fold=True))
    return Section("Groups", blocks)


def group_name(row: Sequence[str]) -> str:
    """A group in words, such as ``female, asian``."""
    return ", ".join(name for name in row if name != ALL) or "all faces"


def _group_table(caption: str, found: pd.DataFrame, names: Sequence[str], fold: bool = False) -> Table:
    rows: list[list[Content]] = []
    for row in found.to_dict("records"):
        group = [row[axis] for axis in AXES]
        key = "/".join(("group", *group))
        cells: list[Content] = [group_name(group), count(f"{key}/faces", row["faces"])]
        for name in names:
            if not np.isnan(row[name]):
                cells.append(score_interval(f"{key}/{name}", row[name], row[f"{name}_low"], row[f"{name}_high"]))
            elif SCORES[name].over_classes and row[SCORES[name].task] != ALL:
                cells.append("one class")
            else:
                cells.append(f"< {MIN_FACES} faces")
        rows.append(cells)
    heads = [SCORES[name].heading for name in names]
    return Table(caption, ["group", "faces", *heads], rows, fold)


def _group_figure(found: pd.DataFrame, name: str) -> Figure:
    single = found[(found[list(AXES)] != ALL).sum(axis=1) == 1].dropna(subset=name)
    whole = found.iloc[0]
    key = "group/all/all/all/" + name
    caption = words("All faces: {}.", score_interval(key, whole[name], whole[f"{name}_low"], whole[f"{name}_high"]))
    if len(single):
        ends = single.sort_values(name, ascending=not SCORES[name].higher_is_better)
        parts: list[Content] = []
        for _, row in (next(iter(ends.iterrows())), list(ends.iterrows())[-1]):
            group = [row[axis] for axis in AXES]
            found_key = "/".join(("group", *group, name))
            parts += [group_name(group), score_interval(found_key, row[name], row[f"{name}_low"], row[f"{name}_high"])]
        caption += words(" Best for {}: {}; worst for {}: {}.", *parts)
    title = SCORES[name].heading
    return drawn(figures.group_scores(found, name), f"groups-{name.replace('/', '-')}", title, caption)
