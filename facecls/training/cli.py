"""What the commands share: their parsers, precision and the folder of a run."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Lightning 2.6 calls what jsonargparse 4.49 deprecated; users can do nothing about it
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError
from facecls.model.module import FaceModule
from facecls.model.schedule import ALL
from facecls.ranks import launched
from facecls.training.callbacks import Average, LastCheckpoint, Progress
from facecls.training.collector import PredictionCollector
from facecls.training.precision import choose_precision, uses_cuda

RUNS = "runs"
BEST = "best"
NOISE = (
    "isinstance.treespec, LeafSpec.. is deprecated",  # Lightning 2.6 with torch since 2.12
    "Checkpoint directory .* exists and is not empty",  # of course it does when a run is resumed
    "Be aware that when using `ckpt_path`, callbacks",  # --ema null leaves one out, and is dealt with
    "The dirpath has changed from",  # a run that is resumed under another name chooses its best anew
    "It is recommended to use `self.log",  # torchmetrics has put together what all devices counted
)
"""What Lightning warns of though a user can do nothing about it."""


@contextmanager
def without_noise() -> Iterator[None]:
    """Hides ``NOISE``; all other warnings are shown."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Lets Ctrl-C end a command with the status it always has; Lightning would end it with 1."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


class FaceCLI(LightningCLI):
    """The parser and the objects of ``facecls.fit``.

    Args:
        args: Words of the command line.
    """

    prog = "python -m facecls.fit"

    def __init__(self, args: Sequence[str] | None) -> None:
        super().__init__(
            FaceModule,
            FacesDataModule,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": RUNS, "max_epochs": 15, "devices": 1},
            parser_kwargs={"exit_on_error": False, "prog": self.prog},
            args=None if args is None else list(args),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is neither model, data nor trainer."""
        parser.add_argument("--name", default="faces", help="The run is kept in runs/NAME/version_N.")
        parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint to resume, such as checkpoints/last.ckpt.")
        parser.add_argument(
            "--ema", type=float | None, default=0.999, help="Decay of the average of the weights; null for none."
        )
        parser.add_argument(
            "--probe",
            type=bool,
            default=False,
            help="Run the trunk, which stays as it is, over each face once, and train the heads on its features.",
        )
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the words it is given, without Lightning's warning when Python's own command line has some as well."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Decides precision, folder and callbacks."""
        config = self.config
        # the command line decides where to start from, not the configuration that is kept beside the run
        self.ckpt_path, config.ckpt_path = config.ckpt_path, None
        if self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise UserError(f"Expected a checkpoint to resume at {self.ckpt_path}, but there is none.")
        if config.trainer.overfit_batches:
            raise UserError(
                "Expected no trainer.overfit_batches; trainer.limit_train_batches takes a part of the batches."
            )
        if config.probe:
            _check_probe(config)
        self.precision, why = config.trainer.precision, "as asked"
        if self.precision is None:
            self.precision, why = choose_precision(config.trainer.accelerator)
        self.precision_note = f"precision {self.precision}: {why}"
        _check_clipping(config, str(self.precision))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Makes the trainer with logger, checkpoints, average and progress bar."""
        config = self.config.trainer
        self.trainer_defaults["callbacks"] = self._callbacks()
        if config.logger is None or config.logger is True:
            root = config.default_root_dir or RUNS
            kwargs["logger"] = create_logger(
                root, self.config.name, resumed_version(self.ckpt_path, root, self.config.name)
            )
        kwargs["precision"] = self.precision
        if config.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # the command says what is trained in a line of its own
        kwargs["use_distributed_sampler"] = False  # the datamodule cuts its batches itself
        trainer = super().instantiate_trainer(**kwargs)
        asked = trainer.num_devices * trainer.num_nodes
        if (ranks := launched().count) > 1 and ranks != asked:
            raise UserError(
                f"Expected trainer.devices x trainer.num_nodes to be the {ranks} processes that were started, but got "
                f"{trainer.num_devices} x {trainer.num_nodes}; say how many there are on a node, and how many nodes."
            )
        if isinstance(trainer.strategy, DDPStrategy) and any(self.model.schedule.frozen.values()):
            # all parameters are announced to it in the beginning, and it would wait for the gradients of frozen ones
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        return trainer

    def _callbacks(self) -> list[pl.Callback]:
        validates = self.config.trainer.limit_val_batches != 0  # else the last state is the best there is
        callbacks: list[pl.Callback] = [
            ModelCheckpoint(filename=BEST, monitor="val/loss" if validates else None, enable_version_counter=False)
        ]
        if self.config.ema is not None:
            # Lightning would put it where the model is at first, on the CPU
            device = "cuda" if uses_cuda(self.config.trainer.accelerator) else None
            callbacks.append(WeightAveraging(device, multi_avg_fn=Average(self.config.ema)))
        from facecls.training.tensorboard import (
            StudyBoard,  # with what it draws it takes a second, for which --help must not wait
        )

        self.collector = PredictionCollector()
        callbacks += [self.collector, StudyBoard(self.collector)]
        self.last = LastCheckpoint()
        callbacks.append(self.last)  # after the one that keeps the best
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(Progress())
        return callbacks


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise UserError(
            f"Expected seed_everything as a number, but got {str(value).lower()}; all randomness comes from it."
        )
    return value


def _check_clipping(config: Any, precision: str) -> None:
    """Refuses what Lightning can't do, before it finds out in the first step."""
    fused = config.get("model.optimizer.init_args.fused")
    mixed = precision.endswith("mixed") or precision in ("16", "bf16")
    if fused and config.trainer.gradient_clip_val and mixed:
        raise UserError(
            "Expected model.optimizer.init_args.fused false with trainer.gradient_clip_val in mixed precision, since a "
            "fused optimizer does its steps and the scaling of gradients at once."
        )


def _check_probe(config: Any) -> None:
    """Refuses what can't be had from features that are computed once."""
    schedule, transform = config.model.schedule, config.data.train_transform
    if set(schedule.frozen.values()) != {ALL} or 0 not in schedule.frozen:
        raise UserError(
            f"Expected model.schedule.frozen {{0: {ALL}}} with probe, since the trunk stays as it is, but got "
            f"{schedule.frozen}."
        )
    if config.model.tta != "none" or transform is not None:
        raise UserError(
            "Expected model.tta none and no data.train_transform with probe, since each face is seen once, as "
            f"evaluation sees it, but got {config.model.tta} and {'one' if transform else 'none'}."
        )


def create_logger(root: str, name: str, version: str | None = None) -> TensorBoardLogger:
    """The logger of a run; its folder is ROOT/NAME/VERSION, or the next ``version_N``."""
    # else TensorBoard imports TensorFlow wherever it is installed, seconds and lines on the screen for nothing; this is
    # how its own build without TensorFlow is told (tensorboard/compat/__init__.py)
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    return TensorBoardLogger(root, name, version, default_hp_metric=False)  # else a curve that is always -1


def resumed_version(ckpt_path: str | None, root: str, name: str) -> str | None:
    """The folder that a resumed run goes on in: the checkpoint's own, if it has the same root and name.

    Args:
        ckpt_path: The checkpoint, if any.
        root: Folder of all runs.
        name: Name of the run.

    Returns:
        ``version_N``, or ``None`` for a new one.
    """
    if ckpt_path is None:
        return None
    run = Path(ckpt_path).resolve().parent.parent
    return run.name if run.parent == (Path(root) / name).resolve() and run.name.startswith("version_") else None


def parse(make: Any, args: Sequence[str] | None) -> Any:
    """Calls ``make(args)`` and turns what jsonargparse, Lightning and torch say about options into a ``UserError``."""
    try:
        return make(args)
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise UserError(str(error)) from error


def trained_on(checkpoint: str | Path, elsewhere: bool) -> Mapping[str, Any]:
    """The options of the data that a checkpoint was trained with.

    Args:
        checkpoint: A file that ``load_module`` takes.
        elsewhere: Whether they are to be used for other faces.

    Returns:
        Options of ``FacesDataModule`` by name.

    Raises:
        UserError: If the checkpoint does not say.
    """
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    found = kept.get("datamodule_hyper_parameters")
    if found is None:
        raise UserError(
            f"Expected a checkpoint of facecls.fit, but {checkpoint} does not say what data it was trained on."
        )
    left_out = {"split_file"} if elsewhere else set()  # it names the faces of the place that it was made for
    return {name: value for name, value in found.items() if not name.startswith("_") and name not in left_out}
