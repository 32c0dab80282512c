"""What the commands share: their parsers, precision, the folder of a run and what is left in it."""

import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar
from rich.table import Table

import facecls
from facecls.callbacks import Average, LastCheckpoint, Progress, run_folder
from facecls.data.datamodule import FacesDataModule
from facecls.data.labels import TASKS
from facecls.errors import UserError
from facecls.files import replacing
from facecls.model.features import compute_features, features_key, read_features, write_features
from facecls.model.module import FaceModule
from facecls.model.schedule import ALL
from facecls.ranks import launched
from facecls.study.predictions import PredictionCollector

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


def console(quiet: bool = False) -> Console:
    """Where the commands write what people read; nowhere if quiet."""
    return Console(soft_wrap=True, quiet=quiet)


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
            callbacks.append(WeightAveraging(device, avg_fn=Average(self.config.ema)))
        from facecls.board import StudyBoard  # with what it draws it takes a second, for which --help must not wait

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


def uses_cuda(accelerator: Any) -> bool:
    """Whether the trainer will compute on a CUDA device."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def choose_precision(accelerator: Any) -> tuple[str, str]:
    """The fastest precision that the device computes in, bfloat16 where it really does.

    A CPU that only emulates bfloat16 is 15 times slower in it (measured on AVX2, ResNet-50), so the instructions are
    looked up one by one.

    Args:
        accelerator: As given to the trainer: ``auto``, ``cpu``, ``gpu``, ``cuda`` or another one.

    Returns:
        Lightning's name of the precision, and why.
    """
    if uses_cuda(accelerator):
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", f"{name} computes in bfloat16"
        return "32-true", f"{name} does not compute in bfloat16"
    if accelerator in ("auto", "cpu") and not (accelerator == "auto" and torch.backends.mps.is_available()):
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16-mixed", "the CPU computes in bfloat16 (AVX512-BF16 or AMX)"
        return "32-true", "the CPU has neither AVX512-BF16 nor AMX and would only emulate bfloat16"
    return "32-true", f"bfloat16 is not used on {accelerator}"


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


def git_commit() -> str | None:
    """The commit of the checkout that runs, ``-dirty`` if it was changed; ``None`` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
        with create_bar(is_shown=trainer.progress_bar_callback is not None) as bar:
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


def create_bar(is_shown: bool) -> RichBar:
    """A progress bar that counts faces."""
    return RichBar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not is_shown
    )


def write_data(folder: Path, data: FacesDataModule) -> None:
    """Writes ``faces.parquet``, all faces with labels and splits, and ``rejects.csv``, what is not used and why."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "faces.parquet") as part:
        data.faces[["path", "sha1", "split", *TASKS]].to_parquet(part, index=False)
    with replacing(folder / "rejects.csv") as part:
        data.rejects.to_csv(part, index=False)


def write_results(
    folder: Path, trainer: pl.Trainer, data: FacesDataModule, collector: PredictionCollector, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes ``metrics.json`` and ``predictions.parquet`` of the test that the trainer ran last.

    Args:
        folder: Of the run.
        trainer: After its test.
        data: The faces.
        collector: It was among the callbacks.
        facts: More to put into ``metrics.json``.

    Returns:
        What is in ``metrics.json``.
    """
    if not collector.batches:
        raise UserError("Expected faces to test, but trainer.limit_test_batches leaves none.")
    table = collector.table(data)
    results: dict[str, Any] = {
        name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")
    }
    results |= {f"test/{task}/faces": int(table[task].notna().sum()) for task in TASKS}
    results |= {
        f"temperature/{task}": t for task, t in collector.temperatures.items() if f"temperature_{task}" in table
    }
    results |= {f"faces/{name}": int(count) for name, count in data.faces["split"].value_counts().items()}
    results |= {"faces/tested": len(table), "rejects": len(data.rejects), **facts}
    results |= {
        "precision": str(trainer.precision),
        "device": device_name(trainer),
        "version": facecls.__version__,
        "versions": versions(),
    }
    with replacing(folder / "predictions.parquet") as part:
        table.to_parquet(part, index=False)
    with replacing(folder / "metrics.json") as part:
        part.write_text(json.dumps(results, indent=2) + "\n")
    return results


def write_study(folder: Path, data: FacesDataModule, collector: PredictionCollector, model: FaceModule) -> None:
    """Writes ``report.html`` and ``suspects.csv`` beside the results of a test.

    Args:
        folder: Of the run, after ``write_results``.
        data: The faces.
        collector: It was among the callbacks.
        model: What was tested.
    """
    from facecls.study.page import write_report  # late, as the board above

    faces = collector.faces()
    with console().status("writing the report"):
        write_report(folder, lambda row: data.picture(faces[row]), model.model.cpu())


def versions() -> dict[str, str]:
    """What results depend on, by name."""
    packages = {name: version(name) for name in ("torch", "pytorch-lightning", "timm")}
    return packages | {"python": platform.python_version()}


def device_name(trainer: pl.Trainer) -> str:
    """What the trainer computes on, in words; after ``2 x`` where there are two of them."""
    times = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    if trainer.strategy.root_device.type == "cuda":
        return times + torch.cuda.get_device_name(trainer.strategy.root_device)
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = f" ({names[0]})" if names else ""
    return f"{times}{trainer.strategy.root_device.type}{model}, {os.cpu_count()} cores"


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """Shows the metrics of a test, and where the rest lies."""
    table = Table(title=f"{results['faces/tested']:,} faces tested", title_justify="left")
    for column in ("task", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in results.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[2] not in ("faces", "loss"):
            text = f"{value:.2f}" if parts[2].endswith("_years") else f"{100 * value:.1f} %"
            table.add_row(parts[1], parts[2], text)
    out = console()
    out.print(table)
    out.print(f"open {folder / 'report.html'}; metrics.json, predictions.parquet and all else lie beside it")
