"""Folders as runs leave them, with simulated predictions, and pages read back."""

import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_predictions import predicted, simulated_labels, with_ranges

from facecls import run
from facecls.data.split import assign_split
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE, Tasks, ages, classifications

TEMPERATURES = {"gender": 1.4, "race": 0.8, "age": 1.2}


def without_drawing(patch: pytest.MonkeyPatch) -> None:
    """Keeps runs from drawing their page and TensorBoard's figures, which takes longer than all else on few faces."""
    patch.setattr("facecls.report.page.write_report", lambda *_: None)
    without_figures_of_epochs(patch)


def without_figures_of_epochs(patch: pytest.MonkeyPatch) -> None:
    """Keeps runs from drawing TensorBoard's figures alone."""
    patch.setattr("facecls.training.tensorboard.FigureLogger._draw", lambda *_: None)


def without_rendering(patch: pytest.MonkeyPatch) -> None:
    """Leaves the figures of pages empty, where a test reads what stands beside them: they take most of the time."""
    patch.setattr(
        "facecls.report.blocks.to_svg",
        lambda figure, name, label: f'<svg role="img" aria-label="{escape(label)}"></svg>',
    )


def with_spread(table: pd.DataFrame, seed: int = 5, tasks: Tasks = UTKFACE) -> pd.DataFrame:
    """Adds what ``simulated_predictions`` leaves out: probabilities that differ, temperatures and age intervals."""
    rng, table = np.random.default_rng(seed), table.copy()
    for task in classifications(tasks.values()):
        columns = list(task.probabilities)
        noisy = table[columns].to_numpy(float) ** rng.uniform(0.5, 3, (len(table), 1))
        table[columns] = (noisy / noisy.sum(1, keepdims=True)).astype(np.float32)
        table[f"temperature_{task.name}"] = TEMPERATURES.get(task.name, 1.1)
    for task in ages(tasks.values()):
        middle = table[f"{task.name}_predicted"].to_numpy().round()
        for ending, half in (("", 9), ("_raw", 6)):
            width = rng.integers(half - 3, half + 3, len(table))
            table[f"{task.name}_low{ending}"] = (middle - width).clip(0).astype(np.int16)
            table[f"{task.name}_high{ending}"] = (middle + width).clip(0).astype(np.int16)
        table[f"temperature_{task.name}"] = TEMPERATURES.get(task.name, 1.1)
    return table


def simulated_run(folder: Path, faces: int = 400, seed: int = 0, tasks: Tasks = UTKFACE, ranges: float = 0) -> Path:
    """A run on faces that have no pictures; a share of their ages may be known as ranges only."""
    everything = simulated_labels(2 * faces, seed, tasks)
    everything["sha1"] = everything["sha1"].mask(
        everything.index % 50 == 1, everything["sha1"].shift()
    )  # 2 % duplicates
    everything["split"] = ["train", "test"] * faces
    everything.loc[everything.index % 50 == 1, "split"] = "train"
    return write_run(folder, everything, {"root": "elsewhere/UTKFace"}, tasks=tasks, ranges=ranges)


def drawn_run(folder: Path, faces: int = 60, seed: int = 3) -> Path:
    """A run on drawn faces."""
    everything = read_table(f"synthetic:{faces}", seed, UTKFACE).faces
    everything["split"] = assign_split(everything, 0.1, 0.6, seed)
    return write_run(folder, everything, {"root": f"synthetic:{faces}", "image_size": 64}, seed=seed)


def write_run(
    folder: Path,
    faces: pd.DataFrame,
    data: dict[str, object],
    seed: int = 0,
    tasks: Tasks = UTKFACE,
    ranges: float = 0,
) -> Path:
    """Everything that a run leaves but curves and checkpoints; without ``data.tasks`` where they are UTKFace's."""
    table = with_spread(predicted(faces[["path", "sha1", "split", *tasks]], seed, tasks), tasks=tasks)
    if ranges:
        table = with_ranges(table, np.random.default_rng(seed).random(len(table)) < ranges)
    rejects = pd.DataFrame({"path": ["a<b>.jpg", "b.jpg", "c.txt"], "reason": ["truncated"] * 2 + ["not an image"]})
    labels = [("b.jpg", "race", "purple", "no such race"), ("d.jpg", "race", "<7>", "no such race")]
    unread = pd.DataFrame([*labels, ("d.jpg", "age", "x", "no age")], columns=["path", "label", "text", "reason"])
    run.write_faces(folder, table, rejects, unread, tasks)
    tested = table[table["split"] == "test"].reset_index(drop=True)
    run.write_results(folder, {"seconds": 4162.5, "epochs": 5, "steps": 2495, "device": "cpu"}, tested, tasks)
    data = data if tasks == UTKFACE else data | {"tasks": {name: task.options for name, task in tasks.items()}}
    (folder / "config.yaml").write_text(json.dumps({"seed_everything": seed, "data": data}))
    return folder


def change(folder: Path, change: object) -> None:
    """Puts ``change(table)`` in place of the predictions."""
    table = pd.read_parquet(folder / "predictions.parquet")
    change(table).to_parquet(folder / "predictions.parquet", index=False)  # type: ignore[operator]


class Page(HTMLParser):
    """What is on a page.

    Attributes:
        numbers: Values by ``data-name``, as texts.
        shown: What a reader sees of each, by name.
        sections: Titles and the text below each, by id.
        figures: Labels, captions and SVG attributes, in order.
        images: Addresses and alternative texts.
        attributes: Of every element.
        tags: All of them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.numbers: dict[str, set[str]] = {}
        self.shown: dict[str, str] = {}
        self.sections: dict[str, str] = {}
        self.figures: list[dict[str, str]] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self._section = self._number = ""
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag not in ("meta", "img", "path", "use", "rect", "image", "br"):
            self._open.append(tag)
        if tag == "section":
            self._section = found["id"]
            self.sections[self._section] = ""
        elif tag == "figure":
            self.figures.append({"id": found["id"], "caption": "", "svg": ""})
        elif tag == "svg":
            self.figures[-1] |= {"role": found["role"], "label": found["aria-label"]}
        elif tag == "img":
            self.images.append(found)
        elif tag == "data":
            self._number = found["data-name"]
            self.numbers.setdefault(self._number, set()).add(found["value"])
            self.shown[self._number] = ""

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "data":
            self._number = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data
        if self._number:
            self.shown[self._number] += data
        if self.figures and "figcaption" in self._open:
            self.figures[-1]["caption"] += data
        if self.figures and "svg" in self._open:
            self.figures[-1]["svg"] += data + "\n"

    @property
    def values(self) -> dict[str, float]:
        """The value of each number, which is the same wherever it stands."""
        assert all(len(values) == 1 for values in self.numbers.values())
        return {name: float(*values) for name, values in self.numbers.items()}
