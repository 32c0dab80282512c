"""Photos, folders, globs, archives, videos, manifests, lists and drawn faces, as named on the command line -> inputs.

Held in memory are the names in a folder and those above it, the matches of one glob, and some rows of a manifest.
"""

import glob
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
import numpy.typing as npt

from facecls.data.archives import Read, UnreadableError
from facecls.data.columns import writing_of
from facecls.data.file_names import parse_name
from facecls.data.folders import IMAGE_ENDINGS, expanded, file_bytes, files_below
from facecls.data.limits import LIMITS, too_large
from facecls.data.manifests import stream_rows
from facecls.data.sources import Record, is_archive, is_clutter, is_drawn, is_manifest, open_source
from facecls.data.store import read_image
from facecls.data.tasks import Tasks
from facecls.errors import UserError
from facecls.files import resolved

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
EVERY = 1.0
"""Seconds between the frames of a video that are looked at."""
_PLAYER = cv2.CAP_FFMPEG if cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG) else cv2.CAP_ANY
"""What plays videos: others would go on from ``1.mp4``, if that is an image, to ``2.mp4``."""
_PLAYER_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_NO_PLAYLISTS = "protocol_whitelist;file|format_whitelist;mov,avi,matroska,mpeg,mpegts,mpegvideo,m4v,asf,flv,ogg"
"""Values of that variable, by which FFmpeg plays no file that names others."""
_FRAME_QUALITY, _TICK, _LEAST_FRAMES = 95, 1e-6, 0.9
"""Of a frame as a JPEG; what seconds are rounded by; the share of the announced frames that a whole video has."""


