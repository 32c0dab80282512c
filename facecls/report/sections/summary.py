"""Section that sums up: the verdict, all scores, and how the model was made."""

from collections.abc import Mapping, Sequence

from facecls.analysis.scores import Interval, constant_guesses, scores_of
from facecls.analysis.tables import parts, tested_tasks
from facecls.data.tasks import UTKFACE
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
    listed,
    score,
    score_interval,
    sentence,
)
from facecls.report.sections.untested import untested
from facecls.run import CONFIG, Run

NOTEBOOK: dict[bool, dict[str, float]] = {
    True: {"gender/accuracy": 0.944, "race/accuracy": 0.875, "age/mae_years": 7.38},
    False: {"gender/accuracy": 0.9407, "race/accuracy": 0.8752},
}
"""Scores reported by the notebook that this project started from, of a model with several tasks and of models with
one; on its own split of UTKFace (18,946 faces for training, 4,759 for validation), at the epoch that was best on the
latter."""


def summary(
    run: Run, verdict: Sequence[Block], scores: Mapping[str, Interval], guesses: Mapping[str, float]
) -> Section:
    """The verdict, all scores, and how the model was made.

    Args:
        run: The run.
        verdict: As ``verdict`` returns it.
        scores: As ``analysis.scores.score`` returns them.
        guesses: As ``analysis.scores.trivial`` returns them.
    """
    blocks = list(verdict)
    tested = tested_tasks(run.predictions, run.tasks)
    blocks += [untested(run.predictions, task) for task in run.tasks.values() if task not in tested]
    if learned := int((run.predictions["split"] == "train").sum()):
        text = "The model was trained on {} of the tested faces, so it may do worse on new ones."
        blocks.append(Text(sentence(text, count("faces/tested_and_trained", learned))))
    if scores:
        blocks += _scores(run, scores, guesses)
    blocks.append(_facts(run))
    if run.config_text:
        blocks.append(Fold("Configuration", run.config_text))
    else:
        blocks.append(Missing(f"The configuration is unknown, because there is no {CONFIG} beside the predictions."))
    return Section("summary", "Summary", blocks)


def _scores(run: Run, scores: Mapping[str, Interval], guesses: Mapping[str, float]) -> list[Block]:
    known, reported = scores_of(run.tasks), _notebook_scores(run)
    rows: list[list[Content]] = []
    for name, interval in scores.items():
        unit = known[name].unit
        row: list[Content] = [known[name].heading]
        row.append(score_interval(f"score/{name}", interval.value, interval.low, interval.high, unit))
        row.append(score(f"trivial/{name}", guesses[name], unit) if name in guesses else NONE)
        if reported:
            row.append(score(f"notebook/{name}", reported[name], unit) if name in reported else NONE)
        rows.append([*row, count(f"score/{name}/faces", interval.faces)])
    columns = ["this model (95 % interval)", "constant guess", *(["original notebook"] if reported else []), "faces"]
    note = (
        "The intervals show how much the scores would vary with another sample of as many faces (bootstrap over "
        f"faces). {_about_guesses(run)}"
    )
    if reported:
        note += (
            " The original notebook's scores are from its own split of UTKFace, on the faces that also chose its best "
            "epoch, so they are only roughly comparable."
        )
    return [Table("Scores", ["score", *columns], rows), Text(note)]


def _about_guesses(run: Run) -> str:
    """What the constant guesses are, and which faces they come from."""
    tested = {task.name for task in tested_tasks(run.predictions, run.tasks)}
    titles: dict[bool, dict[str, list[Content]]] = {True: {}, False: {}}
    for name, guess in constant_guesses(run.predictions, run.train, run.tasks).items():
        if name in tested:
            titles[guess.from_reference].setdefault(guess.description, []).append(run.tasks[name].title.lower())
    said = [
        f"{listed([f'the {description} for {listed(names)}' for description, names in some.items()])} (from the "
        f"{'training' if from_training else 'tested'} faces)"
        for from_training, some in titles.items()
        if some
    ]
    return f"The constant guess is {'; '.join(said)}."


def _notebook_scores(run: Run) -> dict[str, float]:
    """The original notebook's scores of tasks with the same labels, if the tested faces are UTKFace's."""
    if not run.is_utkface:
        return {}
    reported = NOTEBOOK[len(tested_tasks(run.predictions, run.tasks)) > 1]
    same = {name for name, task in run.tasks.items() if task == UTKFACE.get(name)}
    return {name: value for name, value in reported.items() if name.split("/")[0] in same}


def _facts(run: Run) -> Table:
    metrics = run.metrics
    rows: list[list[Content]] = []

    def add(name: str, value: Content | None) -> None:
        if value:
            rows.append([name, value])

    add("Run", str(run.folder))
    add("Data", str(run.data.get("root", "")))
    sizes = parts(run.faces if run.faces is not None else run.predictions)
    add(
        "Faces",
        sentence(", ").join(sentence("{} {}", count(f"faces/{name}", size), name) for name, size in sizes.items()),
    )
    add("Rejected files", None if run.rejects is None else count("rejects", len(run.rejects)))
    add("Checkpoint", metrics.get("checkpoint"))
    epochs = metrics.get("epochs")
    add("Training", f"{epochs} epoch{'s' * (epochs != 1)}, {metrics.get('steps', 0):,} steps" if epochs else None)
    since = " since it was resumed" if metrics.get("resumed") else ""
    add("Time", _duration(metrics["seconds"]) + since if "seconds" in metrics else None)
    add("Device", metrics.get("device"))
    add("Precision", metrics.get("precision"))
    versions = {"facecls": metrics.get("version"), **metrics.get("versions", {})}
    add("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    add("Commit", metrics.get("git_commit"))
    return Table("How it was made", [], rows, wraps=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
