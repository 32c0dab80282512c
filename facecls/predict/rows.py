"""Rows of predictions as text that a program can append to and read back, CSV or JSON lines."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pandas as pd


def cells_of(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """The rows of a table.

    Args:
        table: (N, C), float32 among its columns.

    Yields:
        N tuples, with None where there is nothing, and floats no longer than float32 needs.
    """
    columns = []
    for name in table:
        cells = table[name].astype(object).where(table[name].notna(), None).tolist()
        if table[name].dtype == "float32":
            cells = [None if cell is None else float(str(np.float32(cell))) for cell in cells]
        columns.append(cells)
    return zip(*columns, strict=True)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as lines of CSV; an empty cell where there is None.

    Args:
        rows: Their cells.

    Returns:
        The lines.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def json_text(table: pd.DataFrame) -> str:
    """A table as JSON lines, each an object by column; null where there is nothing.

    Args:
        table: (N, C).

    Returns:
        N lines.
    """
    return "".join(f"{json.dumps(dict(zip(table, row, strict=True)))}\n" for row in cells_of(table))


def csv_rows(stream: BinaryIO) -> Iterator[tuple[dict[str, str], int]]:
    """Reads CSV that ``csv_text`` made, its first row the names.

    Args:
        stream: At its start.

    Yields:
        Cells by column, and how many bytes there are up to the end of the row. A last row that is cut is left out.

    Raises:
        ValueError, csv.Error: If it is something else.
    """
    end, is_cut = 0, False

    def lines() -> Iterator[str]:
        nonlocal end, is_cut
        for line in stream:
            if is_cut := not line.endswith(b"\n"):
                return
            end += len(line)
            yield line.decode()
        is_cut = True  # perhaps within a cell that holds an end of line

    rows = csv.reader(lines(), strict=True)
    try:
        names = next(rows, [])
        for cells in rows:
            yield dict(zip(names, cells, strict=True)), end
    except csv.Error:
        if not is_cut:
            raise


def json_rows(stream: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """Reads what ``json_text`` made.

    Args:
        stream: At its start.

    Yields:
        Cells by column, and how many bytes there are up to the end of the row. A last row that is cut is left out.

    Raises:
        ValueError: If it is something else.
    """
    end = 0
    for line in stream:
        if line.endswith(b"\n"):
            end += len(line)
            yield json.loads(line), end
