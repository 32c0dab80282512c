"""The folder of a run: what lies in it, written and read.

Every file name of a run stands here and nowhere else.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from facecls import plain_yaml
from facecls.data.file_names import parse_name
from facecls.data.parsing import LabelError
from facecls.data.sources import is_drawn, roots_of
from facecls.data.spreadsheets import csv_text, unquoted
from facecls.data.tasks import UTKFACE, Age, Tasks, classifications, create_tasks
from facecls.errors import UserError
from facecls.events import read_scalars
from facecls.files import make_folder, replacing, resolved

CONFIG = "config.yaml"
"""The options."""
FACES, REJECTS, UNREAD = "faces.parquet", "rejects.csv", "unread_labels.csv"
"""All faces of the data with labels and splits; the files that are not used, and why."""
METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
"""The results of the test with the tasks, and one row per tested face."""
REPORT, SUSPECTS, COMPARISON, CARD = "report.html", "suspects.csv", "compare.html", "model_card.md"
"""The report, the labels worth checking, the comparison with other runs, and the card of the model."""
BEST_CHECKPOINT, LAST_CHECKPOINT = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
"""The model with the lowest validation loss, and the state to resume from."""
EARLIER = "earlier_"
"""Before the names of results of a run's state before it was resumed."""
LOCK = "run.lock"
"""There while the run is written."""

_FACE_COLUMNS = ("path", "sha1", "split")
_UNREAD_COLUMNS = ("path", "label", "text", "reason")
_METRIC_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("checkpoint", "device", "precision", "version", "git_commit"), (str,)),
    **dict.fromkeys(("epochs", "faces_seen", "steps"), (int,)),
    "resumed": (bool,),
    "seconds": (int, float),
    "versions": (dict,),
}
_CONFIG_KINDS: Mapping[str, tuple[type, ...]] = {"seed_everything": (int,), "data": (dict,)}
_DATA_KINDS: Mapping[str, tuple[type, ...]] = {
    "root": (str, list),
    "seed": (int,),
    "split_seed": (int,),
    "image_size": (int,),
    "split_file": (str, dict),
}
"""What is read of the metrics and the options, and what it must be, if it is there."""


@dataclass(frozen=True)
class Run:
    """A run, as read from its folder.

    Attributes:
        folder: Its folder.
        predictions: One row per tested face.
        faces: One row per face of the data, tested or not; ``None`` if the file is missing.
        rejects: ``path`` and ``reason`` of each file not used; ``None`` if the file is missing.
        unread: ``path``, ``label``, ``text`` and ``reason`` of each label that was left out.
        metrics: Contents of ``metrics.json``; empty if the file is missing.
        config: The options; empty if the file is missing.
        config_text: The options as they were written.
        scalars: Logged values by tag, each indexed by training step.
        configured_tasks: All tasks of its data.
    """

    folder: Path
    predictions: pd.DataFrame
    faces: pd.DataFrame | None
    rejects: pd.DataFrame | None
    unread: pd.DataFrame
    metrics: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    scalars: dict[str, "pd.Series[float]"]
    configured_tasks: Tasks

    @property
    def name(self) -> str:
        """The folder and its parent, such as ``transfer/version_1``."""
        return "/".join(resolved(self.folder).parts[-2:])

    @property
    def data(self) -> dict[str, Any]:
        """The options of its data."""
        return _data_options(self.config)

    @cached_property
    def tasks(self) -> Tasks:
        """The tasks of its data that were predicted or that some face has a label for."""
        faces = [self.predictions] if self.faces is None else [self.predictions, self.faces]
        return {
            name: task
            for name, task in self.configured_tasks.items()
            if f"{name}_predicted" in self.predictions
            or any(table[column].notna().any() for table in faces for column in task.columns if column in table)
        }

    @property
    def train(self) -> pd.DataFrame:
        """The faces it was trained on; empty if unknown."""
        faces = self.predictions.iloc[:0] if self.faces is None else self.faces
        return faces[faces["split"] == "train"]

    @property
    def is_drawn(self) -> bool:
        """Whether its faces were drawn by ``facecls.data.synthetic``, not photographed."""
        return all(map(is_drawn, roots_of(self.data.get("root", ""))))

    @property
    def is_utkface(self) -> bool:
        """Whether it was tested on photographs that are named as UTKFace names them."""
        return "root" in self.data and not self.is_drawn and all(map(_has_utkface_name, self.predictions["path"]))


