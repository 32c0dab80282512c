"""Predictions on standard output: CSV for a program, aligned lines for a person."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Self

import pandas as pd

from facecls.data.tasks import Classification, Task, Tasks
from facecls.predict.outputs import cells_of, count_failed


class Screen:
    """Standard output: CSV for a program, aligned lines for a person; both row by row.

    Args:
        tasks: What is predicted.

    Attributes:
        done, rows, failed, is_interactive: As of ``Journal``.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.done: Counter[str] = Counter()
        self.rows = 0
        self.failed = 0
        self.is_interactive = sys.stdout.isatty()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """No-op: standard output stays open."""

    def finish(self) -> None:
        """No-op: all rows are printed."""

    def append(self, table: pd.DataFrame) -> None:
        """Prints rows.

        Args:
            table: As ``FacePredictor.predict`` returns it.
        """
        if self.is_interactive:
            text = "".join(f"{_line(self.tasks, row)}\n" for row in table.to_dict("records"))
        else:
            text = (_csv_text([table.columns]) if not self.rows else "") + _csv_text(cells_of(table))
        sys.stdout.write(text)
        sys.stdout.flush()
        self.rows += len(table)
        self.failed += count_failed(table)


def _line(tasks: Tasks, row: Mapping[Hashable, Any]) -> str:
    """Such as ``female  98 %   asian   71 %    34 (28-41)     photos/1.jpg, face 2``."""
    if not pd.isna(row["error"]):
        return f"{row['path']}: {row['error']}"
    number = row.get("face", 1)
    where = row["path"] if pd.isna(number) or number == 1 else f"{row['path']}, face {number}"
    return "   ".join([*(_in_line(task, row) for task in tasks.values()), where])


def _in_line(task: Task, row: Mapping[Hashable, Any]) -> str:
    if isinstance(task, Classification):
        p = max(row[column] for column in task.probabilities)
        return f"{row[task.name]:<{max(map(len, task.classes))}} {100 * p:3.0f} %"
    low, high = (row.get(f"{task.name}_{end}") for end in ("low", "high"))
    interval = "" if low is None else f" ({low}-{high})"
    return f"{task.text(row[task.name]):>3}{interval:<10}"


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as lines of CSV, with an empty cell for None."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
