"""Section about the data."""

import pandas as pd

from facecls.analysis import tables
from facecls.analysis.labels import label_texts
from facecls.data.tasks import Age, Classification, Task
from facecls.report import run_figures
from facecls.report.blocks import (
    Block,
    Content,
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    Table,
    Text,
    count,
    figure,
    sentence,
    share,
)
from facecls.run import FACES, REJECTS, Run

_REASONS = 20
"""Reasons of rejects that are listed."""
_RANGES = 10
"""Ranges of ages that are listed in a caption."""


def data(run: Run) -> Section:
    """How many faces of which labels each split has, duplicates, and files and labels that are not used."""
    blocks: list[Block] = []
    faces = run.faces
    if faces is None:
        faces = run.predictions
        blocks.append(Missing(f"Only the tested faces are described, because there is no {FACES} with all of them."))
    shown = [each for task in run.tasks.values() for each in _distributions(faces, task)]
    blocks.append(Figures(shown))
    blocks += [
        Missing(f"No face is labelled for {task.title.lower()}.")
        for task in run.tasks.values()
        if not _distributed(faces, task)
    ]
    duplicates = tables.duplicates(faces, run.tasks)
    blocks.append(
        Text(
            sentence(
                "{} faces are byte-identical to another, in {} groups; {} of the groups have contradicting labels, "
                "and {} span more than one split.",
                *(count(f"duplicates/{name}", number) for name, number in duplicates.items()),
            )
        )
    )
    return Section("data", "Data", [*blocks, *_rejects(run), *_unread(run)])


def _distributed(faces: pd.DataFrame, task: Task) -> list[str]:
    """The label columns that some face has a value in."""
    return [column for column in task.columns if column in faces and faces[column].notna().any()]


def _distributions(faces: pd.DataFrame, task: Task) -> list[Figure]:
    columns = _distributed(faces, task)
    if isinstance(task, Classification):
        return [_of_classes(faces, task)] if columns else []
    shown = [_of_ages(faces, task)] if task.name in columns else []
    return [*shown, _of_ranges(faces, task)] if task.range[0] in columns else shown


def _of_classes(faces: pd.DataFrame, task: Classification) -> Figure:
    said: list[Content] = []
    for split, part in _labels_by_split(faces, task.name):
        shares = [
            sentence("{} {}", name, share(f"data/{split}/{task.name}/{name}", float((part == code).mean())))
            for code, name in enumerate(task.classes)
        ]
        said.append(sentence("{}: {}", split, sentence(", ").join(shares)))
    drawing = run_figures.class_distribution(faces, task)
    return figure(drawing, f"data-{task.name}", f"{task.title} by split", sentence("{}.", sentence("; ").join(said)))


def _of_ages(faces: pd.DataFrame, task: Age) -> Figure:
    said: list[Content] = []
    for split, part in _labels_by_split(faces, task.name):
        low, middle, high = part.astype(float).quantile([0.25, 0.5, 0.75])
        ends = [
            Number(f"data/{split}/{task.name}/{quantile}", value, f"{value:g}")
            for quantile, value in (("q50", middle), ("q25", low), ("q75", high))
        ]
        said.append(sentence("{}: median {}, half of the ages between {} and {}", split, *ends))
    drawing = run_figures.age_distribution(faces, task)
    return figure(drawing, f"data-{task.name}", f"{task.title} by split", sentence("{}.", sentence("; ").join(said)))


def _of_ranges(faces: pd.DataFrame, task: Age) -> Figure:
    said: list[Content] = []
    for split, part in _labels_by_split(faces, task.range[0]):
        names = pd.Series(label_texts(faces.loc[part.index], task)).value_counts(normalize=True)
        shares = [
            sentence("{} {}", str(name), share(f"data/{split}/{task.name}/{name}", value))
            for name, value in names.head(_RANGES).items()
        ]
        said.append(sentence("{}: {}", split, sentence(", ").join(shares)))
    title = f"{task.title} by split, faces labelled with a range"
    drawing = run_figures.range_distribution(faces, task)
    return figure(drawing, f"data-{task.name}-ranges", title, sentence("{}.", sentence("; ").join(said)))


def _labels_by_split(faces: pd.DataFrame, column: str) -> list[tuple[str, "pd.Series[int]"]]:
    """Each split with the labels that its faces have, if they have any."""
    by_split = [(split, faces.loc[faces["split"] == split, column].dropna()) for split in tables.parts(faces)]
    return [(split, labels) for split, labels in by_split if len(labels)]


def _rejects(run: Run) -> list[Block]:
    if run.rejects is None:
        return [Missing(f"Rejected files are unknown, because there is no {REJECTS} beside the predictions.")]
    if not len(run.rejects):
        return [Text("No file was rejected.")]
    counts = run.rejects["reason"].value_counts().head(_REASONS).to_dict()
    examples = run.rejects.drop_duplicates("reason").set_index("reason")["path"].to_dict()
    rows = [[str(reason), count(f"rejects/{reason}", number), examples[reason]] for reason, number in counts.items()]
    return [Table("Rejected files", ["reason", "files", "example"], rows, wraps=True)]


def _unread(run: Run) -> list[Block]:
    if not len(run.unread):
        return []
    kinds = run.unread.groupby(["label", "reason"], sort=False)
    rows: list[list[Content]] = [
        [str(label), str(reason), count(f"unread/{label}/{reason}", len(some)), some["text"].iloc[0]]
        for (label, reason), some in sorted(kinds, key=lambda kind: -len(kind[1]))[:_REASONS]
    ]
    return [Table("Labels that were left out", ["label", "reason", "faces", "example"], rows, wraps=True)]
