"""Data: what faces there are."""

import pandas as pd

from facecls.analysis import tables
from facecls.data.tasks import CLASSES, TASKS, Task
from facecls.report import run_figures
from facecls.report.blocks import (
    Block,
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    Table,
    Text,
    count,
    drawn,
    share,
    words,
)
from facecls.run import Run

_MANY_REASONS = 20
"""Kinds of rejects that are named."""


def data(run: Run) -> Section:
    """What faces there are."""
    blocks: list[Block] = []
    faces = run.faces
    if faces is None:
        faces = run.predictions
        blocks.append(
            Missing("Only the tested faces are described, as there is no faces.parquet with all of them beside them.")
        )
    shown = [task for task in TASKS if faces[task].notna().any()]
    blocks.append(Figures([_distribution(faces, task) for task in shown]))
    blocks += [Missing(f"No face has a label of {task}.") for task in TASKS if task not in shown]
    copies = tables.duplicates(faces)
    blocks.append(
        Text(
            words(
                "{} faces are byte-for-byte copies of another, in {} groups; {} of the groups disagree about a label, "
                "and {} lie in more than one part of the split.",
                *(count(f"duplicates/{name}", number) for name, number in copies.items()),
            )
        )
    )
    return Section("Data", [*blocks, *_rejects(run)])


def _distribution(faces: pd.DataFrame, task: Task) -> Figure:
    said = []
    for split in tables.parts(faces):
        part = faces.loc[faces["split"] == split, task].dropna()
        if not len(part):
            continue
        if task == "age":
            low, middle, high = part.astype(float).quantile([0.25, 0.5, 0.75])
            ends = [
                Number(f"data/{split}/age/{quantile}", value, f"{value:g}")
                for quantile, value in (("q25", low), ("q50", middle), ("q75", high))
            ]
            said.append(
                words("{}: half of the ages lie from {} to {}, the median is {}", split, ends[0], ends[2], ends[1])
            )
        else:
            shares = [
                words("{} {}", name, share(f"data/{split}/{name}", float((part == code).mean())))
                for code, name in enumerate(CLASSES[task])
            ]
            said.append(words("{}: {}", split, words(", ").join(shares)))
    figure = run_figures.age_distribution(faces) if task == "age" else run_figures.class_distribution(faces, task)
    return drawn(figure, f"data-{task}", f"{task.capitalize()} in each part", words("{}.", words("; ").join(said)))


def _rejects(run: Run) -> list[Block]:
    if run.rejects is None:
        return [Missing("Rejects are unknown, as there is no rejects.csv beside the predictions.")]
    if not len(run.rejects):
        return [Text("No file was rejected.")]
    counts = run.rejects["reason"].value_counts().head(_MANY_REASONS).to_dict()
    examples = run.rejects.drop_duplicates("reason").set_index("reason")["path"].to_dict()
    rows = [[str(reason), count(f"rejects/{reason}", number), examples[reason]] for reason, number in counts.items()]
    return [Table("Rejects, files that are not used", ["reason", "files", "such as"], rows, words=True)]
