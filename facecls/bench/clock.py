"""Durations of the same work, taken in turns with other work, as a rate with its spread."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

ROUNDS = 5
"""How often each thing is timed; what is compared takes turns, so that a busy neighbour disturbs all of it."""


class Rate(NamedTuple):
    """Faces per second: the median of the rounds, the slowest and the fastest."""

    median: float
    low: float
    high: float


class Clock:
    """Times blocks of work by name.

    Args:
        synchronize: Waits until the device has done what it was told.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self._rates: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def block(self, name: str, faces: int) -> Iterator[None]:
        """Times the body.

        Args:
            name: What it is.
            faces: How many it works on.
        """
        self.synchronize()
        started = time.perf_counter()
        yield
        self.synchronize()
        self._rates[name].append(faces / (time.perf_counter() - started))

    def rates(self) -> dict[str, Rate]:
        """What was timed so far."""
        return {name: Rate(median(found), min(found), max(found)) for name, found in self._rates.items()}

    def ratio(self, one: str, other: str) -> float:
        """How one rate compares with another: the median over the rounds, each compared within itself."""
        return median(a / b for a, b in zip(self._rates[one], self._rates[other], strict=True))
