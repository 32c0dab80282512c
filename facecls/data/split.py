"""Which faces train, validate and test."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.data.columns import read_columns
from facecls.data.parsing import MISSING
from facecls.data.tasks import UTKFACE, Classification, Task, Tasks
from facecls.errors import UserError

SPLITS = ("train", "val", "test")
STRATA_AGE_EDGES = (0, 3, 10, 20, 30, 40, 50, 60, 70)
"""First age of each band in years, the last one open: those of FairFace (Karkkainen and Joo, WACV 2021)."""

_IS_TRAIN = {"1": "train", "1.0": "train", "0": "holdout", "0.0": "holdout"}
_TRAIN, _VAL, _TEST = range(3)  # indices into SPLITS
_Ints = npt.NDArray[np.int64]


def assign_split(faces: pd.DataFrame, val: float, test: float, seed: int, tasks: Tasks = UTKFACE) -> "pd.Series[str]":
    """Splits faces into train, val and test, each with the same mixture of labels.

    The same faces and seed give the same split in whatever order the rows come. Byte-identical images always stay
    together. A stratum is a combination of classes and age bands of all tasks, where a missing label counts as a value
    of its own; identical images with different labels belong to the first of their strata. Every stratum's shares are
    right to about one face (or the largest group of identical images), and so are those of neighbouring strata
    together, such as all women, and of the whole. A part that is asked for is never empty, as long as there are as many
    different images as parts; with fewer, all faces train.

    Args:
        faces: With the columns ``sha1`` and those of the labels; NA for a missing label.
        val: Share of the faces to validate with, 0 or more.
        test: Share of the faces to test with, 0 or more; the rest trains, so the two must not reach 1.
        seed: Another seed gives another split.
        tasks: What the faces are labelled with.

    Returns:
        One of ``SPLITS`` for every row, with the index of ``faces``.

    Raises:
        UserError: If the fractions are negative or leave nothing to train with.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise UserError(f"Expected fractions val >= 0 and test >= 0 with val + test < 1, got val={val}, test={test}.")
    drawn = np.fromiter((_draw(seed, sha1) for sha1 in faces["sha1"]), np.uint64, len(faces))
    # a draw stands for its image: two of a million share one once in 40 million times, and only go together then
    draws, row_group, sizes = np.unique(drawn, return_inverse=True, return_counts=True)
    strata = np.full(len(draws), np.iinfo(np.int64).max)
    np.minimum.at(strata, row_group, _strata(faces, tasks))
    order = np.lexsort((draws, strata))
    by_stratum = np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)

    shares = {_TEST: test, _VAL: val}
    parts = _deal(by_stratum, sizes, shares, {part: _draw(seed, SPLITS[part]) / 2**64 for part in shares})
    _leave_none_empty(parts, [_TRAIN, *(part for part, share in shares.items() if share)], sizes, draws)
    return pd.Series(np.array(SPLITS, object)[parts[row_group]], index=faces.index, name="split", dtype="str")


def read_split_file(path: str | Path, faces: pd.DataFrame) -> "pd.Series[str]":
    """Reads a split from a CSV file with the columns ``img_name`` and ``is_train`` (1 or 0).

    Images are matched by their file name without folders.

    Args:
        path: The CSV file.
        faces: With the column ``path``.

    Returns:
        With the index of ``faces``: ``"train"`` where ``is_train`` is 1, ``"holdout"`` (validates and tests) where it
        is 0, NA for a face that isn't listed.

    Raises:
        UserError: If the file can't be read as such a CSV, an image is listed as both, or no face is listed.
    """
    listed = read_columns(Path(path), ["img_name", "is_train"])
    split = listed["is_train"].map(_IS_TRAIN)
    if split.isna().any():
        value = listed["is_train"][split.isna()].iloc[0]
        raise UserError(f"Expected 1 or 0 under is_train in {path}, got {value!r}; correct the file.")
    sides = (
        pd.Series(split.to_numpy(), index=_file_names(listed["img_name"])).groupby(level=0).agg(["first", "nunique"])
    )
    both = sides.index[sides["nunique"] > 1]
    if len(both):
        raise UserError(
            f"Expected each image once in {path}, but {both[0]} is listed with both 1 and 0; correct the file."
        )
    split = sides["first"].reindex(_file_names(faces["path"]))
    if split.isna().all():
        raise UserError(f"Expected the faces' file names under img_name in {path}, but none of the faces is listed.")
    return pd.Series(split.to_numpy(), index=faces.index, name="split", dtype="str")


