"""CSV files for spreadsheets, which would run some texts as formulas."""

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

_RUN = re.compile(r"'*[=+\-@\t\r]")
"""How a text begins that a spreadsheet may run, or that has been quoted against it."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_QUOTE = "'"
_END = "\r\n"
"""While a line is made, as Python before 3.13 puts only cells with a part of a line's end into quotation marks."""


def quoted(cell: Any) -> Any:
    """Quotes a cell that a spreadsheet would run, by an apostrophe in front of it.

    Args:
        cell: A text, or anything else, which is returned as it is; so are numbers.

    Examples:
        >>> [quoted(cell) for cell in ("=1+1", "-5", "'=1+1", "a.jpg", 7)]
        ["'=1+1", '-5', "''=1+1", 'a.jpg', 7]
    """
    if isinstance(cell, str) and _RUN.match(cell) and not _NUMBER.fullmatch(cell):
        return _QUOTE + cell
    return cell


def csv_line(cells: Iterable[Any]) -> str:
    """Cells as a line of CSV, quoted; nothing for ``None``."""
    text = io.StringIO()
    csv.writer(text, lineterminator=_END).writerow(map(quoted, cells))
    return f"{text.getvalue().removesuffix(_END)}\n"


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, its cells and the names of its columns quoted."""
    text: str = table.map(quoted).rename(columns=quoted).to_csv(index=False, lineterminator=_END)
    return text.replace(_END, "\n")


def unquoted(text: str) -> str:
    """Undoes ``quoted``; leaves other texts alone.

    Examples:
        >>> [unquoted(text) for text in ("'=1+1", "-5", "''=1+1", "'a'")]
        ['=1+1', '-5', "'=1+1", "'a'"]
    """
    return text.removeprefix(_QUOTE) if _RUN.match(text) else text
