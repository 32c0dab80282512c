"""Data, curves, groups and differences between runs -> matplotlib figures; as in ``figures``."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from facecls.analysis import tables
from facecls.analysis.scores import SCORES
from facecls.data.tasks import CLASSES, MAX_AGE, Task
from facecls.report.style import (
    BLUE,
    INK,
    ORANGE,
    in_per_cent,
    legend_above,
    new_figure,
    styled,
)

_LINES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
"""Marker and line of each series, so that colour is not all that tells them apart."""


@styled
def age_distribution(faces: pd.DataFrame) -> Figure:
    """The share of each part's faces in every five years of age.

    Args:
        faces: With ``split`` and ``age``.
    """
    figure, (axes,) = new_figure(2.7)
    edges = np.arange(0, MAX_AGE + 6, 5)
    for (split, part), (_, line) in zip(_by_split(faces.dropna(subset="age")), cycle(_LINES), strict=False):
        counts, _ = np.histogram(part["age"].to_numpy(float), edges)
        axes.stairs(counts / counts.sum(), edges, label=f"{split} ({len(part):,})", linestyle=line, linewidth=1.6)
    axes.set(xlabel="age (years)", ylabel="share of faces", xlim=(0, MAX_AGE))
    in_per_cent(axes, "y")
    if axes.patches:
        legend_above(axes)
    return figure


@styled
def class_distribution(faces: pd.DataFrame, task: Task) -> Figure:
    """The share of each part's faces in every class.

    Args:
        faces: With ``split`` and the task.
        task: gender or race.
    """
    names = CLASSES[task]
    parts = _by_split(faces.dropna(subset=task))
    figure, (axes,) = new_figure(0.9 + 0.16 * len(names) * (len(parts) + 1))
    height = 0.8 / max(1, len(parts))
    for number, (split, part) in enumerate(parts):
        shares = np.bincount(part[task].to_numpy(int), minlength=len(names)) / len(part)
        rows = np.arange(len(names)) + (number - (len(parts) - 1) / 2) * height
        axes.barh(rows, shares, height * 0.9, label=f"{split} ({len(part):,})")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="share of faces", ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    in_per_cent(axes, "x")
    if parts:
        legend_above(axes)
    return figure


@styled
def curves(series: Mapping[str, pd.Series], panels: Mapping[str, Sequence[str]], across: str) -> Figure:
    """What a run logged, one panel below the other.

    Args:
        series: Logged values by tag, each indexed by what runs across.
        panels: Titles, and the tags that each shows; tags start with ``train/`` or ``val/``, or stand alone.
        across: Name of the x axis.
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
def differences(scores: pd.DataFrame, unit: str) -> Figure:
    """By how much runs differ, with 95 % intervals.

    Args:
        scores: ``compare.Comparison.scores``.
        unit: ``share`` or ``years``; only scores in it are shown.
    """
    shown = scores[[SCORES[name].unit == unit for name in scores["score"]]].reset_index(drop=True)
    scale = 100 if unit == "share" else 1
    many = shown[["a", "b"]].drop_duplicates().shape[0] > 1
    figure, (axes,) = new_figure(0.9 + 0.38 * len(shown))
    values = scale * shown["difference"]
    better = [SCORES[name].higher_is_better for name in shown["score"]] == (values > 0)
    for which, colour in ((better, BLUE), (~better, ORANGE)):
        spread = np.nan_to_num(
            scale * np.stack([shown["difference"] - shown["low"], shown["high"] - shown["difference"]])
        )
        axes.errorbar(values[which], np.flatnonzero(which), xerr=spread[:, which], fmt="o", color=colour, capsize=2.5)
    axes.axvline(0, color=INK, linewidth=1)
    titles = [
        SCORES[name].title + (f"\n{a} to {b}" if many else "") for name, a, b in shown[["score", "a", "b"]].to_numpy()
    ]
    axes.set(yticks=range(len(shown)), yticklabels=titles, ylim=(len(shown) - 0.5, -0.5))
    axes.set_xlabel("difference (points)" if unit == "share" else "difference (years)")
    return figure


def _by_split(faces: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, faces[faces["split"] == name]) for name in tables.parts(faces)]
