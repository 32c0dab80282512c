"""Columns of a CSV or Parquet file that a person wrote, as text."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from facecls.errors import UserError

CHUNK = 65_536
"""Rows that are read at a time."""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("file", "image", "img_name", "filename"),
    "gender": ("sex",),
    "race": ("ethnicity",),
}
"""Other names of a column that are common; ``file`` is FairFace's."""


def read_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Reads some columns of a table and leaves the others alone.

    A column is known by its name, else by its name in any case, else by one of its ``ALIASES`` in any case.

    Args:
        path: A Parquet file if its name ends so, else a CSV file in UTF-8 with a header.
        required: Names of columns that must be there.
        optional: Names of columns that are read if they are there.

    Returns:
        The columns that are there, under the names asked for, as str without spaces around it; empty where there is
        no value. Numbered from 0.

    Raises:
        UserError: If the file can't be read as what it should be, lacks a required column, or has two for one name.
    """
    return pd.concat(stream_columns(path, required, optional), ignore_index=True)


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
    kind, names_of, read = ("Parquet", _parquet_names, _parquet) if _is_parquet(path) else ("CSV", _csv_names, _csv)
    try:
        names = names_of(path)
        chosen = _choose(names, [*required, *optional], path)
        if lacking := [name for name in required if name not in chosen]:
            raise UserError(
                f"Expected the columns {', '.join(required)} in {path}, but {', '.join(lacking)} is missing among "
                f"{', '.join(names) or 'none'}; rename or add it."
            )
        yield pd.DataFrame({name: pd.Series(dtype="str") for name in chosen})
        for rows in read(path, list(chosen.values())):
            texts = {name: rows[own].astype("string").fillna("").str.strip() for name, own in chosen.items()}
            yield pd.DataFrame(texts).astype("str")
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise UserError(f"Expected a {kind} file in {path}, but it can't be read as one: {error}") from None


def _choose(names: Sequence[str], wanted: Collection[str], path: Path) -> dict[str, str]:
    """The name in the file of each wanted column that is there."""
    plain = [name.strip().lower() for name in names]
    chosen = {}
    for column in wanted:
        aliases = [alias for alias in ALIASES.get(column, ()) if alias not in wanted]
        matches = (
            [name for name in names if name == column]
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


def _csv_names(path: Path) -> list[str]:
    # as a row, since pandas renames columns of the same name
    return (
        pd.read_csv(path, nrows=1, header=None, dtype=str, keep_default_na=False, skipinitialspace=True)
        .iloc[0]
        .tolist()
    )


def _csv(path: Path, used: list[str]) -> Iterator[pd.DataFrame]:
    with pd.read_csv(
        path,
        usecols=used,
        index_col=False,  # else a comma at the end of each row shifts all columns by one
        dtype=str,
        keep_default_na=False,
        skipinitialspace=True,
        chunksize=CHUNK,
    ) as chunks:
        yield from chunks


def _parquet_names(path: Path) -> list[str]:
    return list(pq.read_schema(path).names)


def _parquet(path: Path, used: list[str]) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK, columns=used):
            yield batch.to_pandas(ignore_metadata=True)
