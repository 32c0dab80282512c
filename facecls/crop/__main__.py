"""``python -m facecls.crop``: aligned faces cut out of photos, as a training set."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from facecls.errors import CommandParser, UserError, command, program
from facecls.files import replacing, sha256
from facecls.locks import locked
from facecls.terminal import say

# what is heavy is imported when it is needed, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from facecls.crop.cutter import Cutter
    from facecls.crop.labels import Labels
    from facecls.finding.frame import Frame

_ABOUT = (
    "Cuts a face out of each photo, turned, scaled and moved to lie as UTKFace's faces do: the largest and most "
    "central one, or those in the boxes of a manifest. Writes the faces, a manifest with their labels, and a list of "
    "what was left out and why. Run again, it goes on."
)
FACES, MANIFEST, LEFT_OUT, OPTIONS = "faces", "faces.csv", "left_out.csv", "crop.json"
"""What is written: a folder of images, their labels, the photos without any, and how they were made."""
LOCK = "crop.lock"
"""There while the folder is written."""
_SIZES = range(64, 1025)
_AHEAD = 16
"""Photos that are read ahead; each may have a hundred million pixels."""
_INTERRUPTED = 130
_TAKEN, _MISSING = "", "no such photo"
"""Counted beside the reasons why faces are left out: those that are not; rows of the manifest without a photo."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Raises:
        UserError: For a mistake in the options or the inputs, or if no face is taken.
        SystemExit: With status 130 after Ctrl-C.
    """
    options = _create_parser().parse_args(arguments)
    if options.size not in _SIZES:
        raise UserError(
            f"Expected --size from {_SIZES[0]} to {_SIZES[-1]} pixels, but got {options.size}; name another."
        )
    from facecls.crop.cutter import Cutter
    from facecls.crop.labels import ManifestLabels, NameLabels
    from facecls.data.folders import expanded
    from facecls.finding.detector import Detector
    from facecls.predict.inputs import check

    check([options.photos])
    frame = _frame_of(options.like)
    labels: Labels = NameLabels() if options.manifest is None else ManifestLabels(options.manifest)
    _begin(options, frame)
    root = expanded(options.photos).as_posix()
    cutter = Cutter(Detector(), frame, options.size, options.out / FACES, labels, root)
    counts: Counter[str] = Counter()
    try:
        with locked(options.out / LOCK, str(options.out)):
            _cut_all(options, cutter, labels, counts)
    except KeyboardInterrupt:
        say(f"facecls.crop: interrupted after {counts[_TAKEN]:,} faces; run it again to go on")
        raise SystemExit(_INTERRUPTED) from None
    left_out = "".join(f"; {count:,} left out: {reason}" for reason, count in counts.most_common() if reason != _TAKEN)
    say(f"{counts[_TAKEN]:,} faces{left_out}")
    say(f"wrote {options.out / MANIFEST}")
    if not counts[_TAKEN]:
        raise UserError(f"Expected faces in {options.photos}, but took none; {options.out / LEFT_OUT} says why.")


def _create_parser() -> CommandParser:
    parser = CommandParser(prog=program("facecls.crop"), description=_ABOUT)
    parser.add_argument("photos", metavar="PHOTOS", help="a folder, an archive, a video or a .txt list of photos")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or that of an earlier run")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="labels of the photos, as fit reads them; all columns are kept, and x, y, width and height say which face "
        "of a photo is meant (default: labels from UTKFace's file names)",
    )
    parser.add_argument("--like", type=Path, metavar="CKPT", help="a model whose faces are copied instead of UTKFace's")
    parser.add_argument("--size", type=int, default=200, help="side of the faces in pixels (default: %(default)s)")
    return parser


def _frame_of(model: Path | None) -> "Frame":
    """How faces shall lie."""
    from facecls.finding.frame import UTKFACE_FRAME
    from facecls.model.engine import open_predictor

    if model is None:
        return UTKFACE_FRAME
    frame = open_predictor(model, "cpu").frame
    if frame is None:
        raise UserError(
            f"Expected a model that knows how its faces lie, but none were found in those that {model} was trained on; "
            "leave --like out for UTKFace's."
        )
    return frame


def _begin(options: argparse.Namespace, frame: "Frame") -> None:
    """Makes the folder, or rejects one with something else in it or with faces made in another way."""
    manifest = None if options.manifest is None else sha256(options.manifest)
    now = {"photos": options.photos, "manifest": manifest, "size": options.size, "frame": frame.options()}
    kept = options.out / OPTIONS
    try:
        if kept.is_file():
            before = json.loads(kept.read_text(encoding="utf-8"))
            if other := [name for name in now if before.get(name) != now[name]]:
                raise UserError(
                    f"Expected to go on in {options.out} as it was begun, but {' and '.join(other)} differ; name "
                    "another folder."
                )
            return
        options.out.mkdir(parents=True, exist_ok=True)
        if any(options.out.iterdir()):
            raise UserError(f"Expected a new or empty folder, but {options.out} holds something; name another.")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{OPTIONS} in it is damaged"
        raise UserError(f"Expected a folder to write to at {options.out}, but {reason}; name another.") from None
    with replacing(kept) as part:
        part.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _cut_all(options: argparse.Namespace, cutter: "Cutter", labels: "Labels", counts: Counter[str]) -> None:
    """Writes faces, manifest and what was left out."""
    from facecls.data.parallel import in_order
    from facecls.data.sources import quiet
    from facecls.data.spreadsheets import csv_line
    from facecls.predict.inputs import count, stream
    from facecls.training.progress import face_progress

    own = [options.out.resolve()]
    total, inputs = count([options.photos], own), stream([options.photos], own)
    seen = set[PurePath]()
    with ExitStack() as stack:
        write, leave_out = (
            stack.enter_context(file.open("w", newline="", encoding="utf-8")).write
            for file in (stack.enter_context(replacing(options.out / name)) for name in (MANIFEST, LEFT_OUT))
        )
        write(csv_line(["path", "photo", *labels.columns]))
        leave_out(csv_line(["path", "reason"]))
        advance = stack.enter_context(face_progress("photos", total))
        stack.enter_context(quiet())
        for cuts in in_order(cutter.cut, inputs, ahead=_AHEAD):
            advance(1)
            for photo, own_labels, file, reason in cuts:
                if reason is None and file in seen:
                    reason = "same name as another"
                counts[_TAKEN if reason is None else reason] += 1
                if reason is not None:
                    leave_out(csv_line([photo, reason]))
                    continue
                seen.add(file)
                cells = [f"{FACES}/{file.as_posix()}", photo, *(own_labels.get(name, "") for name in labels.columns)]
                write(csv_line(cells))
        for path in labels.missing():
            counts[_MISSING] += 1
            leave_out(csv_line([path, _MISSING]))


if __name__ == "__main__":
    with command("facecls.crop"):
        main()
