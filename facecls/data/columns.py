"""Columns of a CSV or Parquet file that a person wrote, as text."""

import codecs
import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facecls.data.folders import IMAGE_ENDINGS
from facecls.data.limits import LIMITS, raised, too_large
from facecls.data.spreadsheets import unquoted
from facecls.errors import UserError
from facecls.files import open_regular

CHUNK = 65_536
"""Rows that are read at a time."""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("file", "image", "img_name", "img_path", "image_path", "image_name", "filename", "file_name", "filepath"),
    "gender": ("sex",),
    "race": ("ethnicity",),
}
"""Other names of a column that are common; ``file`` is FairFace's."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NO_SEPARATOR = "\x1f"
"""Stands between the cells of a table with one column, so that commas in it divide nothing."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
csv.field_size_limit(1 << 30)  # else a long text is an error of its own
_START = 1 << 16
"""Bytes in which the header must end."""


class Writing(NamedTuple):
    """How a table is written as text.

    Attributes:
        encoding: Python's name of it: ``utf-8``, ``utf-8-sig``, ``utf-16``, ``utf-16-le``, ``utf-16-be``, ``cp1252``.
        separator: One character between cells.
        skipped: Lines before the header.
    """

    encoding: str
    separator: str
    skipped: int


def writing_of(path: Path) -> Writing:
    """Finds out how a table is written as text.

    A byte order mark, or else the bytes themselves, decide the encoding: UTF-8 if they are, else Windows' cp1252. A
    first line ``sep=;``, which spreadsheets write, decides the separator, or else the header does: it is what divides
    it into most cells.

    Args:
        path: The file.

    Returns:
        How it is written.

    Raises:
        ValueError: If it is neither UTF-8 nor UTF-16 nor cp1252.
        OSError: If it can't be read.
    """
    with path.open("rb") as stream:
        start = stream.read(_START)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None) or _unmarked(path, start)
    lines = codecs.getincrementaldecoder(encoding)().decode(start).splitlines()  # a character may be cut at the end
    number, header = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
    if (said := header.strip(' "')).lower().startswith("sep=") and len(said) == 5:
        return Writing(encoding, said[4], number + 1)
    counts = {separator: len(next(csv.reader([header], delimiter=separator), [])) for separator in _SEPARATORS}
    separator = max(counts, key=lambda separator: counts[separator])
    return Writing(encoding, separator if counts[separator] > 1 else _NO_SEPARATOR, number)


def _unmarked(path: Path, start: bytes) -> str:
    """The encoding of a file without a byte order mark."""
    # the header of a UTF-16 file in English has a zero in each of its letters, and no other text has any
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) >= 8 and not any(start[first:64:2]):
            return encoding
    if b"\0" in start:
        raise ValueError("it holds zero bytes, which no text has")
    try:
        with path.open(encoding="utf-8") as stream:
            while stream.read(_START):
                pass
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def describe(path: Path, wanted: Sequence[str]) -> str:
    """Says how a table is read, for people to check.

    Args:
        path: As for ``read_columns``.
        wanted: Names of the columns that were asked for.

    Returns:
        One line, such as ``faces.csv (cp1252, semicolons): path from img_path, age``.

    Raises:
        UserError: As ``read_columns``.
    """
    with _errors(path):
        names = _names(path)
        chosen = _choose(names, wanted, path)
        parts = []
        if not _is_parquet(path):
            writing = writing_of(path)
            encoding = {"utf-8-sig": "utf-8"}.get(writing.encoding, writing.encoding.removesuffix("-le"))
            parts = [encoding] if encoding != "utf-8" else []
            if writing.separator not in (",", _NO_SEPARATOR):
                parts.append(_SEPARATORS.get(writing.separator, f"separated by {writing.separator}"))
    columns = ", ".join(name if own == name else f"{name} from {own.strip()}" for name, own in chosen.items())
    how = f" ({', '.join(parts)})" if parts else ""
    return f"{path.name}{how}: {columns}"


def read_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Reads some columns of a table and leaves the others alone.

    A column is known by its name, else by its name in any case, else by one of its ``ALIASES`` in any case.

    Args:
        path: A Parquet file if its name ends so, else a table with a header, written as ``writing_of`` finds out.
        required: Names of columns that must be there.
        optional: Names of columns that are read if they are there.

    Returns:
        The columns that are there, under the names asked for, as str without spaces around it; empty where there is
        no value. Numbered from 0.

    Raises:
        UserError: If the file can't be read as what it should be, lacks a required column, or has two for one name.
    """
    return pd.concat(stream_columns(path, required, optional), ignore_index=True)


def read_all_columns(path: Path, required: str) -> pd.DataFrame:
    """Reads all columns of a table.

    Args:
        path: As for ``read_columns``.
        required: Name of a column that must be there, maybe under another name.

    Returns:
        That column, and all others under their own names, without spaces around them; but for those without a name. As
        ``read_columns`` otherwise.

    Raises:
        UserError: As ``read_columns``.
    """
    with _errors(path):
        names = [name.strip() if _is_parquet(path) else unquoted(name.strip()) for name in _names(path)]
        own = _choose(names, [required], path).get(required)
    return read_columns(path, [required], [name for name in names if name not in ("", required, own)])


def stream_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """Reads some columns of a table, ``CHUNK`` rows at a time.

    Args:
        path: As for ``read_columns``.
        required: As for ``read_columns``.
        optional: As for ``read_columns``.

    Yields:
        Successive rows as ``read_columns`` returns them, but for their numbers; first a frame without any.

    Raises:
        UserError: As ``read_columns``.
    """
    with _errors(path):
        names = _names(path)
        chosen = _choose(names, [*required, *optional], path)
        if lacking := [name for name in required if name not in chosen]:
            raise UserError(
                f"Expected the columns {', '.join(required)} in {path}, but {', '.join(lacking)} is missing among "
                f"{', '.join(names) or 'none'}; rename or add it."
            )
        yield pd.DataFrame({name: pd.Series(dtype="str") for name in chosen})
        count = 0
        for rows in (_parquet if _is_parquet(path) else _csv)(path, list(chosen.values())):
            count += len(rows)
            _check_count(count, path)
            texts = {name: rows[own].astype("string").fillna("").str.strip() for name, own in chosen.items()}
            table = pd.DataFrame(texts).astype("str")
            yield table if _is_parquet(path) else table.map(unquoted).astype("str")


def _check_count(count: int, path: Path) -> None:
    if count > LIMITS.names:
        how = raised("names", 10 * LIMITS.names)
        raise UserError(f"Expected at most {LIMITS.names:,} rows in {path}, but it has more; divide it, or {how}.")


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns what pandas and pyarrow raise for a damaged file, which is of many kinds, into a ``UserError``."""
    try:
        open_regular(path).close()
        yield
    except UserError:
        raise
    except Exception as error:
        kind = "Parquet" if _is_parquet(path) else "CSV"
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"Expected a {kind} file in {path}, but it can't be read as one: {reason}; save it again."
        ) from None


