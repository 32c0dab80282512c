"""A probe: the trunk runs once over each face, and the heads learn on its features."""

import time

import pytorch_lightning as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError
from facecls.model.features import compute_features, features_key, read_features, write_features
from facecls.model.module import FaceModule
from facecls.training.callbacks import run_folder


def use_features(trainer: pl.Trainer, model: FaceModule, data: FacesDataModule) -> str:
    """Lets a module train on its trunk's features, read from beside the run's folder or computed now and kept there.

    Args:
        trainer: Before its training.
        model: The module.
        data: The faces, after ``setup``.

    Returns:
        What was done, in a line.

    Raises:
        UserError: If the features can't be written, or there are several devices.
    """
    if trainer.world_size > 1:
        raise UserError(f"Expected one device with probe, which runs the trunk once, but got {trainer.world_size}.")
    trunk = model.model.trunk
    path, key = run_folder(trainer).parent / "features.safetensors", features_key(trunk, data, str(trainer.precision))
    features, done = read_features(path, key), "read from"
    if features is None:
        started, done = time.monotonic(), "kept in"
        with _create_bar(is_shown=trainer.progress_bar_callback is not None) as bar:
            task = bar.add_task("features", total=len(data.faces))
            features = compute_features(
                trunk,
                data.whole_dataloader(),
                trainer.strategy.root_device,
                trainer.precision_plugin.forward_context,
                lambda faces: bar.advance(task, faces),
            )
        done = f"computed at {len(features) / (time.monotonic() - started):.0f} a second, {done}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_features(path, key, features)
    data.use_features(features)
    return f"features of {len(features):,} faces {done} {path}"


def _create_bar(is_shown: bool) -> Progress:
    """A progress bar that counts faces."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not is_shown
    )
