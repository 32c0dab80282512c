"""What a run left in its folder, read back."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from google.protobuf.message import DecodeError

from facecls.data.tasks import LabelError, parse_name
from facecls.errors import UserError

NEEDED = ("path", "sha1", "split", "gender", "race", "age")
"""Columns that every table of predictions has."""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: Where it lies.
        predictions: One row a tested face.
        faces: One row for every face of the data, tested or not; ``None`` if the run did not keep them.
        rejects: ``path`` and ``reason`` of each file not used; ``None`` if unknown.
        metrics: What is in ``metrics.json``; empty without.
        config: The options; empty without.
        config_text: The same as it was written.
        scalars: What was logged, by tag, each indexed by training step.
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
        """Its folder and the one above, such as ``transfer/version_1``."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def data(self) -> dict[str, Any]:
        """The options of its data."""
        data = self.config.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def train(self) -> pd.DataFrame:
        """The faces that it was trained with; none if they are unknown."""
        faces = self.predictions.iloc[:0] if self.faces is None else self.faces
        return faces[faces["split"] == "train"]

    @property
    def of_utkface(self) -> bool:
        """Whether it was tested on photographs under UTKFace's file names."""
        root = str(self.data.get("root", ""))
        return root != "" and not root.startswith("synthetic:") and all(map(_utkface, self.predictions["path"]))


def _utkface(path: str) -> bool:
    try:
        parse_name(path.rsplit("/", 1)[-1])
    except LabelError:
        return False
    return True


def read_run(folder: Path) -> Run:
    """Reads the folder of a run; only the predictions must be there.

    Args:
        folder: Such as ``runs/faces/version_0``.

    Returns:
        The run.

    Raises:
        UserError: If there are no predictions in it, or a file in it is not what it should be.
    """
    predictions = folder / "predictions.parquet"
    if not predictions.is_file():
        raise UserError(
            f"Expected the folder of a run with predictions.parquet, but {folder} has none; facecls.fit and "
            "facecls.evaluate leave one in runs/NAME/version_N."
        )
    text = _text(folder / "config.yaml")
    return Run(
        folder=folder,
        predictions=_read_table(predictions, "predicted"),
        faces=_read_table(folder / "faces.parquet", "") if (folder / "faces.parquet").is_file() else None,
        rejects=_read_rejects(folder / "rejects.csv"),
        metrics=_mapping(folder / "metrics.json", json.loads, _text(folder / "metrics.json") or "{}"),
        config=_mapping(folder / "config.yaml", yaml.safe_load, text or "{}"),
        config_text=text,
        scalars=read_scalars(folder),
    )


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _mapping(file: Path, parse: Any, text: str) -> dict[str, Any]:
    try:
        found = parse(text)
    except (ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"Expected names and values in {file}, but could not read them; mend or remove the file.")
    return found


def _read_table(file: Path, ending: str) -> pd.DataFrame:
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"Expected a Parquet table at {file}, but: {error}; run the evaluation again.") from None
    missing = [name for name in NEEDED if name not in table]
    if missing or not any(str(name).endswith(ending) for name in table) or not len(table):
        raise UserError(
            f"Expected a table of faces with {', '.join(NEEDED)} at {file}, but it has "
            f"{f'no {missing[0]}' if missing else 'no predictions'}; run the evaluation again."
        )
    return table.astype(dict.fromkeys(("gender", "race", "age"), "Int16")).reset_index(drop=True)


def _read_rejects(file: Path) -> pd.DataFrame | None:
    if not file.is_file():
        return None
    rejects = pd.read_csv(file, dtype=str, keep_default_na=False)
    if not {"path", "reason"} <= {*rejects}:
        raise UserError(f"Expected the columns path and reason in {file}; mend or remove the file.")
    return rejects


def read_scalars(folder: Path) -> dict[str, "pd.Series[float]"]:
    """Reads the curves that TensorBoard shows; where a resumed run logged a step again, the later value counts.

    Reads the files itself: tensorboard's own reader imports TensorFlow where that is installed, and checks sums in
    Python, a megabyte a second.

    Args:
        folder: With event files, or without.

    Returns:
        Values by tag, each indexed by step.
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
        except DecodeError:  # a run that was killed may leave anything at the end
            return
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), content, its checksum (4); cut ones end it.

    See https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length
