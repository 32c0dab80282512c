"""From a table of faces to the loaders of training, validation and test."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader

from facecls.data.buffers import SharedBuffers
from facecls.data.dataset import FaceDataset, FeatureDataset
from facecls.data.folders import expanded
from facecls.data.manifests import describe_manifest
from facecls.data.parallel import available_cores
from facecls.data.parsing import MISSING
from facecls.data.sampler import FaceBatchSampler, resume_after, trained_batches
from facecls.data.sources import Root, is_manifest, roots_of
from facecls.data.split import assign_split, earlier_parts, leaks, read_split_file, read_split_lists
from facecls.data.store import ImageStore, decode
from facecls.data.table import read_table
from facecls.data.tasks import TaskOptions, create_tasks
from facecls.data.transforms import EvalTransform, TrainTransform, Transform, check_image
from facecls.errors import UserError

HOLDOUT = "holdout"
"""A face of the original notebook's split file that serves as validation and as test."""
_PREFETCH = 2
"""Batches that a worker prepares ahead, torch's own default."""
_HELD = 3
"""Batches that the loop, its look-ahead and the copy to a GPU hold at once."""
_FORK = "fork" if sys.platform == "linux" else None
"""How workers share images and buffers without a copy; the default on Linux before Python 3.14, unsafe on macOS."""


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader that Lightning knows it can resume within an epoch.

    Lightning asks for these two methods; the datamodule keeps the position, so there is nothing to keep here.
    """

    def state_dict(self) -> dict[str, int]:
        """No state: the datamodule keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """No-op: the datamodule keeps the position."""


def _start_worker(worker: int) -> None:
    pl_worker_init_function(worker)
    cv2.setNumThreads(0)  # there is one worker per core already
    # where SIGTERM reaches all processes: a worker that it killed would be an error to its parent, which has to save
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _manifests(root: Root) -> list[Path]:
    places = [expanded(each) for each in roots_of(root)]
    return [place for place in places if is_manifest(place) and place.is_file()]


def _reasons(left_out: pd.DataFrame) -> str:
    """Such as `` (3 malformed name, 1 truncated)``."""
    counts = left_out["reason"].value_counts().items()
    return f" ({', '.join(f'{count:,} {reason}' for reason, count in counts)})" if len(left_out) else ""


def _parts(split: "pd.Series[str]") -> str:
    """Such as ``48 train, 8 val, 24 test``."""
    counts = split.value_counts()
    return ", ".join(f"{counts[name]:,} {name}" for name in ("train", "val", "test", HOLDOUT) if name in counts)


