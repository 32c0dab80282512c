"""Section about the classifications: which classes are confused."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from facecls.analysis import tables
from facecls.analysis.tables import labelled
from facecls.data.tasks import Classification
from facecls.report import figures
from facecls.report.blocks import (
    Block,
    Content,
    Figure,
    Figures,
    Number,
    Section,
    Table,
    count,
    figure,
    listed,
    sentence,
    share,
)
from facecls.report.sections.untested import untested


def classes(table: pd.DataFrame, tasks: Sequence[Classification]) -> Section:
    """Which classes are confused.

    Args:
        table: Predictions.
        tasks: The classifications of the run, at least one.
    """
    blocks: list[Block] = []
    shown: list[Figure] = []
    for task in tasks:
        if not len(labelled(table, task)):
            blocks.append(untested(table, task))
            continue
        shown.append(_confusion(table, task))
        if len(task.classes) == 2 and tables.roc(table, task) is not None:
            shown.append(_roc(table, task))
        blocks += [_class_table(table, task), _counts_table(table, task)]
    title = str(listed([task.title.lower() for task in tasks])).capitalize()
    return Section("classes", title, [Figures(shown), *blocks] if shown else blocks)


def _confusion(table: pd.DataFrame, task: Classification) -> Figure:
    cells = tables.confusion(table, task).to_numpy()
    key = f"confusion/{task.name}"
    right, total = int(np.diag(cells).sum()), int(cells.sum())
    caption = sentence("{} of {} predictions are right.", count(f"{key}/right", right), count(f"{key}/faces", total))
    wrong = cells - np.diag(np.diag(cells))
    if wrong.any():
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        label, predicted = task.classes[row], task.classes[column]
        caption += sentence(
            ' The most common mistake is "{}" predicted as "{}": {} of {} ({}).',
            label, predicted, count(f"{key}/{label}/{predicted}", int(cells[row, column])),
            count(f"class/{task.name}/{label}/faces", int(cells[row].sum())),
            share(f"{key}/{label}/{predicted}/share", cells[row, column] / cells[row].sum()),
        )  # fmt: skip
    title = f"{task.title}: labels (rows) and predictions (columns)"
    return figure(figures.confusion(table, task), f"confusion-{task.name}", title, caption)


def _roc(table: pd.DataFrame, task: Classification) -> Figure:
    curve = tables.roc(table, task)
    assert curve is not None
    negative, positive = task.classes
    recall = tables.class_scores(table, task)["recall"]
    caption = sentence(
        'The area under the curve is {}. At a threshold of one half, {} of "{}" are found, and {} of "{}" are '
        "mistaken for it.",
        Number(f"roc/{task.name}/area", curve.area, f"{curve.area:.4f}"),
        share(f"class/{task.name}/{positive}/recall", recall[positive]), positive,
        share(f"roc/{task.name}/false_positive_rate", 1 - recall[negative]), negative,
    )  # fmt: skip
    title = f"{task.title}: ROC curve of {positive} against {negative}"
    return figure(figures.roc(table, task), f"roc-{task.name}", title, caption)


def _class_table(table: pd.DataFrame, task: Classification) -> Table:
    rows: list[list[Content]] = []
    for name, row in tables.class_scores(table, task).to_dict("index").items():
        key = f"class/{task.name}/{name}"
        numbers = [share(f"{key}/{column}", row[column]) for column in ("precision", "recall", "f1")]
        rows.append([str(name), *numbers, count(f"{key}/faces", int(row["faces"]))])
    return Table(f"{task.title} by class", ["label", "precision", "recall", "F1", "faces"], rows)


def _counts_table(table: pd.DataFrame, task: Classification) -> Table:
    cells = tables.confusion(table, task).to_numpy()
    rows: list[list[Content]] = [
        [
            label,
            *(count(f"confusion/{task.name}/{label}/{name}", int(cells[i, j])) for j, name in enumerate(task.classes)),
        ]
        for i, label in enumerate(task.classes)
    ]
    head = ["label", *(f"as {name}" for name in task.classes)]
    return Table(f"{task.title}: counts of labels and predictions", head, rows, fold=True)