class Input(NamedTuple):
    """One face to predict.

    Attributes:
        path: Where it lies, relative to the working directory or absolute; a member of an archive after the archive's
            path and a slash. None for pixels that come from no file.
        load: Returns its pixels, RGB, uint8 ``(H, W, 3)``, in any thread, or raises ``UnreadableError``.
        labels: Texts by task, of a manifest or of drawn faces.
        problem: Why there is nothing to load, if that is known.
        held: Bytes of memory that it takes already.
    """

    path: str | None
    load: Callable[[], npt.NDArray[np.uint8]]
    labels: Mapping[str, str] = {}
    problem: str | None = None
    held: int = 0


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
        left_out: Resolved paths of files and folders that are passed over, such as what the command itself writes.
        tasks: The tasks whose labels are read from manifests; drawn faces wear glasses if ``glasses`` is one.
        every: Seconds between the frames of a video.

    Yields:
        The inputs, in the order of the arguments.
    """
    names = {path.name for path in left_out}  # few files have one of these, and to resolve all is slow
    folders = [path for path in left_out if path.is_dir()]

    def is_left_out(file: Path) -> bool:
        if folders and any(resolved(file).is_relative_to(folder) for folder in folders):
            return True
        return file.name in names and resolved(file) in left_out

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
        raise UserError(f"Expected photos, but there is nothing at {', '.join(arguments)}; is it misspelt?")


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
        if isinstance(place, Path) and _is(Path.is_dir, place) and _holds_more(place):
            return None
    return sum(map(is_wanted, stream(arguments, left_out)))


def _holds_more(folder: Path) -> bool:
    """Whether there are files below a folder that are several inputs each."""
    return any(is_archive(path) or _is_video(folder / path) for path, _ in files_below(folder))


def _places(arguments: Sequence[str]) -> Iterator[Path | Input]:
    """The paths that arguments name; an unreadable input for a glob that matches nothing."""
    for argument in arguments:
        if argument == STDIN:
            yield from _listed(os.fsdecode(line) for line in sys.stdin.buffer)
        elif glob.has_magic(argument) and not _is(Path.exists, Path(argument)):
            yield from _matches(argument)
        elif (place := expanded(argument)).suffix.lower() == _LIST and _is(_is_list, place):
            yield from _listed(_lines(place), place.parent)
        else:
            yield place


def _lines(file: Path) -> list[str]:
    """The lines of a text file; none if it is no text."""
    try:
        if file.stat().st_size > LIMITS.file_bytes:
            return []
        return file.read_text(writing_of(file).encoding, errors="surrogateescape").splitlines()
    except ValueError:
        return []


def _listed(lines: Iterable[str], folder: Path = Path()) -> Iterator[Path]:
    """The paths in a list, however they are written, without comments; one that leads nowhere may be in the folder."""
    for line in lines:
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        bare = text.strip()
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
            bare = bare[1:-1]
        if bare and (not bare.startswith("#") or _is(Path.exists, Path(bare))):  # else it is a comment
            plain = bare.replace("\\", "/")
            places = [Path(text), Path(bare), folder / bare, Path(plain), folder / plain]
            yield next((place for place in places if os.path.lexists(place)), Path(bare))


def _is_list(file: Path) -> bool:
    """Whether a text file lists paths: some of its lines are, or are named as photos are; and it is no manifest."""
    if not file.is_file() or _is_table(file):
        return False
    places = _listed(_lines(file), file.parent)
    return any(place.suffix.lower() in IMAGE_ENDINGS or _is(Path.exists, place) for place in places)


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
    matches = sorted(glob.iglob(str(expanded(pattern)), recursive=True))  # noqa: PTH207
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
    for path, problem in files_below(folder):
        file = folder / path
        if problem is not None:
            yield _failed(file.as_posix(), f"unreadable ({problem.strerror})")
        elif is_clutter(path) or is_left_out(file):
            continue
        elif is_archive(path):
            yield from _in_archive(file)
        elif _is_video(file):
            yield from _in_video(file, every)
        else:
            yield _input(file.as_posix(), Record("", partial(file_bytes, file)), is_photo=may_be_photo(path))


def _in_file(file: Path, tasks: Tasks, every: float) -> Iterator[Input]:
    if _is_video(file):
        yield from _in_video(file, every)
        return
    if not _is_source(file):
        yield _input(file.as_posix(), Record("", partial(file_bytes, file)))
        return
    if is_archive(file):
        yield from _in_archive(file)
        return
    try:
        yield from _in_drawing(file, tasks) if is_drawn(file) else _in_manifest(file, tasks)
    except UserError as error:
        yield _failed(file.as_posix(), str(error))


def _in_drawing(source: Path, tasks: Tasks) -> Iterator[Input]:
    for record in open_source(source, tasks):
        yield _input(f"{source}/{record.path}", record._replace(labels={**parse_name(record.path), **record.labels}))


def _in_archive(archive: Path) -> Iterator[Input]:
    """Its members; the rest of one that is damaged is an unreadable input."""
    try:
        for record in open_source(archive):
            if is_clutter(record.path):
                continue
            path = f"{archive.as_posix()}/{record.path}"
            try:  # now, since the next member may be asked for before a thread decodes this one
                data = record.read()
            except UnreadableError as error:
                yield _failed(path, str(error))
            else:
                held = record._replace(read=partial(bytes, data))
                yield _input(path, held, is_photo=may_be_photo(path))._replace(held=len(data))
    except UserError as error:
        yield _failed(archive.as_posix(), str(error))


def _in_manifest(manifest: Path, tasks: Tasks) -> Iterator[Input]:
    for record in open_source(manifest, tasks):
        path = manifest.parent / record.path if record.path else manifest
        yield _input(path.as_posix(), record)


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in _VIDEOS and _is(Path.is_file, file)


def _in_video(file: Path, every: float) -> Iterator[Input]:
    """The first frame of a video, and the first one after each so many seconds."""
    with _environment(_PLAYER_OPTIONS, _NO_PLAYLISTS):  # FFmpeg reads it now
        video = cv2.VideoCapture(str(file), _PLAYER)
    pixels = int(video.get(cv2.CAP_PROP_FRAME_WIDTH)) * int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
    if pixels > LIMITS.image_pixels:
        video.release()
        yield _failed(file.as_posix(), too_large(pixels, "image_pixels", "pixels"))
        return
    announced = video.get(cv2.CAP_PROP_FRAME_COUNT)
    count, wanted, now, offset = 0, 0.0, 0.0, 0.0
    try:
        while video.grab():
            count += 1
            seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000 + offset
            if seconds < now - every:  # of a file that was joined from several, the clock starts again
                offset, seconds = offset + now - seconds, now
            now = seconds
            if seconds < wanted - _TICK:
                continue
            wanted = (math.floor(seconds / every + _TICK) + 1) * every
            frame = video.retrieve()[1]
            if frame is None:
                break
            # as a JPEG, since many may wait for the model
            data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, _FRAME_QUALITY])[1].tobytes()
            time = f"{seconds:.3f}".rstrip("0").rstrip(".")
            yield _input(f"{file.as_posix()}#t={time}", Record("", partial(bytes, data)))._replace(held=len(data))
    finally:
        video.release()
    if not count:
        yield _failed(file.as_posix(), "not a video that OpenCV reads")
    elif count < _LEAST_FRAMES * announced:
        yield _failed(file.as_posix(), f"cut off after {now:.1f} seconds")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _failed(path: str, reason: str) -> Input:
    return _input(path, Record("", partial(_raise, reason)))._replace(problem=reason)


def _raise(reason: str) -> NoReturn:
    raise UnreadableError(reason)


def may_be_photo(path: str) -> bool:
    """Whether a file among others should be an image, by its name; one without an ending may be one."""
    return Path(path).suffix.lower() in ("", *IMAGE_ENDINGS)


def _input(path: str, record: Record, is_photo: bool = True) -> Input:
    text = path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
    return Input(text, partial(_decoded, record.read, is_photo), record.labels)


def _decoded(read: Read, is_photo: bool) -> npt.NDArray[np.uint8]:
    try:
        return read_image(read())
    except ValueError as error:
        raise UnreadableError(str(error) if is_photo else NO_PHOTO) from None