class FacesDataModule(pl.LightningDataModule):
    """Faces of a folder, archive or manifest as batches for training, validation and test.

    Args:
        root: Folder, .tar, .tar.gz or .zip of UTKFace-like file names, a .csv, .tsv, .txt or .parquet manifest, or
            ``synthetic:N`` for N drawn faces; or a list of these.
        image_size: Side of the images in pixels, 64 or more.
        batch_size: Faces in a batch, on each device.
        num_workers: Processes that prepare batches for a device; null for one per core, at most 16.
        val_fraction: Share of the faces kept for validation, which chooses the best epoch.
        test_fraction: Share of the faces kept for the test.
        split_seed: For the split; null for the seed of everything. Runs that differ in that then test the same faces.
        split_file: A split that is given, in place of the fractions: the original notebook's (CSV with ``img_name`` and
            ``is_train``: 1 trains, the others serve as validation and as test), or ``{train: FILE, test: FILE}``,
            tables that list the images of each part; without one for ``val``, ``val_fraction`` of the training part
            validates.
        split: The part that is tested: ``test``, ``val``, ``train``, or ``all`` faces.
        train_transform: Class path of another pipeline for training; null for facecls.data.transforms.TrainTransform.
        eval_transform: The same for validation and test; null for facecls.data.transforms.EvalTransform.
        seed: For order, augmentation and drawn faces; follows ``seed_everything``.
        tasks: What faces are labelled with beside gender, race and age, such as ``{glasses: {classes: [without,
            with]}}``; a task of the same name takes the place of one of these. Labels are columns of the manifest.

    Attributes:
        tasks: All that faces are labelled with, by name.
        faces: The table with its ``split`` column, after ``setup``.
        rejects: Which files are not used and why, after ``setup``.
        unread: Which labels are not used and why, after ``setup``.
        gone: Training faces of the run that is continued or tested which are no longer there, after ``keep_split``.
        resumed_at: Epoch, and batch in it, with which a resumed run goes on.
    """

    faces: pd.DataFrame
    rejects: pd.DataFrame
    unread: pd.DataFrame
    gone: pd.DataFrame

    def __init__(
        self,
        root: list[str] | str,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int | None = None,
        split_file: dict[str, str] | str | None = None,
        split: Literal["train", "val", "test", "all"] = "test",
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        seed: int = 0,
        tasks: dict[str, TaskOptions | None] = {},  # noqa: B006 - jsonargparse shows it; it is never changed
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
        self.num_workers = min(16, available_cores()) if num_workers is None else num_workers
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = seed if split_seed is None else split_seed
        self.split_file = split_file
        self.split = split
        self.train_transform = TrainTransform(image_size) if train_transform is None else train_transform
        self.eval_transform = EvalTransform(image_size) if eval_transform is None else eval_transform
        self.seed = seed
        self.tasks = create_tasks(tasks)
        self._store: ImageStore | None = None
        self._features: Tensor | None = None
        self._start = self.resumed_at = (0, 0)

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the faces, once.

        Args:
            stage: Not used; all parts come from one table.

        Raises:
            UserError: If the data can't be read or split as asked.
        """
        if self._store is not None:
            return
        for transform in (self.train_transform, self.eval_transform):
            check_image(transform(image=np.zeros((200, 200, 3), np.uint8))["image"], self.image_size)
        table = read_table(self.root, self.seed, self.tasks)
        faces, rejects = table.faces, table.rejects
        self._is_split_given = self.split_file is not None or "split" in faces
        if self.split_file is not None:
            faces["split"] = self._read_split(self.split_file, faces)
            unlisted = faces["split"].isna()
            extra = pd.DataFrame({"path": faces.loc[unlisted, "path"], "reason": "not in the split file"})
            rejects = pd.concat([rejects, extra], ignore_index=True)
        elif "split" not in faces:
            faces["split"] = assign_split(faces, *self.fractions, self.split_seed, self.tasks)
        self.faces, self.rejects, self.unread, self._store = faces, rejects, table.unread, table.store
        self.gone = faces.iloc[:0]
        self._labels = {
            column: faces[column].fillna(MISSING).to_numpy(np.int64)
            for task in self.tasks.values()
            for column in task.columns
            if column in faces
        }

    def _read_split(self, file: dict[str, str] | str, faces: pd.DataFrame) -> "pd.Series[str]":
        """The split of ``split_file``, whose training part is divided if no faces are listed for validation."""
        if isinstance(file, str):
            return read_split_file(file, faces)
        split = read_split_lists(file, faces)
        if "val" not in file:
            learned = faces[split.eq("train")]
            split[learned.index] = assign_split(learned, self.fractions[0], 0.0, self.split_seed, self.tasks)
        return split

    def keep_split(self, earlier: pd.DataFrame, by: Sequence[str] = ("sha1", "path")) -> str | None:
        """Leaves each face of a run in the part where it was, and splits only those that are new.

        Otherwise a split of more or fewer faces would test faces that were trained on.

        Args:
            earlier: The faces of the run: ``path``, ``sha1`` and ``split``.
            by: What a face is known by, as for ``earlier_parts``.

        Returns:
            One line about new faces and those that are gone; ``None`` if there are none.

        Raises:
            UserError: If the split is given, and takes training faces of the run for something else.
        """
        faces, was = self.faces, earlier_parts(self.faces, earlier, by)
        new = was.isna() & faces["split"].notna()
        if self._is_split_given:
            if isinstance(self.split_file, dict) and "val" not in self.split_file:
                divided = faces["split"].isin(["train", "val"]) & was.isin(["train", "val"])
                faces["split"] = was.where(divided, faces["split"])
            moved = faces[was.eq("train") & faces["split"].notna() & faces["split"].ne("train")]
            if len(moved):
                raise UserError(
                    f"Expected the training faces of the run to stay in train, but the split that is given now has "
                    f"{len(moved):,} of them elsewhere, such as {moved['path'].iloc[0]} in {moved['split'].iloc[0]}; "
                    "leave them in train, or train anew."
                )
        else:
            if new.any():
                was[new] = assign_split(faces[new], *self.fractions, self.split_seed, self.tasks)
            faces["split"] = was
        is_gone = ~pd.concat([earlier[column].isin(faces[column]) for column in by], axis=1).any(axis=1)
        gone = earlier[is_gone & earlier["split"].notna()]
        self.gone = gone[gone["split"].eq("train")]
        if not new.any() and not len(gone):
            return None
        said = [
            f"{len(some):,} {words}" + (f" ({_parts(some['split'])})" if len(some) else "")
            for some, words in ((faces[new], "are new"), (gone, "are gone"))
        ]
        return f"{int((~new & faces['split'].notna()).sum()):,} faces of the run keep their part, {', '.join(said)}"

    def treat_as_test_only(self) -> None:
        """Labels the tested part ``test`` and removes all other faces from the split; for faces not trained on.

        Raises:
            UserError: If there is nothing to test.
        """
        split = np.full(len(self.faces), None, object)
        split[self._part(self.split)] = "test"
        self.faces["split"] = pd.Series(split, self.faces.index, dtype="str")
        self.split = "test"

    def describe(self) -> str:
        """What was read, in a few lines, always with the number of rejects."""
        lines = [describe_manifest(file, self.tasks) for file in _manifests(self.root)]
        rejects = f"{len(self.rejects):,} rejects{_reasons(self.rejects)}"
        split = self.faces["split"]
        lines.append(f"{int(split.count()):,} faces ({_parts(split)}); {rejects}")
        if len(self.unread):
            reasons = self.unread["reason"].value_counts().items()
            said = "; ".join(f"{reason}: {count:,}" for reason, count in reasons)
            lines.append(f"labels left out: {len(self.unread):,} ({said}), listed in unread_labels.csv")
        if crossing := leaks(self.faces, split):
            lines.append(f"{crossing:,} faces have a byte-identical copy in another part of the split that was given")
        return "\n".join(lines)

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
        """How much memory the encoded images take, which all workers share."""
        assert self._store is not None, "setup comes first"
        return len(self._store.data)

    def use_features(self, features: Tensor) -> None:
        """Makes all batches from now on carry ``features`` in place of ``image``.

        Args:
            features: (F, V, D) float32, by row of ``faces``: V views of each.
        """
        self._features = features

    def state_dict(self) -> dict[str, int]:
        """How many faces of which epoch the optimizer has had; Lightning keeps it in every checkpoint.

        Faces, since a resumed run may have other batches. Those whose gradients still wait for more of them
        (``trainer.accumulate_grad_batches``) do not count, since a checkpoint has no gradients.
        """
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        begun, progress = loop.epoch_progress.current.ready, loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": begun, "faces": 0}
        batches: int = progress.current.processed  # type: ignore[attr-defined]
        batches -= batches % self.trainer.accumulate_grad_batches
        return {"epoch": max(0, begun - 1), "faces": batches * self.batch_size * self.trainer.world_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after those faces, in batches as they are now.

        Lightning makes the first iterator before it tells the sampler its epoch, so a resumed run must know it here.
        """
        assert self.trainer is not None
        faces, ranks = len(self._part("train")), self.trainer.world_size
        size = self.batch_size * ranks
        batches = trained_batches(faces, size, self.trainer.limit_train_batches)
        start = resume_after(state_dict["faces"], faces, size, batches, ranks)
        self._start, self.resumed_at = (state_dict["epoch"], start), (state_dict["epoch"], start // size)

    def train_dataloader(self) -> ResumableLoader:
        """Augmented training faces in a new order each epoch."""
        (epoch, start), self._start = self._start, (0, 0)
        return self._loader(self._part("train"), self.train_transform, seed=self.seed, epoch=epoch, start=start)

    def val_dataloader(self) -> ResumableLoader:
        """Validation faces."""
        return self._loader(self._part("val"), self.eval_transform)

    def test_dataloader(self) -> ResumableLoader:
        """The faces of the part that ``split`` names."""
        return self._loader(self._part(self.split), self.eval_transform)

    def whole_dataloader(self) -> ResumableLoader:
        """All faces, in the order of the table, as evaluation sees them."""
        return self.loader(np.arange(len(self.faces)))

    def loader(self, rows: np.ndarray) -> ResumableLoader:
        """Some faces, as evaluation sees them.

        Args:
            rows: (N,) row numbers in ``faces``.
        """
        return self._loader(rows, self.eval_transform)

    def sample(self, count: int) -> np.ndarray:
        """Up to ``count`` faces of the training, by ``seed``: (N,) row numbers in ``faces``, ascending."""
        return np.sort(np.random.default_rng(self.seed).permutation(self._part("train"))[:count])

    def rows(self, part: str) -> np.ndarray:
        """The faces of a part of the split, after ``setup``.

        Args:
            part: ``train``, ``val``, ``test`` or ``all``.

        Returns:
            (N,) int64 row numbers in ``faces``; none if the part is empty.
        """
        split = self.faces["split"]
        wanted = split.notna() if part == "all" else split.eq(part) | (part != "train") & split.eq(HOLDOUT)
        return np.flatnonzero(wanted.fillna(False).to_numpy(bool))

    def _part(self, name: str) -> np.ndarray:
        rows = self.rows(name)
        if not len(rows):
            raise UserError(
                f"Expected faces in the {name} part of {', '.join(roots_of(self.root))}, but it has none; see the "
                "data.* options."
            )
        return rows

    def _loader(self, faces: np.ndarray, transform: Transform, **order: Any) -> ResumableLoader:
        assert self._store is not None, "setup comes first"
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(faces) < ranks:
            raise UserError(
                f"Expected a face for each of {ranks} devices in each part, but one part has {len(faces)}; use fewer "
                "devices."
            )
        dataset: FaceDataset | FeatureDataset
        if self._features is None:
            workers = self.num_workers
            size = self.batch_size * self.image_size**2 * 3
            buffers = SharedBuffers(workers, _PREFETCH + _HELD, size) if workers and _FORK else None
            dataset = FaceDataset(self._store, self._labels, transform, self.image_size, buffers)
        else:
            workers = 0  # features are looked up faster than they are handed over
            dataset = FeatureDataset(self._features, self._labels)
        return ResumableLoader(
            dataset,  # type: ignore[arg-type] # an item is a batch, and workers' shared batches arrive as such
            sampler=FaceBatchSampler(faces, self.batch_size, **order, rank=rank, ranks=ranks),
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            multiprocessing_context=_FORK if workers else None,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )
