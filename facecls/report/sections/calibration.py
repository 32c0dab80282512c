"""Section about calibration: whether predicted probabilities match observed frequencies."""

import numpy as np
import pandas as pd

from facecls.analysis.calibration import BINS, calibration_table
from facecls.analysis.labels import label_ends
from facecls.data.tasks import Age, Classification, Tasks, classifications
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
    Text,
    count,
    figure,
    listed,
    sentence,
    share,
)


def calibration(table: pd.DataFrame, tasks: Tasks) -> Section:
    """Whether predicted probabilities match observed frequencies.

    Args:
        table: Predictions.
        tasks: The tasks of the run.
    """
    measured = calibration_table(table, tasks)
    blocks: list[Block] = [
        Missing(
            f"The temperature of {task.title.lower()} was not saved; run the evaluation again to see its calibration."
        )
        for name, task in tasks.items()
        if _has_probabilities(table, task) and f"temperature_{name}" not in table and table[name].notna().any()
    ]
    blocks += [
        Missing(
            f"The tested faces are labelled with ranges of {name.replace('_', ' ')} only, with which an age "
            "distribution is neither calibrated nor checked."
            + (" Its temperature is 1." if table[f"temperature_{name}"].iloc[0] == 1 else "")
        )
        for name, task in tasks.items()
        if f"temperature_{name}" in table
        and not table[name].notna().any()
        and not np.isnan(label_ends(table, task)[0]).all()
    ]
    if not len(measured):
        return Section(
            "calibration",
            "Calibration",
            blocks or [Missing("No labelled face has predicted probabilities, so calibration cannot be checked.")],
        )
    if (measured["temperature"] == 1).all():
        blocks.append(Missing("No temperatures were fitted for this model, so before and after are the same."))
    of_classes = measured["task"].isin([task.name for task in classifications(tasks.values())])
    for some, measures in (
        (measured[of_classes], {"ece": "calibration error (ECE)", "nll": "neg. log likelihood (nats)"}),
        (measured[~of_classes], {"coverage": "ages in their 90 % interval", "width": "interval width (years)"}),
    ):
        shown = [
            _reliability(table, task, some) for task in classifications(tasks.values()) if task.name in {*some["task"]}
        ]
        blocks += [Figures(shown)] if shown else []
        if len(some):
            names = listed([tasks[name].title.lower() for name in some["task"].unique()])
            blocks.append(
                Table(
                    f"Temperature scaling of {names}",
                    ["task", "temperature", *measures.values(), "faces"],
                    _rows(some, tasks, *measures),
                )
            )
    blocks.append(
        Text(
            "The temperature divides the logits. It was fitted on the validation faces and changes no predicted "
            "class. Above 1, the model was overconfident; below 1, underconfident. ECE is the mean distance between "
            f"confidence and accuracy over {BINS} bins of confidence."
        )
    )
    return Section("calibration", "Calibration", blocks)


def _has_probabilities(table: pd.DataFrame, task: Classification | Age) -> bool:
    wanted = f"{task.name}_low" if isinstance(task, Age) else f"{task.name}_predicted"
    return wanted in table


def _rows(measured: pd.DataFrame, tasks: Tasks, first: str, second: str) -> list[list[Content]]:
    rows: list[list[Content]] = []
    for row in measured.to_dict("records"):
        key = f"calibration/{row['task']}/{row['stage']}"
        temperature = Number(f"{key}/temperature", row["temperature"], f"{row['temperature']:.3f}")
        one = share(f"{key}/{first}", row[first], 2 if first == "ece" else 1)
        two = Number(f"{key}/{second}", row[second], f"{row[second]:.4f}" if second == "nll" else f"{row[second]:.1f}")
        rows.append(
            [
                f"{tasks[row['task']].title}, {row['stage']} scaling",
                temperature,
                one,
                two,
                count(f"{key}/faces", row["faces"]),
            ]
        )
    return rows


def _reliability(table: pd.DataFrame, task: Classification, measured: pd.DataFrame) -> Figure:
    errors = measured[measured["task"] == task.name].set_index("stage")["ece"].to_dict()
    before, after = (share(f"calibration/{task.name}/{stage}/ece", errors[stage], 2) for stage in ("before", "after"))
    caption = sentence(
        "Confidence and accuracy differ by {} on average before scaling and by {} after. On the dotted line they are "
        "equal. The lower panel counts faces by confidence.",
        before, after,
    )  # fmt: skip
    drawing = figures.reliability_diagram(table, task)
    return figure(drawing, f"reliability-{task.name}", f"{task.title}: reliability", caption)
