"""The numbers of runs, and how they vary over seeds."""

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Literal

from facecls.analysis.groups import MIN_FACES, axes_of
from facecls.analysis.scores import main_scores, score_parts, scores_of
from facecls.data.tasks import Task, Tasks
from facecls.run import Trial

Stage = Literal["test", "val"]
CORAL_AGES = (21, 60)
"""First and last age of the CORAL paper's protocol (Cao et al. 2019, arXiv:1901.07884), which others compare on."""
NONE = "\N{EN DASH}"
Group = tuple[str, str]
"""Name of an axis, and of a group on it."""


def all_tasks(trials: Iterable[Trial]) -> Tasks:
    """The tasks of all runs, each as the first run has it."""
    tasks: dict[str, Task] = {}
    for trial in trials:
        for name, task in trial.tasks.items():
            tasks.setdefault(name, task)
    return tasks


def value(trial: Trial, stage: Stage, name: str) -> float:
    """A score of a run.

    Args:
        trial: The run.
        stage: ``test`` for that of ``metrics.json``, ``val`` for that of its best epoch, which is the one that is kept.
        name: As in ``scores_of``, such as ``age/mae_years``.

    Returns:
        A share or years; NaN where the run does not have it.
    """
    if stage == "test":
        return float(trial.metrics.get(f"test/{name}", math.nan))
    losses, curve = trial.scalars.get("val/loss"), trial.scalars.get(f"val/{name}")
    if losses is None or curve is None:
        return math.nan
    return float(curve.get(losses.idxmin(), math.nan))


def error_between(trial: Trial, name: str, first: int, last: int) -> float:
    """The mean absolute error of an age over the tested faces of some ages.

    Args:
        trial: The run.
        name: Of the task.
        first: The youngest age.
        last: The oldest age.

    Returns:
        Years; NaN without predictions of such faces.
    """
    table = trial.predictions
    if table is None or f"{name}_predicted" not in table:
        return math.nan
    chosen = table[table[name].between(first, last).fillna(False).astype(bool)]
    return float((chosen[f"{name}_predicted"].astype(float) - chosen[name].astype(float)).abs().mean())


def group_values(trial: Trial) -> dict[str, dict[Group, float]]:
    """The main score of each task in each group of faces, on axes with two groups or more.

    Args:
        trial: The run.

    Returns:
        By name of the score and group; groups of fewer than ``MIN_FACES`` labelled faces are left out. A class's share
        of faces that are right, its recall, is that of the group of faces with its label.
    """
    table, tasks = trial.predictions, trial.tasks
    if table is None:
        return {}
    parts, scores = score_parts(table, tasks), scores_of(tasks)
    found: dict[str, dict[Group, float]] = {}
    for name in main_scores(parts, tasks).values():
        for axis in axes_of(table, tasks).values():
            codes = axis.codes(table)
            sums = {group: parts[name][codes == code].sum(0) for code, group in enumerate(axis.groups)}
            shown = {group: each for group, each in sums.items() if each[0] >= MIN_FACES}
            if len(shown) > 1:
                of_groups = {(axis.name, group): float(scores[name].value(each)) for group, each in shown.items()}
                found.setdefault(name, {}).update(of_groups)
    return found


def worst(groups: Sequence[dict[Group, float]], higher_is_better: bool) -> dict[str, tuple[str, list[float]]]:
    """The group of each axis that is worst on average over runs.

    Args:
        groups: Of each run, the scores by group.
        higher_is_better: Whether high scores are good.

    Returns:
        By axis: the group's name, and its scores, one per run. Groups that a run has no score of are left out.
    """
    common = [group for group in groups[0] if all(group in each for each in groups)] if groups else []
    averages = {group: mean(each[group] for each in groups) for group in common}
    found: dict[str, tuple[str, list[float]]] = {}
    for axis in dict.fromkeys(axis for axis, _ in common):
        of_axis = [group for group in common if group[0] == axis]
        group = (min if higher_is_better else max)(of_axis, key=averages.__getitem__)
        found[axis] = (group[1], [each[group] for each in groups])
    return found


def spread(values: Iterable[float], unit: str, with_range: bool = True) -> str:
    """A number over runs: the mean; of several runs also their standard deviation, and the lowest and the highest.

    Args:
        values: One per run, NaN where it has none.
        unit: ``share``, shown in per cent without the sign, or ``years``.
        with_range: Whether the lowest and the highest are shown.

    Examples:
        >>> spread([0.94, 0.95], "share"), spread([4.2], "years"), spread([], "years") == NONE
        ('94.5 ± 0.7 (94.0 to 95.0)', '4.20', True)
    """
    scale, digits = (100, 1) if unit == "share" else (1, 2)
    known = [scale * value for value in values if not math.isnan(value)]
    if not known:
        return NONE
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" \N{PLUS-MINUS SIGN} {stdev(known):.{digits}f}"
        text += f" ({min(known):.{digits}f} to {max(known):.{digits}f})" if with_range else ""
    return text
