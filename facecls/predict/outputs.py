"""Where predictions go: a file by way of a journal, which makes a run resumable, or standard output.

A journal is a file of JSON lines that only grows. Each batch is on the disk before the next one is computed, so that
whatever ends the program costs no finished batch. When all rows are there, they are converted once into the file that
was asked for, and the journal is removed.
"""

import csv
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from facecls.data.tasks import Classification, Task, Tasks
from facecls.errors import UserError
from facecls.files import replacing
from facecls.predict.rows import cells_of, csv_text, json_text

ENDINGS = (".csv", ".parquet", ".jsonl")
_GROUP = 50_000
"""Rows of a group in a Parquet file; so many are in memory when it is written."""
_ARROW = {"str": pa.string(), "float32": pa.float32(), "Int16": pa.int16()}


def journal_of(out: Path) -> Path:
    """The journal of a file of predictions."""
    return out.with_name(f"{out.name}.journal.jsonl")


def is_complete(out: Path) -> bool:
    """Whether a file holds all predictions of its run."""
    return out.exists() and not journal_of(out).exists()


def check_output(out: Path, resume: bool) -> None:
    """Refuses a file that can't be written, or whose run began earlier.

    Args:
        out: What the user named.
        resume: Whether a run that began earlier is meant.

    Raises:
        UserError: If its ending is unknown, its folder missing, or it or its journal exists and ``resume`` is false.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"Expected --out to end in {', '.join(ENDINGS)}, but got {out}; name another file.")
    if not out.parent.is_dir():
        raise UserError(f"Expected a folder for --out, but there is none at {out.parent}; make it first.")
    for file in (out, journal_of(out)):
        if file.is_dir():
            raise UserError(f"Expected a file for --out, but {file} is a folder; name a file in it.")
        if file.exists() and not resume:
            raise UserError(
                f"Expected a new file for --out, but {file} exists; continue with --resume, or name another file."
            )


class Journal:
    """Predictions on their way into a file.

    Args:
        out: The file; ``check_output`` has accepted it.
        columns: Types by name, as ``facecls.predict.faces.columns`` returns them.

    Attributes:
        done: Number of rows by path that were in the journal at the start.
        rows: Number of rows.
        failed: Number of rows with an error.
        is_for_people: Whether a person watches the rows come.

    Raises:
        UserError: If the journal holds something else than predictions with these columns, or can't be written.
    """

    def __init__(self, out: Path, columns: Mapping[str, str]) -> None:
        self.out = out
        self.columns = columns
        self.done: Counter[str] = Counter()
        self.failed = 0
        self.is_for_people = False
        self._file = journal_of(out)
        try:
            self._stream = self._file.open("a+b")
        except OSError as error:
            raise UserError(f"Can't write {out}: {error.strerror}; name another file.") from None
        self._stream.truncate(self._read())
        self.rows = self.done.total()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the journal, from which the run can be resumed unless it is finished."""
        self._stream.close()

    def append(self, table: pd.DataFrame) -> None:
        """Writes rows to the disk.

        Args:
            table: With the columns.

        Raises:
            UserError: If that fails.
        """
        try:
            self._stream.write(json_text(table).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(
                f"Can't write {self._file}: {error.strerror}; free some space and continue with --resume."
            ) from None
        self.rows += len(table)
        self.failed += int(table["error"].notna().sum())

    def finish(self) -> None:
        """Converts the journal into the file that was asked for, and removes it.

        Raises:
            UserError: If the file can't be written.
        """
        self._stream.close()
        with self._file.open("rb") as lines, replacing(self.out) as part:
            if self.out.suffix.lower() == ".jsonl":
                shutil.copyfile(self._file, part)
            else:
                write = _write_csv if self.out.suffix.lower() == ".csv" else _write_parquet
                write(part, map(json.loads, lines), self.columns)
        self._file.unlink()

    def _read(self) -> int:
        """Counts the rows of the journal and returns their length in bytes; a last row that is cut does not count."""
        end = 0
        self._stream.seek(0)
        for line in self._stream:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if list(row) != list(self.columns):
                    raise ValueError
            except (ValueError, TypeError):
                self._stream.close()
                raise UserError(
                    f"Expected predictions with the columns {', '.join(self.columns)} in {self._file}, but row "
                    f"{self.done.total() + 1} is none; was it made with another model? Name another file."
                ) from None
            self.done[row["path"]] += 1
            self.failed += bool(row["error"])
            end += len(line)
        return end


def _write_csv(dest: Path, rows: Iterator[dict[str, Any]], columns: Mapping[str, str]) -> None:
    with dest.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row.values() for row in rows)


def _write_parquet(dest: Path, rows: Iterator[dict[str, Any]], columns: Mapping[str, str]) -> None:
    schema = pa.schema([(name, _ARROW[dtype]) for name, dtype in columns.items()])

    def table_of(group: list[dict[str, Any]]) -> pa.Table:
        series = {name: pd.Series([row[name] for row in group], dtype=dtype) for name, dtype in columns.items()}
        return pa.Table.from_pandas(pd.DataFrame(series), schema, preserve_index=False)

    with pq.ParquetWriter(dest, table_of([]).schema) as writer:
        while group := list(islice(rows, _GROUP)):
            writer.write_table(table_of(group))


class Screen:
    """Standard output: CSV for a program, aligned lines for a person; both row by row.

    Args:
        tasks: What is predicted.

    Attributes:
        done, rows, failed, is_for_people: As of ``Journal``.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.done: Counter[str] = Counter()
        self.rows = 0
        self.failed = 0
        self.is_for_people = sys.stdout.isatty()

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
        if self.is_for_people:
            text = "".join(f"{_line(self.tasks, row)}\n" for row in table.to_dict("records"))
        else:
            text = (csv_text([table.columns]) if not self.rows else "") + csv_text(cells_of(table))
        sys.stdout.write(text)
        sys.stdout.flush()
        self.rows += len(table)
        self.failed += int(table["error"].notna().sum())


def _line(tasks: Tasks, row: Mapping[Hashable, Any]) -> str:
    """Such as ``female  98 %   asian   71 %    34 (28-41)     faces/1.jpg``."""
    if not pd.isna(row["error"]):
        return f"{row['path']}: {row['error']}"
    return "   ".join([*(_in_line(task, row) for task in tasks.values()), row["path"]])


def _in_line(task: Task, row: Mapping[Hashable, Any]) -> str:
    if isinstance(task, Classification):
        p = max(row[column] for column in task.probabilities)
        return f"{row[task.name]:<{max(map(len, task.classes))}} {100 * p:3.0f} %"
    low, high = (row.get(f"{task.name}_{end}") for end in ("low", "high"))
    interval = "" if low is None else f" ({low}-{high})"
    return f"{task.text(row[task.name]):>3}{interval:<10}"
