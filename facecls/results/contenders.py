"""Which runs belong together: those whose options differ in the seed alone."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError
from facecls.files import resolved
from facecls.model.module import FaceModule
from facecls.model.schedule import Schedule
from facecls.report.sections.comparison import flat_options
from facecls.run import CONFIG, Trial, read_trial

SEEDS = ("seed_everything", "data.seed")
_NOT_COMPARED = (
    *SEEDS,
    "name",
    "ckpt_path",
    "data.num_workers",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.precision",
)
"""Options that do not change what is learned, or only by chance. A path of a checkpoint is what a run went on from."""
_TESTED = ("trainer.limit_test_batches", ("null", "0"))
"""An option that does not change it either, and its values for the whole test and for none; part of one is another."""


class Contender(NamedTuple):
    """Runs of one recipe.

    Attributes:
        name: Unlike that of others.
        trials: The runs, which differ in their seeds.
    """

    name: str
    trials: Sequence[Trial]


def read_trials(folders: Iterable[Path]) -> list[Trial]:
    """Reads runs.

    Args:
        folders: Each that of a run, or one that has folders of runs in it, such as ``runs/base``.

    Returns:
        The runs, each once, in the order of the folders.

    Raises:
        UserError: If there is none in a folder, or one can't be read.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = [folder] if (folder / CONFIG).is_file() else sorted(file.parent for file in folder.rglob(CONFIG))
        if not inside:
            raise UserError(
                f"Expected the folder of a run with {CONFIG}, or one with such folders in it, but {folder} is neither; "
                "facecls.fit leaves them in runs/NAME/version_N."
            )
        found |= {resolved(each): each for each in inside}
    return [read_trial(folder) for folder in found.values()]


def group(trials: Sequence[Trial]) -> list[Contender]:
    """Groups runs by their options but for seeds; a contender is called as its runs are.

    Args:
        trials: The runs.

    Returns:
        In the order of their first runs. Where several contenders have one name, what they differ in stands after it.
    """
    groups: dict[tuple[str, frozenset[tuple[str, str]]], list[Trial]] = {}
    for trial in trials:
        name = str(trial.config.get("name", resolved(trial.folder).parent.name))
        groups.setdefault((name, frozenset(_options(trial).items())), []).append(trial)
    contenders = []
    for (name, options), some in groups.items():
        of_name = [dict(others) for other, others in groups if other == name]
        differing = sorted({option for other in of_name for option, _ in set(other.items()) ^ options})
        said = _said(dict(options), differing)
        contenders.append(Contender(f"{name} ({said})" if said else name, some))
    return contenders


def changes(trials: Sequence[Trial], baseline: Trial) -> list[Contender]:
    """Groups runs by what differs from the options of another one, which names them.

    Args:
        trials: The runs; those with the options of the baseline are left out.
        baseline: What they are compared with.

    Returns:
        In the order of their first runs.

    Examples:
        A run with ``--model.dropout 0.4`` is called ``model.dropout 0.4``.
    """
    start = _options(baseline)
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        options = _options(trial)
        differing = sorted({option for option, _ in set(options.items()) ^ set(start.items())})
        groups.setdefault(_said(options, differing), []).append(trial)
    return [Contender(name, some) for name, some in groups.items() if name]


def _options(trial: Trial) -> dict[str, str]:
    """The options of a run by name; those that there were not yet have their defaults, which change nothing."""
    own = dict(flat_options(trial.config))
    missing = {option: value for option, value in _defaults() if not any(each.startswith(f"{option}.") for each in own)}
    return {
        option: value
        for option, value in (missing | own).items()
        if option not in _NOT_COMPARED and not option.startswith("limits.")
        if not (option == _TESTED[0] and value in _TESTED[1])
    }


@cache
def _defaults() -> Sequence[tuple[str, str]]:
    """All options of the model and of the data with their defaults."""
    kinds: dict[str, type] = {"model": FaceModule, "model.schedule": Schedule, "data": FacesDataModule}
    options: dict[str, Any] = {"heads": None, "restore_batchnorm": False} | {
        f"{part}.{name}": parameter.default
        for part, kind in kinds.items()
        for name, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, str | int | float | list | None)
    }
    return list(flat_options(options))


def _said(options: Mapping[str, str], chosen: Sequence[str]) -> str:
    """Such as ``ema null, model.dropout 0.4``; ``without`` where an option is one that others have.

    Options of an object that other runs have are left out where the run's own value in its place is named.
    """

    def is_said(name: str) -> bool:
        parts = name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts))}
        return name in options or not (above & {*options} or any(each.startswith(f"{name}.") for each in options))

    said = filter(is_said, chosen)
    return ", ".join(f"{name} {options[name]}" if name in options else f"without {name}" for name in said)
