"""Writes the report of a run again, or compares several runs.

``python -m facecls.report RUN_DIR [RUN_B ...] [--data.root WHERE] [--out FILE]``
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from facecls.analysis.duplicates import ImageLoader
from facecls.console import console
from facecls.data.limits import add_limits, set_limits_of
from facecls.data.sources import ACCEPTED
from facecls.data.store import decode
from facecls.data.table import read_table
from facecls.errors import CommandParser, UserError, command, program
from facecls.model.checkpoint import read_checkpoint
from facecls.model.network import FaceModel
from facecls.report.page import write_comparison, write_report
from facecls.run import BEST_CHECKPOINT, CARD, COMPARISON, REPORT, SUSPECTS, Run, read_run

_DESCRIPTION = (
    f"Writes {REPORT}, {CARD} and {SUSPECTS} into the folder of a run, from its predictions and the faces; for several "
    f"runs {COMPARISON}, on the faces they have in common."
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command.

    Args:
        arguments: Command line; ``None`` for that of the process.

    Returns:
        Path of the page.

    Raises:
        UserError: For a mistake in the options or in a run's folder.
    """
    parser = CommandParser(prog=program("facecls.report"), description=_DESCRIPTION)
    parser.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="+", help="such as runs/faces/version_0")
    parser.add_argument("--data.root", dest="root", help=f"where the faces are now: {ACCEPTED}")
    parser.add_argument("--out", type=Path, help=f"file of the comparison (default: {COMPARISON} in the first run)")
    add_limits(parser)
    options = parser.parse_args(arguments)
    set_limits_of(options)
    if options.out is not None and len(options.runs) == 1:
        raise UserError("Expected --out with several runs only; the report of one run is written into its folder.")
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"Expected --out to end in .html, as no file of a run but pages does, but got {options.out}.")
    first = read_run(options.runs[0])
    image = find_images(first, options.root)
    if len(options.runs) > 1:
        page = write_comparison(options.runs, image, options.out or first.folder / COMPARISON)
    else:
        page = write_report(first.folder, image, find_model(first) if image is not None else None)
    console().print(f"wrote {page}")
    return page


def find_images(run: Run, root: str | None) -> ImageLoader | None:
    """Finds the tested faces by the SHA-1 of their files.

    Args:
        run: The run.
        root: Where to look; ``None`` for where the run read them.

    Returns:
        Row number of the predictions -> the face; ``None``, after printing why, if ``root`` is ``None`` and they are
        not found.

    Raises:
        UserError: If they are not at ``root``.
    """
    try:
        return _open_images(run, root)
    except UserError as error:
        if root is not None:
            raise
        console().print(f"the report has no images: {error}")
        return None


def _open_images(run: Run, root: str | None) -> ImageLoader:
    where = root or run.data.get("root")
    if not where:
        raise UserError(f"Expected to know where the faces are, but {run.folder} does not say; add --data.root WHERE.")
    table = read_table(where, int(run.data.get("seed", run.config.get("seed_everything", 0))), run.tasks)
    places = {sha1: place for place, sha1 in enumerate(table.faces["sha1"])}
    rows = [places.get(sha1, -1) for sha1 in run.predictions["sha1"]]
    if missing := rows.count(-1):
        raise UserError(
            f"Expected all {len(rows)} tested faces in {where}, but {missing} are missing or changed; give the right "
            "place with --data.root, or evaluate again."
        )

    def image(row: int) -> npt.NDArray[np.uint8]:
        return decode(table.store[rows[row]])

    return image


def find_model(run: Run) -> FaceModel | None:
    """Loads the model that made the predictions.

    Args:
        run: The run. Its own best checkpoint is taken or, without one, the checkpoint that it evaluated.

    Returns:
        The model on the CPU; ``None``, after printing why, if it cannot be loaded.
    """
    own = run.folder / BEST_CHECKPOINT
    try:
        return read_checkpoint(own if own.is_file() else str(run.metrics.get("checkpoint", own))).module.model
    except UserError as error:
        console().print(f"no Grad-CAM maps: {error}")
        return None


if __name__ == "__main__":
    with command("facecls.report"):
        main()
