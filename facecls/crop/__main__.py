"""``python -m facecls.crop``: aligned faces cut out of photos, as a training set."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from facecls.data.limits import add_limits, set_limits_of
from facecls.errors import CommandParser, UserError, command, program, status_of
from facecls.files import remove_parts, replacing, resolved
from facecls.locks import locked
from facecls.terminal import say

# what is heavy is imported when it is needed, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from facecls.crop.cutter import Cutter, Job
    from facecls.crop.labels import Labels
    from facecls.finding.frame import Frame
    from facecls.predict.inputs import Input

_ABOUT = (
    "Cuts a face out of each photo, turned, scaled and moved to lie as UTKFace's faces do: the largest and most "
    "central one, or those in the boxes of a manifest. Writes the faces, a manifest with their labels, and a list of "
    "what was left out and why. Run again, it goes on."
)
FACES, MANIFEST, LEFT_OUT = "faces", "faces.csv", "left_out.csv"
"""What is written: a folder of images, their labels, and the photos without any."""
LOCK = "crop.lock"
"""There while the folder is written."""
_SIZES = range(64, 1025)
_AHEAD = 32
"""Photos whose faces may wait to be listed."""
_TAKEN, _MISSING, _SAME_NAME = "", "no such photo", "same name as another"
"""Counted beside the reasons why faces are left out: those that are not; rows of the manifest without a photo; photos
whose faces would have the name of another's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Raises:
        UserError: For a mistake in the options or the inputs, or if no face is taken.
        SystemExit: With status 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _create_parser().parse_args(arguments)
    set_limits_of(options)
    if options.size not in _SIZES:
        raise UserError(
            f"Expected --size from {_SIZES[0]} to {_SIZES[-1]} pixels, but got {options.size}; name another."
        )
    from facecls.crop.cutter import Cutter
    from facecls.finding.detector import Detector

    _check_photos(options.photos)
    frame = _frame_of(options.like)
    labels = _labels_of(options)
    _begin(options.out)
    cutter = Cutter(Detector(), frame, options.size, options.out / FACES)
    counts: Counter[str] = Counter()
    try:
        with locked(options.out / LOCK, str(options.out)):
            remove_parts(options.out)
            _cut_all(options, cutter, labels, counts)
    except KeyboardInterrupt as stop:
        say(f"facecls.crop: interrupted after {_faces(counts)}; run it again to go on")
        raise SystemExit(status_of(stop)) from None
    say(f"{_faces(counts)}{_reasons(counts)}")
    say(f"wrote {options.out / MANIFEST}")


def _create_parser() -> CommandParser:
    parser = CommandParser(prog=program("facecls.crop"), description=_ABOUT)
    parser.add_argument("photos", metavar="PHOTOS", help="a folder or an archive of photos")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or that of an earlier run")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="a table with a column path; all other columns are kept, and x, y, width and height say which face of a "
        "photo is meant (default: labels from UTKFace's file names)",
    )
    parser.add_argument("--like", type=Path, metavar="CKPT", help="a model whose faces are copied instead of UTKFace's")
    parser.add_argument("--size", type=int, default=200, help="side of the faces in pixels (default: %(default)s)")
    add_limits(parser)
    return parser


def _check_photos(photos: str) -> None:
    """Rejects what is no folder, archive, video, list or glob of photos."""
    from facecls.data.sources import is_manifest
    from facecls.predict.inputs import STDIN, check

    if photos == STDIN or (is_manifest(photos) and not photos.lower().endswith(".txt")):
        raise UserError(
            f"Expected a folder or an archive of photos, but got {photos}; name it, and a manifest with --manifest."
        )
    check([photos])


def _frame_of(model: Path | None) -> "Frame":
    """How faces shall lie."""
    from facecls.finding.frame import UTKFACE_FRAME

    if model is None:
        return UTKFACE_FRAME
    from facecls.model.engine import open_predictor

    frame = open_predictor(model, "cpu").frame
    if frame is None:
        raise UserError(
            f"Expected a model that knows how its faces lie, but none were found in those that {model} was trained on; "
            "leave --like out for UTKFace's."
        )
    return frame


def _labels_of(options: argparse.Namespace) -> "Labels":
    """What is known of the photos; says which columns of a manifest are kept and used."""
    from facecls.crop.labels import ManifestLabels, NameLabels

    if options.manifest is None:
        return NameLabels()
    photos = (_inside(given, options.photos) for given in _photos(options))
    labels = ManifestLabels(options.manifest, photos, Path(options.photos))
    boxes = "; faces in its boxes" if labels.has_boxes else ""
    say(f"{options.manifest.name}: {', '.join(labels.columns) or 'no labels'}{boxes}")
    return labels


