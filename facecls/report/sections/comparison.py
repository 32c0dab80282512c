"""Sections of the page that compares runs."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from facecls.analysis.compare import Comparison
from facecls.analysis.duplicates import ImageLoader
from facecls.analysis.scores import YEARS, Score, scores_of
from facecls.data.tasks import Age, Task, Tasks
from facecls.report import run_figures
from facecls.report.blocks import (
    NONE,
    Block,
    Content,
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    count,
    counted,
    figure,
    score,
    sentence,
)
from facecls.report.sections.gallery import SHOWN, data_uri
from facecls.run import Run

_LISTED = 100
"""Disagreements in the table of a task."""


def summary(runs: Mapping[str, Run], comparison: Comparison, left_out: Mapping[str, str]) -> Section:
    """Which runs are compared, on which faces and tasks, and in which options they differ.

    Args:
        runs: By name.
        comparison: As ``analysis.compare.compare_runs`` returns it.
        left_out: Why a task is not compared, by its name, as ``analysis.compare.shared_tasks`` returns it.
    """
    rows: list[list[Content]] = [
        [name, count(f"faces/{name}", len(run.predictions)), str(run.data.get("root", "unknown"))]
        for name, run in runs.items()
    ]
    options = {name: dict(flat_options(run.config)) for name, run in runs.items()}
    names = sorted({option for flat in options.values() for option in flat})
    differing = [option for option in names if len({flat.get(option) for flat in options.values()}) > 1]
    text = "The runs have {} in common; everything below is about these."
    blocks: list[Block] = [
        Text(sentence(text, counted("faces/shared", comparison.faces, "tested face"))),
        Table("Runs", ["run", "faces tested", "data"], rows, wraps=True),
    ]
    if left_out:
        reasons = ", ".join(f"{name.replace('_', ' ')} ({reason})" for name, reason in left_out.items())
        blocks.append(Missing(f"Not compared: {reasons}."))
    if differing:
        cells = [[option, *(flat.get(option, NONE) for flat in options.values())] for option in differing]
        blocks.append(Table("Options that differ", ["option", *runs], cells, wraps=True))
    return Section("summary", "Summary", blocks)


_WORDS = {None: "null", True: "true", False: "false"}
"""Of YAML."""


def flat_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The options of a run by their dotted names, with their values as texts, as they are written in YAML."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat_options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _WORDS.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def differences(comparison: Comparison, tasks: Tasks) -> Section:
    """By how much the runs differ in each score.

    Args:
        comparison: As ``analysis.compare.compare_runs`` returns it.
        tasks: The tasks that all runs have.
    """
    if not len(comparison.scores):
        return Section("differences", "Differences", [Missing("The runs have no task with labels in common.")])
    scores = scores_of(tasks)
    records = comparison.scores.to_dict("records")
    rows = [_difference_row(row, scores[row["score"]]) for row in records]
    head = ["score", "runs", "first", "second", "difference (95 % interval)", "", "faces"]
    note = (
        "The intervals are those of the differences, on the same faces for both runs (paired bootstrap); they are not "
        "corrected for the number of runs."
    )
    by_unit = {unit: [row for row in records if scores[row["score"]].unit == unit] for unit in ("share", "years")}
    shown = Figures([_figure(comparison.scores, some, tasks, unit) for unit, some in by_unit.items() if some])
    return Section("differences", "Differences", [shown, Table("Scores of the runs", head, rows), Text(note)])


def _difference_row(row: Mapping[Hashable, Any], of: Score) -> list[Content]:
    key = f"{row['a']}/{row['b']}"
    values = [score(f"{row[end]}/{row['score']}", row[f"value_{end}"], of.unit) for end in ("a", "b")]
    unit = "points" if of.unit == "share" else "years"
    ends = [_difference(row, of, column) for column in ("difference", "low", "high")]
    change = sentence('{} {} <span class="range">({} to {})</span>', ends[0], unit, *ends[1:])
    better = (row["difference"] > 0) == of.higher_is_better
    certain = row["low"] > 0 or row["high"] < 0
    verdict = f"{row['b'] if better else row['a']} is better" if certain else "may be due to chance"
    if row["difference"] == 0:
        verdict = "equal"
    faces = count(f"faces/{key}/{row['score']}", row["faces"])
    return [of.title, f"{row['a']} to {row['b']}", *values, change, verdict, faces]


def _difference(row: Mapping[Hashable, Any], of: Score, column: str) -> Number:
    """One of the numbers about a difference, in points or years."""
    text = f"{100 * row[column]:+.1f}" if of.unit == "share" else f"{row[column]:+.2f}"
    return Number(f"{column}/{row['a']}/{row['b']}/{row['score']}", row[column], text)


def _figure(scores: pd.DataFrame, rows: Sequence[Mapping[Hashable, Any]], tasks: Tasks, unit: str) -> Figure:
    many = len({(row["a"], row["b"]) for row in rows}) > 1
    said = []
    for row in rows:
        of = scores_of(tasks)[row["score"]]
        pair = f"from {row['a']} to {row['b']} " if many else ""
        said.append(sentence("{} {}{}", of.title, pair, _difference(row, of, "difference")))
    caption = sentence("Second run minus first: {}. Blue is better, orange worse.", sentence("; ").join(said))
    title = "Differences in points" if unit == "share" else "Differences in years"
    return figure(run_figures.differences(scores, tasks, unit), f"differences-{unit}", title, caption)


def disagreements(
    runs: Sequence[str], comparison: Comparison, tasks: Tasks, table: pd.DataFrame, image: ImageLoader | None
) -> Section:
    """The faces on which the runs disagree.

    Args:
        runs: Names of the runs.
        comparison: As ``analysis.compare.compare_runs`` returns it.
        tasks: The tasks that all runs have.
        table: Predictions of the first run.
        image: Row number of ``table`` -> the face; ``None`` without images.
    """
    blocks: list[Block] = []
    if image is None:
        blocks.append(Missing("The images were not found; say where they are with --data.root WHERE."))
    for task in tasks.values():
        some = comparison.disagreements[comparison.disagreements["task"] == task.name]
        if len(some):
            blocks += _disagreements_about(task, some, runs, table, image)
    return Section("disagreements", "Disagreements", blocks or [Text("There are none.")])


def _disagreements_about(
    task: Task, some: pd.DataFrame, runs: Sequence[str], table: pd.DataFrame, image: ImageLoader | None
) -> list[Block]:
    by = f" by more than {YEARS} years" if isinstance(task, Age) else ""
    text = "The runs disagree{} on the {} of {}, listed with the largest difference first."
    name = task.title.lower()
    blocks: list[Block] = [Text(sentence(text, by, name, counted(f"disagreements/{task.name}", len(some), "face")))]
    faces = some.to_dict("records")
    if image is not None:
        rows = {key: row for row, key in enumerate(zip(table["path"], table["sha1"], strict=True))}
        tiles = [_tile(face, task, runs, image(rows[face["path"], face["sha1"]])) for face in faces[:SHOWN]]
        blocks.append(Tiles(f"Disagreements about {name}", tiles))
    columns = ("label", *(f"predicted/{run}" for run in runs))
    cells = [[face["path"], *(_text(face[column]) for column in columns)] for face in faces[:_LISTED]]
    caption = f"All disagreements about {name}"
    if len(faces) > len(cells):
        caption = f"The first {len(cells)} of {len(faces):,} disagreements about {name}"
    return [*blocks, Table(caption, ["face", "label", *runs], cells, fold=True, wraps=True)]


def _tile(face: Mapping[Hashable, Any], task: Task, runs: Sequence[str], pixels: Any) -> Tile:
    notes: list[Content] = []
    for run in runs:
        predicted = face[f"predicted/{run}"]
        wrong = not pd.isna(face["label"]) and predicted != face["label"] and not isinstance(task, Age)
        notes.append(sentence("{}: <b>✗ {}</b>" if wrong else "{}: {}", run, _text(predicted)))
    return Tile([(data_uri(pixels), face["path"].rsplit("/", 1)[-1])], [f"label: {_text(face['label'])}"], notes)


def _text(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)
