"""Files, folders, globs, archives, manifests, lists and drawn faces, as named on the command line -> inputs.

Held in memory are the names in a folder and those above it, the matches of one glob, and some rows of a manifest.
"""

import codecs
import glob
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
import numpy.typing as npt

from facecls.data.archives import Read, UnreadableError
from facecls.data.file_names import parse_name
from facecls.data.folders import file_bytes
from facecls.data.manifests import stream_rows
from facecls.data.sources import Record, is_archive, is_clutter, is_drawn, is_manifest, open_source
from facecls.data.store import read_image
from facecls.data.tasks import Tasks
from facecls.errors import UserError

STDIN = "-"
"""Stands for a list of paths on standard input, one a line."""
NO_PHOTO = "not a photo"
"""Why a file among photos can't be read whose name does not say that it is one."""
NO_FACE = "no face found"
"""Why a photo has no prediction in which the detector finds nothing."""
NO_FAILURES = frozenset({NO_FACE, NO_PHOTO})
"""Reasons for which an input has no prediction although nothing went wrong."""
_LIST = ".txt"
_VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_PHOTOS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of images, in lower case."""
_LOOKED_AT = 20
"""Lines of a text file that tell whether it is a list."""
EVERY = 1.0
"""Seconds between the frames of a video that are looked at."""
_FRAME_QUALITY = 95


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
    arguments: Sequence[str],
    left_out: Collection[Path] = (),
    tasks: Tasks = MappingProxyType({}),
    every: float = EVERY,
) -> Iterator[Input]:
    """Lists the inputs that arguments name.

    - A file is one input, and a path that does not exist is an unreadable input.
    - A folder is all files below it, sorted by path, except files that macOS and Windows leave behind; an archive in
      it is its members.
    - A glob is what it matches, sorted; ``**`` goes through folders, and only files count then. A path that exists is
      no glob.
    - An archive (``.tar``, ``.tar.gz``, ``.tgz``, ``.zip``) is its members, in their order, read in place.
    - A manifest (``.csv``, ``.tsv``, ``.parquet``, or a ``.txt`` with a header) is the files in its column ``path``.
    - A video (by its ending, also in a folder) is a frame every so many seconds, named ``clip.mp4#t=12.5``.
    - ``synthetic:N`` is N drawn faces.
    - ``-`` is the paths on standard input, one a line, each one of the above but no glob; so is a ``.txt`` whose lines
      are paths, relative to the working directory or else to its folder. Quotes around a path are no part of it.

    Whatever is damaged, such as the rest of an archive that is cut off, is one unreadable input.

    Args:
        arguments: As on the command line.
        left_out: Resolved paths that are passed over, such as what the command itself writes.
        tasks: The tasks whose labels are read from manifests; drawn faces wear glasses if ``glasses`` is one.
        every: Seconds between the frames of a video.

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
            yield from _in_folder(place, is_left_out, every)
        elif not is_left_out(place):
            yield from _in_file(place, tasks, every)


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
        if isinstance(place, Path) and (_is_video(place) or (_is_source(place) and not is_manifest(place))):
            return None
    return sum(map(is_wanted, stream(arguments, left_out)))


def _places(arguments: Sequence[str]) -> Iterator[Path | Input]:
    """The paths that arguments name; an unreadable input for a glob that matches nothing."""
    for argument in arguments:
        if argument == STDIN:
            yield from _listed(sys.stdin.buffer)
        elif glob.has_magic(argument) and not _is(Path.exists, Path(argument)):
            yield from _matches(argument)
        elif (place := Path(argument).expanduser()).suffix.lower() == _LIST and _is(_is_list, place):
            with place.open("rb") as lines:
                yield from _listed(lines, place.parent)
        else:
            yield place


def _listed(lines: Iterable[bytes], folder: Path = Path()) -> Iterator[Path]:
    """The paths in a list, however they are written; a relative one that leads nowhere is taken to be in the folder."""
    for line in lines:
        text = os.fsdecode(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"))
        bare = text.strip()
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
            bare = bare[1:-1]
        if bare:
            plain = bare.replace("\\", "/")
            places = [Path(text), Path(bare), folder / bare, Path(plain), folder / plain]
            yield next((place for place in places if _is(Path.exists, place)), Path(bare))


def _is_list(file: Path) -> bool:
    """Whether a text file lists paths: its first lines are some, and it is no manifest."""
    if not file.is_file() or _is_table(file):
        return False
    with file.open("rb") as lines:
        return any(_is(Path.exists, place) for place in _listed(islice(lines, _LOOKED_AT), file.parent))


def _is_table(file: Path) -> bool:
    """Whether a file is a manifest, by its name or, for a text file, by its header."""
    if not is_manifest(file) or file.suffix.lower() != _LIST:
        return is_manifest(file)
    try:
        next(stream_rows(file, {}))
    except UserError:
        return False
    return True


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
    return is_drawn(file) or (_is(Path.is_file, file) and (is_archive(file) or _is_table(file)))


def _in_folder(folder: Path, is_left_out: Callable[[Path], bool], every: float) -> Iterator[Input]:
    for record in open_source(folder, skip_unreadable=True):
        file = folder / record.path
        if _is_video(file) and not is_clutter(record.path):
            yield from _in_video(file, every)
        elif not is_clutter(record.path) and not is_left_out(file):
            yield _input(file.as_posix(), record, is_photo=_is_photo(record.path))


def _in_file(file: Path, tasks: Tasks, every: float) -> Iterator[Input]:
    if _is_video(file):
        yield from _in_video(file, every)
        return
    if not _is_source(file):
        yield _input(file.as_posix(), Record("", partial(file_bytes, file)))
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
            yield _input(path, record._replace(read=partial(bytes, data)), is_photo=_is_photo(path))


def _in_manifest(manifest: Path, tasks: Tasks) -> Iterator[Input]:
    for record in open_source(manifest, tasks):
        path = manifest.parent / record.path if record.path else manifest
        yield _input(path.as_posix(), record)


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in _VIDEOS and _is(Path.is_file, file)


def _in_video(file: Path, every: float) -> Iterator[Input]:
    """The first frame of a video, and the first one after each so many seconds."""
    video = cv2.VideoCapture(str(file))
    try:
        wanted = 0.0
        while video.grab():
            seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if seconds < wanted:
                continue
            wanted = (seconds // every + 1) * every
            frame = video.retrieve()[1]
            # as a JPEG, since many may wait for the model
            data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, _FRAME_QUALITY])[1].tobytes()
            yield _input(f"{file.as_posix()}#t={round(seconds, 2):g}", Record("", partial(bytes, data)))
        if not wanted:
            yield _failed(file.as_posix(), "not a video that OpenCV reads")
    finally:
        video.release()


def _failed(path: str, reason: str) -> Input:
    return _input(path, Record("", partial(_raise, reason)))


def _raise(reason: str) -> NoReturn:
    raise UnreadableError(reason)


def _is_photo(path: str) -> bool:
    """Whether a file among others should be an image, by its name; one without an ending may be one."""
    return Path(path).suffix.lower() in ("", *_PHOTOS)


def _input(path: str, record: Record, is_photo: bool = True) -> Input:
    text = path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
    return Input(text, partial(_decoded, record.read, is_photo), record.labels)


def _decoded(read: Read, is_photo: bool) -> npt.NDArray[np.uint8]:
    try:
        return read_image(read())
    except ValueError as error:
        raise UnreadableError(str(error) if is_photo else NO_PHOTO) from None