def _photos(options: argparse.Namespace) -> "Iterator[Input]":
    from facecls.predict.inputs import stream

    return stream([options.photos], [resolved(options.out)])


def _inside(given: "Input", photos: str) -> str:
    """The path of a photo relative to the folder or archive."""
    from facecls.data.folders import expanded

    root = expanded(photos).as_posix()
    path = str(given.path)
    return PurePath(path).name if path == root else path.removeprefix(f"{root}/")


def _begin(out: Path) -> None:
    """Makes the folder, or rejects one with something else in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir() if path.name[0] != "."}
        others = sorted(names - {FACES, MANIFEST, LEFT_OUT, LOCK} if FACES in names else names)
        if others:
            raise UserError(f"Expected a new or empty folder, but {out} holds {others[0]}; name another.")
        (out / FACES).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"Expected a folder to write to at {out}, but {error.strerror}; name another.") from None


def _cut_all(options: argparse.Namespace, cutter: "Cutter", labels: "Labels", counts: Counter[str]) -> None:
    """Writes faces, manifest and what was left out."""
    from facecls.console import count_progress
    from facecls.data.parallel import in_order
    from facecls.data.sources import quiet
    from facecls.data.spreadsheets import csv_line
    from facecls.predict.inputs import count

    source = [] if "photo" in labels.columns else ["photo"]
    total = count([options.photos], [resolved(options.out)])
    with ExitStack() as stack:
        write, leave_out = (
            stack.enter_context(file.open("w", newline="", encoding="utf-8")).write
            for file in (stack.enter_context(replacing(options.out / name)) for name in (MANIFEST, LEFT_OUT))
        )
        write(csv_line(["path", *source, *labels.columns]))
        leave_out(csv_line(["path", "reason"]))
        advance = stack.enter_context(count_progress("photos", total, "photos"))
        stack.enter_context(quiet())
        jobs = _jobs(options, labels)
        for job in in_order(cutter.cut, jobs, ahead=_AHEAD, chunk=1, held=lambda job: job.given.held):
            advance(1)
            for face, file, reason in zip(job.faces, job.files, job.reasons, strict=True):
                counts[reason or _TAKEN] += 1
                if reason is not None:
                    leave_out(csv_line([job.given.path, reason]))
                    continue
                known = [face.labels.get(name, "") for name in labels.columns]
                write(csv_line([f"{FACES}/{file.as_posix()}", *([job.given.path] if source else []), *known]))
        for path in labels.left():
            counts[_MISSING] += 1
            leave_out(csv_line([path, _MISSING]))
        if not counts[_TAKEN]:
            raise UserError(f"Expected faces in {options.photos}, but took none{_reasons(counts)}.")


def _jobs(options: argparse.Namespace, labels: "Labels") -> "Iterator[Job]":
    """What is to be taken from each photo; no two faces have one name, whichever thread is the first."""
    from facecls.crop.cutter import Job
    from facecls.crop.labels import LabelledFace, NotMeantError
    from facecls.predict.pictures import file_name

    files = set[str]()

    def is_free(file: PurePath) -> bool:
        name = file.as_posix().casefold()  # some file systems do not tell a from A
        if name in files:
            return False
        files.add(name)
        return True

    for given in _photos(options):
        inside = _inside(given, options.photos)
        own = given._replace(path=inside)
        faces, reason = [LabelledFace({})], given.problem
        try:
            faces = faces if reason else labels.take(inside)
        except NotMeantError as error:
            reason = str(error)
        names = [file_name(own, number if len(faces) > 1 else None) for number in range(1, len(faces) + 1)]
        reasons = [reason or (None if is_free(name) else _SAME_NAME) for name in names]
        yield Job(given, faces, names, f"{inside} {_state(str(given.path))}", reasons)


def _state(photo: str) -> str:
    """Size and time of change of the file that a photo is or lies in."""
    place = Path(photo.partition("#t=")[0])
    for each in (place, *place.parents):
        if each.is_file():
            return f"{each.stat().st_size} {each.stat().st_mtime_ns}"
    return ""


def _faces(counts: Counter[str]) -> str:
    return f"{counts[_TAKEN]:,} face{'s' * (counts[_TAKEN] != 1)}"


def _reasons(counts: Counter[str]) -> str:
    """Such as ``; left out: 2 no face found, 1 not a photo``."""
    left_out = [f"{count:,} {reason}" for reason, count in counts.most_common() if reason != _TAKEN]
    return f"; left out: {', '.join(left_out)}" if left_out else ""


if __name__ == "__main__":
    with command("facecls.crop"):
        main()
