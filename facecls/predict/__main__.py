"""``python -m facecls.predict``: attributes of the faces in any number of photos, one row for each face."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from facecls.data.limits import add_limits, set_limits_of
from facecls.errors import CommandParser, UserError, command, memory_for, program, status_of
from facecls.files import remove_parts, resolved, sha256
from facecls.locks import locked
from facecls.ranks import Rank, launched
from facecls.terminal import say

# what is heavy is imported when it is needed, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from facecls.model.predictor import Predictor
    from facecls.predict.faces import Batch
    from facecls.predict.finder import Finder
    from facecls.predict.grid import Grid
    from facecls.predict.inputs import Input
    from facecls.predict.outputs import Journal
    from facecls.predict.pictures import Pictures
    from facecls.predict.screen import Screen

_ABOUT = (
    "Predicts gender, race, age and whatever else a model was trained for: finds the faces in photos, brings each into "
    "the frame of the faces that the model was trained on, and prints a row for it."
)
_INPUTS = (
    "photos, folders (with all below them), globs, .tar, .tar.gz and .zip archives, videos, .csv, .tsv and .parquet "
    "manifests with a column path, .txt lists of paths, synthetic:N for N drawn faces, or - for a list on standard "
    "input"
)
_NO_FRAME = "the detector found no faces in this model's training images: photos are taken whole"
_FRAME_ASSUMED = "this model does not say how its faces lie in their images: as UTKFace's, it is assumed"


class _Outputs(NamedTuple):
    """The files that a run writes.

    Attributes:
        out: Predictions of this process; ``None`` for standard output.
        grid: The picture of this process; ``None`` for none.
        written: Resolved paths of all files of all processes, which are no inputs.
    """

    out: Path | None
    grid: Path | None
    written: set[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Returns:
        The exit status: 1 if an input could not be read, else 0.

    Raises:
        UserError: For a mistake in the options, the model or the inputs.
        SystemExit: With status 130 after Ctrl-C, 143 after SIGTERM.
    """
    options, rank = create_parser().parse_intermixed_args(arguments), launched()
    set_limits_of(options)
    _check_options(options, rank)
    outputs = _own_outputs(options, rank)
    with _held(options, outputs):
        return _predict(options, rank, outputs)


