"""Counts faces and labels, and refuses to train or test without them."""

from collections.abc import Iterable, Mapping

import pandas as pd
import pytorch_lightning as pl

from facecls.data.datamodule import HOLDOUT, FacesDataModule
from facecls.data.sampler import trained_batches
from facecls.data.sources import roots_of
from facecls.data.tasks import Task
from facecls.errors import UserError


def count_labels(faces: pd.DataFrame, tasks: Iterable[Task]) -> dict[str, int]:
    """Counts the faces that have a label of each task; a range of ages is one.

    Args:
        faces: With the label columns of the tasks, as far as any face has such a label.
        tasks: The tasks.

    Returns:
        Number of faces by task.
    """
    return {
        task.name: int(faces[[column for column in task.columns if column in faces]].notna().any(axis=1).sum())
        for task in tasks
    }


def describe_labels(data: FacesDataModule) -> str | None:
    """The number of labels of each task, such as ``labels: gender 80, race 0, age 40 of 80 faces``.

    Args:
        data: The faces, after ``setup``.

    Returns:
        A line; ``None`` if all faces have all labels.
    """
    faces = data.faces[data.faces["split"].notna()]
    counts = count_labels(faces, data.tasks.values())
    if set(counts.values()) == {len(faces)}:
        return None
    return f"labels: {', '.join(f'{name} {count:,}' for name, count in counts.items())} of {len(faces):,} faces"


def check_some_labels(data: FacesDataModule, learned: Iterable[Task]) -> None:
    """Refuses to test a model on faces without labels.

    Args:
        data: The faces, after ``setup``.
        learned: The tasks that the model has learned.

    Raises:
        UserError: If no face to test has a label of any of them.
    """
    tested = data.rows(data.split)
    counts = count_labels(data.faces.iloc[tested], learned)
    if len(tested) and not any(counts.values()):  # the loader refuses an empty part
        raise UserError(
            f"Expected labels of {', '.join(counts)} in {', '.join(roots_of(data.root))}, but no face to test has one; "
            "correct the names of the columns, or see facecls.predict for faces without labels."
        )


def is_tested(trainer: pl.Trainer) -> bool:
    """Whether a training ends with a test: not a development run, nor one whose ``limit_test_batches`` is 0."""
    return trainer.limit_test_batches != 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]


def check_parts(trainer: pl.Trainer, data: FacesDataModule, least: int) -> None:
    """Refuses to begin a training that will lack faces or steps, in its last minute if not in its first.

    Args:
        trainer: Before training.
        data: The faces, after ``setup``.
        least: How many faces a batch of the training needs on each device; 2 where their mean is taken.

    Raises:
        UserError: If a part that will be needed is empty, its limit leaves no batch, or batches are too small.
    """
    if 0 in (trainer.max_epochs, trainer.max_steps):
        raise UserError("Expected something to train, but trainer.max_epochs or max_steps is 0; raise it.")
    needed = {
        "train": ("train", "see the data.* options"),
        "val": ("val", "raise data.val_fraction, or set trainer.limit_val_batches to 0 not to validate"),
        "test": (data.split, "raise data.test_fraction, or set trainer.limit_test_batches to 0 not to test"),
    }
    if trainer.limit_val_batches == 0:
        del needed["val"]
    if not is_tested(trainer):
        del needed["test"]
    where, size = ", ".join(roots_of(data.root)), data.batch_size * trainer.world_size
    for name, (part, remedy) in needed.items():
        faces, limit = len(data.rows(part)), getattr(trainer, f"limit_{name}_batches")
        if not faces:
            raise UserError(f"Expected faces in the {part} part of {where}, but it has none; {remedy}.")
        batches = trained_batches(faces, size) if name == "train" else -(-faces // size)
        if limit == 0 or (isinstance(limit, float) and not int(limit * batches)):
            raise UserError(
                f"Expected trainer.limit_{name}_batches to leave one of {batches} batches, but {limit} leaves none; "
                "raise it."
            )
        if name == "train" and (alone := min(data.batch_size, faces // trainer.world_size)) < least:
            raise UserError(
                f"Expected batches of {least} faces or more on each device with model.feature_norm, but they have "
                f"{alone}; raise data.batch_size, or add faces."
            )
        if name == "val":
            _check_validation_comes(
                trainer, trained_batches(len(data.rows("train")), size, trainer.limit_train_batches)
            )


def _check_validation_comes(trainer: pl.Trainer, batches: int) -> None:
    """Refuses intervals at which no epoch is validated, so that none could be the best."""
    epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if epochs is not None and 0 <= (trainer.max_epochs or 0) < epochs:
        raise UserError(
            f"Expected trainer.check_val_every_n_epoch of at most trainer.max_epochs, {trainer.max_epochs}, but got "
            f"{epochs}; lower it, or set trainer.limit_val_batches to 0 not to validate."
        )
    if epochs is not None and isinstance(interval, int) and interval > batches:
        raise UserError(
            f"Expected trainer.val_check_interval of at most {batches}, the batches of an epoch, but got {interval}; "
            "lower it."
        )


def check_labels(data: FacesDataModule, learned: Iterable[Task], has_validation: bool) -> None:
    """Refuses to train a task without labels, such as one whose column has a mistyped name.

    Args:
        data: The faces, after ``setup``.
        learned: The tasks that are learned.
        has_validation: Whether validation chooses the best epoch.

    Raises:
        UserError: If no training face has a label of a task, or no validation face.
    """
    learned, parts = list(learned), data.faces["split"]
    in_training = count_labels(data.faces[parts.eq("train")], learned)
    in_validation = count_labels(data.faces[parts.isin(("val", HOLDOUT))], learned)
    where = ", ".join(roots_of(data.root))
    if unlabelled := [name for name, count in in_training.items() if not count]:
        raise UserError(
            f"Expected labels of {', '.join(unlabelled)} in {where}, but no training face has one; correct the "
            f"name of the column{_only(in_training)}."
        )
    if has_validation and (unlabelled := [name for name, count in in_validation.items() if not count]):
        raise UserError(
            f"Expected labels of {', '.join(unlabelled)} in the validation part of {where}, which chooses the best "
            f"epoch, but no face of it has one; add some, set trainer.limit_val_batches to 0{_only(in_validation)}."
        )


def _only(counts: Mapping[str, int]) -> str:
    """The end of a sentence that offers to learn only the tasks that have labels, if any has."""
    labelled = [name for name, count in counts.items() if count]
    return f", or set model.tasks to [{', '.join(labelled)}]" if labelled else ""
