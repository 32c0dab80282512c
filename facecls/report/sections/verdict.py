"""The first lines of the report: how good the model is, in words."""

from collections.abc import Mapping

import pandas as pd

from facecls.analysis.groups import ANY_GROUP, WorstGroup, axis_columns, worst_groups
from facecls.analysis.scores import Guess, Interval, Verdict, constant_guesses, main_scores, scores_of
from facecls.report.blocks import (
    Block,
    Bullets,
    Content,
    Text,
    count,
    counted,
    listed,
    score,
    score_interval,
    sentence,
)
from facecls.report.sections.groups import group_key, group_name
from facecls.run import Run

_PHRASES = {
    "accuracy": ("right for {} of {}", "be right for {}"),
    "mae_years": ("wrong by {} years on average over {}", "be wrong by {} years"),
    "band_accuracy": ("in the labelled range for {} of {}", "be in it for {}"),
}
"""What the main score of a task says about a model and about a constant guess, by the last part of its name."""
_VERDICTS = {
    Verdict.BETTER: ("better than guessing at {}", "and"),
    Verdict.UNCLEAR: ("not shown to be better than guessing at {}", "or"),
    Verdict.WORSE: ("worse than guessing at {}", "and"),
}
"""What the first sentence says about tasks, and the word between them."""


def verdict(
    run: Run,
    scores: Mapping[str, Interval],
    trivial: Mapping[str, float],
    verdicts: Mapping[str, Verdict],
    groups: pd.DataFrame,
) -> list[Block]:
    """How good the model is, against a constant guess, and for whom it is worst.

    Args:
        run: The run.
        scores: As ``analysis.scores.score`` returns them.
        trivial: As ``analysis.scores.trivial`` returns them.
        verdicts: As ``analysis.scores.compare_with_guess`` returns them.
        groups: As ``analysis.groups.group_table`` returns them.
    """
    blocks: list[Block] = [Text(_first_sentence(run, verdicts))]
    if run.is_drawn:
        blocks.append(Text("The faces were drawn by a program; these results say nothing about photographs."))
    worst = worst_groups(groups, run.tasks)
    guesses = constant_guesses(run.predictions, run.train, run.tasks)
    lines: list[Content] = []
    for task, name in main_scores(scores, run.tasks).items():
        line = sentence("{}: ", run.tasks[task].title)
        if task in verdicts:
            line += _reservation(verdicts[task], scores[name].faces)
        line += _score(run, name, scores[name], trivial.get(name), guesses.get(task))
        if task in worst:
            line += _worst(run, worst[task], axis_columns(groups))
        lines.append(line)
    return [*blocks, Bullets(lines)] if lines else blocks


def _first_sentence(run: Run, verdicts: Mapping[str, Verdict]) -> Content:
    tested = counted("faces/tested", len(run.predictions), "tested face")
    if not verdicts:
        return sentence("No verdict: none of the {} is labelled.", tested)
    titles = {each: [run.tasks[task].title.lower() for task in verdicts if verdicts[task] is each] for each in Verdict}
    few = listed(titles[Verdict.TOO_FEW], "or") if titles[Verdict.TOO_FEW] else ""
    phrases = [
        sentence(phrase, listed(titles[each], conjunction))
        for each, (phrase, conjunction) in _VERDICTS.items()
        if titles[each]
    ]
    if not phrases:
        text = "No verdict: of the {}, too few are labelled to tell whether the model is better than guessing at {}."
        return sentence(text, tested, few)
    first, *others = phrases
    if others:
        conjunction = "but" if titles[Verdict.BETTER] else "and"
        first = sentence("{}, {} {}", first, conjunction, listed(others))
    text = sentence("<strong>The model is {}</strong>, on {}.", first, tested)
    return text + sentence(" Too few faces are labelled to tell about {}.", few) if few else text


def _reservation(verdict: Verdict, faces: int) -> Content:
    """What a line says first about a task that the model was not shown to have learned."""
    said = {
        Verdict.BETTER: "",
        Verdict.UNCLEAR: "not shown to be better than guessing",
        Verdict.WORSE: "worse than guessing",
        Verdict.TOO_FEW: f"too few labelled faces ({faces}) to tell",
    }[verdict]
    return sentence("<strong>{}</strong>, ", said) if said else ""


def _score(run: Run, name: str, interval: Interval, trivial: float | None, guess: Guess | None) -> Content:
    unit = scores_of(run.tasks)[name].unit
    of_model, of_guess = _PHRASES[name.split("/")[1]]
    value = score_interval(f"score/{name}", interval.value, interval.low, interval.high, unit)
    said = sentence(of_model, value, counted(f"score/{name}/faces", interval.faces, "face"))
    if trivial is not None and guess is not None:
        said += sentence("; always answering with the {} would ", guess.description)
        said += sentence(of_guess, score(f"trivial/{name}", trivial, unit))
    return said + sentence(".")


def _worst(run: Run, worst: WorstGroup, axes: list[str]) -> Content:
    unit = scores_of(run.tasks)[worst.score].unit
    group = {axis: worst.group if axis == worst.axis else ANY_GROUP for axis in axes}
    key = f"{group_key(group)}/{worst.score}"
    interval = score_interval(key, worst.value, worst.low, worst.high, unit)
    text = " Worst group: {}, {} years over {} faces." if unit == "years" else " Worst group: {}, {} of {} faces."
    return sentence(text, group_name(group), interval, count(f"{key}/faces", worst.faces))
