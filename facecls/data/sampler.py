"""Which faces make a batch, in which order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class BatchIndices:
    """The faces of a batch, and what its augmentation is seeded with.

    Attributes:
        faces: (N,) int64 rows of the table.
        seed: Integers that no other batch of the run has; ``None`` where nothing is random.
    """

    faces: np.ndarray
    seed: tuple[int, ...] | None


def trained_batches(faces: int, size: int, limit: int | float = 1.0) -> int:
    """How many batches a training epoch has.

    A last batch that is not full is left out; one of a single face would give BatchNorm nothing to average over.

    Args:
        faces: How many there are to train on.
        size: Faces in a batch of all processes together.
        limit: ``trainer.limit_train_batches``: at most so many batches, or a share of them.

    Returns:
        0 only if the share is too small for a batch.
    """
    batches = max(1, faces // size)
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def resume_after(seen: int, faces: int, size: int, batches: int, ranks: int) -> int:
    """The face with which a resumed epoch goes on, in the epoch's order, whatever its batches were before.

    The batch of that face is the first one; only those of its faces are taken that the epoch has not had, and all later
    batches are those of an epoch that was never stopped. A few faces come again if less than two for each process were
    left of the batch, which BatchNorm could not average over, or if the epoch has now ended before.

    Args:
        seen: How many faces of the epoch were trained on.
        faces: How many there are to train on.
        size: Faces in a batch of all processes together.
        batches: Batches of an epoch.
        ranks: How many processes there are.

    Returns:
        From 0; the batch is this number divided by ``size``, rounded down.

    Examples:
        >>> resume_after(112, faces=1050, size=64, batches=16, ranks=1)  # goes on with the other 16 faces of batch 1
        112
        >>> resume_after(1040, faces=1050, size=64, batches=16, ranks=1)  # 16 batches have 1,024
        1022
    """
    batch = min(seen // size, batches - 1)
    end = min((batch + 1) * size, faces)
    return max(batch * size, min(seen, end - 2 * ranks))


class FaceBatchSampler(Sampler[BatchIndices]):
    """The batches of an epoch.

    In training, order and augmentation are a function of the seed, the epoch and the number of the batch alone: they
    do not depend on the number of workers, and are the same again when a run is resumed.

    Several processes divide the same batches among them: each takes every ``ranks``-th face, so that no face is taken
    twice or left out, and together they have the batches that one process has with ``ranks`` times the ``batch_size``.

    Args:
        faces: (N,) int64 rows of the table.
        batch_size: Faces in a batch; the last one of an evaluation may be smaller.
        seed: For training; ``None`` for evaluation, in the order of the table.
        epoch: The first epoch that will be asked for.
        start: The face of that epoch, in its order, with which a resumed run goes on, as ``resume_after`` returns it.
        rank: Number of this process.
        ranks: How many processes there are, no more than faces.
    """

    def __init__(
        self,
        faces: np.ndarray,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.faces = faces
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Batches in a whole epoch: in training the same for all processes, in evaluation some may have one more."""
        if self.seed is None:
            return -(-len(self.faces[self.rank :: self.ranks]) // self.batch_size)
        return trained_batches(len(self.faces), self.batch_size * self.ranks)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchIndices]:
        """The batches of this epoch."""
        faces = self.faces
        if self.seed is not None:
            faces = np.random.default_rng((self.seed, self.epoch)).permutation(faces)
        start, self.start = self.start, 0
        size = self.batch_size * self.ranks
        for number in range(start // size, len(self)):
            seed = None if self.seed is None else (self.seed, self.epoch, number, self.rank)
            own = faces[max(start, number * size) : (number + 1) * size]
            yield BatchIndices(own[self.rank :: self.ranks], seed)
