"""Applies a function to many items in threads, which share what memory their images may take."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from facecls.data.limits import BYTES_AHEAD, PIXELS_AT_ONCE

_T = TypeVar("_T")
_R = TypeVar("_R")

WORKERS = min(8, os.cpu_count() or 1)
"""Threads; a single producer thread cannot feed more."""
_CHUNK = 8
"""Items per submitted task by default, which keeps the overhead of submitting small."""


def available_cores() -> int:
    """How many cores this process may use; where the system does not say, as macOS and Windows, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[_T], _R],
    items: Iterator[_T],
    ahead: int = 4 * WORKERS * _CHUNK,
    chunk: int = _CHUNK,
    held: Callable[[_T], int] = lambda _: 0,
) -> Iterator[_R]:
    """Maps a function over items in threads, ahead of the consumer; results come in the order of the items.

    Args:
        function: Called from several threads; only functions that release the GIL, such as OpenCV's and hashlib's, gain
            from it. While it works on an item, the pixels that it has claimed (``claim_pixels``) are its own.
        items: Iterated in the caller's thread alone.
        ahead: How many items are taken, at most, before their results are consumed (give or take a chunk).
        chunk: Items per task, at most; 1 where each takes long.
        held: How many bytes an item holds in memory; those that are taken ahead hold ``BYTES_AHEAD`` together, give or
            take one.

    Yields:
        One result for each item.
    """
    waiting: deque[tuple[Future[list[_R]], int]] = deque()
    total = 0
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for part, size in _chunks(items, chunk, held):
            waiting.append((pool.submit(_apply, function, part), size))
            total += size
            while waiting and (len(waiting) * chunk > ahead or total > BYTES_AHEAD):
                done, size = waiting.popleft()
                yield from done.result()
                del done
                total -= size
        while waiting:
            yield from waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterator[_T], most: int, held: Callable[[_T], int]) -> Iterator[tuple[list[_T], int]]:
    """Some items at a time, fewer where they hold much, and the bytes that they hold."""
    chunk: list[_T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += held(item)
        if len(chunk) == most or size > BYTES_AHEAD // WORKERS:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _apply(function: Callable[[_T], _R], items: list[_T]) -> list[_R]:
    results = []
    _OWN.pixels = 0
    for item in items:
        try:
            results.append(function(item))
        finally:
            claim_pixels(0)
    return results


_OWN = threading.local()
_CHANGED = threading.Condition()
_claimed = 0


def _forget() -> None:
    """Starts a forked process afresh, in which no thread is left that could give pixels back or release the lock."""
    global _OWN, _CHANGED, _claimed
    _OWN, _CHANGED, _claimed = threading.local(), threading.Condition(), 0


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_forget)


def claim_pixels(count: int) -> None:
    """Waits until an image can be decoded beside those that other threads of ``in_order`` have in hand.

    The pixels are given back once the thread has finished its item, or claims another image's. Elsewhere, where images
    are decoded one after the other, this does nothing.

    Args:
        count: How many pixels the image has.
    """
    global _claimed
    if not hasattr(_OWN, "pixels"):
        return
    with _CHANGED:
        _claimed -= _OWN.pixels
        _OWN.pixels = 0
        _CHANGED.notify_all()
        # the largest image alone may always be decoded
        _CHANGED.wait_for(lambda: not _claimed or _claimed + count <= PIXELS_AT_ONCE)
        _claimed += count
        _OWN.pixels = count
