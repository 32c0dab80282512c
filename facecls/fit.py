"""Trains a model, tests the best epoch and leaves everything in ``runs/NAME/version_N``.

``python -m facecls.fit --config configs/base.yaml [--any.option VALUE ...]``
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from facecls.callbacks import last_checkpoint, run_folder
from facecls.cli import (
    FaceCLI,
    console,
    git_commit,
    parse,
    print_results,
    use_features,
    without_noise,
    write_data,
    write_results,
    write_study,
)
from facecls.data.datamodule import FacesDataModule
from facecls.data.labels import TASKS
from facecls.errors import command
from facecls.files import replacing
from facecls.model.module import FaceModule, load_module
from facecls.study.calibration import fit_temperature


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: Words of the command line; ``None`` for the program's own.

    Returns:
        What is in ``metrics.json``; nothing after ``--trainer.fast_dev_run``.

    Raises:
        UserError: For a mistake in the options or the data.
        SystemExit: With status 130 after Ctrl-C.
    """
    started, commit = time.monotonic(), git_commit()  # before anybody changes the checkout beside the run
    cli: FaceCLI = parse(FaceCLI, args)
    out, trainer, data = console(), cli.trainer, cli.datamodule
    out.print(cli.precision_note)
    out.print(cli.model.describe())
    data.setup()
    out.print(data.describe())
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_data(run_folder(trainer), data)
    if cli.config.probe:
        out.print(use_features(trainer, cli.model, data))
    try:
        with without_noise():
            trainer.fit(cli.model, datamodule=data, ckpt_path=cli.ckpt_path, weights_only=True)
    except SystemExit:
        last = last_checkpoint(trainer)
        if trainer.interrupted and last.exists():
            out.print(f"stopped; go on with the same command and --ckpt_path {last}")
            raise SystemExit(130) from None
        raise
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        out.print("fast_dev_run: a batch of each kind went through, nothing was kept")
        return {}
    # a run that was killed in its last validation and resumed after it has none
    best = Path(trainer.checkpoint_callback.best_model_path or last_checkpoint(trainer))  # type: ignore[union-attr]
    # from the file, not by ckpt_path: the averaging callback would put the weights back that were not averaged
    model = load_module(best)
    with without_noise():
        calibrate(trainer, model, data, best)
        trainer.test(model, datamodule=data, verbose=False)
    facts = {
        "checkpoint": str(best),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "resumed": cli.ckpt_path is not None,
        "git_commit": commit,
    }
    results = write_results(trainer, data, cli.collector, facts)
    write_study(run_folder(trainer), data, cli.collector, model)
    print_results(results, run_folder(trainer))
    return results


def calibrate(trainer: pl.Trainer, model: FaceModule, data: FacesDataModule, checkpoint: Path) -> None:
    """Fits the model's temperatures on the validation faces, and puts them into its checkpoint.

    Args:
        trainer: After its training; no more batches are looked at than in its validation.
        model: The trained model, which gets the temperatures.
        data: The faces.
        checkpoint: The file that the model was loaded from.
    """
    if trainer.limit_val_batches == 0:
        return
    trainer.limit_predict_batches = trainer.limit_val_batches
    batches: Any = trainer.predict(model, data.val_dataloader())
    for number, task in enumerate(TASKS):
        if task in batches[0]:
            logits, labels = (torch.cat(parts) for parts in zip(*(batch[task] for batch in batches), strict=True))
            if logits.shape[1] > 1:  # a regression has no distribution to spread
                model.model.temperatures[number] = fit_temperature(logits.numpy(), labels.numpy())
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept["state_dict"]["model.temperatures"] = model.model.temperatures.cpu()
    with replacing(checkpoint) as part:
        torch.save(kept, part)


if __name__ == "__main__":
    with command("facecls.fit"):
        main(sys.argv[1:])
