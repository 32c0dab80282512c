"""Predictions in a file, written by way of a journal, which makes a run resumable.

A journal is a file of JSON lines that only grows: first a header that says what was run, then one row per face. Each
batch is on the disk before the next one is computed, so that no finished batch is lost, however the program ends. When
all rows are there, they are converted once into the file that was asked for, and the journal is removed.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from facecls.data.spreadsheets import csv_line, unquoted
from facecls.errors import UserError
from facecls.files import replacing, sync
from facecls.predict.inputs import NO_FAILURES

ENDINGS = (".csv", ".parquet", ".jsonl")
_NUMBER = "face"
"""The column that counts the faces of a photo, where they are found."""
_GROUP = 50_000
"""Rows of a group in a Parquet file; so many are in memory when it is written."""
_HEADER = {"model": "model (SHA-256)", "options": "options", "columns": "columns"}
"""The entries of a journal's header as messages call them."""
_ARROW = {"str": pa.string(), "float32": pa.float32(), "Int16": pa.int16(), "Int32": pa.int32()}


def journal_of(out: Path) -> Path:
    """The journal of a file of predictions."""
    return out.with_name(f"{out.name}.journal.jsonl")


def lock_of(out: Path) -> Path:
    """The lock of a file of predictions, there while a process writes it."""
    return out.with_name(f"{out.name}.lock")


def check_output(out: Path, resume: bool) -> None:
    """Rejects a file that can't be written, or whose run began earlier.

    Args:
        out: What the user named.
        resume: Whether to continue a run that began earlier.

    Raises:
        UserError: If its ending is unknown, its folder missing, it or its journal exists and ``resume`` is false, or
            version 0.1 left an unfinished run of it.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"Expected --out to end in {', '.join(ENDINGS)}, but got {out}; name another file.")
    if not out.parent.is_dir():
        raise UserError(f"Expected a folder for --out, but there is none at {out.parent}; create it first.")
    for file in (out, journal_of(out)):
        if file.is_dir():
            raise UserError(f"Expected a file for --out, but {file} is a folder; name a file in it.")
    old = out.with_name(f"{out.name}.part.jsonl")
    if old.exists():
        raise UserError(
            f"Expected a run of this version for --out, but {old} is an unfinished run of version 0.1, which can't be "
            "continued; delete it or name another file."
        )
    for file, remedy in ((journal_of(out), "continue with --resume"), (out, "delete it")):
        if file.exists() and not resume:
            raise UserError(f"Expected a new file for --out, but {file} exists; {remedy}, or name another file.")


def is_finished(out: Path) -> bool:
    """Whether a file is there without a journal, so that there is nothing to continue."""
    return out.exists() and not journal_of(out).exists()


def check_complete(out: Path, columns: Mapping[str, str], count: int) -> None:
    """Rejects a finished file that is not what a run would have written; only its columns and rows are compared.

    Args:
        out: The file, which has no journal.
        columns: Types by name, as ``facecls.predict.faces.columns`` returns them.
        count: Number of inputs of the run, each with a row or with one for each face.

    Raises:
        UserError: If it can't be read, or has other columns or another number of whole rows. Version 0.1 left such
            files when it was interrupted.
    """
    read = {".csv": _csv_shape, ".parquet": _parquet_shape, ".jsonl": _jsonl_shape}[out.suffix.lower()]
    try:
        names, rows = read(out)
    except (OSError, ValueError, csv.Error):  # pyarrow's own errors are ValueErrors
        problem = "it can't be read"
    else:
        if rows and names != list(columns):
            problem = "it has other columns"
        elif rows != count:
            problem = f"it has whole rows for {rows:,}"
        else:
            return
    raise UserError(
        f"Expected {out}, which has no journal to continue from, to hold rows for each input ({count:,}), but "
        f"{problem}; delete it or name another file."
    )


def _csv_shape(file: Path) -> tuple[list[str], int]:
    """Names of the columns, and number of photos in whole rows."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader((line for line in stream if line.endswith("\n")), strict=True)
        names = list(map(unquoted, next(rows, [])))
        whole = (dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names))
        return names, sum(map(is_first_row, whole))


def _jsonl_shape(file: Path) -> tuple[list[str], int]:
    with file.open("rb") as stream:
        names = list(_parsed(stream.readline()))
        stream.seek(0)
        return names, sum(is_first_row(_parsed(line)) for line in stream if line.endswith(b"\n"))