@dataclass(frozen=True)
class Trial:
    """What a run says about itself, whether it was tested or not.

    Attributes:
        folder: Its folder.
        config: The options.
        metrics: Contents of ``metrics.json``; empty without a test.
        scalars: Logged values by tag, each indexed by training step.
        predictions: One row per tested face; ``None`` if the file is missing.
        tasks: All tasks of its data, or those that were predicted or labelled, if there are predictions.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    scalars: dict[str, "pd.Series[float]"]
    predictions: pd.DataFrame | None
    tasks: Tasks

    @property
    def data(self) -> dict[str, Any]:
        """The options of its data."""
        return _data_options(self.config)


def write_faces(folder: Path, faces: pd.DataFrame, rejects: pd.DataFrame, unread: pd.DataFrame, tasks: Tasks) -> None:
    """Writes all faces of the data, the files that are not used, and the labels that are not, if there are any.

    Args:
        folder: Folder of the run; created if need be.
        faces: With ``path``, ``sha1``, ``split`` and the label columns of the tasks. Columns of age ranges may be
            missing.
        rejects: ``path`` and ``reason``.
        unread: ``path``, ``label``, ``text`` and ``reason``.
        tasks: The tasks of the data.
    """
    make_folder(folder)
    labels = [column for task in tasks.values() for column in task.columns if column in faces]
    with replacing(folder / FACES) as part:
        faces[[*_FACE_COLUMNS, *labels]].to_parquet(part, index=False)
    with replacing(folder / REJECTS) as part:
        part.write_text(csv_text(rejects), encoding="utf-8", newline="")
    if len(unread):
        with replacing(folder / UNREAD) as part:
            part.write_text(csv_text(unread), encoding="utf-8", newline="")


def write_config(folder: Path, text: str) -> None:
    """Writes the options.

    Args:
        folder: Folder of the run; created if need be.
        text: The options as YAML.
    """
    make_folder(folder)
    with replacing(folder / CONFIG) as part:
        part.write_text(text, encoding="utf-8")


def faces_of_training(checkpoint: str | Path) -> pd.DataFrame | None:
    """The faces of the run that a checkpoint lies in.

    Args:
        checkpoint: Such as ``runs/faces/version_0/checkpoints/last.ckpt``.

    Returns:
        As ``write_faces`` wrote them; ``None`` if they are not there.

    Raises:
        UserError: If they can't be read.
    """
    file = resolved(checkpoint).parent.parent / FACES
    return _read_table(file, ()) if file.is_file() else None


def heads_of_run(checkpoint: str | Path) -> str | None:
    """The checkpoint whose heads the run began with that a checkpoint lies in; ``None`` if it is not known.

    Args:
        checkpoint: Such as ``runs/faces/version_0/checkpoints/last.ckpt``.
    """
    heads = _read_mapping(resolved(checkpoint).parent.parent / CONFIG, plain_yaml.load).get("heads")
    return heads if isinstance(heads, str) else None


def write_results(folder: Path, results: Mapping[str, Any], predictions: pd.DataFrame, tasks: Tasks) -> dict[str, Any]:
    """Writes the results of a test.

    Args:
        folder: Folder of the run.
        results: Metrics and facts about the run; plain values.
        predictions: One row per tested face.
        tasks: The tasks of the data, which the codes in the predictions belong to.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        UserError: If a metric is not finite.
    """
    for name, value in results.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"Expected finite results, but {name} is {value:g}; the model is damaged or did not learn.")
    contents = {**results, "tasks": {name: task.options for name, task in tasks.items()}}
    with replacing(folder / PREDICTIONS) as part:
        predictions.to_parquet(part, index=False)
    with replacing(folder / METRICS) as part:
        part.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


def write_suspects(folder: Path, suspects: pd.DataFrame) -> None:
    """Writes the labels worth checking.

    Args:
        folder: Folder of the run.
        suspects: As ``analysis.suspects.suspects`` returns them.
    """
    with replacing(folder / SUSPECTS) as part:
        part.write_text(csv_text(suspects), encoding="utf-8", newline="")


def read_run(folder: Path) -> Run:
    """Reads the folder of a run; every file but the predictions may be missing.

    Args:
        folder: Such as ``runs/faces/version_0``.

    Returns:
        The run.

    Raises:
        UserError: If there are no predictions, or a file cannot be read.
    """
    if not (folder / PREDICTIONS).is_file():
        raise UserError(
            f"Expected the folder of a run with {PREDICTIONS}, but {folder} has none; facecls.fit and "
            "facecls.evaluate leave one in runs/NAME/version_N."
        )
    config, metrics = _read_mapping(folder / CONFIG, plain_yaml.load), _read_mapping(folder / METRICS, json.loads)
    _check_facts(folder, metrics, config)
    tasks = _recorded_tasks(metrics, config)
    predictions = _read_table(folder / PREDICTIONS, tuple(UTKFACE if tasks is None else tasks))
    if not any(str(name).endswith("_predicted") for name in predictions):
        raise UserError(f"Expected predictions in {folder / PREDICTIONS}, but it has none; run the evaluation again.")
    if tasks is None:
        tasks = _utkface_tasks(folder / PREDICTIONS, predictions)
    faces = _read_table(folder / FACES, tuple(tasks)) if (folder / FACES).is_file() else None
    for table, name in ((predictions, PREDICTIONS), (faces, FACES)):
        if table is not None:
            _check_values(table, tasks, folder / name)
    return Run(
        folder=folder,
        predictions=predictions,
        faces=faces,
        rejects=_read_list(folder / REJECTS, ("path", "reason")),
        unread=pd.DataFrame() if (unread := _read_list(folder / UNREAD, _UNREAD_COLUMNS)) is None else unread,
        metrics=metrics,
        config=config,
        config_text=_read_text(folder / CONFIG),
        scalars=read_scalars(folder),
        configured_tasks=tasks,
    )


def set_results_aside(folder: Path) -> list[str]:
    """Renames the results of a run that is resumed: its checkpoints will be others than those that they are of.

    Args:
        folder: Of the run.

    Returns:
        The new names; none if there are no results.

    Raises:
        UserError: If a file can't be renamed.
    """
    aside = []
    for name in (METRICS, PREDICTIONS, REPORT, SUSPECTS, CARD):
        try:
            (folder / name).replace(folder / f"{EARLIER}{name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"Can't rename {folder / name}: {error.strerror}; make {folder} writable.") from None
        aside.append(f"{EARLIER}{name}")
    return aside


def read_trial(folder: Path) -> Trial:
    """Reads what a run says about itself.

    Args:
        folder: Such as ``runs/faces/version_0``, with the options at least.

    Returns:
        The run.

    Raises:
        UserError: If a file cannot be read.
    """
    if (folder / PREDICTIONS).is_file():
        run = read_run(folder)
        return Trial(folder, run.config, run.metrics, run.scalars, run.predictions, run.tasks)
    config, metrics = _read_mapping(folder / CONFIG, plain_yaml.load), _read_mapping(folder / METRICS, json.loads)
    _check_facts(folder, metrics, config)
    tasks = _recorded_tasks(metrics, config)
    return Trial(folder, config, metrics, read_scalars(folder), None, UTKFACE if tasks is None else tasks)


def _check_facts(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Rejects metrics and options of other kinds."""
    numbers: dict[str, tuple[type, ...]] = {
        name: (int, float) for name in metrics if name.startswith(("test/", "faces/"))
    }
    _check_kinds(metrics, {**_METRIC_KINDS, **numbers}, folder / METRICS)
    _check_kinds(config, _CONFIG_KINDS, folder / CONFIG)
    _check_kinds(_data_options(config), _DATA_KINDS, folder / CONFIG)


