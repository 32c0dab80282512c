"""The parts of a page; the template defines how each one looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup
from matplotlib.figure import Figure as MplFigure

from facecls.report.style import to_svg

NONE = "\N{EN DASH}"
"""Stands where there is no value."""


@dataclass(frozen=True)
class Number:
    """A number on the page, marked up so that programs can find it.

    Attributes:
        name: Key, such as ``score/gender/accuracy``. A name has the same value wherever it stands on a page.
        value: At full precision.
        text: As shown.
    """

    name: str
    value: float
    text: str

    def __html__(self) -> str:
        """The element; ``Markup.format`` and Jinja call this."""
        return Markup('<data data-name="{}" value="{!r}">{}</data>').format(self.name, float(self.value), self.text)


Content = str | Number
"""What stands in a cell or a line; ``Markup`` is a ``str`` that is not escaped again."""
Unit = Literal["share", "years"]


def share(name: str, value: float, digits: int = 1) -> Number:
    """A share 0..1, shown in per cent."""
    return Number(name, value, NONE if math.isnan(value) else f"{100 * value:.{digits}f} %")


def years(name: str, value: float, sign: bool = False) -> Number:
    """Years, shown with two decimals."""
    return Number(name, value, NONE if math.isnan(value) else f"{value:{'+' if sign else ''}.2f}")


def count(name: str, value: int) -> Number:
    """A whole number."""
    return Number(name, value, f"{value:,}")


def counted(name: str, value: int, noun: str) -> Markup:
    """A whole number of things, such as ``1 face`` or ``2 faces``."""
    return sentence("{} {}{}", count(name, value), noun, "" if value == 1 else "s")


def score(name: str, value: float, unit: Unit) -> Number:
    """A score in its unit."""
    return years(name, value) if unit == "years" else share(name, value)


def score_interval(name: str, value: float, low: float, high: float, unit: Unit) -> Markup:
    """A score with its interval, if it has one."""
    if math.isnan(low):
        return sentence("{}", score(name, value, unit))
    ends = [score(f"{name}/{end}", number, unit) for end, number in (("low", low), ("high", high))]
    short = [Number(end.name, end.value, end.text.removesuffix(" %")) for end in ends]  # the unit stands once
    return sentence('{} <span class="range">({} to {})</span>', score(name, value, unit), *short)


def sentence(text: str, *values: Content) -> Markup:
    """A sentence in which each ``{}`` is replaced by a number or an escaped text."""
    return Markup(text).format(*values)


def listed(items: Sequence[Content], conjunction: str = "and") -> Markup:
    """Joins items as a sentence does.

    Examples:
        >>> str(listed(["gender", "race", "age"])), str(listed(["gender"]))
        ('gender, race and age', 'gender')
    """
    *first, last = [sentence("{}", item) for item in items]
    return sentence("{} {} {}", Markup(", ").join(first), conjunction, last) if first else last


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: Content


@dataclass(frozen=True)
class Missing:
    """A sentence that explains why something is not shown."""

    kind: ClassVar = "missing"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; if ``fold`` is given, collapsed behind that line."""

    kind: ClassVar = "bullets"
    items: Sequence[Content]
    fold: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: Title.
        head: Column names; empty for a table without a header.
        rows: Rows of equal length.
        fold: Whether it is collapsed behind its caption.
        wraps: Whether the cells are long texts, which may wrap, rather than numbers.
    """

    kind: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Content]]
    fold: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure; its caption gives the main numbers in words."""

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
        images: Data URIs, each with its alternative text.
        lines: Lines above the images.
        notes: Lines below the images.
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
    """A long text, collapsed behind a line."""

    kind: ClassVar = "fold"
    summary: str
    text: str


Block = Text | Missing | Bullets | Table | Figures | Tiles | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        id: Target of links to it.
        title: Heading.
        blocks: Contents.
    """

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def subheading(text: str) -> Text:
    """A heading within a section."""
    return Text(sentence("<strong>{}</strong>", text))


def figure(drawing: MplFigure, name: str, title: str, caption: Content) -> Figure:
    """A figure of the page from a matplotlib figure."""
    return Figure(name, title, caption, Markup(to_svg(drawing, name, title)))
