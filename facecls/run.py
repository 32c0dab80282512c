"""The folder of a run: what lies in it, written and read.

Every file name of a run stands here and nowhere else.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from google.protobuf.message import DecodeError

from facecls.data.tasks import UTKFACE, LabelError, Tasks, create_tasks, parse_name
from facecls.errors import UserError
from facecls.files import replacing

CONFIG = "config.yaml"
"""The options."""
FACES, REJECTS = "faces.parquet", "rejects.csv"
"""All faces of the data with labels and splits; the files that are not used, and why."""
METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
"""The results of the test, and one row per tested face."""
REPORT, SUSPECTS, COMPARISON = "report.html", "suspects.csv", "compare.html"
"""The report, the labels worth checking, and the comparison with other runs."""
BEST_CHECKPOINT, LAST_CHECKPOINT = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
"""The model with the lowest validation loss, and the state to resume from."""

_FACE_COLUMNS = ("path", "sha1", "split")


@dataclass(frozen=True)
class Run:
    """A run, as read from its folder.

    Attributes:
        folder: Its folder.
        predictions: One row per tested face.
        faces: One row per face of the data, tested or not; ``None`` if the file is missing.
        rejects: ``path`` and ``reason`` of each file not used; ``None`` if the file is missing.
        metrics: Contents of ``metrics.json``; empty if the file is missing.
        config: The options; empty if the file is missing.
        config_text: The options as they were written.
        scalars: Logged values by tag, each indexed by training step.
    """

    folder: Path
    predictions: pd.DataFrame
    faces: pd.DataFrame | None
    rejects: pd.DataFrame | None
    metrics: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    scalars: dict[str, "pd.Series[float]"]

    @property
    def name(self) -> str:
        """The folder and its parent, such as ``transfer/version_1``."""
        return "/".join(self.folder.resolve().parts[-2:])

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
            for name, task in _configured_tasks(self.config).items()
            if f"{name}_predicted" in self.predictions
            or any(table[column].notna().any() for table in faces for column in task.columns if column in table)
        }

    @property
    def train(self) -> pd.DataFrame:
        """The faces it was trained on; empty if unknown."""
        faces = self.predictions.iloc[:0] if self.faces is None else self.faces
        return faces[faces["split"] == "train"]

    @property
    def reference(self) -> pd.DataFrame:
        """The faces that a constant guess is taken from: those of the training or, if unknown, of the test."""
        return self.train if len(self.train) else self.predictions

    @property
    def is_drawn(self) -> bool:
        """Whether its faces were drawn by ``facecls.data.synthetic``, not photographed."""
        return str(self.data.get("root", "")).startswith("synthetic:")

    @property
    def is_utkface(self) -> bool:
        """Whether it was tested on photographs that are named as UTKFace names them."""
        return "root" in self.data and not self.is_drawn and all(map(_has_utkface_name, self.predictions["path"]))


def write_faces(folder: Path, faces: pd.DataFrame, rejects: pd.DataFrame, tasks: Tasks) -> None:
    """Writes all faces of the data and the files that are not used.

    Args:
        folder: Folder of the run; created if need be.
        faces: With ``path``, ``sha1``, ``split`` and the label columns of the tasks. Columns of age ranges may be
            missing.
        rejects: ``path`` and ``reason``.
        tasks: The tasks of the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = [column for task in tasks.values() for column in task.columns if column in faces]
    with replacing(folder / FACES) as part:
        faces[[*_FACE_COLUMNS, *labels]].to_parquet(part, index=False)
    with replacing(folder / REJECTS) as part:
        rejects.to_csv(part, index=False)


def write_results(folder: Path, results: Mapping[str, Any], predictions: pd.DataFrame) -> None:
    """Writes the results of a test.

    Args:
        folder: Folder of the run.
        results: Metrics and facts about the run; plain values.
        predictions: One row per tested face.
    """
    with replacing(folder / PREDICTIONS) as part:
        predictions.to_parquet(part, index=False)
    with replacing(folder / METRICS) as part:
        part.write_text(json.dumps(results, indent=2) + "\n")


