"""What Lightning writes of a run: in a folder that no other run takes, and each file completely or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from facecls.errors import UserError, uninterrupted
from facecls.files import make_folder
from facecls.model.checkpoint import write_checkpoint
from facecls.run import write_config
from facecls.training.callbacks import run_folder

_VERSION = "version_"


class RunLogger(TensorBoardLogger):
    """Lightning's logger, in a new folder ``version_N`` that it creates, so that runs started at once have their own.

    Args:
        root: Folder of all runs.
        name: Of the run.
        version: Name of the folder; ``None`` for a new one, created when its name is first asked for.
    """

    def __init__(self, root: str, name: str, version: str | None) -> None:
        self._own_version = version
        super().__init__(root, name, version, default_hp_metric=False)  # else it logs a curve that is always -1

    @property
    def version(self) -> str:
        """The name of the folder; of the first process, which creates it and tells the others by ``run_folder``."""
        if self._own_version is None:
            is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
            self._own_version = claim_version(Path(self.root_dir)) if is_first else f"{_VERSION}0"
        return self._own_version

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As Lightning's, to its end; Ctrl-C within it could leave TensorBoard's thread asleep for two minutes."""
        with uninterrupted():
            super().log_metrics(metrics, step)


def claim_version(folder: Path) -> str:
    """Creates the next folder ``version_N``, after all that are there.

    Args:
        folder: Of all runs of a name; created if need be.

    Returns:
        The folder's name.

    Raises:
        UserError: If it can't be created.
    """
    make_folder(folder)
    try:
        numbers = [each.name.removeprefix(_VERSION) for each in folder.glob(f"{_VERSION}*")]
        number = max((int(each) for each in numbers if each.isascii() and each.isdigit()), default=-1)
        while True:
            number += 1
            try:
                (folder / f"{_VERSION}{number}").mkdir()
            except FileExistsError:  # another run was faster
                continue
            return f"{_VERSION}{number}"
    except OSError as error:
        raise UserError(
            f"Can't create a folder in {folder}: {error.strerror}; name a place that is writable."
        ) from None


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints as all other files of a run are written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Replaces the file, or leaves it as it is.

        Raises:
            UserError: If it can't be written.
        """
        make_folder(Path(path).parent)
        write_checkpoint(checkpoint, Path(path))


class OptionsSaver(SaveConfigCallback):
    """Writes ``config.yaml`` as all other files of a run are written."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the options, once; all processes must call it."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and not self.already_saved:
            write_config(folder, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True
