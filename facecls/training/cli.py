"""The options of fit, and what other commands share with it: parsing, the logger, silenced libraries."""

import inspect
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Lightning 2.6 calls what jsonargparse 4.49 deprecated; users can do nothing about it
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import pytorch_lightning as pl
from jsonargparse import ArgumentError, Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only

from facecls.compat import DEPRECATED, keep_tensorboard_from_importing_tensorflow
from facecls.data.datamodule import FacesDataModule
from facecls.data.limits import Limits, set_limits
from facecls.data.sources import open_source, roots_of
from facecls.errors import UserError, program
from facecls.files import resolved
from facecls.model.checkpoint import Checkpoint, read_checkpoint
from facecls.model.module import FaceModule
from facecls.run import BEST_CHECKPOINT
from facecls.terminal import say
from facecls.training import precision, probe, renames
from facecls.training.callbacks import ExponentialAverage, LastCheckpoint, ResumeSettings
from facecls.training.checkpoint_options import heads_of_resumed
from facecls.training.collector import PredictionCollector
from facecls.training.option_parser import OptionParser
from facecls.training.processes import check_launch
from facecls.training.progress import create_progress
from facecls.training.saving import OptionsSaver, RunLogger, WholeCheckpointIO
from facecls.training.trial import time_precisions

RUNS = "runs"
_DATA_OPTIONS = frozenset(inspect.signature(FacesDataModule).parameters)
AS_TRAINED = "same as in training"
"""Placeholder for a missing --data.root; the checkpoint's is used."""
NOISE = (
    DEPRECATED,
    "Checkpoint directory .* exists and is not empty",  # as it always does when a run is resumed
    "Be aware that when using `ckpt_path`, callbacks",  # --ema null leaves one out, and ResumeSettings handles that
    "The dirpath has changed from",  # a run that is resumed under another name chooses its best epoch afresh
    "does not have many workers",  # data.num_workers is one per core, or what was asked for; features need none
    "is smaller than the logging interval",  # the metrics of each epoch are logged all the same
    "It is recommended to use `self.log",  # torchmetrics has already combined the counts of all devices
)
"""Warnings of Lightning that a user can do nothing about."""
for _name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # no tips, nor settings that the commands print themselves