def write_suspects(folder: Path, suspects: pd.DataFrame) -> None:
    """Writes the labels worth checking.

    Args:
        folder: Folder of the run.
        suspects: As ``analysis.suspects.suspects`` returns them.
    """
    with replacing(folder / SUSPECTS) as part:
        suspects.to_csv(part, index=False)


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
    config_text = _read_text(folder / CONFIG)
    config = _read_mapping(folder / CONFIG, yaml.safe_load)
    labels = tuple(_configured_tasks(config))
    predictions = _read_table(folder / PREDICTIONS, labels)
    if not any(str(name).endswith("_predicted") for name in predictions):
        raise UserError(f"Expected predictions in {folder / PREDICTIONS}, but it has none; run the evaluation again.")
    return Run(
        folder=folder,
        predictions=predictions,
        faces=_read_table(folder / FACES, labels) if (folder / FACES).is_file() else None,
        rejects=_read_rejects(folder / REJECTS),
        metrics=_read_mapping(folder / METRICS, json.loads),
        config=config,
        config_text=config_text,
        scalars=read_scalars(folder),
    )


def _data_options(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config.get("data")
    return data if isinstance(data, dict) else {}


def _configured_tasks(config: Mapping[str, Any]) -> Tasks:
    """All tasks of the data; those of UTKFace for runs of version 0.1, which had no others."""
    options = _data_options(config).get("tasks")
    return create_tasks(options) if isinstance(options, dict) else UTKFACE


def _has_utkface_name(path: str) -> bool:
    try:
        parse_name(path.rsplit("/", 1)[-1])
    except LabelError:
        return False
    return True


def _read_text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Names and values; none if the file is missing."""
    if not file.is_file():
        return {}
    try:
        found = parse(file.read_text())
    except (ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"Expected names and values in {file}, but could not read them; repair or delete the file.")
    return found


def _read_table(file: Path, labels: tuple[str, ...]) -> pd.DataFrame:
    """Faces with all of these labels, as Int16."""
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"Expected a Parquet table at {file}, but: {error}; run the evaluation again.") from None
    needed = (*_FACE_COLUMNS, *labels)
    missing = [name for name in needed if name not in table]
    if missing or not len(table):
        raise UserError(
            f"Expected a table of faces with {', '.join(needed)} at {file}, but it has "
            f"{f'no {missing[0]}' if missing else 'no rows'}; run the evaluation again."
        )
    return table.astype(dict.fromkeys(labels, "Int16")).reset_index(drop=True)


def _read_rejects(file: Path) -> pd.DataFrame | None:
    if not file.is_file():
        return None
    rejects = pd.read_csv(file, dtype=str, keep_default_na=False)
    if not {"path", "reason"} <= {*rejects}:
        raise UserError(f"Expected the columns path and reason in {file}; repair or delete the file.")
    return rejects


def read_scalars(folder: Path) -> dict[str, "pd.Series[float]"]:
    """Reads the curves that TensorBoard shows.

    Parses the event files itself, because tensorboard's ``EventAccumulator`` verifies checksums in Python: 5.7 s for
    a 33 MB log of 240,000 scalars and 60 images on one core, against 0.6 s here.

    Args:
        folder: With or without event files.

    Returns:
        Values by tag, each indexed by step. Where a resumed run logged a step again, the later value is kept.
    """
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):  # the names begin with the time
        for step, tag, value in _scalars(file):
            found.setdefault(tag, {})[step] = value
    return {tag: pd.Series(values).sort_index() for tag, values in found.items()}


def _scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    from tensorboard.compat.proto.event_pb2 import Event

    for record in _records(file.read_bytes()):
        try:
            event = Event.FromString(record)
        except DecodeError:  # the last record of a killed run may be damaged
            return
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value


def _records(data: bytes) -> Iterator[bytes]:
    """Splits a TFRecord file; a truncated record at its end is dropped.

    A record is its length (8 bytes), a checksum of that (4), the content, and a checksum of that (4), see
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length