def _parquet_shape(file: Path) -> tuple[list[str], int]:
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if _NUMBER not in names:
            return names, parquet.metadata.num_rows
        return names, sum(map(is_first_row, parquet.read([_NUMBER]).to_pylist()))


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a JSON line, empty if there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Journal:
    """Predictions on their way into a file.

    Args:
        out: The file; ``check_output`` has accepted it.
        columns: Types by name, as ``facecls.predict.faces.columns`` returns them.
        model: SHA-256 of the model's file.
        options: Those that decide what is predicted, as words of the command line.

    Attributes:
        done: Number of photos by path that were in the journal at the start.
        rows: Number of rows.
        failed: Number of rows whose error is a failure.
        is_interactive: Whether rows go to a terminal.

    Raises:
        UserError: If the journal was begun with other arguments, holds something else, or can't be written.
    """

    def __init__(self, out: Path, columns: Mapping[str, str], model: str, options: Sequence[str]) -> None:
        self.out = out
        self.columns = columns
        self.done: Counter[str] = Counter()
        self.rows = 0
        self.failed = 0
        self.is_interactive = False
        self._header: dict[str, Any] = {"model": model, "options": list(options), "columns": list(columns)}
        self._file = journal_of(out)
        try:
            self._stream = self._file.open("a+b")
        except OSError as error:
            raise UserError(f"Can't write {out}: {error.strerror}; name another file.") from None
        try:
            length = self._read()
            self._stream.truncate(length)
            if not length:
                self._write(f"{json.dumps(self._header)}\n")
        except UserError:
            self._close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the journal, from which the run can be resumed unless it is finished."""
        self._close()

    def append(self, table: pd.DataFrame) -> None:
        """Writes rows to the disk.

        Args:
            table: With the columns.

        Raises:
            UserError: If that fails.
        """
        self._write(_json_text(table))
        self.rows += len(table)
        self.failed += count_failed(table)

    def finish(self) -> None:
        """Converts the journal into the file that was asked for, and removes it.

        Raises:
            UserError: If the file can't be written.
        """
        self._stream.close()
        with self._file.open("rb") as lines, replacing(self.out) as part:
            lines.readline()  # the header
            if self.out.suffix.lower() == ".jsonl":
                with part.open("wb") as stream:
                    shutil.copyfileobj(lines, stream)
            else:
                write = _write_csv if self.out.suffix.lower() == ".csv" else _write_parquet
                write(part, map(json.loads, lines), self.columns)
        self._file.unlink()

    def _close(self) -> None:
        with suppress(OSError):  # of what could not be written, as has been said
            self._stream.close()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text.encode())
            self._stream.flush()
            sync(self._stream)
        except OSError as error:
            raise UserError(
                f"Can't write {self._file}: {error.strerror}; free some space and continue with --resume."
            ) from None

    def _read(self) -> int:
        """Counts the rows of the journal and returns its length in bytes, without what may not be whole.

        That is a last line that is cut and, where photos have several rows, the rows of the last photo.
        """
        self._stream.seek(0)
        lines = takewhile(lambda line: line.endswith(b"\n"), self._stream)
        header = next(lines, b"")
        if header:
            self._check_header(_parsed(header))
        end = len(header)
        last: list[tuple[dict[str, Any], int]] = []
        for line in lines:
            row = _parsed(line)
            if list(row) != list(self.columns) or not isinstance(row["path"], str):
                raise UserError(
                    f"Expected predictions with the columns {', '.join(self.columns)} in {self._file}, but row "
                    f"{self.rows + len(last) + 1} has other columns; was it written with another model? Name another "
                    "file."
                )
            if is_first_row(row):
                end += self._count(last)
                last = []
            last.append((row, len(line)))
        return end if _NUMBER in self.columns else end + self._count(last)

    def _count(self, rows: Sequence[tuple[dict[str, Any], int]]) -> int:
        """Counts the rows of a photo and returns their length in bytes."""
        for row, _ in rows:
            self.done[row["path"]] += is_first_row(row)
            self.rows += 1
            self.failed += row["error"] is not None and row["error"] not in NO_FAILURES
        return sum(length for _, length in rows)

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if header.keys() != self._header.keys():
            raise UserError(
                f"Expected a journal of facecls.predict in {self._file}, but its first line is not the header of one; "
                "delete it or name another file."
            )
        for name, now in self._header.items():
            if header[name] != now:
                before, after = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (header[name], now))
                raise UserError(
                    f"Expected to continue {self._file} with the same {_HEADER[name]}, but it was begun with {before}, "
                    f"not {after}; repeat the first command with --resume, or name another file."
                )


def _write_csv(dest: Path, rows: Iterator[dict[str, Any]], columns: Mapping[str, str]) -> None:
    with dest.open("w", newline="", encoding="utf-8") as stream:
        stream.write(csv_line(columns))
        stream.writelines(csv_line(row.values()) for row in rows)


def _write_parquet(dest: Path, rows: Iterator[dict[str, Any]], columns: Mapping[str, str]) -> None:
    schema = pa.schema([(name, _ARROW[dtype]) for name, dtype in columns.items()])

    def table_of(group: list[dict[str, Any]]) -> pa.Table:
        series = {name: pd.Series([row[name] for row in group], dtype=dtype) for name, dtype in columns.items()}
        return pa.Table.from_pandas(pd.DataFrame(series), schema, preserve_index=False)

    with pq.ParquetWriter(dest, table_of([]).schema) as writer:
        while group := list(islice(rows, _GROUP)):
            writer.write_table(table_of(group))


def is_first_row(row: Mapping[str, Any]) -> bool:
    """Whether a row of predictions is the first, or only, one of its photo."""
    return row.get(_NUMBER) in (None, 1, "", "1")


def count_failed(table: pd.DataFrame) -> int:
    """How many rows have an error that is a failure."""
    return int((table["error"].notna() & ~table["error"].isin(NO_FAILURES)).sum())


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


def _json_text(table: pd.DataFrame) -> str:
    """A table as JSON lines, each an object by column, with null where there is nothing."""
    return "".join(f"{json.dumps(dict(zip(table, row, strict=True)))}\n" for row in cells_of(table))
