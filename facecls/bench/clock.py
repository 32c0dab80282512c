"""Rates with their spread, from blocks of work that are timed in alternation."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

ROUNDS = 5
"""How often each block is timed. Blocks that are compared alternate, so that other load slows them alike."""


class Rate(NamedTuple):
    """Faces per second: the median of the rounds, the slowest and the fastest."""

    median: float
    low: float
    high: float


class Clock:
    """Times named blocks of work.

    Args:
        synchronize: Waits until the device has finished, since work on a GPU is only queued by the calls that start it.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self._rates: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def block(self, name: str, faces: int) -> Iterator[None]:
        """Times the body.

        Args:
            name: Name of the block.
            faces: How many faces it processes.
        """
        self.synchronize()
        started = time.perf_counter()
        yield
        self.synchronize()
        self._rates[name].append(faces / (time.perf_counter() - started))

    def rates(self) -> dict[str, Rate]:
        """The rates of all blocks timed so far, by name."""
        return {name: Rate(median(rates), min(rates), max(rates)) for name, rates in self._rates.items()}

    def ratio(self, one: str, other: str) -> float:
        """The rate of one block divided by that of another: the median of the ratios within each round."""
        return median(a / b for a, b in zip(self._rates[one], self._rates[other], strict=True))
