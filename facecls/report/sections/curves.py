"""Curves: what the run logged while it learned."""

from collections.abc import Mapping, Sequence

import pandas as pd

from facecls.analysis.scores import SCORES
from facecls.data.tasks import TASKS, Task
from facecls.report import run_figures
from facecls.report.blocks import (
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    drawn,
    words,
)
from facecls.run import Run


def curves(run: Run) -> Section:
    """What the run logged while it learned."""
    scalars = {tag: series for tag, series in run.scalars.items() if tag.startswith(("train/", "val/")) or tag == "lr"}
    if not scalars:
        return Section("Curves", [Missing("No curves: no training was logged in this folder.")])
    series, across = _by_epoch(scalars, run.scalars.get("epoch"))
    shown = [_curve(series, across, task, _panels(series, task)) for task in TASKS if _panels(series, task)]
    whole = {title: _tags(series, name) for title, name in (("Loss of all tasks", "loss"), ("Learning rate", "lr"))}
    if any(whole.values()):
        shown.append(_curve(series, across, "training", {title: tags for title, tags in whole.items() if tags}))
    return Section("Curves", [Figures(shown)])


def _panels(series: Mapping[str, "pd.Series[float]"], task: Task) -> dict[str, list[str]]:
    wanted = {f"Loss of {task}": f"{task}/loss"}
    wanted |= {found.heading: name for name, found in SCORES.items() if found.task == task}
    return {title: _tags(series, name) for title, name in wanted.items() if _tags(series, name)}


def _tags(series: Mapping[str, "pd.Series[float]"], name: str) -> list[str]:
    return [tag for tag in (f"train/{name}", f"val/{name}", name) if tag in series]


def _by_epoch(
    scalars: Mapping[str, "pd.Series[float]"], epochs: "pd.Series[float] | None"
) -> tuple[dict[str, "pd.Series[float]"], str]:
    """The series by epochs done, as far as the run says how many steps make one; else by step."""
    ends = [series.index[-1] for tag, series in scalars.items() if tag.startswith("val/") or tag.startswith("train/")]
    if epochs is None or not ends or ends[0] not in epochs.index:
        return dict(scalars), "step"
    a_epoch = (ends[0] + 1) / (epochs[ends[0]] + 1)  # both are counted from 0
    return {tag: series.set_axis((series.index + 1) / a_epoch) for tag, series in scalars.items()}, "epoch"


def _curve(
    series: Mapping[str, "pd.Series[float]"], across: str, name: str, panels: Mapping[str, Sequence[str]]
) -> Figure:
    said = []
    for title, tags in panels.items():
        tag = next((tag for tag in tags if tag.startswith("val/")), tags[0])
        digits = ".2g" if tag == "lr" else ".3f"
        values = series[tag]
        ends = [
            Number(f"curves/{tag}/{end}", at, f"{at:{digits}}")
            for end, at in (("first", values.iloc[0]), ("last", values.iloc[-1]))
        ]
        which = {"val": " in validation", "train": " in training"}.get(tag.split("/")[0], "")
        said.append(words("{} goes from {} to {}{}.", title, *ends, which))
    return drawn(run_figures.curves(series, panels, across), f"curves-{name}", name.capitalize(), words(" ").join(said))
