"""``python -m facecls.export``: a trained model as one ONNX file, written once ONNX Runtime agrees with torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from facecls.console import console
from facecls.data.limits import add_limits, set_limits_of
from facecls.errors import CommandParser, UserError, command, program
from facecls.files import check_no_input, replacing

# heavy libraries are imported late, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from facecls.data.datamodule import FacesDataModule
    from facecls.model.checkpoint import Checkpoint

OPSETS = range(18, 22)
"""torch's exporter can't write less than 18; 21 is the last that onnxruntime 1.20 runs, the oldest allowed here."""
VERIFIED = 264
"""At most this many faces verify an fp32 file."""
VERIFIED_INT8 = 1000
"""The same for int8, where changed decisions are counted."""
CALIBRATED = 256
"""Faces that calibrate int8; 64, 512 and 1,024 did as well with EfficientNet-Lite0."""
_DESCRIPTION = "Writes a trained model as one ONNX file, once ONNX Runtime agrees with torch on real faces."


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Returns:
        What the table shows and more, as ``verification.compare`` returns it, for the models torch, fp32 and int8.

    Raises:
        UserError: For a mistake in the options, the checkpoint or the data, or if ONNX Runtime does not agree.
    """
    options = _create_parser().parse_args(arguments)
    set_limits_of(options)
    if options.opset not in OPSETS:
        raise UserError(
            f"Expected --opset from {OPSETS[0]} to {OPSETS[-1]}, but got {options.opset}; leave it out for {OPSETS[0]}."
        )
    if options.dest.suffix != ".onnx":
        raise UserError(
            f"Expected a file name that ends in .onnx, but got {options.dest}; predict recognises ONNX models by that "
            "ending."
        )
    check_no_input(options.dest, [options.checkpoint])
    with replacing(options.dest) as part:
        return _export(options, part)


def _create_parser() -> CommandParser:
    parser = CommandParser(prog=program("facecls.export"), description=_DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint such as best.ckpt")
    parser.add_argument("dest", type=Path, metavar="DEST", help="the .onnx file to write or replace")
    parser.add_argument("--int8", action="store_true", help="quantise the trunk to 8 bits and report what that changes")
    parser.add_argument(
        "--opset",
        type=int,
        default=OPSETS[0],
        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: %(default)s, the most widely read)",
    )
    parser.add_argument(
        "--data.root",
        dest="root",
        metavar="WHERE",
        help="faces to verify on, and to calibrate int8 with (default: those that the model was trained on)",
    )
    add_limits(parser)
    return parser


def _export(options: argparse.Namespace, part: Path) -> dict[str, float]:
    """Exports, verifies, quantises if asked to, writes the file and prints the comparison."""
    import torch

    from facecls.export import quantisation, show, verification
    from facecls.model import onnx_file
    from facecls.model.checkpoint import read_checkpoint

    out = console()
    checkpoint = read_checkpoint(options.checkpoint)
    module, tasks = checkpoint.module, checkpoint.module.model.tasks
    with out.status("reading faces"):
        data = _open_data(checkpoint, options)
        batches = verification.draw_batches(data.val_dataloader(), VERIFIED_INT8 if options.int8 else VERIFIED)
    about = onnx_file.metadata(module, options.checkpoint)
    with out.status("exporting"):
        file = onnx_file.serialise(onnx_file.to_onnx(module, options.opset), about)
    with out.status("comparing ONNX Runtime with torch"):
        runs = {"torch": verification.run_torch(module, batches), "fp32": verification.run_onnx(file, batches)}
        verification.check(runs["torch"].estimates, runs["fp32"].estimates, tasks)
    if options.int8:
        with out.status("quantising"):
            # one by one: with batches of 32 faces at 224 pixels it takes 8 GB
            calibration = verification.draw_batches(data.test_dataloader(), CALIBRATED, sizes=[1])
            file = onnx_file.serialise(quantisation.quantise(file, calibration), about | {"precision": "int8"})
        with out.status("comparing int8 with torch"):
            runs["int8"] = verification.run_onnx(file, batches)
    part.write_bytes(file)
    facts = verification.compare(runs, module, batches)
    table = show.create_table(facts, list(runs), f"{options.dest}: opset {options.opset}")
    batch_sizes = ", ".join(map(str, verification.BATCH_SIZES))
    where = f"CPU, {torch.get_num_threads()} threads"
    table.caption = f"{facts['faces']:,} faces in batches of {batch_sizes}; {where}; (change from torch)"
    out.print(table)
    return facts


def _open_data(checkpoint: "Checkpoint", options: argparse.Namespace) -> "FacesDataModule":
    """The faces that a model was trained on, or others split in the same way; its test part is the training faces."""
    from facecls.data.datamodule import FacesDataModule
    from facecls.training.cli import parse, trusted_options
    from facecls.training.option_parser import OptionParser

    if not checkpoint.data:
        raise UserError(
            f"Expected a checkpoint of facecls.fit, but {options.checkpoint} does not say what data it was trained on."
        )
    kept = trusted_options(checkpoint.data, options.checkpoint)
    words = ["--data.split=train"]
    if options.root is not None:
        kept.pop("split_file", None)  # it lists the faces that the model was trained on
        words.append(f"--data.root={options.root}")
    parser = OptionParser(exit_on_error=False)
    parser.add_lightning_class_args(FacesDataModule, "data")
    parser.set_defaults({f"data.{name}": value for name, value in kept.items()})
    data: FacesDataModule = parser.instantiate(parse(parser.parse_args, words)).data
    try:
        data.setup()
    except UserError as error:
        if options.root is not None:
            raise
        raise UserError(
            f"Can't verify on the faces that {options.checkpoint} was trained on: {error} Name others with --data.root."
        ) from error
    return data


if __name__ == "__main__":
    with command("facecls.export"):
        main()
