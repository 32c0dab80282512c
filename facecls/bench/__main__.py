"""``python -m facecls.bench --config configs/base.yaml [--out bench.json]``: how well is the machine used?

Takes every option of ``facecls.fit``. The training loop and its parts are timed in alternation: making batches,
stepping on a batch that is already on the device, and a loop in plain torch. Layers are frozen as in the last epoch.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pytorch_lightning.cli import LightningArgumentParser

from facecls._version import __version__
from facecls.bench.clock import Clock, Rate
from facecls.bench.loop import BARE, STEP, TOGETHER, time_evaluation, time_training
from facecls.bench.machine import forward_flops, peak_flops, process_start
from facecls.bench.pipeline import (
    ALL_WORKERS,
    AUGMENT,
    COLLATE,
    DECODE,
    ONE_WORKER,
    READ,
    RESIZE_ALONE,
    WHOLE,
    time_stages,
    time_workers,
)
from facecls.bench.show import print_bench, verdict
from facecls.console import console
from facecls.data.parallel import available_cores
from facecls.data.sources import roots_of
from facecls.data.split import split_files
from facecls.errors import UserError, command, memory_for, program
from facecls.files import check_no_input, replacing
from facecls.model.schedule import at_epoch
from facecls.training.cli import FaceCLI, parse, without_noise
from facecls.training.outcome import device_name, git_commit, versions
from facecls.training.processes import together


class BenchCLI(FaceCLI):
    """The parser and the objects of ``facecls.fit``, with the bench's own options, set up to leave no files behind.

    Attributes:
        folder: Temporary folder, where the trainer keeps its run.
    """

    prog = program("facecls.bench")
    folder: "TemporaryDirectory[str]"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the bench."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, help="Also write the results to this file, as JSON.")
        parser.add_argument(
            "--seconds", type=float, default=3.0, help="How long each block is timed; there are five of each."
        )

    def before_instantiate_classes(self) -> None:
        """Shortens the training to one epoch, frozen as in the configuration's last one, without validation."""
        super().before_instantiate_classes()
        config = self.config
        if config.probe:
            raise UserError(
                "Expected no probe, whose training steps leave out the trunk; add --probe false to time the model."
            )
        if config.out is not None and not Path(config.out).absolute().parent.is_dir():
            raise UserError(
                f"Expected --out in a folder that exists, but there is none at {Path(config.out).parent}; create it."
            )
        if config.out is not None:
            files = [*(config.config or []), config.model.weights, config.ckpt_path]
            inputs = [*files, *split_files(config.data.split_file), *roots_of(config.data.root)]
            check_no_input(Path(config.out), [each for each in map(str, inputs) if each])
        if not 0 < config.seconds < math.inf:
            raise UserError(f"Expected --seconds above 0, but got {config.seconds}; leave it out for 3.")
        self.folder = TemporaryDirectory()
        schedule, trainer = config.model.schedule, config.trainer
        schedule.frozen = {0: at_epoch(schedule.frozen, (trainer.max_epochs or 1) - 1, 0)}
        trainer.max_epochs, trainer.limit_val_batches, trainer.num_sanity_val_steps = 1, 0, 0
        trainer.enable_progress_bar, trainer.default_root_dir = False, self.folder.name


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command.

    Args:
        args: As on the command line; ``None`` takes those.

    Returns:
        The results, as written to the JSON file.

    Raises:
        UserError: For a mistake in the options or the data.
    """
    cli: BenchCLI = parse(BenchCLI, args)
    with (
        cli.folder,
        without_noise(),
        together(cli.trainer),
        memory_for("--data.batch_size", cli.datamodule.batch_size),
    ):
        results = measure(cli)
    print_bench(results, console())
    if cli.config.out is not None:
        with replacing(Path(cli.config.out)) as part:
            part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def measure(cli: BenchCLI) -> dict[str, Any]:
    """Takes all measurements.

    Args:
        cli: Holds trainer, module and data.

    Returns:
        The results, as written to the JSON file.
    """
    trainer, module, data, seconds = cli.trainer, cli.model, cli.datamodule, cli.config.seconds
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    data.setup()
    data.trainer = trainer  # its device decides whether batches are pinned
    clocks = {stage: Clock(torch.cuda.synchronize) if on_gpu else Clock() for stage in ("training", "evaluation")}
    training, evaluation = clocks.values()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # another precision may have been tried
    with console().status("timing the training") as status:
        alternating = time_training(trainer, module, data, training, seconds)
        device_mib = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
        status.update("timing the evaluation")
        time_evaluation(trainer, module, data, evaluation, seconds)
        status.update("timing the input")
        time_workers(data, data.train_dataloader, training, seconds)
        time_workers(data, data.val_dataloader, evaluation, seconds)
        time_stages(data, data.train_dataloader(), training)
        time_stages(data, data.val_dataloader(), evaluation)
        status.update("measuring the device's peak")
        peak = peak_flops(device, _dtype(str(trainer.precision)), training)
        forward = forward_flops(module.model, data.image_size)
    # with nothing frozen, the backward pass takes twice the operations of the forward pass
    trains_all = all(parameter.requires_grad for parameter in module.model.parameters())
    flops = {"training": 3 * forward if trains_all else None, "evaluation": forward}
    start, memory = process_start(), alternating.memory
    results = _describe(cli) | {
        "peak_flops": peak,
        "start_seconds": None if start is None else round(alternating.first_step - start, 2),
        "memory": {
            "device_mib": device_mib,
            "images_mib": round(data.encoded_bytes() / 2**20, 1),
            "worker_private_mib": memory.private_mib if memory else [],
            "worker_shared_mib": memory.shared_mib if memory else [],
        },
    }
    for stage, clock in clocks.items():
        results[stage] = _stage(stage, clock, data.num_workers, flops[stage], peak)
        rates = {
            **results[stage]["ratios"],
            "input": _input_rate(clock.rates()).median,
            "step": clock.rates()[STEP].median,
        }
        results[stage]["verdict"] = verdict(stage, rates, data.num_workers, results["cores"], on_gpu)
    return results


def _describe(cli: BenchCLI) -> dict[str, Any]:
    """What was timed, on which machine and with which versions."""
    trainer, data = cli.trainer, cli.datamodule
    return {
        "name": cli.config.name,
        "trunk": cli.model.model.trunk.name,
        "image_size": data.image_size,
        "batch_size": data.batch_size,
        "workers": data.num_workers,
        "cores": available_cores(),
        "device": device_name(trainer),
        "precision": str(trainer.precision),
        "version": __version__,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _stage(stage: str, clock: Clock, workers: int, flops: float | None, peak: float) -> dict[str, Any]:
    rates = clock.rates()
    stages = (READ, DECODE, AUGMENT, COLLATE, WHOLE, ONE_WORKER, ALL_WORKERS)
    fed, step = _input_rate(rates), rates[STEP]
    together = rates[TOGETHER].median / fed.median if fed.median < step.median else clock.ratio(TOGETHER, STEP)
    peer, alone = ("augmentation", AUGMENT) if stage == "training" else ("OpenCV", RESIZE_ALONE)
    ratios = {
        "together": together,
        "step / bare": clock.ratio(STEP, BARE),
        "step / peak": None if flops is None else step.median * flops / peak,
        f"pipeline / {peer} alone": clock.ratio(WHOLE, alone),
    }
    if workers > 1:
        ratios["workers / linear"] = clock.ratio(ALL_WORKERS, ONE_WORKER) / workers
    return {
        "input": {name: rates[name]._asdict() for name in stages if name in rates},
        "loop": {name: rates[name]._asdict() for name in (STEP, TOGETHER, BARE)},
        "flops_per_face": flops,
        "ratios": ratios,
    }


def _input_rate(rates: dict[str, Rate]) -> Rate:
    return rates.get(ALL_WORKERS, rates[WHOLE])


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32


if __name__ == "__main__":
    with command("facecls.bench"):
        main(sys.argv[1:])
