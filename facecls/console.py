"""The console for user-facing output, and progress on it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from facecls.terminal import printable

LINE_EVERY = 30.0
"""Seconds between two lines of progress where there is no bar."""


class _PlainConsole(Console):
    """Prints texts as they are: what looks like markup is no markup, and control characters are shown."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def console(quiet: bool = False) -> Console:
    """The console for user-facing output; it prints nothing if quiet."""
    return _PlainConsole(soft_wrap=True, quiet=quiet, markup=False, emoji=False)


def shows_bars() -> bool:
    """Whether stdout is a terminal or a notebook, which can show a bar."""
    out = console()
    return out.is_terminal or out.is_jupyter


@contextmanager
def count_progress(name: str, total: int | None, unit: str = "faces") -> Iterator[Callable[[int], None]]:
    """Shows how many of something are done, by a bar or by lines of text.

    Args:
        name: What is done.
        total: Their number, or ``None`` if that is not known.
        unit: What is counted.

    Yields:
        A function to call with the number of further ones that are done.
    """
    if shows_bars():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, started = 0, time.monotonic()
    last_line = started

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        if time.monotonic() - last_line >= LINE_EVERY:
            last_line = time.monotonic()
            rate = done / (last_line - started)
            parts = [f"{name} {done:,}", f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s"]
            if total is not None:
                parts = [f"{parts[0]}/{total:,}", parts[1], time_left(started, done, total)]
            print(", ".join(parts), flush=True)

    yield advance


def time_left(started: float, done: int, total: int) -> str:
    """Such as ``0:01:20 left``.

    Args:
        started: By ``time.monotonic``.
        done: How many are done since, more than 0.
        total: How many there are.
    """
    left = (time.monotonic() - started) / done * (total - done)
    return f"{timedelta(seconds=round(left))} left"
