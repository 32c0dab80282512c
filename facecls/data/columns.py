"""Columns of a CSV or Parquet file that a user made, as text, and the labels in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from facecls.errors import UserError

CHUNK = 65_536
"""Rows that are read at a time."""


def read_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Reads some columns of a table and leaves the others alone.

    Args:
        path: A Parquet file if its name ends so, else a CSV file in UTF-8 with a header.
        required: Names of columns that must be there.
        optional: Names of columns that are read if they are there.

    Returns:
        The columns that are there, as str without spaces around it; empty where there is no value. Numbered from 0.

    Raises:
        UserError: If the file can't be read as what it should be, or lacks a required column.
    """
    return pd.concat(stream_columns(path, required, optional), ignore_index=True)


def stream_columns(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """Reads some columns of a table, ``CHUNK`` rows at a time.

    Args:
        path: As for ``read_columns``.
        required: As for ``read_columns``.
        optional: As for ``read_columns``.

    Yields:
        Successive rows, one frame at least, as ``read_columns`` gives them but for their numbers.

    Raises:
        UserError: As ``read_columns``.
    """
    kind, names_of, read = ("Parquet", _parquet_names, _parquet) if _is_parquet(path) else ("CSV", _csv_names, _csv)
    try:
        names = names_of(path)
        if lacking := [name for name in required if name not in names]:
            raise UserError(
                f"Expected the columns {', '.join(required)} in {path}, but {', '.join(lacking)} is missing among "
                f"{', '.join(names) or 'none'}; rename or add it."
            )
        used = [name for name in (*required, *optional) if name in names]
        yield pd.DataFrame({name: pd.Series(dtype="str") for name in used})
        for found in read(path, used):
            texts = {name: found[name].astype("string").fillna("").str.strip().astype("str") for name in used}
            yield pd.DataFrame(texts)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise UserError(f"Expected a {kind} file in {path}, but it can't be read as one: {error}") from None


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _csv_names(path: Path) -> list[str]:
    return list(pd.read_csv(path, nrows=0, skipinitialspace=True).columns)


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
