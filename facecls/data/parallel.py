"""One function on many items, in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

WORKERS = min(8, os.cpu_count() or 1)
"""Threads; what hands them their items is one thread and feeds no more."""
_CHUNK = 8
"""Items that a thread takes at a time, so that handing over costs little."""


def in_order(function: Callable[[_T], _R], items: Iterator[_T], ahead: int = 4 * WORKERS * _CHUNK) -> Iterator[_R]:
    """What a function makes of each item, in the order of the items, worked out beforehand in threads.

    Args:
        function: Called from several threads; those profit that release Python's lock, as OpenCV and hashlib do.
        items: Taken from the caller's thread alone.
        ahead: How many items at most are taken that have not been given back yet, but for a chunk of 8.

    Yields:
        One result for each item.
    """
    waiting: deque[Future[list[_R]]] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        while chunk := list(islice(items, _CHUNK)):
            waiting.append(pool.submit(lambda part: list(map(function, part)), chunk))
            if len(waiting) * _CHUNK > ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
