"""The first lines of the report: how good the model is, in words."""

from collections.abc import Mapping

import pandas as pd

from facecls.analysis.groups import ANY_GROUP, WorstGroup, axis_columns, worst_groups
from facecls.analysis.scores import Interval, main_scores, scores_of
from facecls.report.blocks import Block, Bullets, Content, Text, count, heading, listed, score, score_interval, sentence
from facecls.report.sections.groups import group_key, group_name
from facecls.run import Run

_PHRASES = {
    "accuracy": ("right for {} of {} faces", "always answering with the most common class would be right for {}"),
    "mae_years": (
        "wrong by {} years on average over {} faces",
        "always answering with the median age would be wrong by {} years",
    ),
    "band_accuracy": (
        "in the labelled range for {} of {} faces",
        "always answering with the middle of the most common range would be for {}",
    ),
}
"""What the main score of a task says about a model and about a constant guess, by the last part of its name."""


def verdict(
    run: Run,
    scores: Mapping[str, Interval],
    guesses: Mapping[str, float],
    better: Mapping[str, bool],
    groups: pd.DataFrame,
) -> list[Block]:
    """How good the model is, against a constant guess, and for whom it is worst.

    Args:
        run: The run.
        scores: As ``analysis.scores.score`` returns them.
        guesses: As ``analysis.scores.trivial`` returns them.
        better: As ``analysis.scores.better_than_guessing`` returns it.
        groups: As ``analysis.groups.group_table`` returns them.
    """
    blocks: list[Block] = [Text(_first_sentence(run, better))]
    if run.is_drawn:
        blocks.append(Text("The faces were drawn by a program; these results say nothing about photographs."))
    worst = worst_groups(groups, run.tasks)
    lines: list[Content] = []
    for task, name in main_scores(scores, run.tasks).items():
        line = sentence("{}: ", heading(task))
        if not better.get(task, True):
            line += sentence("<strong>no better than guessing</strong>, ")
        line += _score(run, name, scores[name], guesses.get(name))
        if task in worst:
            line += _worst(run, worst[task], axis_columns(groups))
        lines.append(line)
    return [*blocks, Bullets(lines)] if lines else blocks


def _first_sentence(run: Run, better: Mapping[str, bool]) -> Content:
    tested = sentence("{} tested faces", count("faces/tested", len(run.predictions)))
    good, bad = ([heading(task).lower() for task in better if better[task] is which] for which in (True, False))
    if not better:
        return sentence("No verdict: the {} have no labels to compare the predictions with.", tested)
    if not bad:
        return sentence("<strong>The model is better than guessing at {}</strong>, on {}.", listed(good), tested)
    if not good:
        return sentence("<strong>The model is no better than guessing</strong>, on {}.", tested)
    return sentence(
        "<strong>The model is better than guessing at {}, but no better than guessing at {}</strong>, on {}.",
        listed(good), listed(bad, "or"), tested,
    )  # fmt: skip


def _score(run: Run, name: str, found: Interval, guess: float | None) -> Content:
    unit = scores_of(run.tasks)[name].unit
    of_model, of_guess = _PHRASES[name.split("/")[1]]
    interval = score_interval(f"score/{name}", found.value, found.low, found.high, unit)
    said = sentence(of_model, interval, count(f"score/{name}/faces", found.faces))
    if guess is not None:
        said += sentence("; ") + sentence(of_guess, score(f"trivial/{name}", guess, unit))
    return said + sentence(".")


def _worst(run: Run, worst: WorstGroup, axes: list[str]) -> Content:
    unit = scores_of(run.tasks)[worst.score].unit
    group = {axis: worst.group if axis == worst.axis else ANY_GROUP for axis in axes}
    interval = score_interval(f"{group_key(group)}/{worst.score}", worst.value, worst.low, worst.high, unit)
    return sentence(" Worst group: {}, {}{}.", group_name(group), interval, " years" if unit == "years" else "")