@contextmanager
def without_noise() -> Iterator[None]:
    """Suppresses the warnings in ``NOISE``; all others are shown."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


class FaceCLI(LightningCLI):
    """The parser of ``facecls.fit``, and the objects that it creates.

    Args:
        args: Words of the command line; ``None`` for the program's own.
    """

    prog = program("facecls.fit")

    def __init__(self, args: Sequence[str] | None) -> None:
        super().__init__(
            FaceModule,
            FacesDataModule,
            trainer_class=precision.Trainer,
            save_config_callback=OptionsSaver,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": RUNS, "max_epochs": 15, "devices": 1},
            parser_class=OptionParser,
            parser_kwargs={"exit_on_error": False, "prog": self.prog, "allow_abbrev": False},
            args=None if args is None else list(args),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that belong neither to the model nor to the data nor to the trainer."""
        parser.add_argument("--name", type=str, default="faces", help="The run is saved in runs/NAME/version_N.")
        parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint to resume, such as checkpoints/last.ckpt.")
        parser.add_argument(
            "--heads", type=str | None, help="Checkpoint whose heads to start from, such as a probe's on this trunk."
        )
        parser.add_argument(
            "--restore_batchnorm",
            type=bool,
            default=False,
            help="Measure the statistics of BatchNorms that were folded into scale and shift anew, on 1,024 training "
            "faces; the trunk then bears higher learning rates.",
        )
        parser.add_argument(
            "--ema", type=float | None, default=0.999, help="Decay of the average of the weights; null for none."
        )
        parser.add_argument(
            "--probe",
            type=bool,
            default=False,
            help="Train the heads alone, on features that the frozen trunk computes once for each face.",
        )
        parser.add_class_arguments(Limits, "limits")
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.tasks", "model.task_options")
        # only a checkpoint gives these; linked, so that they are no options
        parser.link_arguments("model.weights", "model.graph", compute_fn=lambda weights: None)
        parser.link_arguments("data.image_size", "model.face_frame", compute_fn=lambda size: None)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_check_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line, with the names of version 0.1 replaced by today's."""
        words, notes = renames.rename_options(sys.argv[1:] if args is None else args)
        for note in notes:
            _print_note(note)
        self.config = parser.parse_args(words)

    def before_instantiate_classes(self) -> None:
        """Checks the options."""
        config = self.config
        set_limits(**config.limits.as_dict())
        strategy = str(config.trainer.strategy)
        if any(word in strategy for word in ("spawn", "fork", "notebook")):
            raise UserError(
                f"Expected a trainer.strategy that starts the command once for each device, but {strategy} copies this "
                "process, whose results would be lost; use ddp."
            )
        # a resumed run saves its options as well, and they must not resume again
        self.ckpt_path, config.ckpt_path = config.ckpt_path, None
        if self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise UserError(f"Expected a checkpoint to resume at {self.ckpt_path}, but there is none.")
        if self.ckpt_path is not None:
            config.heads = heads_of_resumed(self.ckpt_path, config.heads)
        if config.trainer.overfit_batches:
            raise UserError(
                "Expected no trainer.overfit_batches; use trainer.limit_train_batches to train on part of the batches."
            )
        if config.ema is not None and not 0 <= config.ema < 1:
            raise UserError(f"Expected ema from 0 to below 1, or null for no average, but got {config.ema}.")
        if (accumulated := config.trainer.accumulate_grad_batches) < 1:
            raise UserError(f"Expected trainer.accumulate_grad_batches of 1 or more, but got {accumulated}.")
        precision.check_precision(config.trainer.precision)
        if config.probe:
            probe.check_options(config)
        _check_clipping(config, precision.most_reduced(config.trainer.precision, config.trainer.accelerator))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Creates the trainer with logger, checkpoints, average and progress bar."""
        config = self.config.trainer
        self.trainer_defaults["callbacks"] = self._create_callbacks()
        if config.logger is None or config.logger is True:
            root = config.default_root_dir or RUNS
            version = resumed_version(self.ckpt_path, root, self.config.name)
            kwargs["logger"] = create_logger(root, self.config.name, version)
        for root in roots_of(self.datamodule.root):
            open_source(root)  # which refuses what is not there
        self._choose_precision()  # takes seconds, so it comes after what may be refused
        kwargs["precision"] = config.precision
        if any(self.model.schedule.frozen.values()) and _uses_ddp(config):
            # DDP would wait for the gradients of parameters that are frozen in this epoch
            kwargs["strategy"] = "ddp_find_unused_parameters_true"
        if config.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # the command describes the model in a line of its own
        kwargs["use_distributed_sampler"] = False  # the datamodule's sampler divides the batches
        with _options_taken():
            trainer = super().instantiate_trainer(**kwargs)
        self.model.hparams["precision"] = str(trainer.precision)  # by Lightning's own name, whatever was asked
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
        check_launch(trainer)
        return trainer

    def _choose_precision(self) -> None:
        """Chooses the precision, unless it was asked for, and keeps it in ``config.yaml``."""
        trainer, reason = self.config.trainer, "as asked"
        if precision.is_automatic(trainer.precision) and self.ckpt_path is not None:
            trainer.precision, reason = read_checkpoint(self.ckpt_path).precision, "as in the run that is resumed"
        if precision.is_automatic(trainer.precision):
            with _options_taken():
                planned = _plain_trainer(trainer)
            measure = partial(
                time_precisions,
                model=self.model.model,
                shape=(self.datamodule.batch_size, self.datamodule.image_size),
                device=planned.strategy.root_device,
                schedule=None if self.config.probe else self.model.schedule,  # a probe runs the trunk forward alone
                epoch=(trainer.max_epochs or 1) - 1,  # when most trains
            )
            is_alone = planned.world_size == 1
            trainer.precision, reason = precision.choose_precision(trainer.accelerator, measure if is_alone else None)
        self.precision_note = f"precision {trainer.precision}: {reason}"

    def _create_callbacks(self) -> list[pl.Callback]:
        # a second to import, for which --help must not wait
        from facecls.training.tensorboard import FigureLogger

        has_validation = self.config.trainer.limit_val_batches != 0  # without, the last state counts as the best
        best = Path(BEST_CHECKPOINT).stem
        callbacks: list[pl.Callback] = [
            ModelCheckpoint(filename=best, monitor="val/loss" if has_validation else None, enable_version_counter=False)
        ]
        if self.config.ema is not None:
            # by default it is where the model is when training begins, on the CPU
            device = "cuda" if precision.uses_cuda(self.config.trainer.accelerator) else None
            callbacks.append(WeightAveraging(device, multi_avg_fn=ExponentialAverage(self.config.ema)))
        self.collector, self.last = PredictionCollector(), LastCheckpoint()
        callbacks += [ResumeSettings(), self.collector, FigureLogger(self.collector), self.last]
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(create_progress())
        return callbacks


@rank_zero_only
def _print_note(note: str) -> None:
    say(note)  # stdout may be the file that --print_config goes to


def _check_seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise UserError(
            f"Expected seed_everything as a number, but got {str(value).lower()}; all randomness follows from it."
        )
    return value


def _check_clipping(config: Any, number_format: str) -> None:
    """Refuses early what Lightning would only refuse in the first step, or not at all."""
    clip = config.trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:  # a negative one would turn the gradients round
        raise UserError(f"Expected trainer.gradient_clip_val of 0 or more, but got {clip}; null does not clip.")
    fused = config.get("model.optimizer.init_args.fused")
    mixed = number_format.endswith("mixed") or number_format in ("16", "bf16")
    if fused and clip and mixed:
        raise UserError(
            "Expected model.optimizer.init_args.fused false with trainer.gradient_clip_val in mixed precision, since a "
            "fused optimizer scales gradients and updates weights in one pass."
        )


@contextmanager
def _options_taken() -> Iterator[None]:
    """Tells of options of a kind that the parser lets through and a trainer refuses, such as devices or max_time."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"Expected options that the trainer takes, but: {error} Correct trainer.*.") from error


