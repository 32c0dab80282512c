"""Counts the labels of each task, and refuses to train or test without them."""

from collections.abc import Iterable

import pandas as pd

from facecls.data.datamodule import HOLDOUT, FacesDataModule
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
        UserError: If no face has a label of any of them.
    """
    counts = count_labels(data.faces[data.faces["split"].notna()], learned)
    if not any(counts.values()):
        raise UserError(
            f"Expected labels of {', '.join(counts)} in {data.root}, but no face has one; correct the names of the "
            "columns, or see facecls.predict for faces without labels."
        )


def check_labels(data: FacesDataModule, learned: Iterable[Task], has_validation: bool) -> None:
    """Refuses to train a task without labels, such as one whose column has a mistyped name.

    Args:
        data: The faces, after ``setup``.
        learned: The tasks that are learned.
        has_validation: Whether validation chooses the best epoch.

    Raises:
        UserError: If no training face has a label of a task, or no validation face has any label.
    """
    learned, parts = list(learned), data.faces["split"]
    training, validation = data.faces[parts.eq("train")], data.faces[parts.isin(("val", HOLDOUT))]
    counts = count_labels(training, learned)
    unlabelled = [name for name, count in counts.items() if not count]
    labelled = [name for name, count in counts.items() if count]
    if len(training) and unlabelled:  # the loader refuses an empty part
        remedy = f", or set model.tasks to [{', '.join(labelled)}]" if labelled else ""
        raise UserError(
            f"Expected labels of {', '.join(unlabelled)} in {data.root}, but no training face has one; correct the "
            f"name of the column{remedy}."
        )
    if has_validation and len(validation) and not any(count_labels(validation, learned).values()):
        raise UserError(
            f"Expected labels of {', '.join(labelled)} in the validation part of {data.root}, which chooses the best "
            "epoch, but no face of it has one; add some, or set trainer.limit_val_batches to 0."
        )
