"""The page about many runs, in Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from facecls.analysis.scores import scores_of
from facecls.data.sources import roots_of
from facecls.data.split import split_files, split_seed_of
from facecls.data.tasks import ages
from facecls.errors import UserError
from facecls.files import replacing
from facecls.results.contenders import Contender
from facecls.results.values import (
    CORAL_AGES,
    NONE,
    Stage,
    all_tasks,
    error_between,
    group_values,
    spread,
    value,
    worst,
)
from facecls.run import Trial

MARK = "<!-- What is below this line is written by hand, and stays. -->"
"""Ends what the command writes, and replaces when it writes the page again."""
_HEAD = """# Results

Written by `python -m facecls.results` from what runs left. A number of several runs, which differ in the seed, is the
mean \N{PLUS-MINUS SIGN} standard deviation (lowest to highest).
"""
_Column = tuple[str, str, Callable[[Trial], float]]
"""Heading, unit, and the value of a run."""


def markdown(contenders: Sequence[Contender], baseline: Contender | None, changed: Sequence[Contender]) -> str:
    """The page without what is written by hand.

    Args:
        contenders: The runs to report.
        baseline: The runs whose changes are listed; ``None`` for none.
        changed: Runs with other options than those, named by the difference.

    Returns:
        Markdown.
    """
    parts = [_HEAD]
    if contenders:
        parts += ["## Scores of the test", _scores(contenders)]
        parts += ["## Worst groups", _worst_groups(contenders), "## How they were made", _facts(contenders)]
    if baseline is not None:
        parts += ["## One change at a time", _changes(baseline, changed)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_page(dest: Path, text: str) -> Path:
    """Writes the page, with what is written by hand in the one that it replaces.

    Args:
        dest: Path of the file; one that exists must have the line ``MARK``.
        text: As ``markdown`` returns it.

    Returns:
        ``dest``.

    Raises:
        UserError: If the file is another one, or can't be read or written.
    """
    kept = "\n"
    if dest.exists():
        try:
            _, mark, kept = dest.read_text(encoding="utf-8").partition(MARK)
        except (OSError, UnicodeDecodeError):
            mark = ""
        if not mark:
            raise UserError(
                f"Expected {dest} to be a page of facecls.results, with the line {MARK}, but it is not; add the line "
                "above what is to stay, or name another file with --out."
            )
    with replacing(dest) as part:
        part.write_text(f"{text}\n{MARK}{kept}", encoding="utf-8")
    return dest


def _columns(contenders: Sequence[Contender], stage: Stage) -> list[_Column]:
    """The scores of all tasks that some run has."""
    trials = [trial for contender in contenders for trial in contender.trials]
    tasks = all_tasks(trials)
    columns: list[_Column] = []
    for name, score in scores_of(tasks).items():
        heading = f"{score.title} (%)" if score.unit == "share" else score.heading
        columns.append((heading, score.unit, lambda trial, name=name: value(trial, stage, name)))  # type: ignore[misc]
    first, last = CORAL_AGES
    for age in ages(tasks.values()) if stage == "test" else ():
        heading = f"{age.title}: error from {first} to {last} (years)"
        columns.append((heading, "years", lambda trial, age=age: error_between(trial, age.name, first, last)))  # type: ignore[misc]
    return [column for column in columns if not all(math.isnan(column[2](trial)) for trial in trials)]


def _scores(contenders: Sequence[Contender]) -> str:
    columns = _columns(contenders, "test")
    rows = [
        [
            contender.name,
            _count(contender, columns),
            *(spread(map(of, contender.trials), unit) for _, unit, of in columns),
        ]
        for contender in contenders
    ]
    note = "With one label a face, accuracy is micro F1."
    return f"{_table(['recipe', 'runs', *(heading for heading, _, _ in columns)], rows)}\n\n{note}"


def _count(contender: Contender, columns: Sequence[_Column]) -> str:
    """How many runs there are, and how many of them have results."""
    tested = sum(any(not math.isnan(of(trial)) for _, _, of in columns) for trial in contender.trials)
    return f"{tested} of {len(contender.trials)}" if tested < len(contender.trials) else str(tested)


def _worst_groups(contenders: Sequence[Contender]) -> str:
    """For each recipe and task, the worst group of each axis."""
    rows: list[tuple[str, str, Mapping[str, str]]] = []
    for contender in contenders:
        groups = [group_values(trial) for trial in contender.trials if trial.predictions is not None]
        for name, score in scores_of(all_tasks(contender.trials)).items():
            of_score = [each[name] for each in groups if name in each]
            cells = {
                axis: f"{group}: {spread(values, score.unit)}"
                for axis, (group, values) in worst(of_score, score.higher_is_better).items()
            }
            if cells:
                heading = f"{score.title} (%)" if score.unit == "share" else score.heading
                rows.append((contender.name, heading, cells))
    axes = list(dict.fromkeys(axis for _, _, cells in rows for axis in cells))
    if not axes:
        return "No run has the predictions of enough faces of two groups."
    head = ["recipe", "score", *(f"by {axis.replace('_', ' ')}" for axis in axes)]
    note = (
        "Of the groups of faces by each label, the one with the worst score. By its own label a task's accuracy is the "
        "recall of a class."
    )
    table = [[name, score, *(cells.get(axis, NONE) for axis in axes)] for name, score, cells in rows]
    return f"{_table(head, table)}\n\n{note}"


def _facts(contenders: Sequence[Contender]) -> str:
    head = ["recipe", "faces seen", "minutes", "device", "data", "faces (train, val, test)", "split"]
    rows = []
    for contender in contenders:
        seen, *others = [
            ", ".join(dict.fromkeys(map(fact, contender.trials))) for fact in (_seen, _device, _source, _sizes, _split)
        ]
        rows.append([contender.name, seen, _minutes(contender.trials), *others])
    return _table(head, rows)


def _seen(trial: Trial) -> str:
    """Faces that the trunk was trained on; a probe's trunk passes once, and others may start from its heads."""
    if trial.config.get("probe") is True:
        return f"{trial.metrics['faces/train']:,} once" if "faces/train" in trial.metrics else NONE
    if "faces_seen" not in trial.metrics:
        return NONE
    heads = trial.config.get("heads")
    return f"{trial.metrics['faces_seen']:,}" + (f", from the heads of {heads}" if isinstance(heads, str) else "")


