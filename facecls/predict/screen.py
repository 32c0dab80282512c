"""Predictions on standard output: CSV for a program, aligned lines for a person."""

import sys
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, Self

import pandas as pd

from facecls.data.spreadsheets import csv_line
from facecls.data.tasks import Classification, Task, Tasks
from facecls.errors import UserError
from facecls.predict.outputs import cells_of, count_failed
from facecls.terminal import printable


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
            text = "".join(f"{printable(_line(self.tasks, row))}\n" for row in table.to_dict("records"))
        else:
            text = ("" if self.rows else csv_line(table)) + "".join(map(csv_line, cells_of(table)))
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"Can't write standard output: {error.strerror}; use --out to name a file.") from None
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
