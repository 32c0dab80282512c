"""Limits: what the numbers do not say, from the groups of this run."""

from collections.abc import Sequence

import pandas as pd

from facecls.analysis.groups import ALL, AXES, MIN_FACES, Gap, age_bands, describe
from facecls.analysis.scores import task_labels
from facecls.report.blocks import (
    Bullets,
    Content,
    Section,
    count,
    share,
    words,
)
from facecls.run import Run

MAIN = ("gender/accuracy", "race/accuracy", "age/mae_years")
"""The scores whose largest gaps are named again."""


def limits(run: Run, groups: pd.DataFrame, gaps: Sequence[Gap]) -> Section:
    """What the numbers do not say, from the groups of this run."""
    items: list[Content] = [*_thin_groups(groups), *_training_shares(run)]
    certain = [gap for gap in gaps if gap.low > 0 and gap.by != "group"]
    for name in MAIN:
        if found := [gap for gap in certain if gap.score == name]:
            items.append(describe(max(found, key=lambda gap: gap.difference)))
    if gaps and not certain:
        items.append(
            "No gap between genders, races or age bands is larger than chance might make it; with more faces one may "
            "be."
        )
    items += [
        "Gender and race are the labels of a data set, in its categories and with its errors; they are not what a "
        "person is or says of themselves.",
        "Ages are estimates too, in most data sets those of other programs and people.",
        "Data sets of faces such as UTKFace and VGGFace2 are for non-commercial research only, and so is what is "
        "trained from them.",
        "Not for decisions about persons: not for access, hiring, policing, insurance, prices or anything else that "
        "affects them.",
    ]  # fmt: skip
    return Section("Limits", [Bullets(items)])


def _thin_groups(groups: pd.DataFrame) -> list[Content]:
    axes = [axis for axis in AXES if groups[axis].ne(ALL).any()]
    if len(axes) < 2:
        return []
    combined = groups[(groups[axes] != ALL).all(axis=1)]
    thin = combined[combined["faces"] < MIN_FACES]
    if not len(thin):
        return []
    empty = thin[thin["faces"] == 0]
    share_of_faces = thin["faces"].sum() / max(1, groups["faces"].iloc[0])
    named = [", ".join(row) for row in empty[axes].to_numpy()]
    text = words(
        "{} of {} combinations of {} have fewer than {} tested faces (together {} of the faces): nothing "
        "is said about them.",
        count("limits/thin", len(thin)), count("limits/combinations", len(combined)),
        " and ".join((", ".join(axis.replace("_", " ") for axis in axes[:-1]), axes[-1].replace("_", " "))),
        str(MIN_FACES), share("limits/thin_share", float(share_of_faces)),
    )  # fmt: skip
    if named:
        more = f" and {len(named) - 6} others" if len(named) > 6 else ""
        text = words("{} {} have none: {}{}.", text, count("limits/empty", len(named)), "; ".join(named[:6]), more)
    return [text]


def _training_shares(run: Run) -> list[Content]:
    train = run.train
    if not len(train):
        return ["What the model was trained on is not known here, so a weak group may simply be a rare one."]
    said = []
    for axis, names in AXES.items():
        codes = age_bands(task_labels(train, "age")) if axis == "age_band" else task_labels(train, axis)
        shares = [(float((codes == code).mean()), name) for code, name in enumerate(names)]
        if max(shares)[0] > 0:
            most, least = max(shares), min(shares)
            numbers = [share(f"limits/train/{name}", value) for value, name in (most, least)]
            said.append(words("{}: {} {} to {} {}", axis.replace("_", " "), most[1], numbers[0], least[1], numbers[1]))
    if not said:
        return []
    sentence = "Of {} training faces, the largest and smallest share by {}. What is rare there is learned less well."
    return [words(sentence, count("faces/train", len(train)), words("; by ").join(said))]
