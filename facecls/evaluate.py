"""Tests a trained model on any faces.

``python -m facecls.evaluate --ckpt_path FILE [--data.root WHERE] [--data.split all]``
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.errors import command
from facecls.files import replacing
from facecls.model.module import load_module
from facecls.training.callbacks import Progress, run_folder
from facecls.training.cli import RUNS, create_logger, interruptible, parse, trained_on, without_noise
from facecls.training.collector import PredictionCollector
from facecls.training.outcome import git_commit, print_results, write_data, write_results, write_study
from facecls.training.precision import choose_precision


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        What is in ``metrics.json``.

    Raises:
        UserError: For a mistake in the options, the checkpoint or the data.
    """
    commit = git_commit()  # before anybody changes the checkout beside the run
    words = list(sys.argv[1:] if args is None else args)
    parser = create_parser(data_defaults(words))
    config = parse(parser.parse_args, words)
    model = load_module(config.ckpt_path)
    collector = PredictionCollector()
    trainer = parse(partial(create_trainer, collector=collector), config)
    data: FacesDataModule = parser.instantiate(config).data
    data.setup()
    split = data.split
    if not _is_of_training(data, config.ckpt_path):
        data.forget_training()
    console().print(data.describe())
    folder = run_folder(trainer)
    write_data(folder, data)
    with replacing(folder / "config.yaml") as part:
        parser.save(config, part, overwrite=True)
    with without_noise(), interruptible(trainer):
        trainer.test(model, datamodule=data, verbose=False)
    facts = {"checkpoint": str(config.ckpt_path), "split": split, "git_commit": commit}
    results = write_results(folder, trainer, data, collector, facts)
    write_study(folder, data, collector, model)
    print_results(results, folder)
    return results


def _is_of_training(data: FacesDataModule, ckpt_path: str) -> bool:
    """Whether the split of the data is the one that the model was trained with."""
    kept = trained_on(ckpt_path, elsewhere=False)
    names = ("root", "seed", "val_fraction", "test_fraction", "split_file")
    return all(data.hparams[name] == kept.get(name) for name in names)


def create_trainer(config: Namespace, collector: PredictionCollector) -> pl.Trainer:
    """The trainer that tests.

    Args:
        config: The command's options.
        collector: Keeps the predictions.

    Returns:
        The trainer, on one device: several would test some faces twice.
    """
    precision, why = config.precision, "as asked"
    if precision is None:
        precision, why = choose_precision(config.accelerator)
    console().print(f"precision {precision}: {why}")
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=precision,
        logger=create_logger(RUNS, config.name),
        callbacks=[Progress(), collector],
        enable_model_summary=False,
    )


def data_defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """What the command line does not say of the data is as in the training.

    Args:
        words: The command line, from which ``--ckpt_path`` is read.

    Returns:
        Options by name; none if there is no such option, which is said later.

    Raises:
        UserError: If it is not a checkpoint of ``facecls.fit``.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--ckpt_path")
    path = reader.parse_known_args(words)[0].ckpt_path
    if path is None:
        return {}
    load_module(path)  # says what is wrong with it, if anything is
    return trained_on(path, elsewhere=any(word.partition("=")[0] == "--data.root" for word in words))


def create_parser(data: Mapping[str, Any]) -> LightningArgumentParser:
    """The command's options.

    Args:
        data: Defaults of ``--data.*``.

    Returns:
        The parser.
    """
    parser = LightningArgumentParser(prog="python -m facecls.evaluate", description=__doc__, exit_on_error=False)
    parser.add_argument(
        "--ckpt_path", required=True, type=str, help="The trained model, such as checkpoints/best.ckpt."
    )
    parser.add_argument("--name", default="evaluate", help="The results are kept in runs/NAME/version_N.")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, or auto for a GPU where there is one.")
    parser.add_argument("--precision", type=str | None, help="Such as 32-true; null for the fastest that there is.")
    parser.add_lightning_class_args(FacesDataModule, "data")
    parser.set_defaults({f"data.{name}": value for name, value in data.items()})
    return parser


if __name__ == "__main__":
    with command("facecls.evaluate"):
        main()
