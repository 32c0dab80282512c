"""Summary: how good the model is, and what it was made with."""

from collections.abc import Mapping

import pandas as pd

from facecls.analysis.scores import SCORES, Interval, trivial
from facecls.analysis.tables import parts, tested_tasks, why_untested
from facecls.data.tasks import TASKS
from facecls.report.blocks import (
    NONE,
    Block,
    Content,
    Fold,
    Missing,
    Section,
    Table,
    Text,
    count,
    score,
    score_interval,
    words,
)
from facecls.run import Run

NOTEBOOK: dict[bool, dict[str, float]] = {
    True: {"gender/accuracy": 0.944, "race/accuracy": 0.875, "age/mae_years": 7.38},
    False: {"gender/accuracy": 0.9407, "race/accuracy": 0.8752},
}
"""What the notebook that this project started from reports, with several tasks in one model and with one alone; on its
own split of UTKFace, 18,946 faces to train with and 4,759 to validate with, at the best epoch by those."""


def summary(run: Run, scores: Mapping[str, Interval]) -> Section:
    """How good the model is, and what it was made with."""
    blocks: list[Block] = [Text(_in_a_sentence(run.predictions, scores))]
    blocks += [
        Missing(why_untested(run.predictions, task)) for task in TASKS if task not in tested_tasks(run.predictions)
    ]
    if learned := int((run.predictions["split"] == "train").sum()):
        sentence = "The model was trained with {} of these faces, so it may do worse on others."
        blocks.append(Text(words(sentence, count("faces/tested_and_trained", learned))))
    if scores:
        blocks += _score_table(run, scores)
    blocks.append(_facts(run))
    if run.config_text:
        blocks.append(Fold("Configuration", run.config_text))
    else:
        blocks.append(Missing("The configuration is unknown, as there is no config.yaml beside the predictions."))
    return Section("Summary", blocks)


def _in_a_sentence(table: pd.DataFrame, scores: Mapping[str, Interval]) -> Content:
    sentences = {
        "gender/accuracy": "gender is right for {}",
        "race/accuracy": "race is right for {}",
        "age/mae_years": "age is {} years off on average",
    }
    said = [
        words(sentence, score(f"score/{name}", scores[name].value))
        for name, sentence in sentences.items()
        if name in scores
    ]
    start = words("{} faces were tested.", count("faces/tested", len(table)))
    return words("{} Of those with a label, {}.", start, words(", ").join(said)) if said else start


def _score_table(run: Run, scores: Mapping[str, Interval]) -> list[Block]:
    reference, whose = (run.train, "training") if len(run.train) else (run.predictions, "tested")
    guesses = trivial(run.predictions, reference)
    reported = NOTEBOOK[len(tested_tasks(run.predictions)) > 1] if run.of_utkface else {}
    rows: list[list[Content]] = []
    for name, found in scores.items():
        row: list[Content] = [SCORES[name].heading]
        row.append(score_interval(f"score/{name}", found.value, found.low, found.high))
        row.append(score(f"trivial/{name}", guesses[name]) if name in guesses else NONE)
        if reported:
            row.append(score(f"notebook/{name}", reported[name]) if name in reported else NONE)
        rows.append([*row, count(f"score/{name}/faces", found.faces)])
    head = [
        "score",
        "this model (95 % interval)",
        "trivial guess",
        *(["original notebook"] if reported else []),
        "faces",
    ]
    note = (
        "Intervals show what another draw of as many faces might give (bootstrap over faces). The trivial guess is "
        f"always the commonest class and the median age of the {whose} faces."
    )
    if reported:
        note += (
            " The original notebook's numbers are those that it reports on its own split of UTKFace, on faces that also"
            " chose its best epoch, so they compare only roughly."
        )
    return [Table("Scores", head, rows), Text(note)]


def _facts(run: Run) -> Table:
    metrics = run.metrics
    rows: list[list[Content]] = []

    def add(name: str, value: Content | None) -> None:
        if value:
            rows.append([name, value])

    add("Run", str(run.folder))
    add("Data", str(run.data.get("root", "")))
    sizes = parts(run.faces if run.faces is not None else run.predictions)
    add("Faces", words(", ").join(words("{} {}", count(f"faces/{name}", size), name) for name, size in sizes.items()))
    add("Rejects", None if run.rejects is None else count("rejects", len(run.rejects)))
    add("Checkpoint", metrics.get("checkpoint"))
    add(
        "Trained for", f"{metrics['epochs']} epochs, {metrics.get('steps', 0):,} steps" if "epochs" in metrics else None
    )
    since = " since it was resumed" if metrics.get("resumed") else ""
    add("Time", _duration(metrics["seconds"]) + since if "seconds" in metrics else None)
    add("Device", metrics.get("device"))
    add("Precision", metrics.get("precision"))
    versions = {"facecls": metrics.get("version"), **metrics.get("versions", {})}
    add("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    add("Commit", metrics.get("git_commit"))
    return Table("How it was made", [], rows, words=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
