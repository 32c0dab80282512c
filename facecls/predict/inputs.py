"""Files, folders, globs, archives, manifests and lists that are named on the command line -> a stream of faces.

Nothing is held but the names in a folder and those above it, those that one glob finds, and some rows of a manifest.
"""

import glob
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from facecls.data.columns import label_values, stream_columns
from facecls.data.sources import Read, UnreadableError, file_bytes, is_clutter, tar_members, walk, zip_members
from facecls.data.store import read_image
from facecls.data.tasks import HIGHEST, MISSING, TASKS, Labels
from facecls.errors import UserError

STDIN = "-"
"""Stands for a list of paths on standard input, one a line."""


class Input(NamedTuple):
    """One face to predict.

    Attributes:
        path: Where it lies, as one would open it from here; a member of an archive after the archive's path and a
            slash. None for pixels that come from no file.
        load: Gives its pixels, RGB, uint8 ``(H, W, 3)``, in any thread, or raises ``UnreadableError``.
        labels: What a manifest says about it, ``MISSING`` where it says nothing; None without a manifest.
    """

    path: str | None
    load: Callable[[], npt.NDArray[np.uint8]]
    labels: Labels | None = None


def stream(words: Sequence[str], left_out: Collection[Path] = ()) -> Iterator[Input]:
    """Finds what words name.

    - A file is one input, and a path that leads nowhere is one that can't be read.
    - A folder is all files below it, sorted by path, but for what macOS leaves behind.
    - A glob is what it matches, sorted; ``**`` goes through folders, and only files count then. A path that exists is
      no glob.
    - A ``.tar``, ``.tar.gz``, ``.tgz`` or ``.zip`` is its members, in their order, read in place.
    - A ``.csv`` or ``.parquet`` is a manifest: the files in its column ``path``, absolute or relative to its folder.
    - ``-`` is the paths on standard input, one a line, each one of the above but no glob.

    What is wrong along the way, such as the rest of an archive that is cut, makes one input that can't be read.

    Args:
        words: As on the command line.
        left_out: Resolved paths that are passed over, such as what the command itself writes.

    Yields:
        The inputs, in the order of the words.
    """
    names = {path.name for path in left_out}  # few files have one of these, and to resolve them all is slow
    for place in _places(words):
        if isinstance(place, Input):
            yield place
        elif _is(Path.is_dir, place):
            yield from _in_folder(place, lambda file: file.name in names and file.resolve() in left_out)
        elif not (place.name in names and place.resolve() in left_out):
            yield from _in_file(place)


def check(words: Sequence[str]) -> None:
    """Refuses words that can't be meant.

    Args:
        words: As on the command line.

    Raises:
        UserError: If there is nothing at any of them, or an archive or manifest can't be opened.
    """
    anything = STDIN in words
    for place in _places([word for word in words if word != STDIN]):
        if isinstance(place, Input) or not _is(Path.exists, place):
            continue
        anything = True
        if (reader := _reader(place)) is not None:
            next(reader(place), None)
    if not anything:
        raise UserError(f"Expected images to predict, but there is nothing at {', '.join(words)}; is it misspelt?")


def count(
    words: Sequence[str], left_out: Collection[Path] = (), is_wanted: Callable[[Input], bool] = lambda _: True
) -> int | None:
    """How many inputs ``stream`` will find.

    Args:
        words: As on the command line.
        left_out: As for ``stream``.
        is_wanted: Says which of them count.

    Returns:
        Their number, or None if that takes reading all of them, as with archives and standard input.
    """
    if STDIN in words:
        return None
    for place in _places(words):
        if isinstance(place, Path) and _reader(place) not in (None, _in_manifest):
            return None
    return sum(map(is_wanted, stream(words, left_out)))


def _places(words: Sequence[str]) -> Iterator[Path | Input]:
    """The paths that are meant; an input that can't be read for a glob that matches nothing."""
    for word in words:
        if word == STDIN:
            for line in sys.stdin.buffer:
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    yield Path(name)
        elif glob.has_magic(word) and not _is(Path.exists, Path(word)):
            yield from _matches(word)
        else:
            yield Path(word).expanduser()


def _matches(pattern: str) -> Iterator[Path | Input]:
    # glob rather than Path.glob, since hidden files stay out as in a shell
    found = sorted(glob.iglob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
    if "**" in pattern:
        found = [match for match in found if not Path(match).is_dir()]
    if not found:
        yield _failed(pattern, "no file matches")
    yield from map(Path, found)


def _is(question: Callable[[Path], bool], place: Path) -> bool:
    try:
        return question(place)
    except OSError:  # such as a name that is too long; reading it will say so
        return False


def _in_folder(folder: Path, is_left_out: Callable[[Path], bool]) -> Iterator[Input]:
    for name, error in walk(folder):
        file = folder / name
        if error is not None:
            yield _failed(file.as_posix(), f"unreadable ({error.strerror})")
        elif not is_clutter(name) and not is_left_out(file):
            yield on_disk(file)


def _in_file(file: Path) -> Iterator[Input]:
    reader = _reader(file)
    if reader is None or not _is(Path.is_file, file):
        yield on_disk(file)
        return
    try:
        yield from reader(file)
    except UserError as error:
        yield _failed(file.as_posix(), str(error))


def _in_archive(members: Callable[[Path], Iterator[tuple[str, Read]]], archive: Path) -> Iterator[Input]:
    for name, read in members(archive):
        if is_clutter(name):
            continue
        path = f"{archive.as_posix()}/{name}"
        try:
            data = read()
        except UnreadableError as error:
            yield _failed(path, str(error))
        else:
            yield Input(_text(path), partial(_decoded, partial(bytes, data)))


def _in_manifest(manifest: Path) -> Iterator[Input]:
    for rows in stream_columns(manifest, ["path"], TASKS):
        labels = np.full((len(rows), len(Labels._fields)), MISSING, np.int64)
        for task in TASKS:
            if task in rows:
                labels[:, Labels._fields.index(task)], _ = label_values(rows[task], HIGHEST[task])
        for path, values in zip(rows["path"].tolist(), labels.tolist(), strict=True):
            if path:
                yield on_disk(manifest.parent / path)._replace(labels=Labels(*values))
            else:
                yield _failed("", f"no path in a row of {manifest.as_posix()}")


_READERS: dict[tuple[str, ...], Callable[[Path], Iterator[Input]]] = {
    (".tar", ".tar.gz", ".tgz"): partial(_in_archive, tar_members),
    (".zip",): partial(_in_archive, zip_members),
    (".csv", ".parquet"): _in_manifest,
}


def _reader(file: Path) -> Callable[[Path], Iterator[Input]] | None:
    """What reads the files that are listed or packed in this one, if its name says that it is such a file."""
    if _is(Path.is_dir, file):
        return None
    return next((reader for endings, reader in _READERS.items() if file.name.lower().endswith(endings)), None)


def on_disk(file: Path) -> Input:
    """The input that an image file is.

    Args:
        file: Its path; there need not be such a file.

    Returns:
        The input.
    """
    return Input(_text(file.as_posix()), partial(_decoded, partial(file_bytes, file)))


def _failed(path: str, reason: str) -> Input:
    return Input(_text(path), partial(_raise, reason))


def _raise(reason: str) -> NoReturn:
    raise UnreadableError(reason)


def _decoded(read: Read) -> npt.NDArray[np.uint8]:
    try:
        return read_image(read())
    except ValueError as error:
        raise UnreadableError(str(error)) from None


def _text(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
