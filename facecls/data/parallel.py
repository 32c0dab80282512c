"""Applies a function to many items in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

WORKERS = min(8, os.cpu_count() or 1)
"""Threads; a single producer thread cannot feed more."""
_CHUNK = 8
"""Items per submitted task, which keeps the overhead of submitting small."""


def available_cores() -> int:
    """How many cores this process may use; where the system does not say, as macOS and Windows, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[_T], _R], items: Iterator[_T], ahead: int = 4 * WORKERS * _CHUNK) -> Iterator[_R]:
    """Maps a function over items in threads, ahead of the consumer; results come in the order of the items.

    Args:
        function: Called from several threads; only functions that release the GIL, such as OpenCV's and hashlib's, gain
            from it.
        items: Iterated in the caller's thread alone.
        ahead: How many items are taken, at most, before their results are consumed (give or take a chunk of 8).

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
