"""Figures about predictions, for the page and for TensorBoard.

Every function returns a new matplotlib figure in the style of ``facecls.report.style``, on white. Without data, the
axes are empty.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from facecls.analysis import tables
from facecls.analysis.calibration import class_probabilities, reliability, uncalibrated
from facecls.analysis.groups import ANY_GROUP, MIN_FACES, axes_split, axis_columns, axis_title
from facecls.analysis.scores import Score, scores_of
from facecls.data.tasks import Age, Classification, Tasks
from facecls.report.style import (
    BLUE,
    DENSITY,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SHADE,
    format_percent,
    legend_above,
    new_figure,
    styled,
)

_AXIS_COLOURS = (ORANGE, BLUE, GREEN, PURPLE)
"""Of the groups by each axis in turn; all faces have the colour of the text."""
_LETTERS = 40
"""Letters of tick labels that fit side by side below a figure."""


@styled
def confusion(table: pd.DataFrame, task: Classification) -> Figure:
    """Confusion matrix: counts, and shares of each label (rows).

    Args:
        table: Predictions.
        task: Task to show.
    """
    counts = tables.confusion(table, task)
    names, cells = list(counts.index), counts.to_numpy()
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    figure, (axes,) = new_figure(1.1 + 0.55 * len(names))
    axes.imshow(shares, cmap=SHADE, vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(cells):
        text = f"{count:,}\n{100 * shares[row, column]:.0f} %" if cells[row].sum() else f"{count}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, weight="bold" if row == column else "normal")
    axes.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names)
    if sum(map(len, names)) > _LETTERS:
        axes.set_xticklabels(names, rotation=35, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticklabels(names)
    axes.set(xlabel="predicted", ylabel="label")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


@styled
def roc(table: pd.DataFrame, task: Classification) -> Figure:
    """ROC curve of a task with two classes, with the operating point at a probability of one half.

    Args:
        table: Predictions.
        task: Task with two classes; the second one is the positive class.
    """
    negative, positive = task.classes
    figure, (axes,) = new_figure(3.2)
    axes.plot([0, 1], [0, 1], ":", color=GREY, label="chance")
    curve = tables.roc(table, task)
    if curve is not None:
        axes.plot(curve.false_positive, curve.true_positive, color=BLUE, label=f"area {curve.area:.4f}")
        counts = tables.confusion(table, task).to_numpy()
        false, true = counts[:, 1] / counts.sum(1)
        axes.plot(false, true, "o", color=ORANGE, markersize=7, label="as predicted")
    axes.set(xlabel=f'"{negative}" predicted as "{positive}"', ylabel=f'"{positive}" found')
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    format_percent(axes, "xy")
    axes.legend(loc="lower right")
    return figure


@styled
def reliability_diagram(table: pd.DataFrame, task: Classification) -> Figure:
    """Accuracy by confidence, before and after temperature scaling, above a histogram of confidence.

    Args:
        table: Predictions.
        task: Task to show.
    """
    p, labels = class_probabilities(table, task)
    temperature = float(table[f"temperature_{task.name}"].iloc[0])
    figure, (axes, below) = new_figure(4.2, 2)
    axes.get_gridspec().set_height_ratios([3, 1])  # type: ignore[union-attr]
    axes.plot([0, 1], [0, 1], ":", color=GREY)
    stages = [("before", uncalibrated(p, temperature), ORANGE, "s--"), ("after", p, BLUE, "o-")]
    for stage, values, colour, style in stages if temperature != 1 else stages[1:]:
        right = (values.argmax(1) == labels).astype(float)
        bins = reliability(values.max(1), right)
        seen = bins["faces"] > 0
        label = stage if temperature != 1 else "not scaled"
        axes.plot(bins.loc[seen, "confidence"], bins.loc[seen, "accuracy"], style, color=colour, label=label)
        below.stairs(bins["faces"], np.append(bins["low"], 1), color=colour, linestyle=style[1:], linewidth=1.6)
    first = 1 / len(task.classes) - 0.02
    axes.set(ylabel="accuracy", xlim=(first, 1.02), ylim=(min(first, axes.get_ylim()[0]), 1.02))
    below.set(xlabel="confidence", ylabel="faces", yscale="log", ylim=(0.7, None))
    format_percent(axes, "y")
    format_percent(below, "x")
    legend_above(axes)
    return figure


@styled
def age_density(table: pd.DataFrame, task: Age) -> Figure:
    """Predicted against true age; darker where there are more faces.

    Args:
        table: Predictions.
        task: Task to show.
    """
    errors = tables.age_errors(table, task)
    top = task.highest
    figure, (axes,) = new_figure(3.7)
    if len(errors):
        norm = LogNorm(1, max(2, len(errors) / 50), clip=True)
        cells = axes.hexbin(
            errors["age"], errors["predicted"], gridsize=34, extent=(0, top, 0, top), mincnt=1, cmap=DENSITY, norm=norm,
            linewidths=0,
        )  # fmt: skip
        cells.set_antialiased(False)  # otherwise hairlines show between the cells
        bar = figure.colorbar(cells, ax=axes, label="faces", pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000) if tick <= norm.vmax]  # type: ignore[operator]
        bar.set_ticks(ticks, labels=[f"{tick}" for tick in ticks])
    axes.axline((0, 0), slope=1, color=INK, linewidth=1, linestyle="--")
    axes.set(xlabel="true age (years)", ylabel="predicted age (years)", xlim=(0, top), ylim=(0, top))
    return figure


@styled
def age_error(table: pd.DataFrame, task: Age) -> Figure:
    """Mean absolute error by true age, in bins of five years; larger points stand for more faces.

    Args:
        table: Predictions.
        task: Task to show.
    """
    summary = tables.age_by_years(table, task)
    summary = summary[summary["faces"] > 0]
    figure, (axes,) = new_figure(2.7)
    axes.plot(summary.index.to_numpy(float), summary["mae_years"], color=BLUE, zorder=2)
    size = 12 + 100 * summary["faces"] / max(1, summary["faces"].max())
    axes.scatter(summary.index.to_numpy(float), summary["mae_years"], s=size, color=BLUE, zorder=3)
    axes.set(xlabel="true age (years)", ylabel="mean absolute error (years)", xlim=(0, task.highest), ylim=(0, None))
    return figure


@styled
def age_bias(table: pd.DataFrame, task: Age) -> Figure:
    """Mean signed error by age band; positive where ages are overestimated.

    Args:
        table: Predictions.
        task: Task to show.
    """
    summary = tables.age_by_band(table, task)
    figure, (axes,) = new_figure(2.7)
    bias = summary["bias_years"].fillna(0).to_numpy(float)
    bars = axes.bar(range(len(bias)), bias, 0.7, color=np.where(bias > 0, ORANGE, BLUE))
    texts = [f"{value:+.1f}" if faces else "no faces" for value, faces in zip(bias, summary["faces"], strict=True)]
    axes.bar_label(bars, texts, padding=2, fontsize=9)
    axes.axhline(0, color=INK, linewidth=1)
    axes.margins(y=0.15)
    axes.set(xticks=range(len(bias)), xticklabels=summary.index, xlabel="true age (years)")
    axes.set_ylabel("predicted - true (years)")
    axes.grid(axis="x", visible=False)
    return figure


@styled
def cumulative_score(table: pd.DataFrame, task: Age) -> Figure:
    """Share of faces by the largest error allowed.

    Args:
        table: Predictions.
        task: Task to show.
    """
    shares = tables.cumulative_score(table, task)
    figure, (axes,) = new_figure(2.7)
    axes.plot(shares.index, shares, "o-", color=BLUE)
    axes.set(xlabel="largest error (years)", ylabel="share of faces", xlim=(0, shares.index[-1]), ylim=(0, 1))
    format_percent(axes, "y")
    return figure


@styled
def age_coverage(table: pd.DataFrame, task: Age) -> Figure:
    """Share of true ages inside the predicted 90 % interval, by age band.

    Args:
        table: Predictions with intervals.
        task: Task to show.
    """
    summary = tables.age_by_band(table, task)
    figure, (axes,) = new_figure(2.7)
    known = summary["faces"] > 0
    places = np.flatnonzero(known)
    axes.axhline(0.9, color=ORANGE, linestyle="--", label="nominal, 90 %")
    bars = axes.bar(places, summary.loc[known, "coverage"], 0.7, color=BLUE)
    axes.bar_label(
        bars, [f"{100 * value:.0f} %" for value in summary.loc[known, "coverage"]], label_type="center", fontsize=9
    )
    axes.set(xticks=range(len(summary)), xticklabels=summary.index, ylim=(0, 1.08), xlabel="true age (years)")
    axes.set_ylabel("ages inside their interval")
    format_percent(axes, "y")
    axes.grid(axis="x", visible=False)
    legend_above(axes)
    return figure


def is_of_one_class(group: Mapping[Any, Any], score: Score) -> bool:
    """Whether a score is missing because it is a mean over classes and the group has only one.

    Args:
        group: A row of ``analysis.groups.group_table``.
        score: The score.
    """
    return score.over_classes and group.get(score.task.name, ANY_GROUP) != ANY_GROUP


@styled
def group_scores(groups: pd.DataFrame, tasks: Tasks, name: str) -> Figure:
    """One score of all faces and of each group by one axis, with 95 % intervals.

    Args:
        groups: From ``analysis.groups.group_table``.
        tasks: The tasks of the run.
        name: Name of the score, such as ``race/accuracy``.
    """
    score = scores_of(tasks)[name]
    axis_names = axis_columns(groups)
    split = groups[axis_names] != ANY_GROUP
    shown = groups[axes_split(groups) <= 1]
    labels = [next((name for name in row if name != ANY_GROUP), "all faces") for row in shown[axis_names].to_numpy()]
    axis = split.loc[shown.index].to_numpy() @ np.arange(1, len(axis_names) + 1)  # 0 for all faces
    rows = np.arange(len(shown)) + axis  # a gap above each axis, for its title
    figure, (axes,) = new_figure(0.8 + 0.25 * (len(shown) + len(axis_names)))
    values, low, high = (shown[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    for place in range(len(axis_names) + 1):
        which, colour = axis == place, _AXIS_COLOURS[(place - 1) % len(_AXIS_COLOURS)] if place else INK
        spread = np.nan_to_num(np.stack([values - low, high - values])[:, which])
        axes.errorbar(values[which], rows[which], xerr=spread, fmt="o", color=colour, elinewidth=1.6, capsize=2.5)
        if place:
            title = f"{axis_title(axis_names[place - 1])}:"
            where = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(-0.02, rows[which][0] - 1, title, where, color=colour, weight="bold")
    axes.axvline(values[0], color=INK, linewidth=0.8, linestyle=":")
    for row in np.flatnonzero(np.isnan(values)):
        text = "one class" if is_of_one_class(shown.iloc[row].to_dict(), score) else f"fewer than {MIN_FACES} faces"
        axes.text(0.5, rows[row], text, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=9)
    axes.set(yticks=rows, yticklabels=labels, ylim=(rows[-1] + 0.7, -0.7))
    if score.unit == "share":
        format_percent(axes, "x")
    axes.set_xlabel(score.heading)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure
