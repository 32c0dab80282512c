"""Tests a trained model on any faces.

``python -m facecls.evaluate --ckpt_path FILE [--data.root WHERE] [--data.split all]``
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace

from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.data.limits import Limits, set_limits
from facecls.data.tasks import Tasks
from facecls.errors import UserError, command, memory_for, program
from facecls.model.checkpoint import Checkpoint
from facecls.run import write_config, write_faces
from facecls.training.callbacks import run_folder
from facecls.training.checkpoint_options import check_split, describe_trained, has_faces_of_training, keep_split
from facecls.training.cli import RUNS, create_logger, parse, parse_with_checkpoint, without_noise
from facecls.training.collector import PredictionCollector
from facecls.training.labels import check_some_labels, describe_labels
from facecls.training.option_parser import OptionParser
from facecls.training.outcome import git_commit, save_outcome
from facecls.training.precision import AUTO, choose_precision, is_automatic, possible_precisions, uses_cuda
from facecls.training.processes import together
from facecls.training.progress import create_progress
from facecls.training.trial import time_precisions


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        UserError: For a mistake in the options, the checkpoint or the data.
    """
    commit = git_commit()  # now, since the checkout may be changed during the run
    parser = create_parser()
    config, checkpoint = parse_with_checkpoint(parser, args)
    set_limits(**config.limits.as_dict())
    collector = PredictionCollector()
    trainer = parse(partial(create_trainer, checkpoint=checkpoint, collector=collector), config)
    data: FacesDataModule = parser.instantiate(config).data
    _check_tasks(data.tasks, checkpoint.module.model.tasks)
    check_split(data, checkpoint.data)
    data.setup()
    split = data.split
    if has_faces_of_training(data, checkpoint.data):
        console().print(keep_split(config.ckpt_path, data), end="")
    else:
        data.treat_as_test_only()
        console().print(describe_trained(config.ckpt_path, data), end="")
    console().print(data.describe())
    if labels := describe_labels(data):
        console().print(labels)
    check_some_labels(data, checkpoint.module.model.tasks.values())
    folder = run_folder(trainer)
    write_faces(folder, data.faces, data.rejects, data.unread, data.tasks)
    write_config(folder, parser.dump(config))
    with without_noise(), together(trainer), memory_for("--data.batch_size", data.batch_size):
        trainer.test(checkpoint.module, datamodule=data, verbose=False)
    facts = {"checkpoint": str(config.ckpt_path), "split": split, "git_commit": commit}
    return save_outcome(folder, trainer, checkpoint.module, data, collector, facts)


def create_parser() -> OptionParser:
    """Creates the parser of the command's options; those of the data default to those of training."""
    parser = OptionParser(
        prog=program("facecls.evaluate"), description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--ckpt_path", required=True, type=str, help="The trained model, such as checkpoints/best.ckpt."
    )
    parser.add_argument("--name", type=str, default="evaluate", help="The results are saved in runs/NAME/version_N.")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, or auto for a GPU where there is one.")
    parser.add_argument(
        "--precision", type=str | None, default=AUTO, help="Such as 32-true; auto for that of the training."
    )
    parser.add_lightning_class_args(FacesDataModule, "data")
    parser.add_class_arguments(Limits, "limits")
    return parser


def create_trainer(config: Namespace, checkpoint: Checkpoint, collector: PredictionCollector) -> pl.Trainer:
    """Creates the trainer that tests.

    Args:
        config: The command's options, in which the precision is set.
        checkpoint: The tested model; where the device computes in its precision, the results are those of its run.
        collector: Collects the predictions.

    Returns:
        The trainer, on one device.
    """
    reason = "as asked"
    if is_automatic(config.precision) and checkpoint.precision in possible_precisions(config.accelerator)[0]:
        config.precision, reason = checkpoint.precision, "as in training"
    elif is_automatic(config.precision):
        device = torch.device("cuda" if uses_cuda(config.accelerator) else "cpu")
        shape = config.data.batch_size, config.data.image_size
        network = checkpoint.module.model
        measure = partial(time_precisions, model=network, shape=shape, device=device, schedule=None)
        config.precision, reason = choose_precision(config.accelerator, measure)
    console().print(f"precision {config.precision}: {reason}")
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,
        logger=create_logger(RUNS, config.name),
        callbacks=[create_progress(), collector],
        enable_model_summary=False,
    )


def _check_tasks(labelled: Tasks, learned: Tasks) -> None:
    """Checks that data.tasks defines the model's tasks as it was trained."""
    for name, task in learned.items():
        if (other := labelled.get(name)) != task:
            raise UserError(
                f"Expected data.tasks with {name} as the model has learned it ({task.expected}), but got "
                f"{other.expected if other else 'no such task'}; leave data.tasks out, or take another model."
            )


if __name__ == "__main__":
    with command("facecls.evaluate"):
        main()
