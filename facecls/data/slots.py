"""Memory in which batches come from the processes that make them, used again and again."""

import mmap
import weakref
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_NUMBERS = count()


class Slots:
    """Shared memory for batches of images; each slot is lent to one batch at a time.

    torch's own way maps fresh memory for every batch, of which worker and parent have to fault in each page: more time
    than decoding and resizing what lies in it take together (batches of 64 at 224 pixels, Linux in a virtual machine).

    The parent lends a slot to a batch that is to be made, a forked worker fills it, and the parent makes a tensor of it
    without a copy. When nothing refers to that tensor any more, the slot is free again. A batch without a slot, because
    all are lent or the worker wasn't forked, goes torch's way.

    Args:
        count: How many slots.
        size: Bytes of each. What no batch has touched takes no memory.
    """

    def __init__(self, count: int, size: int) -> None:
        self.number = next(_NUMBERS)
        self._bytes = np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)
        self._free = list(range(count))
        _KNOWN[self.number] = self

    def __reduce__(self) -> Any:
        """Nothing: a process that isn't forked from this one doesn't have the memory."""
        return _nothing, ()

    def lend(self) -> int | None:
        """The number of a free slot, the last one that was given back; ``None`` if all are lent."""
        return self._free.pop() if self._free else None

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
        self._sent = slots.number, slot, shape, {name: value.numpy() for name, value in rest.items()}

    def __reduce__(self) -> Any:
        """What makes a batch of it."""
        return _receive, self._sent


def _receive(number: int, slot: int, shape: tuple[int, ...], rest: Mapping[str, Any]) -> dict[str, Tensor]:
    images = _KNOWN[number].tensor(slot, shape).permute(0, 3, 1, 2)
    return {"image": images, **{name: torch.from_numpy(value) for name, value in rest.items()}}


def _nothing() -> None:
    pass
