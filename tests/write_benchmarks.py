"""Writes BENCHMARKS.md from the results of the benchmarks: ``python tests/write_benchmarks.py [benchmarks.json]``."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEAD = """# Benchmarks

Written by `python tests/write_benchmarks.py` from `benchmarks.json`, which `pytest -m bench` writes on an idle
machine. What is compared was timed in alternation in one run; rates are medians. Compare ratios, not rates, between
machines.
"""


def markdown(results: dict[str, Any]) -> str:
    """The page.

    Args:
        results: The contents of ``benchmarks.json``: device, versions and rows by title.

    Returns:
        Markdown.
    """
    parts = [HEAD]
    for title, group in results.items():
        versions = ", ".join(f"{name} {version}" for name, version in group["versions"].items())
        parts.append(f"## {title}\n\n{group['device']}; {versions}\n")
        lines = ["| what | measured | target | |", "|---|---:|---|---|"]
        for row in group["rows"]:
            met = {None: "", True: "met", False: "missed"}[row["met"]]
            value = f"{_number(row['value'])} {row['unit']}" if row["unit"] else f"{row['value']:.3f}"
            lines.append(f"| {row['what']} | {value} | {row['target']} | {met if row['target'] else ''} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks.json"
    (ROOT / "BENCHMARKS.md").write_text(markdown(json.loads(source.read_text())))