def _data_options(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config.get("data")
    return data if isinstance(data, dict) else {}


def _recorded_tasks(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> Tasks | None:
    """All tasks of the data, as its files say; ``None`` if none does."""
    for options in (metrics.get("tasks"), _data_options(config).get("tasks")):
        if isinstance(options, dict):
            return create_tasks(options)
    return None


def _utkface_tasks(file: Path, predictions: pd.DataFrame) -> Tasks:
    """The tasks of UTKFace, which version 0.1 did not record, if these are predictions of them."""
    columns = [str(column) for column in predictions]
    known = [task for task in classifications(UTKFACE.values()) if f"{task.name}_predicted" in columns]
    expected = [column for task in known for column in task.probabilities if column in columns]
    predicted = {column.removesuffix("_predicted") for column in columns if column.endswith("_predicted")}
    if [column for column in columns if column.startswith("p_")] != expected or not predicted <= {*UTKFACE}:
        raise UserError(
            f"Expected {METRICS} or {CONFIG} beside {file} to say what its tasks and classes are, because they are not "
            "those of UTKFace; restore one of them, or run the evaluation again."
        )
    return UTKFACE


def _has_utkface_name(path: str) -> bool:
    try:
        parse_name(path.rsplit("/", 1)[-1])
    except LabelError:
        return False
    return True


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Names and values; none if the file is missing."""
    if not file.is_file():
        return {}
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Can't read {file}: {error.strerror}; make it readable.") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"Expected a mapping in {file}, but could not read one; repair or delete the file.")
    return content


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], file: Path) -> None:
    """Rejects values of other kinds than they are written in."""
    for name, kind in kinds.items():
        value = values.get(name)
        is_kind = type(value) in kind and not (isinstance(value, float) and not math.isfinite(value))
        if value is not None and not is_kind:
            words = " or ".join(each.__name__ for each in kind)
            raise UserError(f"Expected {name} as {words} in {file}, but got {value!r}; repair or delete the file.")


def _check_values(table: pd.DataFrame, tasks: Tasks, file: Path) -> None:
    """Rejects codes without a class, ages beyond the highest, probabilities that are none, and what is no number."""
    highest: dict[str, float] = {}
    for task in tasks.values():
        if isinstance(task, Age):
            highest |= dict.fromkeys(task.columns, task.highest) | {f"{task.name}_predicted": math.inf}
        else:
            highest |= dict.fromkeys((task.name, f"{task.name}_predicted"), len(task.classes) - 1)
            highest |= dict.fromkeys(task.probabilities, 1 + 1e-3)  # sums are rounded
    for name, most in highest.items():
        if name not in table:
            continue
        values = table[name].dropna()
        least = -math.inf if most == math.inf else 0
        if not pd.api.types.is_numeric_dtype(values) or not values.between(least, most).all():
            raise UserError(
                f"Expected numbers{'' if most == math.inf else f' from 0 to {most:g}'} under {name} in {file}, but it "
                "has others; run the evaluation again."
            )


def _read_table(file: Path, labels: tuple[str, ...]) -> pd.DataFrame:
    """Faces with all of these labels, as Int16."""
    try:
        table = pd.read_parquet(file)
        table = table.astype({name: kind for name, kind in _types(labels).items() if name in table})
    except Exception as error:  # pyarrow raises many kinds over a damaged file, and pandas over values of other kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"Expected a Parquet table at {file}, but: {reason}; run the evaluation again.") from None
    needed = (*_FACE_COLUMNS, *labels)
    missing = [name for name in needed if name not in table]
    if missing or not len(table):
        raise UserError(
            f"Expected a table of faces with {', '.join(needed)} at {file}, but it has "
            f"{f'no {missing[0]}' if missing else 'no rows'}; run the evaluation again."
        )
    return table.reset_index(drop=True)


def _types(labels: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(_FACE_COLUMNS, "str") | dict.fromkeys(labels, "Int16")


def _read_list(file: Path, columns: tuple[str, ...]) -> pd.DataFrame | None:
    """A table of texts with all of these columns; ``None`` if the file is missing."""
    if not file.is_file():
        return None
    try:
        listed = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8").map(unquoted)
    except (OSError, ValueError):  # pandas' own errors are ValueErrors
        listed = pd.DataFrame()
    if not {*columns} <= {*listed}:
        raise UserError(f"Expected the columns {', '.join(columns)} in {file}; repair or delete the file.")
    return listed
