"""Section about calibration: whether predicted probabilities match observed frequencies."""

import pandas as pd

from facecls.analysis.calibration import BINS, calibration_table
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
    heading,
    listed,
    share,
    sentence,
)


def calibration(table: pd.DataFrame, tasks: Tasks) -> Section:
    """Whether predicted probabilities match observed frequencies.

    Args:
        table: Predictions.
        tasks: The tasks of the run.
    """
    found = calibration_table(table, tasks)
    blocks: list[Block] = [
        Missing(f"The temperature of {name} was not saved; run the evaluation again to see its calibration.")
        for name, task in tasks.items()
        if _has_probabilities(table, task) and f"temperature_{name}" not in table and table[name].notna().any()
    ]
    if not len(found):
        return Section(
            "calibration", "Calibration", blocks or [Missing("There are no labelled probabilities to check.")]
        )
    if (found["temperature"] == 1).all():
        blocks.append(Missing("No temperatures were fitted for this model, so before and after are the same."))
    of_classes = found["task"].isin([task.name for task in classifications(tasks.values())])
    for some, measures in (
        (found[of_classes], {"ece": "calibration error (ECE)", "nll": "neg. log likelihood (nats)"}),
        (found[~of_classes], {"coverage": "ages in their 90 % interval", "width": "interval width (years)"}),
    ):
        shown = [
            _reliability(table, task, some) for task in classifications(tasks.values()) if task.name in {*some["task"]}
        ]
        blocks += [Figures(shown)] if shown else []
        if len(some):
            names = listed(some["task"].unique().tolist())
            blocks.append(
                Table(
                    f"Temperature scaling of {names}",
                    ["task", "temperature", *measures.values(), "faces"],
                    _rows(some, *measures),
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


def _rows(found: pd.DataFrame, first: str, second: str) -> list[list[Content]]:
    rows: list[list[Content]] = []
    for row in found.to_dict("records"):
        key = f"calibration/{row['task']}/{row['stage']}"
        temperature = Number(f"{key}/temperature", row["temperature"], f"{row['temperature']:.3f}")
        one = share(f"{key}/{first}", row[first], 2 if first == "ece" else 1)
        two = Number(f"{key}/{second}", row[second], f"{row[second]:.4f}" if second == "nll" else f"{row[second]:.1f}")
        rows.append([f"{row['task']}, {row['stage']}", temperature, one, two, count(f"{key}/faces", row["faces"])])
    return rows


def _reliability(table: pd.DataFrame, task: Classification, found: pd.DataFrame) -> Figure:
    errors = found[found["task"] == task.name].set_index("stage")["ece"].to_dict()
    before, after = (share(f"calibration/{task.name}/{stage}/ece", errors[stage], 2) for stage in ("before", "after"))
    caption = sentence(
        "Confidence and accuracy differ by {} on average before scaling and by {} after. On the dotted line they are "
        "equal. The lower panel counts faces by confidence.",
        before, after,
    )  # fmt: skip
    drawing = figures.reliability_diagram(table, task)
    return figure(drawing, f"reliability-{task.name}", f"{heading(task.name)}: reliability", caption)
