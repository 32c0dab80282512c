"""Figures and tables -> one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from facecls.analysis.compare import paired
from facecls.analysis.duplicates import Pixels
from facecls.analysis.groups import gaps, group_table
from facecls.analysis.scores import score
from facecls.errors import UserError
from facecls.files import replacing
from facecls.model.heads import FaceModel
from facecls.report.blocks import Section
from facecls.report.sections import comparison
from facecls.report.sections.age import age
from facecls.report.sections.calibration import calibration
from facecls.report.sections.classes import gender_and_race
from facecls.report.sections.curves import curves
from facecls.report.sections.data import data
from facecls.report.sections.gallery import gallery
from facecls.report.sections.groups import groups
from facecls.report.sections.limits import limits
from facecls.report.sections.summary import summary
from facecls.report.sections.suspects import find_suspects, suspects_section
from facecls.run import read_run

REPORT, SUSPECTS, COMPARISON = "report.html", "suspects.csv", "compare.html"


def write_report(run_dir: Path, image: Pixels | None, model: FaceModel | None, seed: int = 0) -> Path:
    """Writes ``report.html`` and ``suspects.csv`` of a run, from its predictions and whatever else it left.

    Args:
        run_dir: Folder with ``predictions.parquet``.
        image: Row number of the predictions -> the face, RGB (H, W, 3) uint8; ``None`` for a page without pictures.
        model: Shows what its heads looked at in their mistakes; ``None`` for a page without that.
        seed: Of the bootstrap, and of the faces that are drawn for the gallery.

    Returns:
        Where the page lies.

    Raises:
        UserError: If there are no predictions, a file in the folder can't be read, or it can't be written to.
    """
    run = read_run(run_dir)
    table = run.predictions
    by_group, found_gaps = group_table(table, seed), gaps(table, seed)
    found = find_suspects(run, image)
    sections = [
        summary(run, score(table, seed)),
        data(run),
        curves(run),
        gender_and_race(table),
        age(table),
        groups(by_group, found_gaps),
        calibration(table),
        gallery(run, image, model, seed),
        suspects_section(run, found, image),
        limits(run, by_group, found_gaps),
    ]
    with replacing(run_dir / SUSPECTS) as part:
        found.to_csv(part, index=False)
    return write_page(run_dir / REPORT, f"Report on {run.name}", sections)


def write_page(dest: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a page.

    Args:
        dest: The file.
        title: Its heading.
        sections: What is on it.

    Returns:
        ``dest``.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("facecls", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(title=title, sections=sections)
    with replacing(dest) as part:
        part.write_text(page, encoding="utf-8")
    return dest


def write_comparison(run_dirs: Sequence[Path], image: Pixels | None, dest: Path, seed: int = 0) -> Path:
    """Writes the page that puts runs side by side, on the faces that they share.

    Args:
        run_dirs: Folders with ``predictions.parquet``, two or more.
        image: Row number of the first run's predictions -> the face; ``None`` for a page without pictures.
        dest: The file.
        seed: Of the bootstrap.

    Returns:
        ``dest``.

    Raises:
        UserError: If a folder can't be read, the runs share no face, or the page can't be written.
    """
    runs = [read_run(folder) for folder in run_dirs]
    names = _short_names([run.folder.resolve() for run in runs])
    named = dict(zip(names, runs, strict=True))
    found = paired({name: run.predictions for name, run in named.items()}, seed)
    sections = [
        comparison.summary(named, found),
        comparison.differences(found),
        comparison.disagreements(names, found, runs[0].predictions, image),
    ]
    return write_page(dest, f"Comparison of {' and '.join(names)}", sections)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as they must be to be different."""
    if len(set(folders)) < len(folders):
        raise UserError(f"Expected different runs to compare, but got {folders[0]} twice; name another one.")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]
