"""What a page is made of; the template knows how each looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure as MplFigure

from facecls.analysis.scores import SCORES
from facecls.report.style import to_svg


@dataclass(frozen=True)
class Number:
    """A number on the page, which can be found again by its name.

    Attributes:
        name: Such as ``score/gender/accuracy``; not twice on a page with different values.
        value: As computed.
        text: As shown.
    """

    name: str
    value: float
    text: str

    def __html__(self) -> str:
        """The element; ``Markup.format`` and Jinja call this."""
        return Markup('<data data-name="{}" value="{!r}">{}</data>').format(self.name, float(self.value), self.text)


def share(name: str, value: float, digits: int = 1) -> Number:
    """A share 0..1, shown in per cent."""
    return Number(name, value, NONE if math.isnan(value) else f"{100 * value:.{digits}f} %")


def years(name: str, value: float, sign: bool = False) -> Number:
    """Years, shown with two digits."""
    return Number(name, value, NONE if math.isnan(value) else f"{value:{'+' if sign else ''}.2f}")


def count(name: str, value: int) -> Number:
    """A whole number."""
    return Number(name, value, f"{value:,}")


def words(text: str, *values: Number | str) -> Markup:
    """A sentence in which each ``{}`` is replaced by a number or an escaped text."""
    return Markup(text).format(*values)


NONE = "\N{EN DASH}"
"""Stands where there is no value."""
Content = str | Number
"""What stands in a cell or a line; ``Markup`` is a ``str`` that is not escaped again."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: Content


@dataclass(frozen=True)
class Missing:
    """A sentence that stands where something can't be shown, and says why."""

    kind: ClassVar = "missing"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; ``fold`` is what it is hidden behind."""

    kind: ClassVar = "bullets"
    items: Sequence[Content]
    fold: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: Above it.
        head: Names of the columns; none for a table that needs no names.
        rows: As many cells each.
        fold: Hidden behind its caption until asked for.
        words: Long texts, which are broken, not numbers.
    """

    kind: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Content]]
    fold: bool = False
    words: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure with its content in words and numbers."""

    name: str
    title: str
    caption: Content
    svg: Markup


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room."""

    kind: ClassVar = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Tile:
    """A face.

    Attributes:
        images: Data URIs with what each shows.
        lines: What stands above it.
        notes: What stands below it.
    """

    images: Sequence[tuple[str, str]]
    lines: Sequence[Content]
    notes: Sequence[Content] = ()


@dataclass(frozen=True)
class Tiles:
    """Faces in rows."""

    kind: ClassVar = "tiles"
    label: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Fold:
    """A long text, hidden until asked for."""

    kind: ClassVar = "fold"
    summary: str
    text: str


Block = Text | Missing | Bullets | Table | Figures | Tiles | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)

    @property
    def id(self) -> str:
        """What a link to it says."""
        return self.title.lower().replace(" ", "-")


def score(name: str, value: float) -> Number:
    """A score in its unit; ``name`` ends with its name in ``SCORES``, and maybe ``/low`` or ``/high``."""
    parts = name.removesuffix("/low").removesuffix("/high").split("/")
    if SCORES["/".join(parts[-2:])].unit == "years":
        return years(name, value)
    return share(name, value)


def score_interval(name: str, value: float, low: float, high: float) -> Markup:
    """A score with its interval."""
    if math.isnan(low):
        return words("{}", score(name, value))
    ends = [score(f"{name}/{end}", number) for end, number in (("low", low), ("high", high))]
    short = [Number(end.name, end.value, end.text.removesuffix(" %")) for end in ends]  # the unit stands once
    return words('{} <span class="range">({} to {})</span>', score(name, value), *short)


def drawn(figure: MplFigure, name: str, title: str, caption: Content) -> Figure:
    """A figure of the page from one of matplotlib's."""
    return Figure(name, title, caption, Markup(to_svg(figure, name, title)))
