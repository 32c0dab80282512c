"""Where predictions go: files that survive whatever ends the program and can be gone on with, and the screen.

CSV and JSON lines are appended to, a batch at a time, which is on the disk before the next one is computed. A Parquet
file can't be appended to, and is worthless without its end. So its rows go to JSON lines beside it, in
``predictions.parquet.part.jsonl``, and become the Parquet file when all are there.
"""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Hashable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from facecls.data.tasks import CLASSES
from facecls.errors import UserError
from facecls.files import replacing
from facecls.predict.rows import cells_of, csv_rows, csv_text, json_rows, json_text

ENDINGS = (".csv", ".parquet", ".jsonl")
_ROWS = 50_000
"""Rows of a group in a Parquet file; so many are held when it is written."""
_ARROW = {"str": pa.string(), "float32": pa.float32(), "Int16": pa.int16()}


def appended(out: Path) -> Path:
    """The file that rows are appended to.

    Args:
        out: What the user named.

    Returns:
        The same, or the JSON lines that will become a Parquet file.
    """
    return out.with_name(f"{out.name}.part.jsonl") if out.suffix.lower() == ".parquet" else out


def check_output(out: Path, resume: bool) -> None:
    """Refuses a file that can't be written to, or that holds something already.

    Args:
        out: What the user named.
        resume: Whether what it holds is to be gone on with.

    Raises:
        UserError: If its ending is unknown, its folder missing, or it exists and ``resume`` is false.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"Expected --out to end in {', '.join(ENDINGS)}, but got {out}; name another file.")
    if not out.parent.is_dir():
        raise UserError(f"Expected a folder for --out, but there is none at {out.parent}; make it first.")
    for file in (out, appended(out)):
        if file.is_dir():
            raise UserError(f"Expected a file for --out, but {file} is a folder; name a file in it.")
        if file.exists() and not resume:
            raise UserError(
                f"Expected a new file for --out, but {file} exists; go on with it by --resume, or name another."
            )


class Output:
    """A file of predictions that rows are appended to.

    Args:
        out: A file that ``check_output`` has passed. What is in it is kept but for a last row that is not whole.
        columns: Their types by name, as ``facecls.predict.faces.columns`` gives them.

    Attributes:
        done: How many rows there are of each path; read from the file, and not counted on.
        rows: How many rows there are.
        failed: How many of them have an error.
        is_for_people: Whether a person sees the rows as they come.

    Raises:
        UserError: If what is in it are no predictions with these columns, or it can't be written.
    """

    def __init__(self, out: Path, columns: Mapping[str, str]) -> None:
        self.out = out
        self.columns = columns
        self.done: Counter[str] = Counter()
        self.failed = 0
        self.is_for_people = False
        self._file = appended(out)
        self._is_csv = out.suffix.lower() == ".csv"
        if out.exists() and not self._file.exists():
            self._reopen_parquet()
        try:
            self._stream = self._file.open("a+b")
        except OSError as error:
            raise UserError(f"Can't write {out}: {error.strerror}; name another file.") from None
        self._stream.truncate(self._keep())
        self.rows = self.done.total()
        if self._is_csv and not self._stream.seek(0, io.SEEK_END):
            self._write(csv_text([columns]))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; what is in it can be gone on with."""
        self._stream.close()

    def append(self, table: pd.DataFrame) -> None:
        """Puts rows on the disk.

        Args:
            table: With the columns.

        Raises:
            UserError: If that fails.
        """
        self._write(csv_text(cells_of(table)) if self._is_csv else json_text(table))
        self.rows += len(table)
        self.failed += int(table["error"].notna().sum())

    def finish(self) -> None:
        """Makes the file what the user asked for, when all rows are there.

        Raises:
            UserError: If it can't be written.
        """
        self._stream.close()
        if self._file == self.out:
            return
        with (
            self._file.open("rb") as lines,
            replacing(self.out) as part,
            pq.ParquetWriter(part, self._arrow([]).schema) as writer,
        ):
            while rows := [json.loads(line) for line in islice(lines, _ROWS)]:
                writer.write_table(self._arrow(rows))
        self._file.unlink()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text.encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(
                f"Can't write {self._file}: {error.strerror}; free some space and go on by --resume."
            ) from None

    def _arrow(self, rows: list[dict[str, Any]]) -> pa.Table:
        schema = pa.schema([(name, _ARROW[dtype]) for name, dtype in self.columns.items()])
        frame = pd.DataFrame(
            {name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in self.columns.items()}
        )
        return pa.Table.from_pandas(frame, schema, preserve_index=False)

    def _keep(self) -> int:
        """Counts the whole rows in the file and gives their length in bytes."""
        start = (csv_text([self.columns]) if self._is_csv else '{"path": ').encode()
        self._stream.seek(0)
        found = self._stream.read(len(start))
        self._stream.seek(0)
        end = 0
        try:
            if found != start[: len(found)]:  # it may be cut anywhere
                raise ValueError
            for row, end in (csv_rows if self._is_csv else json_rows)(self._stream):  # noqa: B007 - the last is wanted
                if list(row) != list(self.columns):
                    raise ValueError
                self.done[row["path"]] += 1
                self.failed += bool(row["error"])
        except (ValueError, TypeError, csv.Error):
            self._stream.close()
            raise self._other_rows(f"row {self.done.total() + 1}") from None
        return end

    def _reopen_parquet(self) -> None:
        """Turns a Parquet file back into the JSON lines that it was made from."""
        try:
            with pq.ParquetFile(self.out) as file:
                if file.schema_arrow.names != list(self.columns):
                    raise self._other_rows("it")
                with replacing(self._file) as part, part.open("w", encoding="utf-8") as lines:
                    for batch in file.iter_batches(_ROWS):
                        lines.write(json_text(batch.to_pandas()))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"Expected predictions in {self.out}, but it can't be read: {error}") from None

    def _other_rows(self, which: str) -> UserError:
        return UserError(
            f"Expected predictions with the columns {', '.join(self.columns)} in {self._file}, but {which} is none; "
            "was it made with another model? Name another file."
        )


class Screen:
    """Standard output: CSV for a program, aligned lines for a person; both row by row."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.rows = 0
        self.failed = 0
        self.is_for_people = sys.stdout.isatty()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing; standard output stays open."""

    def finish(self) -> None:
        """Nothing; all is printed."""

    def append(self, table: pd.DataFrame) -> None:
        """Prints rows.

        Args:
            table: As ``Faces.predict`` gives it.
        """
        if self.is_for_people:
            text = "".join(f"{_line(row)}\n" for row in table.to_dict("records"))
        else:
            text = (csv_text([table.columns]) if not self.rows else "") + csv_text(cells_of(table))
        sys.stdout.write(text)
        sys.stdout.flush()
        self.rows += len(table)
        self.failed += int(table["error"].notna().sum())


def _line(row: Mapping[Hashable, Any]) -> str:
    """Such as ``female  98 %   asian   71 %   34 (28-41)   faces/1.jpg``."""
    if not pd.isna(row["error"]):
        return f"{row['path']}: {row['error']}"
    parts = [f"{row[task]:<6} {100 * row[f'p_{row[task]}']:3.0f} %" for task in CLASSES if task in row]
    if "age" in row:
        interval = f" ({row['age_low']}-{row['age_high']})" if "age_low" in row else ""
        parts.append(f"{row['age']:3.0f}{interval:<10}")
    return "   ".join([*parts, row["path"]])
