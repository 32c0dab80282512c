"""What a run leaves in its folder, and what is said about it at the end."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.table import Table

import facecls
from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import TASKS
from facecls.errors import UserError
from facecls.files import replacing
from facecls.model.module import FaceModule
from facecls.training.collector import PredictionCollector


def git_commit() -> str | None:
    """The commit of the checkout that runs, ``-dirty`` if it was changed; ``None`` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_data(folder: Path, data: FacesDataModule) -> None:
    """Writes ``faces.parquet``, all faces with labels and splits, and ``rejects.csv``, what is not used and why."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "faces.parquet") as part:
        data.faces[["path", "sha1", "split", *TASKS]].to_parquet(part, index=False)
    with replacing(folder / "rejects.csv") as part:
        data.rejects.to_csv(part, index=False)


def write_results(
    folder: Path, trainer: pl.Trainer, data: FacesDataModule, collector: PredictionCollector, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes ``metrics.json`` and ``predictions.parquet`` of the test that the trainer ran last.

    Args:
        folder: Of the run.
        trainer: After its test.
        data: The faces.
        collector: It was among the callbacks.
        facts: More to put into ``metrics.json``.

    Returns:
        What is in ``metrics.json``.
    """
    if not collector.batches:
        raise UserError("Expected faces to test, but trainer.limit_test_batches leaves none.")
    table = collector.table(data)
    results: dict[str, Any] = {
        name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")
    }
    results |= {f"test/{task}/faces": int(table[task].notna().sum()) for task in TASKS}
    results |= {
        f"temperature/{task}": t for task, t in collector.temperatures.items() if f"temperature_{task}" in table
    }
    results |= {f"faces/{name}": int(count) for name, count in data.faces["split"].value_counts().items()}
    results |= {"faces/tested": len(table), "rejects": len(data.rejects), **facts}
    results |= {
        "precision": str(trainer.precision),
        "device": device_name(trainer),
        "version": facecls.__version__,
        "versions": versions(),
    }
    with replacing(folder / "predictions.parquet") as part:
        table.to_parquet(part, index=False)
    with replacing(folder / "metrics.json") as part:
        part.write_text(json.dumps(results, indent=2) + "\n")
    return results


def write_study(folder: Path, data: FacesDataModule, collector: PredictionCollector, model: FaceModule) -> None:
    """Writes ``report.html`` and ``suspects.csv`` beside the results of a test.

    Args:
        folder: Of the run, after ``write_results``.
        data: The faces.
        collector: It was among the callbacks.
        model: What was tested.
    """
    from facecls.report.page import write_report  # late, as the board above

    faces = collector.faces()
    with console().status("writing the report"):
        write_report(folder, lambda row: data.picture(faces[row]), model.model.cpu())


def versions() -> dict[str, str]:
    """What results depend on, by name."""
    packages = {name: version(name) for name in ("torch", "pytorch-lightning", "timm")}
    return packages | {"python": platform.python_version()}


def device_name(trainer: pl.Trainer) -> str:
    """What the trainer computes on, in words; after ``2 x`` where there are two of them."""
    times = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    if trainer.strategy.root_device.type == "cuda":
        return times + torch.cuda.get_device_name(trainer.strategy.root_device)
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = f" ({names[0]})" if names else ""
    return f"{times}{trainer.strategy.root_device.type}{model}, {os.cpu_count()} cores"


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """Shows the metrics of a test, and where the rest lies."""
    table = Table(title=f"{results['faces/tested']:,} faces tested", title_justify="left")
    for column in ("task", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in results.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[2] not in ("faces", "loss"):
            text = f"{value:.2f}" if parts[2].endswith("_years") else f"{100 * value:.1f} %"
            table.add_row(parts[1], parts[2], text)
    out = console()
    out.print(table)
    out.print(f"open {folder / 'report.html'}; metrics.json, predictions.parquet and all else lie beside it")
