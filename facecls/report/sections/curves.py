"""Section about the training: what the run logged."""

from collections.abc import Mapping, Sequence

import pandas as pd

from facecls.analysis.scores import scores_of
from facecls.data.tasks import Task, Tasks
from facecls.report import run_figures
from facecls.report.blocks import Content, Figure, Figures, Missing, Number, Section, figure, sentence
from facecls.run import Run

_Series = Mapping[str, "pd.Series[float]"]


def curves(run: Run) -> Section:
    """What the run logged while it was trained."""
    scalars = {tag: series for tag, series in run.scalars.items() if tag.startswith(("train/", "val/")) or tag == "lr"}
    if not scalars:
        return Section("curves", "Curves", [Missing("No curves: no training was logged in this folder.")])
    series, across = _by_epoch(scalars, run.scalars.get("epoch"))
    panels = {task: _task_panels(series, run.tasks, task) for task in run.tasks.values()}
    shown = [_curve(series, across, task.name, task.title, some) for task, some in panels.items() if some]
    if some := _panels(series, {"Total loss": "loss", "Learning rate": "lr"}):
        shown.append(_curve(series, across, "training", "Training", some))
    return Section("curves", "Curves", [Figures(shown)])


def _task_panels(series: _Series, tasks: Tasks, task: Task) -> dict[str, list[str]]:
    wanted = {f"Loss of {task.title.lower()}": f"{task.name}/loss"}
    wanted |= {score.heading: name for name, score in scores_of(tasks).items() if score.task == task}
    return _panels(series, wanted)


def _panels(series: _Series, wanted: Mapping[str, str]) -> dict[str, list[str]]:
    """The tags of each wanted name, by title; titles without any are left out."""
    panels = {title: [f"train/{name}", f"val/{name}", name] for title, name in wanted.items()}
    panels = {title: [tag for tag in tags if tag in series] for title, tags in panels.items()}
    return {title: tags for title, tags in panels.items() if tags}


def _by_epoch(scalars: _Series, epochs: "pd.Series[float] | None") -> tuple[_Series, str]:
    """The series by epochs finished if the run logged how many steps make an epoch, otherwise by step."""
    ends = [series.index[-1] for tag, series in scalars.items() if tag.startswith(("val/", "train/"))]
    if epochs is None or not ends or ends[0] not in epochs.index:
        return scalars, "step"
    steps_per_epoch = (ends[0] + 1) / (epochs[ends[0]] + 1)  # both are counted from 0
    return {tag: series.set_axis((series.index + 1) / steps_per_epoch) for tag, series in scalars.items()}, "epoch"


def _curve(series: _Series, across: str, name: str, heading: str, panels: Mapping[str, Sequence[str]]) -> Figure:
    said: list[Content] = []
    for title, tags in panels.items():
        tag = next((tag for tag in tags if tag.startswith("val/")), tags[0])
        digits = ".2g" if tag == "lr" else ".3f"
        values = series[tag]
        ends = [
            Number(f"curves/{tag}/{end}", at, f"{at:{digits}}")
            for end, at in (("first", values.iloc[0]), ("last", values.iloc[-1]))
        ]
        where = {"val": " in validation", "train": " in training"}.get(tag.split("/")[0], "")
        said.append(sentence("{} goes from {} to {}{}.", title, *ends, where))
    caption = sentence(" ".join(["{}"] * len(said)), *said)
    return figure(run_figures.curves(series, panels, across), f"curves-{name}", heading, caption)
