"""Memory in which batches come from the processes that make them, used again and again."""

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


class Slots:
    """Shared memory for batches of images; each slot is lent to one batch at a time.

    torch's own way maps fresh memory for every batch, of which worker and parent have to fault in each page: for one of
    64 at 224 pixels more than half of the time that decoding and resizing takes (Linux in a virtual machine).

    The process that makes them lends a slot to a batch that is to be made, a worker forked from it fills it, and it
    makes a tensor of that without a copy. When nothing refers to the tensor any more, the slot is free again. While all
    are lent, batches go torch's way. A slot whose batch never comes, as after an error, stays lent.

    Args:
        number: How many slots.
        size: Bytes of each. What no batch has touched takes no memory.

    Attributes:
        key: What tells them from others.
    """

    def __init__(self, number: int, size: int) -> None:
        self.key = next(_KEYS)
        self._owner = os.getpid()
        self._bytes = np.frombuffer(mmap.mmap(-1, number * size), np.uint8).reshape(number, size)
        self._free = list(range(number))
        _KNOWN[self.key] = self

    def __reduce__(self) -> Any:
        """Nothing: a process that isn't forked from this one doesn't have the memory, and does without."""
        return _nothing, ()

    def lend(self) -> int | None:
        """The number of a free slot, the last one that was given back.

        Returns:
            ``None`` if all are lent, and in a forked process, where others may lend the same memory.
        """
        return self._free.pop() if self._free and os.getpid() == self._owner else None

    def array(self, slot: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """The memory of a slot.

        Args:
            slot: Its number.
            shape: Of no more bytes than a slot has.

        Returns:
            A view, uint8, of that shape.
        """
        return self._bytes[slot, : np.prod(shape)].reshape(shape)

    def tensor(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """What a worker left in a slot, which is free again when nothing refers to the tensor.

        Args:
            slot: Its number.
            shape: Of no more bytes than a slot has.

        Returns:
            A view, uint8, of that shape.
        """
        array = self.array(slot, shape)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)


_KNOWN: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


class SlottedBatch:
    """A batch whose images a worker left in a slot; on the parent's side of the queue it is an ordinary one.

    Args:
        slots: That the worker has from the parent.
        slot: Where the images lie.
        shape: Theirs, (N, H, W, 3).
        rest: The other tensors by name; small ones, which are cheaper to send than to share.
    """

    def __init__(self, slots: Slots, slot: int, shape: tuple[int, ...], rest: Mapping[str, Tensor]) -> None:
        self._sent = slots.key, slot, shape, {name: value.numpy() for name, value in rest.items()}

    def __reduce__(self) -> Any:
        """What makes a batch of it."""
        return _receive, self._sent


def _receive(key: int, slot: int, shape: tuple[int, ...], rest: Mapping[str, Any]) -> dict[str, Tensor]:
    images = _KNOWN[key].tensor(slot, shape).permute(0, 3, 1, 2)
    return {"image": images, **{name: torch.from_numpy(value) for name, value in rest.items()}}


def _nothing() -> None:
    pass
