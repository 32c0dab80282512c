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
        skip: Batches of that epoch that a resumed run has already had.
        rank: Number of this process.
        ranks: How many processes there are, no more than faces.
    """

    def __init__(
        self,
        faces: np.ndarray,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.faces = faces
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.skip = skip
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Batches in a whole epoch: in training the same for all processes, in evaluation some may have one more."""
        if self.seed is None:
            return -(-len(self.faces[self.rank :: self.ranks]) // self.batch_size)
        # a last batch of one face would give BatchNorm nothing to average over
        return max(1, len(self.faces) // (self.batch_size * self.ranks))

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchIndices]:
        """The batches of this epoch."""
        faces = self.faces
        if self.seed is not None:
            faces = np.random.default_rng((self.seed, self.epoch)).permutation(faces)
        first, self.skip = self.skip, 0
        size = self.batch_size * self.ranks
        for number in range(first, len(self)):
            seed = None if self.seed is None else (self.seed, self.epoch, number, self.rank)
            yield BatchIndices(faces[number * size : (number + 1) * size][self.rank :: self.ranks], seed)
