"""How figures look, and how they become SVG that follows the colours of the page around them."""

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
from matplotlib.ticker import PercentFormatter

P = ParamSpec("P")

INK = "#010203"
"""Text and axes; becomes ``currentColor`` in a page, and is near black elsewhere."""
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3a7fc4", "#d97708", "#0d9a78", "#b0609f", "#7d8590"
"""Each at least 3:1 against white and against a dark page, as WCAG 2.2 (1.4.11) asks of graphics, and told apart by
people with any of the three kinds of colour blindness when taken in this order; lines differ in shape as well."""
PALETTE = (BLUE, ORANGE, GREEN, PURPLE)
DENSITY = LinearSegmentedColormap.from_list("density", [(*to_rgb(BLUE), 0.12), (*to_rgb(BLUE), 0.95)])
"""For counts: more of one colour, over whatever the background is."""
SHADE = LinearSegmentedColormap.from_list("shade", [(*to_rgb(BLUE), 0.0), (*to_rgb(BLUE), 0.6)])
"""For cells with text on them."""
WIDTH = 4.5
"""Inches; a phone shows this at nearly its own size, so that text stays readable."""

_STYLE: Any = {
    "font.size": 10.0,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are the same everywhere
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
    """Makes a function draw in this file's style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure on white.

    Args:
        height: Inches.
        rows: Axes below each other, with the same x axis.

    Returns:
        The figure and its axes, from the top.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Puts the legend where it hides nothing: above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns, handlelength=1.8)


def in_per_cent(axes: Axes, which: str) -> None:
    """Shows shares 0..1 on these axes, such as ``xy``, in per cent."""
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1, decimals=0))


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Turns a figure into an ``<svg>`` to stand in a page.

    It has no background, its text and axes have the colour of the text around them, its font is the page's, and the
    same figure always gives the same characters.

    Args:
        figure: From ``new_figure``.
        name: Different for each figure of a page; becomes part of the ids.
        label: What it shows, for those who can't see it.

    Returns:
        The element, without declaration, metadata or addresses.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):  # ticks are made when they are drawn
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;?|<style.*?</style>", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    text = _own_ids(text, name)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None  # matplotlib always writes it
    return re.sub(r"<svg[^>]*>", f'<svg {box.group()} role="img" aria-label="{escape(label)}">', text, count=1).strip()


def _own_ids(text: str, name: str) -> str:
    """Leaves only ids that something refers to, and makes them this figure's own."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))

    def renamed(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]*)"', renamed, text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
