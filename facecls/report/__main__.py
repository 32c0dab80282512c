"""Writes the page about a run again, or puts runs side by side.

``python -m facecls.report RUN_DIR [RUN_B ...] [--data.root WHERE] [--out FILE]``
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from facecls.analysis.duplicates import Pixels
from facecls.console import console
from facecls.data.store import decode
from facecls.data.sources import ACCEPTED
from facecls.data.table import read_table
from facecls.errors import UserError, command
from facecls.model.heads import FaceModel
from facecls.model.module import load_module
from facecls.report.page import COMPARISON, write_comparison, write_report
from facecls.run import Run, read_run

_ABOUT = (
    "Writes report.html and suspects.csv into the folder of a run, from its predictions and the faces alone; of "
    "several runs compare.html, on the faces that they share."
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Returns:
        Where the page lies.

    Raises:
        UserError: For a mistake in the options or in a run's folder.
    """
    parser = argparse.ArgumentParser(prog="python -m facecls.report", description=_ABOUT)
    parser.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="+", help="such as runs/faces/version_0")
    parser.add_argument("--data.root", dest="root", help=f"where the faces are now: {ACCEPTED}")
    parser.add_argument(
        "--out", type=Path, help=f"where {COMPARISON} is written (default: into the first run's folder)"
    )
    options = parser.parse_args(arguments)
    if options.out is not None and len(options.runs) == 1:
        raise UserError("Expected --out with several runs only; the page of one run lies in its folder.")
    first = read_run(options.runs[0])
    image = find_pictures(first, options.root)
    if len(options.runs) > 1:
        page = write_comparison(options.runs, image, options.out or first.folder / COMPARISON)
    else:
        page = write_report(first.folder, image, find_model(first) if image is not None else None)
    console().print(f"wrote {page}")
    return page


def find_pictures(run: Run, root: str | None) -> Pixels | None:
    """Reads the tested faces back, by the SHA-1 of their bytes.

    Args:
        run: With its predictions.
        root: Where to look; ``None`` for where the run had them.

    Returns:
        Row number of the predictions -> the face; ``None``, after saying why, if they are not where the run had them.

    Raises:
        UserError: If they are not at ``root``, when that is given.
    """
    try:
        return _pictures(run, root)
    except UserError as error:
        if root is not None:
            raise
        console().print(f"without pictures: {error}")
        return None


def _pictures(run: Run, root: str | None) -> Pixels:
    where = root or run.data.get("root")
    if not where:
        raise UserError(f"Expected to know where the faces are, but {run.folder} does not say; add --data.root WHERE.")
    table = read_table(where, int(run.data.get("seed", run.config.get("seed_everything", 0))))
    places = {sha1: place for place, sha1 in enumerate(table.faces["sha1"])}
    found = [places.get(sha1, -1) for sha1 in run.predictions["sha1"]]
    if missing := found.count(-1):
        raise UserError(
            f"Expected all {len(found)} tested faces in {where}, but {missing} are not there or changed; name the "
            "right place with --data.root, or evaluate again."
        )

    def image(row: int) -> npt.NDArray[np.uint8]:
        return decode(table.store[found[row]])

    return image


def find_model(run: Run) -> FaceModel | None:
    """The model that made the predictions.

    Args:
        run: Its own best checkpoint is taken, or else the one that it names.

    Returns:
        The model on the CPU; ``None``, after saying why, if there is none that can be loaded.
    """
    own = run.folder / "checkpoints" / "best.ckpt"
    try:
        return load_module(own if own.is_file() else str(run.metrics.get("checkpoint", own))).model
    except UserError as error:
        console().print(f"without what the heads looked at: {error}")
        return None


if __name__ == "__main__":
    with command("facecls.report"):
        main()
