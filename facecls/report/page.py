"""Writes the report of a run, and the comparison of several, each as one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from facecls.analysis.compare import compare_runs, shared_tasks
from facecls.analysis.duplicates import ImageLoader
from facecls.analysis.groups import gaps, group_table, score_groups
from facecls.analysis.scores import Verdict, compare_with_guess, score, trivial
from facecls.data.tasks import ages, classifications
from facecls.errors import UserError
from facecls.files import replacing, resolved
from facecls.model.network import FaceModel
from facecls.report.blocks import Section
from facecls.report.card import write_card
from facecls.report.sections import comparison
from facecls.report.sections.age import age
from facecls.report.sections.calibration import calibration
from facecls.report.sections.classes import classes
from facecls.report.sections.curves import curves
from facecls.report.sections.data import data
from facecls.report.sections.gallery import gallery
from facecls.report.sections.groups import groups
from facecls.report.sections.limits import limits
from facecls.report.sections.summary import summary
from facecls.report.sections.suspects import find_suspects, suspects_section
from facecls.report.sections.verdict import verdict
from facecls.report.template import environment
from facecls.run import REPORT, Run, read_run, write_suspects


def write_report(run_dir: Path, image: ImageLoader | None, model: FaceModel | None, seed: int = 0) -> Path:
    """Writes ``report.html``, ``model_card.md`` and ``suspects.csv`` of a run.

    Args:
        run_dir: Folder with at least ``predictions.parquet``.
        image: Row number of the predictions -> the face, RGB (H, W, 3) uint8; ``None`` for a page without images.
        model: For Grad-CAM maps of its heads; ``None`` for none.
        seed: Of the bootstrap and of the random faces.

    Returns:
        Path of the page.

    Raises:
        UserError: If there are no predictions, or a file in the folder cannot be read or written.
    """
    run = read_run(run_dir)
    table, tasks = run.predictions, run.tasks
    scores, guesses = score(table, tasks, seed), trivial(table, run.train, tasks)
    verdicts = compare_with_guess(table, tasks, run.train, seed)
    scored = score_groups(table, tasks, seed)
    by_group, largest_gaps = group_table(scored), gaps(scored)
    # a model that may be guessing has no say about labels
    trusted = [task for task, verdict_of_task in verdicts.items() if verdict_of_task is Verdict.BETTER]
    suspects = find_suspects(run, image, trusted)
    labelled_classes = classifications(tasks.values())
    said, limited = verdict(run, scores, guesses, verdicts, by_group), limits(run, by_group, largest_gaps)
    sections = [
        summary(run, said, scores, guesses),
        data(run),
        curves(run),
        *([classes(table, labelled_classes)] if labelled_classes else []),
        *(age(table, task) for task in ages(tasks.values())),
        groups(by_group, largest_gaps, tasks),
        calibration(table, tasks),
        gallery(run, image, model, seed),
        suspects_section(run, suspects, image, [task for task in verdicts if task not in trusted]),
        limited,
    ]
    write_suspects(run_dir, suspects)
    if len(run.train):  # else these are other faces than the model's, of whose training nothing is known here
        write_card(run, scores, said, limited)
    return write_page(run_dir / REPORT, f"Report on {run.name}{_about_faces([run])}", sections)


def write_page(dest: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a page.

    Args:
        dest: Path of the file.
        title: Title and main heading.
        sections: Contents.

    Returns:
        ``dest``.
    """
    page = environment(escapes=True).get_template("page.html.j2").render(title=title, sections=sections)
    with replacing(dest) as part:
        part.write_text(page, encoding="utf-8")
    return dest


def write_comparison(run_dirs: Sequence[Path], image: ImageLoader | None, dest: Path, seed: int = 0) -> Path:
    """Writes the page that compares runs on the faces they have in common.

    Args:
        run_dirs: Folders with at least ``predictions.parquet``, two or more.
        image: Row number of the first run's predictions -> the face; ``None`` for a page without images.
        dest: Path of the page.
        seed: Of the bootstrap.

    Returns:
        ``dest``.

    Raises:
        UserError: If a folder cannot be read, the runs have no face in common, or the page cannot be written.
    """
    runs = [read_run(folder) for folder in run_dirs]
    names = _short_names([resolved(run.folder) for run in runs])
    named = dict(zip(names, runs, strict=True))
    tables = {name: run.predictions for name, run in named.items()}
    tasks, left_out = shared_tasks(tables, {name: run.tasks for name, run in named.items()})
    compared = compare_runs(tables, tasks, seed)
    sections = [
        comparison.summary(named, compared, left_out),
        comparison.differences(compared, tasks),
        comparison.disagreements(names, compared, tasks, runs[0].predictions, image),
    ]
    return write_page(dest, f"Comparison of {' and '.join(names)}{_about_faces(runs)}", sections)


def _about_faces(runs: Sequence[Run]) -> str:
    return " (drawn faces)" if all(run.is_drawn for run in runs) else ""


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as are needed to tell them apart."""
    if len(set(folders)) < len(folders):
        raise UserError(f"Expected different runs to compare, but got {folders[0]} twice; name another one.")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]
