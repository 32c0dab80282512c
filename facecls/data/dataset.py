"""From the indices of a batch to its tensors."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from facecls.data.buffers import SharedBatch, SharedBuffers
from facecls.data.sampler import BatchIndices
from facecls.data.store import ImageStore, decode
from facecls.data.transforms import Transform, check_image

Labels = Mapping[str, npt.NDArray[np.int64]]
"""(F,) by label column, by row of the table, ``MISSING`` where a face has none."""


class FaceDataset(Dataset[dict[str, Tensor] | SharedBatch]):
    """Batches of images and labels; an item is a whole batch.

    Args:
        store: The encoded images.
        labels: The labels.
        transform: From an image to one of the wanted size.
        size: Side of the images that it must give, in pixels.
        buffers: That forked workers put images in; ``None`` without workers.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Labels,
        transform: Transform,
        size: int,
        buffers: SharedBuffers | None = None,
    ) -> None:
        self.store = store
        self.labels = labels
        self.transform = transform
        self.size = size
        self.buffers = buffers

    def __getitem__(self, batch: BatchIndices) -> dict[str, Tensor] | SharedBatch:
        """Decodes, augments and stacks a batch.

        Args:
            batch: Which faces.

        Returns:
            ``image`` (N, 3, H, W) uint8 RGB, laid out channels last; ``index`` and each label column (N,) int64. In a
            worker, a ``SharedBatch``, which unpickles in the parent as such a dictionary.
        """
        rest = _with_index(batch.faces, self.labels)
        worker = get_worker_info()
        if self.buffers is not None and worker is not None and (buffer := self.buffers.claim(worker.id)) is not None:
            images = self._images(batch, partial(self.buffers.array, buffer))
            return SharedBatch(self.buffers, buffer, images.shape, rest)
        images = self._images(batch, lambda shape: np.empty(shape, np.uint8))
        return {"image": torch.from_numpy(images).permute(0, 3, 1, 2), **rest}

    def _images(
        self, batch: BatchIndices, create: Callable[[tuple[int, ...]], npt.NDArray[np.uint8]]
    ) -> npt.NDArray[np.uint8]:
        if batch.seed is not None:
            self.transform.set_random_seed(int(np.random.SeedSequence(batch.seed).generate_state(1)[0]))
        for place, face in enumerate(batch.faces):
            image = self.transform(image=decode(self.store[face]))["image"]
            check_image(image, self.size)
            if not place:
                images = create((len(batch.faces), *image.shape))
            images[place] = image  # while it is in the processor's cache
        return images


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """Batches of features that were computed before; an item is a whole batch.

    Args:
        features: (F, V, D) float32, by row of the table: V views of each face.
        labels: The labels.
    """

    def __init__(self, features: Tensor, labels: Labels) -> None:
        self.features = features
        self.labels = labels

    def __getitem__(self, batch: BatchIndices) -> dict[str, Tensor]:
        """Looks a batch up.

        Args:
            batch: Which faces.

        Returns:
            ``features`` (N, V, D) float32; ``index`` and each label column (N,) int64.
        """
        return {"features": self.features[torch.from_numpy(batch.faces)], **_with_index(batch.faces, self.labels)}


def _with_index(faces: npt.NDArray[np.int64], labels: Labels) -> dict[str, Tensor]:
    return {
        "index": torch.from_numpy(faces),
        **{column: torch.from_numpy(values[faces]) for column, values in labels.items()},
    }
