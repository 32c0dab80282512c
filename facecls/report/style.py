"""The look of figures, and their conversion to SVG in the colours of the page."""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from cycler import cycler
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#010203"
"""Text and axes: near black in TensorBoard, ``currentColor`` on a page."""
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3a7fc4", "#d97708", "#0d9a78", "#b0609f", "#7d8590"
"""Contrast of at least 3:1 with both the light and the dark page, as WCAG 2.2 (1.4.11) requires of graphics, and
distinguishable under all three kinds of colour blindness; lines differ in shape as well."""
PALETTE = (BLUE, ORANGE, GREEN, PURPLE)
DENSITY = LinearSegmentedColormap.from_list("density", [(*to_rgb(BLUE), 0.12), (*to_rgb(BLUE), 0.95)])
"""For counts: opacity of one colour over any background."""
SHADE = LinearSegmentedColormap.from_list("shade", [(*to_rgb(BLUE), 0.0), (*to_rgb(BLUE), 0.6)])
"""For cells that have text on them, which must stay readable."""
WIDTH = 4.5
"""Inches; a phone shows this at almost full size, so text stays readable."""

_STYLE: Any = {
    "font.size": 10.0,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so layouts are the same everywhere
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=list(PALETTE)),
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.fonttype": "none",
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: applies the style of this module while a function draws."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Creates an empty figure on white.

    Args:
        height: Inches.
        rows: Number of axes, stacked vertically, with a common x axis.

    Returns:
        The figure and its axes from top to bottom.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Places the legend above the axes, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns, handlelength=1.8)


def format_percent(axes: Axes, which: str) -> None:
    """Labels axes of shares 0..1 in per cent.

    Args:
        axes: The axes.
        which: ``x``, ``y`` or ``xy``.
    """
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Converts a figure to an ``<svg>`` element for a page.

    The background is transparent, text and axes have the colour of the surrounding text, and the font is the page's.
    Equal figures give equal text.

    Args:
        figure: From ``new_figure``.
        name: Unique on the page; makes the ids in the figure unique too.
        label: Alternative text.

    Returns:
        The element, without XML declaration, metadata and links.
    """
    # Inline rather than as the source of an <img>: only so do figures take over the colours of the page (light, dark
    # and print) and its font, and can their text be selected and searched.
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):  # also here, since ticks are made while saving
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = re.sub(r"font-family: [^;\"]*;?|<style.*?</style>", "", buffer.getvalue()).replace(INK, "currentColor")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    opening = re.compile(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>").search(text)
    assert opening is not None  # matplotlib always writes it
    return f'<svg {opening[1]} role="img" aria-label="{escape(label)}">{text[opening.end() :]}'.strip()