def _predict(options: argparse.Namespace, rank: Rank, outputs: _Outputs) -> int:
    """Runs the command and returns its status."""
    from facecls.predict.inputs import check, stream
    from facecls.predict.pictures import check_folder, check_replaceable

    check(options.inputs)
    for option, folder in (("--annotate", options.annotate), ("--crops", options.crops)):
        if folder is not None:
            check_folder(option, folder, options.resume, options.inputs)
    from facecls.model.engine import open_predictor
    from facecls.predict.faces import columns

    predictor = open_predictor(options.model, options.device, options.tta, rank.local, options.engine)
    finder = _open_finder(options, predictor)
    inputs = stream(options.inputs, outputs.written, predictor.tasks, options.every)
    if (first := next(inputs, None)) is None:
        raise UserError(f"Expected images to predict, but there is no file in {', '.join(options.inputs)}.")
    own = (each for each in chain([first], inputs) if rank.takes(str(each.path)))
    if options.resume and _is_complete(outputs.out, columns(predictor, finder), own):
        say(f"facecls.predict: {outputs.out} is complete; for further inputs name another file")
        return 0
    if outputs.grid is not None:
        check_replaceable(outputs.grid)
    try:
        return _run(options, rank, predictor, finder, own, outputs)
    except BrokenPipeError:  # whoever reads standard output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def create_parser() -> CommandParser:
    """The command's options."""
    parser = CommandParser(prog=program("facecls.predict"), description=_ABOUT)
    parser.add_argument("model", type=Path, metavar="CKPT", help="a checkpoint such as best.ckpt, or an exported .onnx")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help=_INPUTS)
    parser.add_argument(
        "--out", type=Path, help=".csv, .parquet or .jsonl; makes a run resumable (default: standard output)"
    )
    parser.add_argument("--grid", type=Path, help="picture of the first 64 faces with their predictions, .png")
    parser.add_argument("--batch_size", type=int, default=64, help="faces at a time (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--engine",
        choices=["auto", "torch", "onnx"],
        default="auto",
        help="what runs a checkpoint on a CPU: torch, ONNX Runtime, or the faster one, which is found out after half a "
        "minute of work (default: auto)",
    )
    parser.add_argument(
        "--tta",
        choices=["none", "flip", "zoom"],
        default="none",
        help="flip averages over a face and its mirror image, zoom over both from further away as well (default: none)",
    )
    parser.add_argument(
        "--faces",
        choices=["all", "largest", "whole"],
        default="all",
        help="all that are found, the largest of each photo, or whole photos, each as one face (default: all)",
    )
    parser.add_argument("--detector", type=Path, metavar="FILE", help="another YuNet as .onnx")
    parser.add_argument(
        "--threshold", type=float, default=0.6, help="least score of a face, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--smallest_face", type=int, metavar="PIXELS", help="width of the smallest face to look for (default: 48)"
    )
    parser.add_argument("--annotate", type=Path, metavar="DIR", help="folder for the photos with boxes and texts")
    parser.add_argument("--crops", type=Path, metavar="DIR", help="folder for the faces as the model saw them")
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between frames of a video (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run with the same --out")
    add_limits(parser)
    return parser


def _check_options(options: argparse.Namespace, rank: Rank) -> None:
    """Rejects options that make no sense."""
    if not options.every > 0:
        raise UserError(f"Expected --every to be more than 0 seconds, but got {options.every:g}; name another number.")
    if options.batch_size < 1:
        raise UserError(f"Expected --batch_size to be at least 1, but got {options.batch_size}; name another number.")
    if not options.model.is_file():
        raise UserError(
            f"Expected a model at {options.model}, but there is none; runs keep theirs in checkpoints/best.ckpt."
        )
    if options.resume and options.out is None:
        raise UserError("Expected --out with --resume; name the file of the run to continue.")
    if rank.count > 1 and (options.out is None or "-" in options.inputs):
        raise UserError(
            f"Expected --out and no - with {rank.count} processes, as they can't share standard input and output; "
            "name a file, and the inputs or a manifest."
        )
    if options.grid is not None and (options.grid.suffix.lower() != ".png" or not options.grid.parent.is_dir()):
        raise UserError(f"Expected --grid to be a .png in a folder that exists, but got {options.grid}.")


def _own_outputs(options: argparse.Namespace, rank: Rank) -> _Outputs:
    """The files of this process, which can be written."""
    from facecls.predict.outputs import check_output, journal_of, lock_of

    grids = [] if options.grid is None else rank.shards(options.grid)
    outs = [] if options.out is None else rank.shards(options.out)
    out = outs[rank.number] if outs else None
    if out is not None:
        check_output(out, options.resume)
    folders = [folder for folder in (options.annotate, options.crops) if folder is not None]
    written = {resolved(file) for file in (*grids, *outs, *map(journal_of, outs), *map(lock_of, outs), *folders)}
    return _Outputs(out, grids[rank.number] if grids else None, written)


@contextmanager
def _held(options: argparse.Namespace, outputs: _Outputs) -> "Iterator[None]":
    """Keeps other processes from writing the same predictions."""
    from facecls.predict.outputs import check_output, lock_of

    if outputs.out is None:
        yield
        return
    with locked(lock_of(outputs.out), str(outputs.out)):
        check_output(outputs.out, options.resume)  # again, since another process may just have ended
        remove_parts(outputs.out)
        yield


def _open_finder(options: argparse.Namespace, predictor: "Predictor") -> "Finder":
    """What takes faces out of photos."""
    from facecls.finding.detector import Detector
    from facecls.predict.finder import Finder

    if options.faces == "whole":
        return Finder(predictor, "whole")
    return Finder(predictor, options.faces, Detector(options.detector, options.threshold, options.smallest_face))


def _is_complete(out: Path | None, columns: "dict[str, str]", inputs: "Iterator[Input]") -> bool:
    """Whether a file is finished; one with other columns or rows for another number of inputs is rejected."""
    from facecls.predict.outputs import check_complete, is_finished

    if out is None or not is_finished(out):
        return False
    check_complete(out, columns, count=sum(1 for _ in inputs))
    return True


def _run(
    options: argparse.Namespace,
    rank: Rank,
    predictor: "Predictor",
    finder: "Finder",
    inputs: "Iterator[Input]",
    outputs: _Outputs,
) -> int:
    from facecls.predict.faces import columns, predict_stream
    from facecls.predict.grid import Grid
    from facecls.predict.inputs import count
    from facecls.predict.outputs import Journal
    from facecls.predict.pictures import Pictures
    from facecls.predict.screen import Screen

    def count_own() -> int | None:
        return count(options.inputs, outputs.written, lambda each: rank.takes(str(each.path)))

    def open_output() -> Journal | Screen:
        if outputs.out is None:
            return Screen(predictor.tasks)
        return Journal(outputs.out, columns(predictor, finder), sha256(options.model), _deciding(options))

    if options.faces != "whole" and predictor.frame is None:
        say(_NO_FRAME)
    elif options.faces != "whole" and predictor.is_frame_assumed:
        say(_FRAME_ASSUMED)
    grid = Grid(predictor.tasks)
    pictures = Pictures(predictor.tasks, options.annotate, options.crops)
    with open_output() as output:
        batches = predict_stream(predictor, finder, _remaining(inputs, output.done), options.batch_size)
        try:
            with memory_for("--batch_size", options.batch_size):
                counts, seconds = _write_all(batches, output, (grid, pictures), count_own, rank)
            _check_all_met(output.done, outputs.out)
            which = f"process {rank.number} of {rank.count}: " if rank.count > 1 else ""
            output.finish()
            say(f"{which}{_summary(counts, seconds, output.failed, predictor.engine)}")
        except KeyboardInterrupt as stop:
            say(f"facecls.predict: interrupted{_how_to_resume(output.rows, outputs.out)}")
            raise SystemExit(status_of(stop)) from None
    if made := [str(each) for each in (outputs.out, options.annotate, options.crops) if each is not None]:
        say(f"wrote {', '.join(made)}")
    if outputs.grid is not None:
        if grid.pictures:
            grid.write(outputs.grid)
        else:
            say(f"no face was predicted, so there is no {outputs.grid}")
    return int(output.failed > 0)


def _check_all_met(done: Counter[str], out: Path | None) -> None:
    """Refuses to finish a file with rows of an earlier run for photos that are no inputs of this one."""
    left = +done  # those met have been counted down
    if left:
        raise UserError(
            f"Expected the inputs that {out} was begun with, but it has predictions for {left.total():,} others, such "
            f"as {next(iter(left))}; name those as well with --resume, or another file."
        )


def _deciding(options: argparse.Namespace) -> list[str]:
    """What decides which rows there are, and must be the same when a run is resumed."""
    from facecls.files import sha256

    words = [f"--tta {options.tta}", f"--faces {options.faces}", f"--threshold {options.threshold:g}"]
    words.append(f"--every {options.every:g}")
    if options.smallest_face is not None:
        words.append(f"--smallest_face {options.smallest_face}")
    if options.detector is not None:
        words.append(f"--detector {sha256(options.detector)[:12]}")
    return words


def _how_to_resume(rows: int, out: Path | None) -> str:
    if out is None:
        return "; use --out to make a run resumable"
    return f" after {rows:,} rows; run the same command with --resume to continue"


def _write_all(
    batches: "Iterator[Batch]",
    output: "Journal | Screen",
    pictures: "tuple[Grid, Pictures]",
    count_all: Callable[[], int | None],
    rank: Rank,
) -> tuple[Counter[str], float]:
    """Writes all that is predicted, and returns what was counted and how many seconds it took."""
    from rich.console import Console

    from facecls.console import LINE_EVERY
    from facecls.data.sources import quiet
    from facecls.predict.inputs import NO_FACE, NO_PHOTO

    started = said = time.monotonic()
    counts: Counter[str] = Counter()
    with quiet() as stderr, os.fdopen(stderr, "w", closefd=False) as file:
        console = Console(file=file)
        is_shown = console.is_terminal and not output.is_interactive and rank.number == 0
        with _create_progress(console, is_shown) as progress:
            task = progress.add_task("", total=count_all() if is_shown else None, completed=output.done.total())
            for batch in batches:
                for each in pictures:  # first, since a photo that has its row is not looked at again on --resume
                    each.add(batch)
                output.append(batch.table)
                progress.update(task, advance=batch.photos)
                errors = batch.table["error"]
                other = int(errors.eq(NO_PHOTO).sum())
                counts += Counter(photo=batch.photos - other, face=int(errors.isna().sum()), other=other)
                counts["none"] += int(errors.eq(NO_FACE).sum())
                if not (is_shown or output.is_interactive) and time.monotonic() - said >= LINE_EVERY:
                    said = time.monotonic()
                    print(_summary(counts, said - started, output.failed), file=file, flush=True)
    return counts, time.monotonic() - started


def _summary(counts: Counter[str], seconds: float, failed: int, engine: str = "") -> str:
    """Such as ``3 photos, 7 faces in 2 s (4 faces/s by torch); no face found in 1; 1 could not be read``."""
    by = f" by {engine}" if engine else ""
    photos, faces = (f"{counts[word]:,} {word}{'s' * (counts[word] != 1)}" for word in ("photo", "face"))
    text = f"{photos}, {faces} in {seconds:.0f} s ({counts['face'] / seconds:.0f} faces/s{by})"
    text += f"; no face found in {counts['none']:,}" if counts["none"] else ""
    text += f"; {counts['other']:,} other file{'s' * (counts['other'] != 1)}" if counts["other"] else ""
    return text + (f"; {failed:,} could not be read" if failed else "")


def _create_progress(console: "Console", is_shown: bool) -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} photos/s" if task.speed else "")

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_shown,
        redirect_stdout=False,  # it would go to standard error, predictions included
        redirect_stderr=False,
    )


def _remaining(inputs: "Iterator[Input]", done: Counter[str]) -> "Iterator[Input]":
    """The inputs that have no row yet; one that is named twice has two."""
    for each in inputs:
        if done[str(each.path)] > 0:
            done[str(each.path)] -= 1
        else:
            yield each


if __name__ == "__main__":
    with command("facecls.predict", prints_data=True):
        raise SystemExit(main())
