"""Trains a model, tests its best epoch and saves everything in ``runs/NAME/version_N``.

``python -m facecls.fit --config configs/base.yaml [--any.option VALUE ...]``
"""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from facecls.analysis.calibration import fit_temperature
from facecls.compat import guard_restoring
from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError, command, memory_for, status_of
from facecls.files import make_folder, remove_parts
from facecls.locks import locked
from facecls.model.checkpoint import load_heads, read_checkpoint, write_checkpoint
from facecls.model.module import FaceModule
from facecls.run import LOCK, write_faces
from facecls.training.batchnorms import check_folded, restore_batchnorms
from facecls.training.callbacks import run_folder
from facecls.training.checkpoint_options import check_resumed, keep_split, keep_split_of_heads, restoring, take_restored
from facecls.training.cli import FaceCLI, parse, without_noise
from facecls.training.collector import all_gather
from facecls.training.framing import describe_frame, measure_frame
from facecls.training.labels import check_labels, check_parts, check_some_labels, describe_labels, is_tested
from facecls.training.outcome import git_commit, save_outcome
from facecls.training.probe import use_features
from facecls.training.processes import LostError, together


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        The contents of ``metrics.json``; empty without a test, and in all processes but the first.

    Raises:
        UserError: For a mistake in the options or the data.
        SystemExit: With status 130 after Ctrl-C, 143 after SIGTERM.
    """
    started, commit = time.monotonic(), git_commit()  # now, since the checkout may be changed during the run
    cli: FaceCLI = parse(FaceCLI, args)
    with ExitStack() as held:
        return _run(cli, started, commit, held)


def _run(cli: FaceCLI, started: float, commit: str | None, held: ExitStack) -> dict[str, Any]:
    """Trains and tests, as ``main``; what is held meanwhile, such as the lock of the run's folder, goes to ``held``."""
    trainer, data = cli.trainer, cli.datamodule
    if trainer.local_rank > 0:
        # Ctrl-C reaches all processes; the first of a node needs the others until it has saved, and then kills them
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not trainer.is_global_zero:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which reaches those of all nodes
    out = console(quiet=not trainer.is_global_zero)
    out.print(cli.precision_note)
    out.print(describe(cli.model))
    if cli.ckpt_path is not None:
        trained = read_checkpoint(cli.ckpt_path)
        take_restored(cli.ckpt_path, trained, cli.model, cli.config.restore_batchnorm)
        check_resumed(cli.ckpt_path, trained, cli.model, data)
        out.print(f"resuming from {cli.ckpt_path}")
        data.setup()
        out.print(keep_split(cli.ckpt_path, data), end="")
    else:
        if cli.config.restore_batchnorm:
            check_folded(cli.model)
        heads = None if cli.config.heads is None else read_checkpoint(cli.config.heads)
        if heads is not None:
            taken = load_heads(cli.model.model, heads.module.model, cli.config.heads)
            out.print(f"heads of {', '.join(taken)} from {cli.config.heads}")
        data.setup()
        if heads is not None:
            out.print(keep_split_of_heads(cli.config.heads, heads.data, data))
    out.print(data.describe())
    if labels := describe_labels(data):
        out.print(labels)
    check_parts(trainer, data, least=2 if _takes_means(cli) else 1)
    check_labels(data, cli.model.model.tasks.values(), has_validation=trainer.limit_val_batches != 0)
    if is_tested(trainer):
        check_some_labels(data, cli.model.model.tasks.values())
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        make_folder(folder)
        held.enter_context(locked(folder / LOCK, str(folder)))
        remove_parts(folder)
        write_faces(folder, pd.concat([data.faces, data.gone]), data.rejects, data.unread, data.tasks)
    frame = measure_frame(data)
    out.print(describe_frame(frame))
    cli.model.hparams["face_frame"] = None if frame is None else frame.options()
    if cli.config.restore_batchnorm and cli.ckpt_path is None:
        out.print(restore_batchnorms(cli.model, data))
    try:
        with together(trainer), memory_for("--data.batch_size", data.batch_size):
            if cli.config.probe:
                out.print(use_features(trainer, cli.model, data))
            model, best = train(cli)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                with without_noise():
                    calibrate(trainer, model, data, best)
                    if is_tested(trainer):
                        trainer.test(model, datamodule=data, verbose=False)
            folder = run_folder(trainer)
    except (KeyboardInterrupt, LostError) as stop:
        if cli.last.path is None or not cli.last.path.exists():
            raise
        out.print(f"stopped; to continue, repeat the command with --ckpt_path {cli.last.path}")
        if isinstance(stop, LostError):
            raise
        raise SystemExit(status_of(stop)) from None
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        out.print("fast_dev_run: one batch of each kind was run, nothing was saved")
        return {}
    if not is_tested(trainer):
        out.print(f"{best} is not tested, since trainer.limit_test_batches is 0; facecls.evaluate can do it")
        return {}
    if not trainer.is_global_zero:
        return {}
    facts = {
        "checkpoint": str(best),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        # the trunk of a probe passed over each training face once, whatever the epochs of its heads
        "faces_seen": len(data.rows("train")) if cli.config.probe else faces_seen(trainer, data),
        "seconds": round(time.monotonic() - started, 1),
        "resumed": cli.ckpt_path is not None,
        "git_commit": commit,
    }
    return save_outcome(folder, trainer, model, data, cli.collector, facts)


