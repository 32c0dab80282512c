"""Gender and race: which classes are taken for which."""

import numpy as np
import pandas as pd

from facecls.analysis import tables
from facecls.analysis.tables import tested_tasks, why_untested
from facecls.data.tasks import CLASSES, Task
from facecls.report import figures
from facecls.report.blocks import (
    Block,
    Content,
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    Table,
    count,
    drawn,
    share,
    words,
)


def gender_and_race(table: pd.DataFrame) -> Section:
    """Which classes are taken for which."""
    blocks: list[Block] = []
    shown: list[Figure] = []
    for task in CLASSES:
        if task in tested_tasks(table):
            shown.append(_confusion(table, task))
            blocks.append(_class_table(table, task))
            blocks.append(_counts_table(table, task))
        else:
            blocks.append(Missing(why_untested(table, task)))
    if tables.roc(table) is not None:
        shown.insert(1, _roc(table))
    return Section("Gender and race", [Figures(shown), *blocks] if shown else blocks)


def _confusion(table: pd.DataFrame, task: Task) -> Figure:
    counts = tables.confusion(table, task)
    cells = counts.to_numpy()
    right, total = int(np.diag(cells).sum()), int(cells.sum())
    caption = words(
        "{} of {} faces are right.", count(f"confusion/{task}/right", right), count(f"confusion/{task}/faces", total)
    )
    wrong = cells - np.diag(np.diag(cells))
    if wrong.any():
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        label, predicted = CLASSES[task][row], CLASSES[task][column]
        caption += words(
            " The commonest mistake is {} taken for {}: {} of {} ({}).",
            label,
            predicted,
            count(f"confusion/{task}/{label}/{predicted}", int(cells[row, column])),
            count(f"class/{task}/{label}/faces", int(cells[row].sum())),
            share(f"confusion/{task}/{label}/{predicted}/share", cells[row, column] / cells[row].sum()),
        )
    title = f"{task.capitalize()}: labels (rows) and predictions (columns)"
    return drawn(figures.confusion(table, task), f"confusion-{task}", title, caption)


def _roc(table: pd.DataFrame) -> Figure:
    curve = tables.roc(table)
    assert curve is not None
    recall = tables.class_scores(table, "gender")["recall"]
    caption = words(
        "Area under the curve {}. As predicted, {} of the women are found and {} of the men are taken for women.",
        Number("roc/area", curve.area, f"{curve.area:.4f}"),
        share("class/gender/female/recall", recall["female"]),
        share("roc/men_taken_for_women", 1 - recall["male"]),
    )
    return drawn(figures.roc(table), "roc", "Gender: telling women from men (ROC)", caption)


def _class_table(table: pd.DataFrame, task: Task) -> Table:
    rows: list[list[Content]] = []
    for name, row in tables.class_scores(table, task).to_dict("index").items():
        numbers = [share(f"class/{task}/{name}/{column}", row[column]) for column in ("precision", "recall", "f1")]
        rows.append([str(name), *numbers, count(f"class/{task}/{name}/faces", int(row["faces"]))])
    return Table(f"{task.capitalize()} by class", ["label", "precision", "recall", "F1", "faces"], rows)


def _counts_table(table: pd.DataFrame, task: Task) -> Table:
    names = CLASSES[task]
    cells = tables.confusion(table, task).to_numpy()
    rows: list[list[Content]] = [
        [label, *(count(f"confusion/{task}/{label}/{name}", int(cells[i, j])) for j, name in enumerate(names))]
        for i, label in enumerate(names)
    ]
    return Table(f"{task.capitalize()}: counts", ["label", *(f"as {name}" for name in names)], rows, fold=True)
