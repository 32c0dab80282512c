"""The sections of the page that puts runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from facecls.analysis.compare import Comparison
from facecls.analysis.duplicates import Pixels
from facecls.analysis.scores import SCORES
from facecls.data.tasks import TASKS
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
    drawn,
    score,
    words,
)
from facecls.report.sections.gallery import SHOWN, data_uri
from facecls.run import Run

_LISTED = 100
"""Disagreements in the table of a task."""


def summary(runs: Mapping[str, Run], found: Comparison) -> Section:
    """Which runs, on which faces, and in which options they differ."""
    rows: list[list[Content]] = [
        [name, count(f"faces/{name}", len(run.predictions)), str(run.data.get("root", "unknown"))]
        for name, run in runs.items()
    ]
    options = {name: dict(_flat(run.config)) for name, run in runs.items()}
    names = sorted({option for flat in options.values() for option in flat})
    differing = [option for option in names if len({flat.get(option) for flat in options.values()}) > 1]
    blocks: list[Block] = [
        Text(
            words("The runs share {} tested faces; all that follows is about them.", count("faces/shared", found.faces))
        ),
        Table("Runs", ["run", "faces tested", "data"], rows, words=True),
    ]
    if differing:
        cells = [[option, *(flat.get(option, NONE) for flat in options.values())] for option in differing]
        blocks.append(Table("Options that differ", ["option", *runs], cells, words=True))
    return Section("Summary", blocks)


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def differences(found: Comparison) -> Section:
    """By how much the runs differ in each score."""
    if not len(found.scores):
        return Section("Differences", [Missing("The runs have no task with labels in common.")])
    rows: list[list[Content]] = []
    for row in found.scores.to_dict("records"):
        key = f"{row['a']}/{row['b']}"
        values = [score(f"{row[end]}/{row['score']}", row[f"value_{end}"]) for end in ("a", "b")]
        unit = "points" if SCORES[row["score"]].unit == "share" else "years"
        ends = [_difference(row, column) for column in ("difference", "low", "high")]
        change = words('{} {} <span class="range">({} to {})</span>', ends[0], unit, *ends[1:])
        better = (row["difference"] > 0) == SCORES[row["score"]].higher_is_better
        certain = row["low"] > 0 or row["high"] < 0
        verdict = (row["b"] if better else row["a"]) + " is better" if certain else "may be chance"
        pair = f"{row['a']} to {row['b']}"
        rows.append(
            [
                SCORES[row["score"]].title,
                pair,
                *values,
                change,
                verdict,
                count(f"faces/{key}/{row['score']}", row["faces"]),
            ]
        )
    head = ["score", "runs", "first", "second", "difference (95 % interval)", "", "faces"]
    note = (
        "Intervals are on the difference, over the same faces for both runs (paired bootstrap), not corrected for the "
        "number of runs."
    )
    units = [unit for unit in ("share", "years") if any(SCORES[name].unit == unit for name in found.scores["score"])]
    shown = Figures([_figure(found.scores, unit) for unit in units])
    return Section("Differences", [shown, Table("Scores of the runs", head, rows), Text(note)])


def _difference(row: Mapping[Any, Any], column: str) -> Number:
    """One of the numbers about a difference, in points or years."""
    share = SCORES[row["score"]].unit == "share"
    text = f"{100 * row[column]:+.1f}" if share else f"{row[column]:+.2f}"
    return Number(f"{column}/{row['a']}/{row['b']}/{row['score']}", row[column], text)


def _figure(scores: pd.DataFrame, unit: str) -> Figure:
    rows = [row for row in scores.to_dict("records") if SCORES[row["score"]].unit == unit]
    many = len({(row["a"], row["b"]) for row in rows}) > 1
    said = [
        words(
            "{} {}{}",
            SCORES[row["score"]].title,
            f"from {row['a']} to {row['b']} " * many,
            _difference(row, "difference"),
        )
        for row in rows
    ]
    caption = words("Second run minus first: {}. Blue is better, orange worse.", words("; ").join(said))
    title = "Differences in points" if unit == "share" else "Differences in years"
    return drawn(run_figures.differences(scores, unit), f"differences-{unit}", title, caption)


def disagreements(runs: Sequence[str], found: Comparison, table: pd.DataFrame, image: Pixels | None) -> Section:
    """The faces on which the runs do not say the same.

    Args:
        runs: Their names.
        found: What was compared.
        table: Predictions of the first run, which ``image`` counts.
        image: Row number -> the face; ``None`` without pictures.
    """
    blocks: list[Block] = []
    if image is None:
        blocks.append(
            Missing("The pictures were not at hand; `python -m facecls.report` shows them with --data.root WHERE.")
        )
    places = {key: row for row, key in enumerate(zip(table["path"], table["sha1"], strict=True))}
    for task in TASKS:
        some = found.disagreements[found.disagreements["task"] == task]
        if not len(some):
            continue
        sentence = (
            "{} faces on whose {} the runs disagree"
            + (" by more than five years" if task == "age" else "")
            + ", the furthest apart first."
        )
        blocks.append(Text(words(sentence, count(f"disagreements/{task}", len(some)), task)))
        records = some.to_dict("records")
        if image is not None:
            tiles = [_tile(face, runs, image(places[face["path"], face["sha1"]])) for face in records[:SHOWN]]
            blocks.append(Tiles(f"Disagreements about {task}", tiles))
        rows = [
            [face["path"], *(_text(face[name]) for name in ("label", *(f"predicted/{run}" for run in runs)))]
            for face in records[:_LISTED]
        ]
        caption = (
            f"The first {len(rows)} of {len(records):,} disagreements about {task}"
            if len(records) > len(rows)
            else f"All disagreements about {task}"
        )
        blocks.append(Table(caption, ["face", "label", *runs], rows, fold=True, words=True))
    return Section("Disagreements", blocks or [Text("There are none.")])


def _tile(face: Mapping[Any, Any], runs: Sequence[str], pixels: Any) -> Tile:
    notes: list[Content] = []
    for run in runs:
        predicted = face[f"predicted/{run}"]
        wrong = not pd.isna(face["label"]) and predicted != face["label"] and face["task"] != "age"
        notes.append(words("{}: <b>✗ {}</b>" if wrong else "{}: {}", run, _text(predicted)))
    return Tile([(data_uri(pixels), face["path"].rsplit("/", 1)[-1])], [f"label: {_text(face['label'])}"], notes)


def _text(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)