def read_split_lists(files: Mapping[str, str], faces: pd.DataFrame) -> "pd.Series[str]":
    """Reads a split from a table for each part, which lists its images under ``path``, ``file`` or the like.

    Images are matched by their file name without folders; other columns are not read.

    Args:
        files: The tables, CSV or Parquet, by the name of their part: ``train``, and ``val`` and ``test`` if there are.
        faces: With the column ``path``.

    Returns:
        With the index of ``faces``: its part, NA for a face that no table lists.

    Raises:
        UserError: If a part is none of ``SPLITS``, there is no table for ``train``, one can't be read or lists none of
            the faces, or an image is in two of them.
    """
    if "train" not in files or not {*files} <= {*SPLITS}:
        raise UserError(
            f"Expected tables for train, and maybe for val and test, in data.split_file, but got {', '.join(files)}; "
            "name them so."
        )
    names = pd.Series(_file_names(faces["path"]), faces.index)
    split = pd.Series(pd.NA, faces.index, dtype="str")
    for part, file in files.items():
        listed = names.isin(_file_names(read_columns(Path(file), ["path"])["path"]))
        if not listed.any():
            raise UserError(f"Expected the faces' file names in {file}, but none of the faces is listed.")
        twice = listed & split.notna()
        if twice.any():
            raise UserError(
                f"Expected each image in one part, but {names[twice].iloc[0]} is listed for {split[twice].iloc[0]} and "
                f"for {part}; correct {file}."
            )
        split[listed] = part
    return split.rename("split")


def split_files(given: Mapping[str, str] | str | None) -> list[str]:
    """The files that ``data.split_file`` names."""
    return [] if given is None else [given] if isinstance(given, str) else [*given.values()]


def split_seed_of(options: Mapping[str, Any], otherwise: int | None = None) -> int | None:
    """The seed that faces are split with.

    Args:
        options: Those of the data that a checkpoint or ``config.yaml`` keeps.
        otherwise: For options that name no seed.
    """
    seed: int | None = options.get("split_seed")
    return options.get("seed", otherwise) if seed is None else seed


def earlier_parts(faces: pd.DataFrame, earlier: pd.DataFrame, by: Sequence[str] = ("sha1", "path")) -> "pd.Series[str]":
    """The parts that faces were in when a run was begun, by their image or else their path.

    Args:
        faces: With the columns ``path`` and ``sha1``.
        earlier: The faces of the run, with ``split`` as well.
        by: What a face is known by; ``sha1`` alone where other faces may have the same paths.

    Returns:
        With the index of ``faces``: NA for a new face; ``train`` if an image was in several parts and one was this.

    Examples:
        >>> earlier = pd.DataFrame({"path": ["a", "b"], "sha1": ["0", "1"], "split": ["val", "test"]})
        >>> faces = pd.DataFrame({"path": ["moved", "b", "c"], "sha1": ["0", "changed", "2"]})
        >>> earlier_parts(faces, earlier).tolist()
        ['val', 'test', nan]
    """
    placed = earlier[earlier["split"].notna()].sort_values("split", key=lambda split: split != "train", kind="stable")
    parts = pd.Series(pd.NA, faces.index, dtype="str")
    for column in by:
        part_of = placed.drop_duplicates(column).set_index(column)["split"]
        parts = parts.fillna(faces[column].map(part_of).astype("str"))
    # copies of an image that is known by the path of one of them
    of_image = parts.groupby(faces["sha1"]).first()
    return parts.fillna(faces["sha1"].map(of_image).astype("str")).rename("split")