def _minutes(trials: Sequence[Trial]) -> str:
    seconds = [trial.metrics["seconds"] for trial in trials if trial.metrics.get("seconds") is not None]
    if not seconds:
        return NONE
    more = "more than " if any(trial.metrics.get("resumed") for trial in trials) else ""  # known since then only
    return f"{more}{mean(seconds) / 60:.1f}"


def _device(trial: Trial) -> str:
    return str(trial.metrics.get("device", NONE))


def _source(trial: Trial) -> str:
    return " and ".join(Path(root).name for root in roots_of(trial.data.get("root", NONE)))


def _sizes(trial: Trial) -> str:
    counts = [trial.metrics.get(f"faces/{part}", 0) for part in ("train", "val", "test")]
    if held_out := trial.metrics.get("faces/holdout"):  # validates and is tested
        counts[1:] = [held_out, held_out]
    return " / ".join(f"{count:,}" for count in counts) if any(counts) else NONE


def _split(trial: Trial) -> str:
    files = split_files(trial.data.get("split_file"))
    if files:
        return " and ".join(Path(file).name for file in files)
    return f"seed {split_seed_of(trial.data, trial.config.get('seed_everything', NONE))}"


def _changes(baseline: Contender, changed: Sequence[Contender]) -> str:
    contenders = [baseline, *changed]
    parts = [f"What differs from the options of {_cell(baseline.name)}, and by how much the mean is above its own."]
    titles: dict[Stage, str] = {"val": "Validation, at the epoch that is kept", "test": "Test"}
    for stage, title in titles.items():
        columns = _columns(contenders, stage)
        known = [each for each in changed if any(_change(each, None, column) != NONE for column in columns)]
        if not known:
            continue
        rows = [[baseline.name, _finished(baseline), *(_change(baseline, None, column) for column in columns)]]
        rows += [
            [each.name, _finished(each), *(_change(each, baseline, column) for column in columns)] for each in known
        ]
        parts += [f"### {title}", _table(["change", "runs", *(heading for heading, _, _ in columns)], rows)]
    return "\n\n".join(parts)


def _finished(contender: Contender) -> str:
    """How many runs there are, and how many epochs are done of each untested run that is unfinished."""
    parts = [str(len(contender.trials))]
    for trial in contender.trials:
        losses, epochs, options = trial.scalars.get("val/loss"), trial.scalars.get("epoch"), trial.config.get("trainer")
        if trial.metrics or losses is None or epochs is None or not isinstance(options, dict):
            continue
        done, end = int(epochs.get(losses.index[-1], -1)) + 1, options.get("max_epochs")
        every, steps = options.get("check_val_every_n_epoch"), options.get("max_steps")
        to_come = every if isinstance(every, int) else 1  # epochs up to the next validation
        if isinstance(end, int) and steps in (None, -1) and done + to_come <= end:
            parts.append(f"after {done} of {end} epochs")
    return ", ".join(parts)


def _change(contender: Contender, baseline: Contender | None, column: _Column) -> str:
    _, unit, of = column
    values = list(map(of, contender.trials))
    text = spread(values, unit, with_range=False)
    if baseline is None or text == NONE:
        return text
    before = [known for known in map(of, baseline.trials) if not math.isnan(known)]
    if not before:
        return text
    more = mean(known for known in values if not math.isnan(known)) - mean(before)
    return f"{text}, {100 * more:+.1f}" if unit == "share" else f"{text}, {more:+.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A text of a run as a cell: neither a bar nor markup in it ends or changes the table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
