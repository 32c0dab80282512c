"""Section about limits: what the scores do not say."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from facecls.analysis.groups import (
    ANY_GROUP,
    COMBINATION,
    MIN_FACES,
    Gap,
    axes_of,
    axes_split,
    axis_columns,
    axis_title,
    describe,
    group_title,
)
from facecls.analysis.scores import main_scores
from facecls.data.tasks import Tasks, ages, classifications
from facecls.report.blocks import Bullets, Content, Section, count, counted, listed, sentence, share
from facecls.run import Run

_EMPTY = 6
"""Groups without faces that are named."""


def limits(run: Run, groups: pd.DataFrame, gaps: Sequence[Gap]) -> Section:
    """What the scores do not say, from the groups of this run.

    Args:
        run: The run.
        groups: As ``analysis.groups.group_table`` returns them.
        gaps: As ``analysis.groups.gaps`` returns them.
    """
    items: list[Content] = [*_thin_groups(groups), *_training_shares(run)]
    certain = [gap for gap in gaps if gap.low > 0 and gap.by != COMBINATION]
    for name in main_scores(groups, run.tasks).values():
        if of_task := [gap for gap in certain if gap.score == name]:
            items.append(describe(max(of_task, key=lambda gap: gap.difference), run.tasks))
    if gaps and not certain:
        items.append("No gap between groups is larger than chance would explain; more faces might reveal one.")
    items += [
        *_about_labels(run.tasks),
        "Data sets of faces such as UTKFace and VGGFace2 are licensed for non-commercial research only, and so are "
        "models trained on them.",
        "Not for decisions about people: not for access, hiring, policing, insurance, prices or anything else that "
        "affects them.",
    ]  # fmt: skip
    return Section("limits", "Limits", [Bullets(items)])


def _about_labels(tasks: Tasks) -> list[str]:
    said = []
    if names := [task.title.lower() for task in classifications(tasks.values())]:
        verb = "is a data set's label" if len(names) == 1 else "are a data set's labels"
        pronoun = "it is" if len(names) == 1 else "they are"
        said.append(
            f"{str(listed(names)).capitalize()} {verb}, with its categories and its errors; {pronoun} not who people "
            "are or how they describe themselves."
        )
    if ages(tasks.values()):
        said.append("Ages are estimates too: most data sets take them from other programs and from annotators.")
    return said


def _thin_groups(groups: pd.DataFrame) -> list[Content]:
    axes = axis_columns(groups)
    combined = groups[axes_split(groups) > 1]
    thin = combined[combined["faces"] < MIN_FACES]
    if not len(thin):
        return []
    empty = thin[thin["faces"] == 0]
    share_of_faces = thin["faces"].sum() / max(1, groups["faces"].iloc[0])
    named = [group_title(group) for group in empty[axes].to_dict("records")]
    axes_combined = [axis_title(axis) for axis in axes if combined[axis].ne(ANY_GROUP).any()]
    text = sentence(
        "{} of {} combinations of {} have fewer than {} tested faces (together {} of the faces): nothing is known "
        "about them.",
        count("limits/thin", len(thin)), count("limits/combinations", len(combined)), listed(axes_combined),
        str(MIN_FACES), share("limits/thin_share", float(share_of_faces)),
    )  # fmt: skip
    if named:
        others = len(named) - _EMPTY
        more = f" and {others} other{'' if others == 1 else 's'}" if others > 0 else ""
        shown = "; ".join(named[:_EMPTY])
        text = sentence("{} {} have none: {}{}.", text, count("limits/empty", len(named)), shown, more)
    return [text]


def _training_shares(run: Run) -> list[Content]:
    train = run.train
    if not len(train):
        return ["The training faces are not known, so a group with low scores may simply have been rare in training."]
    said: list[Content] = []
    for name, axis in axes_of(train, run.tasks).items():
        faces = np.bincount(axis.codes(train), minlength=len(axis.groups) + 1)[: len(axis.groups)]
        shares = [(float(number / len(train)), group) for number, group in zip(faces, axis.groups, strict=True)]
        most, least = max(shares), min(shares)
        numbers = [share(f"limits/train/{name}/{group}", value) for value, group in (most, least)]
        said.append(sentence("{}: {} {} to {} {}", axis.title, most[1], numbers[0], least[1], numbers[1]))
    if not said:
        return []
    text = (
        "The largest and smallest groups among the {}, by {}. Groups that are rare in training are learned less well."
    )
    return [sentence(text, counted("faces/train", len(train), "training face"), sentence("; by ").join(said))]
