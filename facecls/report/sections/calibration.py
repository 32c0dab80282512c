"""Calibration: whether probabilities mean what they say."""

import pandas as pd

from facecls.analysis.calibration import BINS, calibration_table
from facecls.analysis.tables import tested_tasks
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
    Text,
    count,
    drawn,
    share,
    words,
)


def calibration(table: pd.DataFrame) -> Section:
    """Whether probabilities mean what they say."""
    found = calibration_table(table)
    missing = [
        Missing(
            f"The predictions of {task} were kept without their temperature; evaluate again to see their calibration."
        )
        for task in tested_tasks(table)
        if f"temperature_{task}" not in table and (task != "age" or "age_low" in table)
    ]
    if not len(found):
        return Section("Calibration", missing or [Missing("There are no probabilities with labels to check them by.")])
    shown = [_reliability(table, task, found) for task in CLASSES if task in set(found["task"])]
    classes, ages = found[found["task"] != "age"], found[found["task"] == "age"]
    blocks: list[Block] = [*missing, *([Figures(shown)] if shown else [])]
    if len(classes):
        head = ["task", "temperature", "calibration error (ECE)", "neg. log likelihood (nats)", "faces"]
        blocks.append(Table("Gender and race: temperature scaling", head, _rows(classes, "ece", "nll")))
    if len(ages):
        head = ["task", "temperature", "ages in their 90 % interval", "its width (years)", "faces"]
        blocks.append(Table("Age: temperature scaling", head, _rows(ages, "coverage", "width")))
    blocks.append(
        Text(
            "A temperature divides the logits; it was fitted on validation faces and changes no decision. Above 1 the "
            f"model was too sure of itself, below 1 not sure enough. ECE is the mean distance between confidence and "
            f"the share that is right, over {BINS} bins of confidence."
        )
    )  # fmt: skip
    if (found["temperature"] == 1).all():
        blocks.insert(0, Missing("No temperatures were fitted for this model, so before and after are the same."))
    return Section("Calibration", blocks)


def _rows(found: pd.DataFrame, first: str, second: str) -> list[list[Content]]:
    rows: list[list[Content]] = []
    for row in found.to_dict("records"):
        key = f"calibration/{row['task']}/{row['stage']}"
        temperature = Number(f"{key}/temperature", row["temperature"], f"{row['temperature']:.3f}")
        one = share(f"{key}/{first}", row[first], 2 if first == "ece" else 1)
        two = Number(f"{key}/{second}", row[second], f"{row[second]:.4f}" if second == "nll" else f"{row[second]:.1f}")
        rows.append([f"{row['task']}, {row['stage']}", temperature, one, two, count(f"{key}/faces", row["faces"])])
    return rows


def _reliability(table: pd.DataFrame, task: Task, found: pd.DataFrame) -> Figure:
    errors = found[found["task"] == task].set_index("stage")["ece"].to_dict()
    before, after = (share(f"calibration/{task}/{stage}/ece", errors[stage], 2) for stage in ("before", "after"))
    caption = words(
        "Confidence and the share that is right differ by {} on average before scaling and by {} after. On the dotted "
        "line they would be equal; below, faces by confidence.",
        before, after,
    )  # fmt: skip
    return drawn(
        figures.reliability_diagram(table, task), f"reliability-{task}", f"{task.capitalize()}: reliability", caption
    )