def leaks(faces: pd.DataFrame, split: "pd.Series[str]") -> int:
    """Counts the faces whose image is, byte for byte, in another part of the split too.

    ``assign_split`` leaves none; splits made elsewhere may.

    Args:
        faces: With the column ``sha1``.
        split: The part of each face, in the rows' order; NA for none.

    Returns:
        How many faces, counted in every part.
    """
    placed = pd.DataFrame({"sha1": faces["sha1"].to_numpy(), "split": split.to_numpy()}).dropna()
    places = placed.drop_duplicates()["sha1"]
    return int(placed["sha1"].isin(places[places.duplicated()]).sum())


def _file_names(paths: "pd.Series[str]") -> list[str]:
    return [path.replace("\\", "/").rpartition("/")[2] for path in paths]


def _strata(faces: pd.DataFrame, tasks: Tasks) -> _Ints:
    """Numbers the strata so that those with neighbouring numbers share the first labels, ``(N,)``."""
    strata = np.zeros(len(faces), np.int64)
    for task in tasks.values():
        values, count = _stratum_of(faces, task)
        strata = strata * count + values
    return strata


def _stratum_of(faces: pd.DataFrame, task: Task) -> tuple[_Ints, int]:
    """Each face's class or age band from 1 on, 0 for no label, ``(N,)``; and how many values there are."""
    labels = faces[task.name].to_numpy(np.int64, na_value=MISSING)
    if isinstance(task, Classification):
        return labels + 1, len(task.classes) + 1
    first = task.range[0]
    if first in faces:
        labels = np.where(labels == MISSING, faces[first].to_numpy(np.int64, na_value=MISSING), labels)
    return np.searchsorted(STRATA_AGE_EDGES, labels, side="right"), len(STRATA_AGE_EDGES) + 1


def _draw(seed: int, text: str) -> int:
    """A pseudorandom number from 0 to 2^64 - 1 that depends on nothing but the seed and the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest(), "big")


def _deal(
    by_stratum: Sequence[_Ints], sizes: _Ints, shares: dict[int, float], starts: dict[int, float]
) -> npt.NDArray[np.int8]:
    """Deals groups of identical images to the parts, stratum by stratum: systematic sampling with a random start.

    By the end of each stratum a part should hold its share of all faces so far, so an error made in one stratum,
    where a group didn't fit, is corrected in the next.

    Args:
        by_stratum: The groups of each stratum in random order.
        sizes: Faces in each group, ``(G,)``.
        shares: Share of the faces for every part but train.
        starts: Offset of the rounding in faces, 0..1, for the same parts.

    Returns:
        The part of each group, ``(G,)``.
    """
    parts = np.full(len(sizes), _TRAIN, np.int8)
    seen = 0
    dealt = dict.fromkeys(shares, 0)
    for groups in by_stratum:
        seen += int(sizes[groups].sum())
        due = {part: int(share * seen + starts[part]) - dealt[part] for part, share in shares.items()}
        for group, size in zip(groups.tolist(), sizes[groups].tolist(), strict=True):
            part = next((part for part in due if size <= due[part]), None)
            if part is not None:
                parts[group] = part
                due[part] -= size
                dealt[part] += size
    return parts


def _leave_none_empty(
    parts: npt.NDArray[np.int8], wanted: list[int], sizes: _Ints, draws: npt.NDArray[np.uint64]
) -> None:
    """Moves the smallest group of the largest part into each empty part; with too few groups, all go to train."""
    if len(parts) < len(wanted):
        parts[:] = _TRAIN
        return
    for part in wanted:
        if not (parts == part).any():
            largest = np.flatnonzero(parts == np.argmax(np.bincount(parts)))
            parts[largest[np.lexsort((draws[largest], sizes[largest]))[0]]] = part