def _uses_ddp(config: Any) -> bool:
    """Whether Lightning will choose its plain DDP strategy for these options of the trainer."""
    if config.strategy not in ("auto", "ddp"):
        return False
    return isinstance(_plain_trainer(config).strategy, DDPStrategy)


def _plain_trainer(config: Any) -> pl.Trainer:
    """A trainer on the devices of these options, to ask what Lightning makes of them."""
    return pl.Trainer(
        barebones=True,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
    )


def create_logger(root: str, name: str, version: str | None = None) -> RunLogger:
    """Creates the logger of a run, whose folder is ROOT/NAME/VERSION; without a version the next ``version_N``.

    Raises:
        UserError: If the name leads out of the root.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"Expected a name that stays within {root}, but got {name}; take another.")
    keep_tensorboard_from_importing_tensorflow()
    return RunLogger(root, name, version)


def resumed_version(ckpt_path: str | None, root: str, name: str) -> str | None:
    """The folder in which a resumed run continues: the checkpoint's own, if it has the same root and name.

    Args:
        ckpt_path: The checkpoint, if any.
        root: Folder of all runs.
        name: Name of the run.

    Returns:
        ``version_N``, or ``None`` for a new one.
    """
    if ckpt_path is None:
        return None
    run = resolved(ckpt_path).parent.parent
    return run.name if run.parent == resolved(Path(root) / name) and run.name.startswith("version_") else None


def parse(create: Callable[[Any], Any], args: Any) -> Any:
    """Calls ``create(args)``, with errors of jsonargparse, Lightning and torch about options as ``UserError``."""
    try:
        return create(args)
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        text = str(error)
        if "data.tasks" in text and "Given value: " in text:  # jsonargparse names Python's types
            raise UserError(
                "Expected data.tasks such as {glasses: {classes: [without, with]}} or {height: {highest: 250}}, with "
                f'words like "no" and "yes" in quotes, but got {text.rpartition("Given value: ")[2]}; correct it.'
            ) from error
        raise UserError(text) from error
    except RuntimeError as error:
        if "SLURM" in str(error):  # Lightning, about variables that contradict each other
            raise UserError(str(error)) from error
        raise


_TRUSTED = ("albumentations", "facecls", "timm", "torch")
"""Packages whose classes a checkpoint may name."""


def trusted_options(
    kept: Mapping[str, Any], source: str | Path, given: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The options of the data that a checkpoint keeps, from which objects can be made without running code of others.

    Args:
        kept: As ``Checkpoint.data``.
        source: The checkpoint, for messages.
        given: Those that the user wrote, which are trusted and take the place of the checkpoint's.

    Raises:
        UserError: If a class of one belongs to none of a few packages. Only that of ``train_transform`` is left out
            then, since a test does not need it.
    """
    options = {name: value for name, value in kept.items() if name in _DATA_OPTIONS}
    for name in ("train_transform", "eval_transform"):
        foreign = next((text for text in _dotted(options.get(name)) if text.split(".")[0] not in _TRUSTED), None)
        if foreign is None:
            continue
        if name == "train_transform" or given.get(name) is not None:
            options.pop(name)
            continue
        raise UserError(
            f"Expected data.{name} of {source} to be of {', '.join(_TRUSTED)}, but it is {foreign}, which could run "
            f"any code; check it, and name it with --data.{name} of facecls.evaluate."
        )
    return options


def _dotted(value: Any) -> Iterator[str]:
    """All texts in a value that jsonargparse may import."""
    if isinstance(value, str) and "." in value:
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _dotted(each)


def parse_with_checkpoint(parser: LightningArgumentParser, args: Sequence[str] | None) -> tuple[Namespace, Checkpoint]:
    """Parses the options of a command that tests a checkpoint; the data's options default to those of training.

    Args:
        parser: With ``--ckpt_path``, and ``FacesDataModule`` as ``data``.
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        The options, and the checkpoint.

    Raises:
        UserError: For a mistake in the options, or if the checkpoint can't be read or does not say where its faces are.
    """
    parser.set_defaults({"data.root": AS_TRAINED})
    given = parse(parser.parse_args, args)
    checkpoint = read_checkpoint(given.ckpt_path)
    options = trusted_options(checkpoint.data, given.ckpt_path, given.data.as_dict())
    if given.data.root not in (AS_TRAINED, options.get("root")):
        options.pop("split_file", None)  # it lists the faces that the model was trained on
    elif "root" not in options:
        raise UserError(f"Expected --data.root, since {given.ckpt_path} does not say what data it was trained on.")
    parser.set_defaults({f"data.{name}": value for name, value in options.items()})
    return parse(parser.parse_args, args), checkpoint