def _choose(names: Sequence[str], wanted: Collection[str], path: Path) -> dict[str, str]:
    """The name in the file of each wanted column that is there."""
    plain = [unquoted(name.strip()).lower() for name in names]
    chosen = {}
    for column in wanted:
        aliases = [alias for alias in ALIASES.get(column, ()) if alias not in wanted]
        matches = (
            [name for name in names if unquoted(name) == column]
            or [name for name, lower in zip(names, plain, strict=True) if lower == column.lower()]
            or [name for name, lower in zip(names, plain, strict=True) if lower in aliases]
        )
        if len(matches) > 1:
            raise UserError(
                f"Expected one column for {column} in {path}, but {' and '.join(matches)} could both be it; "
                f"rename the right one to {column} or remove the other."
            )
        if matches:
            chosen[column] = matches[0]
    return chosen


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _names(path: Path) -> list[str]:
    """The names of all columns."""
    if _is_parquet(path):
        return list(pq.read_schema(path).names)
    writing = writing_of(path)
    # as a row, since pandas renames columns of the same name
    names: list[str] = pd.read_csv(path, nrows=1, header=None, **_options(writing)).iloc[0].tolist()
    return names


def _options(writing: Writing) -> dict[str, Any]:
    """What pandas must know to read cells as the texts that they are."""
    return {
        "dtype": str,
        "keep_default_na": False,
        "skipinitialspace": True,
        "sep": writing.separator,
        "encoding": writing.encoding,
        "skiprows": writing.skipped,
    }


def _csv(path: Path, used: list[str]) -> Iterator[pd.DataFrame]:
    _check_rows(path)
    with pd.read_csv(
        path,
        usecols=used,
        index_col=False,  # else a separator at the end of each row shifts all columns by one
        chunksize=CHUNK,
        **_options(writing_of(path)),
    ) as chunks:
        yield from chunks


def _check_rows(path: Path) -> None:
    """Rejects a table with a row of more cells than the header has, which pandas would cut without a word."""
    writing = writing_of(path)
    with path.open(newline="", encoding=writing.encoding) as stream:
        rows = csv.reader(islice(stream, writing.skipped, None), delimiter=writing.separator, skipinitialspace=True)
        count = len(next(rows, []))
        line = rows.line_num
        for row in rows:
            if rows.line_num > line + 1 and _swallows_rows(row, writing.separator, count):
                raise UserError(
                    f"Expected a quotation mark to be closed in its row in {path}, but that of line "
                    f"{line + 1 + writing.skipped} swallows the next rows; remove it or close it."
                )
            line = rows.line_num
            if any(row[count:]):
                raise UserError(
                    f"Expected {count} cells in each row of {path}, as in its header, but line "
                    f"{rows.line_num + writing.skipped} has {len(row)} ({', '.join(row)}); put texts that hold a "
                    "separator into quotes."
                )


def _swallows_rows(row: Sequence[str], separator: str, count: int) -> bool:
    """Whether a cell of several lines holds rows: a line with as many cells, one of them the name of an image.

    Args:
        row: Its cells.
        separator: Between them.
        count: How many a row has.
    """
    lines = (line.split(separator) for cell in row for line in cell.splitlines()[1:])
    return any(
        len(cells) == count and any(PurePath(cell.strip()).suffix.lower() in IMAGE_ENDINGS for cell in cells)
        for cells in lines
    )


def _parquet(path: Path, used: list[str]) -> Iterator[pd.DataFrame]:
    schema = pq.read_schema(path)
    for name in used:
        if pa.types.is_nested(kind := schema.field(name).type):
            raise UserError(
                f"Expected a text or a number in each cell of {name} in {path}, but it holds {kind}; write a column of "
                "texts."
            )
    # a text that is stored once and repeated stays so until its length in all rows is known
    with pq.ParquetFile(path, read_dictionary=used) as file:
        _check_count(file.metadata.num_rows, path)
        for batch in file.iter_batches(CHUNK, columns=used):
            batch.validate(full=True)  # such as that texts are UTF-8
            for column in batch.columns:
                _check_lengths(column)
            yield batch.to_pandas(ignore_metadata=True)


def _check_lengths(column: Any) -> None:
    if pa.types.is_dictionary(column.type):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        if (total := pc.sum(lengths).as_py() or 0) > LIMITS.file_bytes:
            raise ValueError(too_large(total, "file_bytes", "bytes of text in some rows"))
