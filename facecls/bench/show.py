"""The results of a bench as a table and a verdict for each stage."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_ROWS = (
    ("input", "read", "read"),
    ("input", "decode", "decode"),
    ("input", "augment", "augment"),
    ("input", "collate", "collate"),
    ("input", "one process", "one process"),
    ("input", "one worker", "one worker"),
    ("input", "all workers", "all workers"),
    ("loop", "step", "step alone"),
    ("loop", "together", "together"),
    ("loop", "bare", "bare loop"),
)


def print_bench(results: Mapping[str, Any], out: Console) -> None:
    """Prints the rates, the verdicts, the memory and the time to the first step."""
    table = Table(title=f"faces/s, {results['device']}, {results['precision']}", title_justify="left")
    table.add_column("")
    for stage in ("training", "evaluation"):
        table.add_column(stage, justify="right")
        table.add_column("spread", justify="right", style="dim", no_wrap=True)
    for group, name, text in _ROWS:
        cells = [cell for stage in ("training", "evaluation") for cell in _cells(results[stage][group].get(name))]
        if any(cells):
            table.add_row(text, *cells, end_section=name in ("collate", "all workers"))
    out.print(table)
    for stage in ("training", "evaluation"):
        out.print(results[stage]["verdict"], highlight=False)
    out.print(_machine(results), highlight=False)


def _cells(rate: Mapping[str, float] | None) -> tuple[str, str]:
    if rate is None:
        return "", ""
    spread = "" if rate["low"] == rate["high"] else f"{_number(rate['low'])}\N{EN DASH}{_number(rate['high'])}"
    return _number(rate["median"]), spread


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _machine(results: Mapping[str, Any]) -> str:
    parts = []
    if (start := results["start_seconds"]) is not None:
        parts.append(f"first step {start:.1f} s after the start of the process")
    if (device := results["memory"]["device_mib"]) is not None:
        parts.append(f"peak device memory {device:,.0f} MiB")
    if private := results["memory"]["worker_private_mib"]:
        images = results["memory"]["images_mib"]
        parts.append(f"up to {max(private):,.0f} MiB private to each worker, {images:,.0f} MiB of images shared by all")
    return "; ".join(parts)


def verdict(stage: str, rates: Mapping[str, Any], workers: int, cores: int, on_gpu: bool) -> str:
    """The bottleneck of a stage, and what to change.

    Args:
        stage: ``training`` or ``evaluation``.
        rates: ``input`` and ``step`` in faces/s, ``together`` as a share of the slower of them, and ``step / peak``,
            the step's share of the device's peak matrix-multiplication rate, or ``None``.
        workers: Number of worker processes.
        cores: Number of cores that this process may use.
        on_gpu: Whether the device is a GPU.

    Returns:
        One line.
    """
    share = f"{stage}: the whole loop runs at {100 * rates['together']:.0f} % of the slower of input and step; "
    if rates["input"] < rates["step"]:
        change = (
            f"increase --data.num_workers above {workers}"
            if workers < cores
            else "use a machine with more cores, a cheaper --data.train_transform or a smaller --data.image_size"
        )
        return f"{share}the input is the bottleneck; {change}"
    change = "a larger --data.batch_size" if on_gpu else "a smaller --data.image_size, a GPU"
    peak = rates["step / peak"]
    at = "" if peak is None else f" (at {100 * peak:.0f} % of the device's peak matrix-multiplication rate)"
    return f"{share}the step is the bottleneck{at}; use {change} or a smaller trunk"
