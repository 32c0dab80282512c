"""The end of fit and evaluate: writes results and report to the run's folder and prints the metrics."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from rich.table import Table

from facecls._version import __version__
from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import ages
from facecls.errors import UserError
from facecls.model.module import FaceModule
from facecls.run import METRICS, PREDICTIONS, REPORT, write_results
from facecls.training.collector import PredictionCollector
from facecls.training.labels import count_labels


def save_outcome(
    folder: Path,
    trainer: pl.Trainer,
    module: FaceModule,
    data: FacesDataModule,
    collector: PredictionCollector,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes results and report of the test that the trainer ran last, and prints the metrics.

    Args:
        folder: Of the run.
        trainer: After its test.
        module: The tested model.
        data: The faces.
        collector: One of the trainer's callbacks.
        facts: More about the run, for ``metrics.json``.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        UserError: If no face was tested, or a file can't be written.
    """
    from facecls.report.page import write_report  # matplotlib takes a second, for which --help must not wait

    if not (collector.batches and collector.is_test):
        raise UserError("Expected faces to test, but none were tested; see trainer.limit_test_batches.")
    table, faces = collector.table(data), collector.faces()
    results = _collect_results(trainer, data, collector, table) | dict(facts) | _environment(trainer)
    results = write_results(folder, results, table, data.tasks)
    with console().status("writing the report"):
        write_report(folder, lambda row: data.picture(int(faces[row])), module.model.cpu().float())
    print_results(results, folder)
    return results


def _collect_results(
    trainer: pl.Trainer, data: FacesDataModule, collector: PredictionCollector, table: pd.DataFrame
) -> dict[str, Any]:
    """Metrics, temperatures and numbers of faces, by the keys of ``metrics.json``."""
    results: dict[str, Any] = {
        name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")
    }
    for name, count in count_labels(table, data.tasks.values()).items():
        results[f"test/{name}/faces"] = count
    for age in ages(data.tasks.values()):  # of these faces, those known as a range; errors are over the others
        if age.range[0] in table:
            results[f"test/{age.name}/ranges"] = int(table[age.range[0]].notna().sum())
    results |= {
        f"temperature/{name}": value for name, value in collector.temperatures.items() if f"temperature_{name}" in table
    }
    results |= {f"faces/{name}": int(count) for name, count in data.faces["split"].value_counts().items()}
    return results | {"faces/tested": len(table), "rejects": len(data.rejects)}


def _environment(trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "precision": str(trainer.precision),
        "device": device_name(trainer),
        "version": __version__,
        "versions": versions(),
    }


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """Prints the metrics of a test, and where the files are.

    Args:
        results: The contents of ``metrics.json``.
        folder: Of the run.
    """
    table = Table(title=f"{results['faces/tested']:,} faces tested", title_justify="left")
    for column in ("task", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in results.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[2] not in ("faces", "ranges", "loss"):
            text = f"{value:.2f}" if parts[2].endswith("_years") else f"{100 * value:.1f} %"
            table.add_row(parts[1], parts[2], text)
    out = console()
    out.print(table)
    out.print(f"open {folder / REPORT}; {METRICS}, {PREDICTIONS} and the rest are in the same folder")


def git_commit() -> str | None:
    """The commit of the checkout that runs, with ``-dirty`` if it was changed; ``None`` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on most, by name."""
    packages = {name: version(name) for name in ("torch", "pytorch-lightning", "timm")}
    return packages | {"python": platform.python_version()}


def device_name(trainer: pl.Trainer) -> str:
    """The trainer's device, such as ``cpu (AMD EPYC 9R14), 4 cores``, after ``2 x`` if there are two."""
    times = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = f" ({models[0]})" if models else ""
    return f"{times}{device.type}{model}, {os.cpu_count()} cores"
