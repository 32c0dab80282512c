"""Rows of predictions as text: CSV, and JSON lines that can be read back."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd


def cells_of(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """The rows of a table.

    Args:
        table: (N, C), float32 among its columns.

    Yields:
        N tuples, with None where there is nothing, and floats in no more digits than float32 needs.
    """
    columns = []
    for name in table:
        cells = table[name].astype(object).where(table[name].notna(), None).tolist()
        if table[name].dtype == "float32":
            cells = [None if cell is None else float(str(np.float32(cell))) for cell in cells]
        columns.append(cells)
    return zip(*columns, strict=True)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as lines of CSV, with an empty cell for None."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def json_text(table: pd.DataFrame) -> str:
    """A table as JSON lines, each an object by column, with null where there is nothing."""
    return "".join(f"{json.dumps(dict(zip(table, row, strict=True)))}\n" for row in cells_of(table))
