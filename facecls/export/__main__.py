"""``python -m facecls.export``: a trained model as one ONNX file, written once ONNX Runtime agrees with torch."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from facecls.errors import UserError, command
from facecls.files import replacing

# what is heavy is imported when it is needed, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from rich.table import Table

    from facecls.data.datamodule import FacesDataModule

OPSETS = range(18, 22)
"""Below 18 torch's exporter can't write; 21 is the last that onnxruntime 1.20 runs, the oldest allowed here."""
VERIFIED = 264
"""Faces at most that an fp32 file is compared on, in batches of 1, 7 and 32."""
VERIFIED_INT8 = 1000
"""The same for int8, where changed decisions are counted."""
CALIBRATED = 256
"""Faces that give the ranges of int8 activations; 64, 512 and 1,024 did as well with EfficientNet-Lite0."""
_ABOUT = "Writes a trained model as one ONNX file, once ONNX Runtime gives the same for real faces as torch."
_ROWS = {
    "mb": ("size, MB", "{:.1f}"),
    "faces_per_second": ("faces/s", "{:,.0f}"),
    "difference": ("largest difference, {}", "{:.1e}"),
    "changed": ("changed decisions, {}", "{:.2%}"),
    "accuracy": ("accuracy, {}", "{:.2%}"),
    "mae_years": ("age MAE, years", "{:.3f}"),
}
_CHANGES = {"accuracy", "mae_years"}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the command.

    Args:
        arguments: As on the command line; ``None`` takes those.

    Returns:
        What the table shows, with ``MODEL`` one of torch, fp32, int8: ``faces``; ``mb/MODEL``,
        ``faces_per_second/MODEL``, ``difference/OUTPUT/MODEL`` (from torch), ``changed/TASK/MODEL`` (share of the
        decisions of torch, 0..1), ``accuracy/TASK/MODEL`` and ``mae_years/MODEL``, the last two where there are labels.

    Raises:
        UserError: For a mistake in the options, the checkpoint or the data, or if ONNX Runtime does not agree.
    """
    options = _create_parser().parse_args(arguments)
    if options.opset not in OPSETS:
        raise UserError(
            f"Expected --opset from {OPSETS[0]} to {OPSETS[-1]}, but got {options.opset}; leave it out for {OPSETS[0]}."
        )
    if options.dest.suffix != ".onnx":
        raise UserError(f"Expected a file name that ends in .onnx, but got {options.dest}; predict knows it by that.")
    with replacing(options.dest) as part:
        return _export(options, part)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m facecls.export", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint such as best.ckpt")
    parser.add_argument("dest", type=Path, metavar="DEST", help="the .onnx file to make or replace")
    parser.add_argument("--int8", action="store_true", help="the trunk in 8 bits, and a report of what that changes")
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
        help="faces to verify on, and to calibrate int8 on (default: those that the model was trained on)",
    )
    return parser


def _export(options: argparse.Namespace, part: Path) -> dict[str, float]:
    import torch
    from rich.console import Console

    from facecls.export import graph, quantisation, verification
    from facecls.model.module import load_module
    from facecls.model.predictor import TorchPredictor

    out = Console(soft_wrap=True)
    module = load_module(options.checkpoint)
    with out.status("reading faces"):
        data = _open_data(options.checkpoint, options.root)
    faces = verification.draw(data.val_dataloader(), VERIFIED_INT8 if options.int8 else VERIFIED)
    about = graph.metadata(module, options.checkpoint)
    with out.status("exporting"):
        model = graph.finished(graph.to_onnx(module, options.opset), about)
    with out.status("comparing ONNX Runtime with torch"):
        torch_model = TorchPredictor(module.model, about["image_size"], torch.device("cpu"))
        estimates, speeds = {}, {}
        estimates["torch"], speeds["torch"] = verification.run(torch_model.estimate, faces)
        estimates["fp32"], speeds["fp32"] = verification.run(verification.session(model), faces)
    sizes = {"torch": sum(tensor.nbytes for tensor in module.model.state_dict().values()), "fp32": len(model)}
    verification.check(estimates["torch"], estimates["fp32"])
    if options.int8:
        with out.status("quantising"):
            # one by one: 32 faces at 224 pixels take 8 GB, as ONNX Runtime then keeps all activations of a batch
            calibrating = verification.draw(data.test_dataloader(), CALIBRATED, sizes=[1])
            model = graph.finished(quantisation.quantise(model, calibrating), about | {"precision": "int8"})
        with out.status("comparing int8 with torch"):
            estimates["int8"], speeds["int8"] = verification.run(verification.session(model), faces)
        sizes["int8"] = len(model)
    part.write_bytes(model)
    facts: dict[str, float] = {f"mb/{name}": size / 1e6 for name, size in sizes.items()}
    facts |= {f"faces_per_second/{name}": speed for name, speed in speeds.items()}
    facts |= verification.compared(estimates, faces)
    table = _table(facts, list(sizes), f"{options.dest}: opset {options.opset}")
    where = f"CPU, {torch.get_num_threads()} threads"
    batches = ", ".join(map(str, verification.BATCHES))
    table.caption = f"{facts['faces']:,} faces in batches of {batches}; {where}; (change from torch)"
    out.print(table)
    return facts


def _open_data(checkpoint: Path, root: str | None) -> "FacesDataModule":
    """The faces that a model was trained on, or others split in the same way; its test part is the training faces."""
    from pytorch_lightning.cli import LightningArgumentParser

    from facecls.data.datamodule import FacesDataModule
    from facecls.training.cli import parse, trained_on

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(FacesDataModule, "data")
    parser.set_defaults({f"data.{name}": value for name, value in trained_on(checkpoint, root is not None).items()})
    words = ["--data.split=train"] + ([] if root is None else [f"--data.root={root}"])
    data: FacesDataModule = parser.instantiate(parse(parser.parse_args, words)).data
    try:
        data.setup()
    except UserError as error:
        if root is not None:
            raise
        raise UserError(
            f"Can't verify on the faces that {checkpoint} was trained on: {error} Name others with --data.root."
        ) from error
    return data


def _table(facts: Mapping[str, float], models: Sequence[str], title: str) -> "Table":
    from rich.table import Table

    table = Table("", title=title, title_justify="left", caption_justify="left")
    for model in models:
        table.add_column(model, justify="right")
    rows = dict.fromkeys(key.rpartition("/")[0] for key in facts if "/" in key)
    for row in sorted(rows, key=lambda row: list(_ROWS).index(row.partition("/")[0])):
        kind, _, what = row.partition("/")
        text, form = _ROWS[kind]
        cells = [form.format(facts[f"{row}/{model}"]) if f"{row}/{model}" in facts else "" for model in models]
        if kind in _CHANGES:
            change = form.replace(":", ":+")
            cells[1:] = [
                f"{cell} ({change.format(facts[f'{row}/{model}'] - facts[f'{row}/torch'])})"
                for cell, model in zip(cells[1:], models[1:], strict=True)
            ]
        table.add_row(text.format(what), *cells)
    return table


if __name__ == "__main__":
    with command("facecls.export"):
        main()
