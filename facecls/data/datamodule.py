"""From a table of faces to batches."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from facecls.data.buffers import Slots, SlottedBatch
from facecls.data.split import assign_split, leaks, read_split_file
from facecls.data.store import ImageStore, decode
from facecls.data.table import read_table
from facecls.data.tasks import MISSING, TASKS
from facecls.data.transforms import EvalTransform, TrainTransform, Transform
from facecls.errors import UserError

HOLDOUT = "holdout"
"""A face of the seed's split file that serves as validation and as test."""
_READY = 2
"""Batches that a worker makes ahead, torch's own default."""
_FORKED = "fork" if sys.platform == "linux" else None
"""How workers come by images and slots without a copy: Python's own way on Linux before 3.14, unsafe on macOS."""


@dataclass(frozen=True)
class BatchPlan:
    """Which faces make a batch, and from what its augmentation is drawn.

    Attributes:
        faces: (N,) int64 rows of the table.
        seed: Integers that no other batch of the run has; ``None`` where nothing is drawn.
        slot: Of the loader's ``Slots``, where a worker puts the images, once; ``None`` where there is none.
    """

    faces: np.ndarray
    seed: tuple[int, ...] | None
    slot: int | None = None


class PlanSampler(Sampler[BatchPlan]):
    """The batches of an epoch.

    In training, order and augmentation are a function of the seed, the epoch and the number of the batch alone: they do
    not depend on how many workers there are, and are the same again when a run is resumed.

    Several processes cut the same batches among them: each takes every ``ranks``-th face, so that none is taken twice
    or left out, and together they have the batches that one process has with ``ranks`` times the ``batch_size``.

    Args:
        faces: (N,) int64 rows of the table.
        batch_size: Faces in a batch; the last one of an evaluation may be smaller.
        seed: For training; ``None`` for evaluation, in the order of the table.
        epoch: The first that will be asked for.
        skip: Batches of that epoch that a resumed run has had already.
        rank: Number of this process.
        ranks: How many processes there are, no more than faces.
        slots: Lends one to each batch; ``None`` without forked workers.
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
        slots: Slots | None = None,
    ) -> None:
        self.faces = faces
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.skip = skip
        self.rank = rank
        self.ranks = ranks
        self.slots = slots

    def __len__(self) -> int:
        """Batches in a whole epoch: of training the same for all processes, of evaluation perhaps one more for some."""
        if self.seed is None:
            return -(-len(self.faces[self.rank :: self.ranks]) // self.batch_size)
        # a last batch of one face would give BatchNorm nothing to average over
        return max(1, len(self.faces) // (self.batch_size * self.ranks))

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchPlan]:
        """The plans of this epoch."""
        faces = self.faces
        if self.seed is not None:
            faces = np.random.default_rng((self.seed, self.epoch)).permutation(faces)
        first, self.skip = self.skip, 0
        size = self.batch_size * self.ranks
        for number in range(first, len(self)):
            seed = None if self.seed is None else (self.seed, self.epoch, number, self.rank)
            own = faces[number * size : (number + 1) * size][self.rank :: self.ranks]
            yield BatchPlan(own, seed, None if self.slots is None else self.slots.lend())


class FaceBatches(Dataset[dict[str, Tensor] | SlottedBatch]):
    """Turns plans into batches; an item is a whole batch.

    Args:
        store: The encoded images.
        labels: (N, 3) int64, gender, race and age by row of the table, ``MISSING`` without.
        transform: From an image to one of the wanted size.
        slots: That a forked worker puts images in; ``None`` without any.
    """

    def __init__(self, store: ImageStore, labels: np.ndarray, transform: Transform, slots: Slots | None = None) -> None:
        self.store = store
        self.labels = labels
        self.transform = transform
        self.slots = slots

    def __getitem__(self, plan: BatchPlan) -> dict[str, Tensor] | SlottedBatch:
        """Decodes, augments and stacks a batch.

        Args:
            plan: Which faces.

        Returns:
            ``image`` (N, 3, H, W) uint8 RGB, laid out channels last; gender, race, age and index (N,) int64. In a
            worker a ``SlottedBatch``, which its parent receives as that.
        """
        rest = _labelled(plan.faces, self.labels)
        if self.slots is not None and plan.slot is not None and get_worker_info() is not None:
            images = self._images(plan, partial(self.slots.array, plan.slot))
            return SlottedBatch(self.slots, plan.slot, images.shape, rest)
        images = self._images(plan, partial(np.empty, dtype=np.uint8))
        return {"image": torch.from_numpy(images).permute(0, 3, 1, 2), **rest}

    def _images(self, plan: BatchPlan, create: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray:
        if plan.seed is not None:
            self.transform.set_random_seed(int(np.random.SeedSequence(plan.seed).generate_state(1)[0]))
        for place, face in enumerate(plan.faces):
            image = self.transform(image=decode(self.store[face]))["image"]
            if not place:
                images = create((len(plan.faces), *image.shape))
            images[place] = image  # while it is in the processor's cache
        return images


class FeatureBatches(Dataset[dict[str, Tensor]]):
    """Turns plans into batches of features that were computed before; an item is a whole batch.

    Args:
        features: (N, D) float32, by row of the table.
        labels: (N, 3) int64, as for ``FaceBatches``.
    """

    def __init__(self, features: Tensor, labels: np.ndarray) -> None:
        self.features = features
        self.labels = labels

    def __getitem__(self, plan: BatchPlan) -> dict[str, Tensor]:
        """Looks a batch up.

        Args:
            plan: Which faces.

        Returns:
            ``features`` (N, D) float32; gender, race, age and index (N,) int64.
        """
        return {"features": self.features[torch.from_numpy(plan.faces)], **_labelled(plan.faces, self.labels)}


def _labelled(faces: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    batch = {"index": torch.from_numpy(faces)}
    for column, task in enumerate(TASKS):
        batch[task] = torch.from_numpy(labels[faces, column])
    return batch


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader that Lightning knows it can resume within an epoch.

    Lightning asks for these two methods; there is nothing to keep, since the datamodule keeps which batch of which
    epoch comes next.
    """

    def state_dict(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing."""


def _start_worker(worker: int) -> None:
    pl_worker_init_function(worker)
    cv2.setNumThreads(0)  # workers are one process a core already


def _check_size(name: str, transform: Transform, size: int) -> None:
    found = transform(image=np.zeros((200, 200, 3), np.uint8))["image"].shape
    if found != (size, size, 3):
        raise UserError(
            f"Expected data.{name} to give images of (data.image_size, data.image_size, 3), that is {(size, size, 3)}, "
            f"but it gives {found}; set its size and data.image_size to the same."
        )


class FacesDataModule(pl.LightningDataModule):
    """Faces of a folder, archive or manifest as batches for training, validation and test.

    Args:
        root: Folder, .tar, .tar.gz or .zip of UTKFace-like file names, a .csv or .parquet manifest, or ``synthetic:N``
            for N drawn faces.
        image_size: Side of the images in pixels, 64 or more.
        batch_size: Faces in a batch, on each device.
        num_workers: Processes that prepare batches for a device; null for one a core, at most 16.
        val_fraction: Share of the faces kept for validation, which chooses the best epoch.
        test_fraction: Share of the faces kept for the test.
        split_file: The seed's split (CSV with ``img_name`` and ``is_train``) in place of the fractions: 1 trains, the
            others serve as validation and as test.
        split: The part that is tested: ``test``, ``val``, ``train``, or ``all`` faces.
        train_transform: Class path of another pipeline for training; null for facecls.data.transforms.TrainTransform.
        eval_transform: The same for validation and test; null for facecls.data.transforms.EvalTransform.
        seed: For split, order and augmentation; follows ``seed_everything``.

    Attributes:
        faces: The table with its ``split`` column, after ``setup``.
        rejects: What is not used and why, after ``setup``.
    """

    faces: pd.DataFrame
    rejects: pd.DataFrame

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_file: str | None = None,
        split: Literal["train", "val", "test", "all"] = "test",
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if image_size < 64 or batch_size < 1 or (num_workers is not None and num_workers < 0):
            raise UserError(
                "Expected data.image_size of at least 64, data.batch_size of at least 1 and data.num_workers of at "
                f"least 0, but got {image_size}, {batch_size} and {num_workers}."
            )
        self.save_hyperparameters(logger=False)
        self.root = root
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = min(16, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
        self.fractions = (val_fraction, test_fraction)
        self.split_file = split_file
        self.split = split
        self.train_transform = TrainTransform(image_size) if train_transform is None else train_transform
        self.eval_transform = EvalTransform(image_size) if eval_transform is None else eval_transform
        self.seed = seed
        self._store: ImageStore | None = None
        self._features: Tensor | None = None
        self._start = (0, 0)

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the faces, once.

        Args:
            stage: Not used; all parts come from one table.

        Raises:
            UserError: If the data can't be read or split as asked.
        """
        if self._store is not None:
            return
        for name in ("train_transform", "eval_transform"):
            _check_size(name, getattr(self, name), self.image_size)
        table = read_table(self.root, self.seed)
        faces, rejects = table.faces, table.rejects
        if self.split_file is not None:
            faces["split"] = read_split_file(Path(self.split_file), faces)
            unlisted = faces["split"].isna()
            extra = pd.DataFrame({"path": faces.loc[unlisted, "path"], "reason": "not in the split file"})
            rejects = pd.concat([rejects, extra], ignore_index=True)
        elif "split" not in faces:
            faces["split"] = assign_split(faces, *self.fractions, self.seed)
        self.faces, self.rejects, self._store = faces, rejects, table.store
        self._labels = faces[list(TASKS)].fillna(MISSING).to_numpy(np.int64)  # (N, 3)

    def forget_training(self) -> None:
        """Calls what is tested ``test``, and takes all else out of the split; for faces that no model was trained with.

        Raises:
            UserError: If there is nothing to test.
        """
        split = np.full(len(self.faces), None, object)
        split[self._part(self.split)] = "test"
        self.faces["split"] = pd.Series(split, self.faces.index, dtype="str")
        self.split = "test"

    def describe(self) -> str:
        """What was read, in a line or two, with the number of rejects always said."""
        counts = self.faces["split"].value_counts()
        parts = ", ".join(f"{counts[name]:,} {name}" for name in ("train", "val", "test", HOLDOUT) if name in counts)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects["reason"].value_counts().items())
        text = (
            f"{int(counts.sum()):,} faces ({parts}); {len(self.rejects):,} rejects{f' ({reasons})' if reasons else ''}"
        )
        crossing = leaks(self.faces, self.faces["split"])
        if crossing:
            text += f"\n{crossing:,} faces have a byte-identical copy in another part of the split that was given"
        return text

    def picture(self, face: int) -> np.ndarray:
        """A face as it is stored.

        Args:
            face: Its row number in ``faces``.

        Returns:
            RGB, uint8 (H, W, 3).
        """
        assert self._store is not None, "setup comes first"
        return decode(self._store[face])

    def encoded_bytes(self) -> int:
        """How much memory the images take, held once for all workers."""
        assert self._store is not None, "setup comes first"
        return len(self._store.data)

    def use_features(self, features: Tensor) -> None:
        """Makes all batches from now on carry ``features`` in place of ``image``.

        Args:
            features: (N, D) float32, by row of ``faces``.
        """
        self._features = features

    def state_dict(self) -> dict[str, int]:
        """Which batch of which epoch comes next; Lightning keeps it in every checkpoint."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        begun, progress = loop.epoch_progress.current.ready, loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": begun, "batch": 0}
        return {"epoch": max(0, begun - 1), "batch": progress.current.processed}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on with that batch.

        Lightning makes the first iterator before it tells the sampler its epoch, so a resumed run must know it here.
        """
        self._start = (state_dict["epoch"], state_dict["batch"])

    def train_dataloader(self) -> ResumableLoader:
        """Augmented training faces in a new order each epoch."""
        (epoch, skip), self._start = self._start, (0, 0)
        return self._loader(self._part("train"), self.train_transform, seed=self.seed, epoch=epoch, skip=skip)

    def val_dataloader(self) -> ResumableLoader:
        """Validation faces."""
        return self._loader(self._part("val"), self.eval_transform)

    def test_dataloader(self) -> ResumableLoader:
        """The faces of the part that ``split`` names."""
        return self._loader(self._part(self.split), self.eval_transform)

    def whole_dataloader(self) -> ResumableLoader:
        """All faces, in the order of the table, as evaluation sees them."""
        return self._loader(np.arange(len(self.faces)), self.eval_transform)

    def _part(self, name: str) -> np.ndarray:
        split = self.faces["split"]
        wanted = split.notna() if name == "all" else split.eq(name) | (name != "train") & split.eq(HOLDOUT)
        rows = np.flatnonzero(wanted.fillna(False).to_numpy(bool))
        if not len(rows):
            raise UserError(
                f"Expected faces in the {name} part of {self.root}, but it has none; see the data.* options."
            )
        return rows

    def _slots(self) -> Slots | None:
        """For the batches that workers fill and have filled, and those that loop, look ahead and a GPU's copy hold."""
        if not self.num_workers or not _FORKED:
            return None
        return Slots(self.num_workers * _READY + 3, self.batch_size * self.image_size**2 * 3)

    def _loader(self, faces: np.ndarray, transform: Transform, **plans: Any) -> ResumableLoader:
        assert self._store is not None, "setup comes first"
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(faces) < ranks:
            raise UserError(
                f"Expected a face for each of {ranks} devices in each part, but one has {len(faces)}; take fewer."
            )
        workers, slots = self.num_workers, self._slots()
        batches: Any = FaceBatches(self._store, self._labels, transform, slots)
        if self._features is not None:
            workers, slots = 0, None  # features are looked up faster than handed over
            batches = FeatureBatches(self._features, self._labels)
        return ResumableLoader(
            batches,
            sampler=PlanSampler(faces, self.batch_size, **plans, rank=rank, ranks=ranks, slots=slots),
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            prefetch_factor=_READY if workers else None,
            multiprocessing_context=_FORKED if workers else None,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )
