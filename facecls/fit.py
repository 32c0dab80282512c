"""Trains a model, tests the best epoch and leaves everything in ``runs/NAME/version_N``.

``python -m facecls.fit --config configs/base.yaml [--any.option VALUE ...]``
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from facecls.analysis.calibration import fit_temperature
from facecls.console import console
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import TASKS
from facecls.errors import command
from facecls.files import replacing
from facecls.model.module import FaceModule, load_module
from facecls.training.callbacks import run_folder
from facecls.training.cli import FaceCLI, parse, without_noise
from facecls.training.collector import gathered
from facecls.training.outcome import git_commit, print_results, write_data, write_results, write_study
from facecls.training.probe import use_features


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        What is in ``metrics.json``; nothing after ``--trainer.fast_dev_run``, and in all processes but the first.

    Raises:
        UserError: For a mistake in the options or the data.
        SystemExit: With status 130 after Ctrl-C.
    """
    started, commit = time.monotonic(), git_commit()  # before anybody changes the checkout beside the run
    cli: FaceCLI = parse(FaceCLI, args)
    trainer, data = cli.trainer, cli.datamodule
    out = console(quiet=not trainer.is_global_zero)
    if trainer.local_rank > 0:
        # Ctrl-C reaches them all; the first process of a node needs the others until it has saved, and ends them then
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    out.print(cli.precision_note)
    out.print(cli.model.describe())
    data.setup()
    out.print(data.describe())
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_data(run_folder(trainer), data)
    if cli.config.probe:
        out.print(use_features(trainer, cli.model, data))
    try:
        model, best = train(cli)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with without_noise():
                calibrate(trainer, model, data, best)
                trainer.test(model, datamodule=data, verbose=False)
        folder = run_folder(trainer)
    except SystemExit:
        end_others(trainer)
        if trainer.interrupted and cli.last.path is not None and cli.last.path.exists():
            out.print(f"stopped; go on with the same command and --ckpt_path {cli.last.path}")
            raise SystemExit(130) from None
        raise
    except BaseException:
        end_others(trainer)
        raise
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        out.print("fast_dev_run: a batch of each kind went through, nothing was kept")
        return {}
    if not trainer.is_global_zero:
        return {}
    facts = {
        "checkpoint": str(best),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "resumed": cli.ckpt_path is not None,
        "git_commit": commit,
    }
    results = write_results(folder, trainer, data, cli.collector, facts)
    write_study(folder, data, cli.collector, model)
    print_results(results, folder)
    return results


def train(cli: FaceCLI) -> tuple[FaceModule, Path]:
    """Trains.

    Args:
        cli: The objects of the run.

    Returns:
        The model of the best epoch, and its checkpoint; the model as it is after ``--trainer.fast_dev_run``.
    """
    trainer = cli.trainer
    with without_noise():
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    # a run that was killed in its last validation and resumed after it has none
    best = Path(trainer.checkpoint_callback.best_model_path or str(cli.last.path))  # type: ignore[union-attr]
    # from the file, not by ckpt_path: the averaging callback would put the weights back that were not averaged
    return cli.model if trainer.fast_dev_run else load_module(best), best  # type: ignore[attr-defined]


def end_others(trainer: pl.Trainer) -> None:
    """Ends the processes that Lightning started for the other devices of this node; they would wait for this one.

    Args:
        trainer: After an error or Ctrl-C.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
        launcher.procs.clear()  # or Lightning, which watches over them, would end this process as well


def calibrate(trainer: pl.Trainer, model: FaceModule, data: FacesDataModule, checkpoint: Path) -> None:
    """Fits the model's temperatures on the validation faces of all processes; the first puts them into its checkpoint.

    Args:
        trainer: After its training; no more batches are looked at than in its validation.
        model: The trained model, which gets the temperatures.
        data: The faces.
        checkpoint: The file that the model was loaded from.
    """
    if trainer.limit_val_batches == 0:
        return
    trainer.limit_predict_batches = trainer.limit_val_batches
    predicted: Any = trainer.predict(model, data.val_dataloader())
    batches = gathered(predicted)
    for number, task in enumerate(TASKS):
        if task in batches[0]:
            logits, labels = (torch.cat(parts) for parts in zip(*(batch[task] for batch in batches), strict=True))
            if logits.shape[1] > 1:  # a regression has no distribution to spread
                model.model.temperatures[number] = fit_temperature(logits.numpy(), labels.numpy())
    if not trainer.is_global_zero:
        return
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept["state_dict"]["model.temperatures"] = model.model.temperatures.cpu()
    with replacing(checkpoint) as part:
        torch.save(kept, part)


if __name__ == "__main__":
    with command("facecls.fit"):
        main(sys.argv[1:])
