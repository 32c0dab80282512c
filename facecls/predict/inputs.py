"""Files, folders, globs, archives, manifests, lists and drawn faces, as named on the command line -> inputs.

Held in memory are the names in a folder and those above it, the matches of one glob, and some rows of a manifest.
"""

import glob
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from facecls.data.archives import Read, UnreadableError
from facecls.data.sources import Record, file_bytes, is_archive, is_clutter, is_drawn, is_manifest, open_source
from facecls.data.store import read_image
from facecls.data.tasks import Tasks, parse_name
from facecls.errors import UserError

STDIN = "-"
"""Stands for a list of paths on standard input, one a line."""


class Input(NamedTuple):
    """One face to predict.

    Attributes:
        path: Where it lies, relative to the working directory or absolute; a member of an archive after the archive's
            path and a slash. None for pixels that come from no file.
        load: Returns its pixels, RGB, uint8 ``(H, W, 3)``, in any thread, or raises ``UnreadableError``.
        labels: Texts by task, of a manifest or of drawn faces.
    """

    path: str | None
    load: Callable[[], npt.NDArray[np.uint8]]
    labels: Mapping[str, str] = {}


def stream(
    arguments: Sequence[str], left_out: Collection[Path] = (), tasks: Tasks = MappingProxyType({})
) -> Iterator[Input]:
    """Lists the inputs that arguments name.

    - A file is one input, and a path that does not exist is an unreadable input.
    - A folder is all files below it, sorted by path, except files that macOS leaves behind.
    - A glob is what it matches, sorted; ``**`` goes through folders, and only files count then. A path that exists is
      no glob.
    - An archive (``.tar``, ``.tar.gz``, ``.tgz``, ``.zip``) is its members, in their order, read in place.
    - A manifest (``.csv``, ``.parquet``) is the files in its column ``path``, absolute or relative to its folder.
    - ``synthetic:N`` is N drawn faces.
    - ``-`` is the paths on standard input, one a line, each one of the above but no glob.

    Whatever is damaged, such as the rest of an archive that is cut off, is one unreadable input.

    Args:
        arguments: As on the command line.
        left_out: Resolved paths that are passed over, such as what the command itself writes.
        tasks: The tasks whose labels are read from manifests; drawn faces wear glasses if ``glasses`` is one.

    Yields:
        The inputs, in the order of the arguments.
    """
    names = {path.name for path in left_out}  # few files have one of these, and to resolve all is slow

    def is_left_out(file: Path) -> bool:
        return file.name in names and file.resolve() in left_out

    for place in _places(arguments):
        if isinstance(place, Input):
            yield place
        elif _is(Path.is_dir, place):
            yield from _in_folder(place, is_left_out)
        elif not is_left_out(place):
            yield from _in_file(place, tasks)


def check(arguments: Sequence[str]) -> None:
    """Rejects arguments that make no sense.

    Args:
        arguments: As on the command line.

    Raises:
        UserError: If there is nothing at any of them, an archive or manifest can't be opened, or N of ``synthetic:N``
            is no number.
    """
    anything = STDIN in arguments
    for place in _places([argument for argument in arguments if argument != STDIN]):
        if isinstance(place, Path) and (is_drawn(place) or _is(Path.exists, place)):
            anything = True
            if _is_source(place):
                next(open_source(place), None)
    if not anything:
        raise UserError(f"Expected images to predict, but there is nothing at {', '.join(arguments)}; is it misspelt?")


def count(
    arguments: Sequence[str], left_out: Collection[Path] = (), is_wanted: Callable[[Input], bool] = lambda _: True
) -> int | None:
    """How many inputs ``stream`` yields.

    Args:
        arguments: As on the command line.
        left_out: As for ``stream``.
        is_wanted: Which of them count.

    Returns:
        Their number, or None if that takes reading or drawing all of them, as with archives and standard input.
    """
    if STDIN in arguments:
        return None
    for place in _places(arguments):
        if isinstance(place, Path) and _is_source(place) and not is_manifest(place):
            return None
    return sum(map(is_wanted, stream(arguments, left_out)))


def _places(arguments: Sequence[str]) -> Iterator[Path | Input]:
    """The paths that arguments name; an unreadable input for a glob that matches nothing."""
    for argument in arguments:
        if argument == STDIN:
            for line in sys.stdin.buffer:
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    yield Path(name)
        elif glob.has_magic(argument) and not _is(Path.exists, Path(argument)):
            yield from _matches(argument)
        else:
            yield Path(argument).expanduser()


def _matches(pattern: str) -> Iterator[Path | Input]:
    # glob rather than Path.glob, since hidden files stay out as in a shell
    matches = sorted(glob.iglob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
    if "**" in pattern:
        matches = [match for match in matches if not Path(match).is_dir()]
    if not matches:
        yield _failed(pattern, "no file matches")
    yield from map(Path, matches)


def _is(question: Callable[[Path], bool], place: Path) -> bool:
    try:
        return question(place)
    except OSError:  # such as a name that is too long; reading it fails with the reason
        return False


def _is_source(file: Path) -> bool:
    return is_drawn(file) or ((is_archive(file) or is_manifest(file)) and _is(Path.is_file, file))


def _in_folder(folder: Path, is_left_out: Callable[[Path], bool]) -> Iterator[Input]:
    for record in open_source(folder, skip_unreadable=True):
        file = folder / record.path
        if not is_clutter(record.path) and not is_left_out(file):
            yield _input(file.as_posix(), record)


def _in_file(file: Path, tasks: Tasks) -> Iterator[Input]:
    if not _is_source(file):
        yield on_disk(file)
        return
    try:
        if is_drawn(file):
            yield from _in_drawing(file, tasks)
        else:
            yield from _in_archive(file) if is_archive(file) else _in_manifest(file, tasks)
    except UserError as error:
        yield _failed(file.as_posix(), str(error))


def _in_drawing(source: Path, tasks: Tasks) -> Iterator[Input]:
    for record in open_source(source, tasks):
        yield _input(f"{source}/{record.path}", record._replace(labels={**parse_name(record.path), **record.labels}))


def _in_archive(archive: Path) -> Iterator[Input]:
    for record in open_source(archive):
        if is_clutter(record.path):
            continue
        path = f"{archive.as_posix()}/{record.path}"
        try:  # now, since the next member may be asked for before a thread decodes this one
            data = record.read()
        except UnreadableError as error:
            yield _failed(path, str(error))
        else:
            yield _input(path, record._replace(read=partial(bytes, data)))


def _in_manifest(manifest: Path, tasks: Tasks) -> Iterator[Input]:
    for record in open_source(manifest, tasks):
        path = manifest.parent / record.path if record.path else manifest
        yield _input(path.as_posix(), record)


def on_disk(file: Path) -> Input:
    """The input that an image file is.

    Args:
        file: Its path; there need not be such a file.
    """
    return _input(file.as_posix(), Record("", partial(file_bytes, file)))


def _failed(path: str, reason: str) -> Input:
    return _input(path, Record("", partial(_raise, reason)))


def _raise(reason: str) -> NoReturn:
    raise UnreadableError(reason)


def _input(path: str, record: Record) -> Input:
    text = path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
    return Input(text, partial(_decoded, record.read), record.labels)


def _decoded(read: Read) -> npt.NDArray[np.uint8]:
    try:
        return read_image(read())
    except ValueError as error:
        raise UnreadableError(str(error)) from None