def _takes_means(cli: FaceCLI) -> bool:
    """Whether the training takes means over the faces of a batch alone, of which there must be two then."""
    norms = (isinstance(each, nn.BatchNorm1d) for each in cli.model.modules())
    return cli.config.restore_batchnorm or any(norms)


def faces_seen(trainer: pl.Trainer, data: FacesDataModule) -> int:
    """How many faces the training steps had, of all epochs and devices, in batches as they were at the end."""
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return batches * min(data.batch_size * trainer.world_size, len(data.rows("train")))


def describe(module: FaceModule) -> str:
    """The model in a line: trunk, where its weights come from, heads, size."""
    size = sum(parameter.numel() for parameter in module.model.parameters()) / 1e6
    source = module.hparams["weights"] or "random weights"
    heads = ", ".join(module.model.tasks)
    return f"{module.model.trunk.name} from {source}, heads for {heads}: {size:.1f} M parameters"


def train(cli: FaceCLI) -> tuple[FaceModule, Path]:
    """Trains the model and reads its best epoch.

    Args:
        cli: The options and objects of the run.

    Returns:
        The model of the best epoch, and its checkpoint; after ``--trainer.fast_dev_run`` the model as it is.

    Raises:
        UserError: For options that do not fit each other, the data or the checkpoint.
    """
    trainer = cli.trainer
    if cli.ckpt_path is not None:
        guard_restoring(trainer, restoring(cli.ckpt_path))
    with without_noise():
        try:
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
        except MisconfigurationException as error:  # options that Lightning compares with the data
            raise UserError(str(error)) from error
    # a run that was killed during its last validation and resumed has no best epoch
    best = Path(trainer.checkpoint_callback.best_model_path or str(cli.last.path))  # type: ignore[union-attr]
    # read here, not by trainer.test(ckpt_path=...), where the averaging callback would load the weights themselves
    return cli.model if trainer.fast_dev_run else read_checkpoint(best).module, best  # type: ignore[attr-defined]


def calibrate(trainer: pl.Trainer, module: FaceModule, data: FacesDataModule, checkpoint: Path) -> None:
    """Fits the temperature of each head on the validation faces, and saves it in the checkpoint.

    Args:
        trainer: After training; predicts at most as many batches as it validates.
        module: The trained model, whose temperatures are set.
        data: The faces.
        checkpoint: The file that the model was read from; the first process replaces it.
    """
    if trainer.limit_val_batches == 0:
        return
    trainer.limit_predict_batches = trainer.limit_val_batches
    predicted: Any = trainer.predict(module, data.val_dataloader())
    batches = all_gather(predicted)
    temperatures = {}
    for name, head in module.model.heads.items():
        if head.has_distribution:
            logits, labels = (torch.cat(parts) for parts in zip(*(batch[name] for batch in batches), strict=True))
            head.temperature.fill_(fit_temperature(logits.numpy(), labels.numpy()))
            temperatures[f"model.heads.{name}.temperature"] = head.temperature.cpu()
    if not trainer.is_global_zero:
        return
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    content["state_dict"] |= temperatures
    write_checkpoint(content, checkpoint)


if __name__ == "__main__":
    with command("facecls.fit"):
        main(sys.argv[1:])
