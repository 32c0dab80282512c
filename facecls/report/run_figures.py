"""Figures about the data, the training and the comparison of runs; conventions as in ``figures``."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from facecls.analysis import tables
from facecls.analysis.labels import label_texts
from facecls.analysis.scores import scores_of
from facecls.data.tasks import Age, Classification, Tasks
from facecls.report.style import BLUE, INK, ORANGE, format_percent, legend_above, new_figure, styled

_LINES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
"""Marker and line of each series, so that not only colour tells them apart."""


@styled
def age_distribution(faces: pd.DataFrame, task: Age) -> Figure:
    """Share of the faces of each split in every five years of age.

    Args:
        faces: With ``split`` and the labels of the task.
        task: Task to show.
    """
    figure, (axes,) = new_figure(2.7)
    edges = np.arange(0, task.highest + 6, 5)
    for (split, part), (_, line) in zip(_by_split(faces.dropna(subset=task.name)), cycle(_LINES), strict=False):
        counts, _ = np.histogram(part[task.name].to_numpy(float), edges)
        axes.stairs(counts / counts.sum(), edges, label=f"{split} ({len(part):,})", linestyle=line, linewidth=1.6)
    axes.set(xlabel=f"{task.title.lower()} (years)", ylabel="share of faces", xlim=(0, task.highest))
    format_percent(axes, "y")
    if axes.patches:
        legend_above(axes)
    return figure


@styled
def range_distribution(faces: pd.DataFrame, task: Age) -> Figure:
    """Share of the faces of each split by the range of ages that they are labelled with.

    Args:
        faces: With ``split`` and the columns ``task.range``.
        task: Task to show.
    """
    known = faces.dropna(subset=list(task.range))
    known = known.assign(range=pd.Series(label_texts(known, task), known.index))
    names = list(known.sort_values(list(task.range))["range"].unique())
    shares = {
        f"{split} ({len(part):,})": part["range"].value_counts(normalize=True).reindex(names, fill_value=0).to_numpy()
        for split, part in _by_split(known)
    }
    return _bars(names, shares)


@styled
def class_distribution(faces: pd.DataFrame, task: Classification) -> Figure:
    """Share of the faces of each split in every class.

    Args:
        faces: With ``split`` and the labels of the task.
        task: Task to show.
    """
    classes = len(task.classes)
    shares = {
        f"{split} ({len(part):,})": np.bincount(part[task.name].to_numpy(int), minlength=classes) / len(part)
        for split, part in _by_split(faces.dropna(subset=task.name))
    }
    return _bars(task.classes, shares)


def _bars(names: Sequence[str], shares: Mapping[str, np.ndarray]) -> Figure:
    """Horizontal bars: shares (names,) by series."""
    figure, (axes,) = new_figure(0.9 + 0.16 * len(names) * (len(shares) + 1))
    height = 0.8 / max(1, len(shares))
    for number, (label, values) in enumerate(shares.items()):
        rows = np.arange(len(names)) + (number - (len(shares) - 1) / 2) * height
        axes.barh(rows, values, height * 0.9, label=label)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="share of faces")
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    format_percent(axes, "x")
    if shares:
        legend_above(axes)
    return figure


@styled
def curves(series: Mapping[str, pd.Series], panels: Mapping[str, Sequence[str]], across: str) -> Figure:
    """Logged values, one panel below the other.

    Args:
        series: Logged values by tag, each indexed by the x axis.
        panels: Tags to show by the title of their panel. Tags start with ``train/`` or ``val/``, or are alone in their
            panel.
        across: Label of the x axis.
    """
    figure, all_axes = new_figure(0.5 + 1.5 * len(panels), len(panels))
    for axes, (title, tags) in zip(all_axes, panels.items(), strict=True):
        for tag in tags:
            first = tag.split("/")[0]
            marker, line, colour = {"train": ("o", "--", ORANGE), "val": ("s", "-", BLUE)}.get(first, ("", "-", BLUE))
            label = {"train": "training", "val": "validation"}.get(first)
            values = series[tag]
            axes.plot(values.index, values, line, marker=marker, color=colour, label=label)
        axes.set_title(title)
        if len(tags) > 1 and axes is all_axes[0]:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2, handlelength=1.8)
    if across == "epoch":
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[-1].set_xlabel(across)
    return figure


@styled
def differences(scores: pd.DataFrame, tasks: Tasks, unit: str) -> Figure:
    """Differences between runs, with 95 % intervals.

    Args:
        scores: ``analysis.compare.Comparison.scores``.
        tasks: The tasks that the runs share.
        unit: ``share`` or ``years``; scores in the other unit are left out.
    """
    known = scores_of(tasks)
    shown = scores[[known[name].unit == unit for name in scores["score"]]].reset_index(drop=True)
    scale = 100 if unit == "share" else 1
    many = shown[["a", "b"]].drop_duplicates().shape[0] > 1
    figure, (axes,) = new_figure(0.9 + 0.38 * len(shown))
    values = scale * shown["difference"]
    better = [known[name].higher_is_better for name in shown["score"]] == (values > 0)
    for which, colour in ((better, BLUE), (~better, ORANGE)):
        spread = np.nan_to_num(
            scale * np.stack([shown["difference"] - shown["low"], shown["high"] - shown["difference"]])
        )
        axes.errorbar(values[which], np.flatnonzero(which), xerr=spread[:, which], fmt="o", color=colour, capsize=2.5)
    axes.axvline(0, color=INK, linewidth=1)
    titles = [
        known[name].title + (f"\n{a} to {b}" if many else "") for name, a, b in shown[["score", "a", "b"]].to_numpy()
    ]
    axes.set(yticks=range(len(shown)), yticklabels=titles, ylim=(len(shown) - 0.5, -0.5))
    axes.set_xlabel("difference (points)" if unit == "share" else "difference (years)")
    return figure


def _by_split(faces: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, faces[faces["split"] == name]) for name in tables.parts(faces)]
