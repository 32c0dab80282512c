"""Shared memory that hands batches from the worker processes that make them to the process that uses them."""

import mmap
import os
import weakref
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEYS = count()


class SharedBuffers:
    """Reusable shared memory for batches of images; each buffer holds one batch at a time.

    torch's own way maps fresh memory for every batch, whose pages both worker and parent have to fault in: for a batch
    of 64 at 224 pixels that takes more than half as long as decoding and resizing (Linux in a virtual machine).

    A worker forked from the process that made the buffers claims one of its own and fills it; the parent wraps it in a
    tensor without a copy, and releases it once nothing refers to the tensor. Only its worker sets a buffer's flag and
    only the parent clears it, so no lock is needed. When all of a worker's buffers are in use, its batches fall back to
    torch's own transfer. A buffer whose batch never arrives, as after an error, stays claimed. At most one
    loader may use them.

    Args:
        workers: How many processes fill them.
        each: How many buffers a worker has.
        size: Bytes of each. Pages that no batch has touched take no memory.

    Attributes:
        key: Identifies these buffers in the parent and its workers.
    """

    def __init__(self, workers: int, each: int, size: int) -> None:
        self.key = next(_KEYS)
        self._owner = os.getpid()
        self._in_use = np.frombuffer(mmap.mmap(-1, workers * each), np.uint8).reshape(workers, each)
        self._bytes = np.frombuffer(mmap.mmap(-1, workers * each * size), np.uint8).reshape(workers * each, size)
        _KNOWN[self.key] = self

    def __reduce__(self) -> Any:
        """Pickles as ``None``: a process that was not forked from this one does not share the memory."""
        return _none, ()

    def claim(self, worker: int) -> int | None:
        """Takes a free buffer of a worker; to be called in it.

        Args:
            worker: Its number.

        Returns:
            The buffer's number; ``None`` if all are in use, or this process is no worker of the one that made them.
        """
        if os.getppid() != self._owner or worker >= len(self._in_use):
            return None
        free = np.flatnonzero(self._in_use[worker] == 0)
        if not len(free):
            return None
        first = int(free[0])  # so that no more buffers are ever touched than are needed at once
        self._in_use[worker, first] = 1
        return worker * self._in_use.shape[1] + first

    def array(self, buffer: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """The memory of a buffer.

        Args:
            buffer: Its number.
            shape: Of no more bytes than a buffer has.

        Returns:
            A view, uint8, of that shape.
        """
        return self._bytes[buffer, : np.prod(shape)].reshape(shape)

    def tensor(self, buffer: int, shape: tuple[int, ...]) -> Tensor:
        """What a worker left in a buffer, which is released once nothing refers to the tensor.

        Args:
            buffer: Its number.
            shape: Of no more bytes than a buffer has.

        Returns:
            A view, uint8, of that shape.
        """
        array = self.array(buffer, shape)
        weakref.finalize(array, self._release, buffer).atexit = False
        return torch.from_numpy(array)

    def _release(self, buffer: int) -> None:
        if os.getpid() == self._owner:  # a forked process drops its copy of a tensor that the parent still uses
            self._in_use.reshape(-1)[buffer] = 0

    def free(self) -> int:
        """How many buffers are not in use."""
        return int((self._in_use == 0).sum())


_KNOWN: "weakref.WeakValueDictionary[int, SharedBuffers]" = weakref.WeakValueDictionary()


class SharedBatch:
    """A batch whose images a worker left in a buffer; unpickled by the parent, it is an ordinary batch.

    Args:
        buffers: That the worker shares with its parent.
        buffer: Where the images are.
        shape: Their shape, (N, H, W, 3).
        rest: The other tensors by name; small ones, which are cheaper to send than to share.
    """

    def __init__(self, buffers: SharedBuffers, buffer: int, shape: tuple[int, ...], rest: Mapping[str, Tensor]) -> None:
        self._sent = buffers.key, buffer, shape, {name: value.numpy() for name, value in rest.items()}

    def __reduce__(self) -> Any:
        """Pickles as the call that makes an ordinary batch of it."""
        return _receive, self._sent


def _receive(key: int, buffer: int, shape: tuple[int, ...], rest: Mapping[str, Any]) -> dict[str, Tensor]:
    images = _KNOWN[key].tensor(buffer, shape).permute(0, 3, 1, 2)
    return {"image": images, **{name: torch.from_numpy(value) for name, value in rest.items()}}


def _none() -> None:
    pass
