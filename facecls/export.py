"""``python -m facecls.export``: a trained model as one ONNX file, written once ONNX Runtime agrees with torch.

The graph holds all that ``FaceModule`` does: uint8 RGB in, mean and standard deviation, trunk, heads, temperatures,
softmax and the estimated age out.
"""

import argparse
import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import facecls
from facecls.data.labels import CLASSES, MISSING, TASKS
from facecls.errors import UserError, command
from facecls.files import replacing

# what is heavy is imported when it is needed, so that --help and mistakes are answered at once
if TYPE_CHECKING:
    from onnx import ModelProto
    from rich.table import Table
    from torch import Tensor

    from facecls.data.datamodule import FacesDataModule
    from facecls.model.module import FaceModule

Estimates = dict[str, npt.NDArray[Any]]
"""What ``FaceModel.estimate`` says of N faces, by output."""

OPSETS = range(18, 22)
"""Below 18 torch's exporter can't write; 21 is the last that onnxruntime 1.20 runs, the oldest allowed here."""
TOLERANCE = 1e-4
"""Largest difference from torch: of probabilities, and of ages relative to the age."""
BATCHES = (1, 7, 32)
"""Sizes of the batches for verification; all further ones have the last size."""
VERIFIED = sum(BATCHES) + 7 * BATCHES[-1]
"""Faces at most that an fp32 file is compared on."""
VERIFIED_INT8 = 1000
"""The same for int8, where changed decisions are counted."""
CALIBRATED = 256
"""Faces that give the ranges of int8 activations; 64, 512 and 1,024 did as well with EfficientNet-Lite0."""
LICENCE = (
    "Code: MIT. Weights: under the terms of the data that they were trained on; VGGFace2, ImageNet and UTKFace are "
    "for non-commercial research only."
)
_ABOUT = "Writes a trained model as one ONNX file, once ONNX Runtime gives the same for real faces as torch."
_IN_FLOAT = {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "Softmax"}
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

    from facecls.inference.predictor import TorchPredictor
    from facecls.model.module import load_module

    out = Console(soft_wrap=True)
    module = load_module(options.checkpoint)
    with out.status("reading faces"):
        data = _open_data(options.checkpoint, options.root)
    faces = _draw(data.val_dataloader(), VERIFIED_INT8 if options.int8 else VERIFIED)
    about = metadata(module, options.checkpoint)
    with out.status("exporting"):
        model = finished(to_onnx(module, options.opset), about)
    with out.status("comparing ONNX Runtime with torch"):
        torch_model = TorchPredictor(module.model, about["image_size"], torch.device("cpu"))
        estimates, speeds = {}, {}
        estimates["torch"], speeds["torch"] = _run(torch_model.estimate, faces)
        estimates["fp32"], speeds["fp32"] = _run(_session(model), faces)
    sizes = {"torch": sum(tensor.nbytes for tensor in module.model.state_dict().values()), "fp32": len(model)}
    _check(estimates["torch"], estimates["fp32"])
    if options.int8:
        with out.status("quantising"):
            # one by one: 32 faces at 224 pixels take 8 GB, as ONNX Runtime then keeps all activations of a batch
            quantised = quantise(model, _draw(data.test_dataloader(), CALIBRATED, sizes=[1]))
            model = finished(quantised, about | {"precision": "int8"})
        with out.status("comparing int8 with torch"):
            estimates["int8"], speeds["int8"] = _run(_session(model), faces)
        sizes["int8"] = len(model)
    part.write_bytes(model)
    facts: dict[str, float] = {f"mb/{name}": size / 1e6 for name, size in sizes.items()}
    facts |= {f"faces_per_second/{name}": speed for name, speed in speeds.items()}
    facts |= _compared(estimates, _labels(faces))
    table = _table(facts, list(sizes), f"{options.dest}: opset {options.opset}")
    where = f"CPU, {torch.get_num_threads()} threads"
    table.caption = f"{facts['faces']:,} faces in batches of 1, 7 and 32; {where}; (change from torch)"
    out.print(table)
    return facts


def _open_data(checkpoint: Path, root: str | None) -> "FacesDataModule":
    """The faces that a model was trained on, or others split in the same way; its test part is the training faces."""
    from pytorch_lightning.cli import LightningArgumentParser

    from facecls.cli import parse, trained_on
    from facecls.data.datamodule import FacesDataModule

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


def _draw(loader: Any, count: int, sizes: Sequence[int] = BATCHES) -> Any:
    """A loader over some of another's faces, drawn at random but always the same; the last size of batch goes on."""
    from torch.utils.data import DataLoader

    from facecls.data.datamodule import BatchPlan

    rows = np.random.default_rng(0).permutation(loader.sampler.faces)[:count]
    ends = [*np.cumsum(sizes), *range(sum(sizes) + sizes[-1], len(rows), sizes[-1])]
    plans: Any = [BatchPlan(part, None) for part in np.split(rows, ends) if len(part)]
    return DataLoader(loader.dataset, sampler=plans, batch_size=None)


def to_onnx(module: "FaceModule", opset: int) -> "ModelProto":
    """Turns a model into an ONNX graph.

    torch's newer exporter (``dynamo=True``) does it: the older one is deprecated, and torch means to remove it.

    Args:
        module: The model, in evaluation mode.
        opset: Version of ONNX's operators.

    Returns:
        The graph, from ``image`` (N, 3, S, S) uint8 RGB with any N to the outputs of ``FaceModel.estimate``.

    Raises:
        UserError: If torch can't write this trunk.
    """
    import torch

    from facecls.cli import without_noise

    plain: Any = copy.deepcopy(module)
    plain.to(memory_format=torch.contiguous_format)  # channels last makes a gather of the flattening after the pooling
    size = module.hparams["image_size"]
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # torch.export may take a one for a constant
    with torch.inference_mode():
        names = list(plain(images))
    try:
        with without_noise():
            program = torch.onnx.export(
                plain,
                (images,),
                input_names=["image"],
                output_names=names,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Expected a trunk that torch can write as ONNX, but {module.model.trunk.name} is none: {reason}"
        ) from error
    assert program is not None  # as always with dynamo
    return program.model_proto


def metadata(module: "FaceModule", checkpoint: Path) -> dict[str, Any]:
    """What a file says of itself, under the key ``facecls``.

    Args:
        module: The model.
        checkpoint: Where it came from.

    Returns:
        To be written as JSON; ``temperatures`` are by task, 1 where there is none.
    """
    with checkpoint.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "version": facecls.__version__,
        "versions": {name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
        "tasks": module.tasks,
        "classes": {task: names for task, names in CLASSES.items() if task in module.tasks},
        "image_size": module.hparams["image_size"],
        "temperatures": dict(zip(TASKS, module.model.temperatures.tolist(), strict=True)),
        "precision": "fp32",
        "licence": LICENCE,
        "source": f"{module.model.trunk.name}, {checkpoint.name}, sha256 {digest}",
    }


def finished(model: "ModelProto", about: Mapping[str, Any]) -> bytes:
    """Leaves out of a graph what nobody needs who runs it, says in it what it is, and checks it.

    Args:
        model: The graph; it is changed.
        about: As ``metadata`` gives it.

    Returns:
        The bytes of the file; nothing lies outside it.
    """
    import onnx

    graph = model.graph
    for entry in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        entry.ClearField("metadata_props")  # with paths of the machine that exported
    used = {node.domain for node in graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used]  # onnxruntime adds all that it knows
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)  # so that older runtimes read it
    onnx.helper.set_model_props(model, {"facecls": json.dumps(about)})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def quantise(model: bytes, faces: "Iterable[Mapping[str, Tensor]]") -> "ModelProto":
    """Turns the trunk into 8 bits: static, per channel, with nodes that quantise and dequantise (QDQ).

    Weights use 7 bits, since processors without VNNI add pairs of products in 16 bits, which overflow with 8. All but
    the trunk stays in float: with 8-bit heads the estimated age moved by 1.1 years in the mean instead of 0.4.

    Args:
        model: An fp32 file.
        faces: Batches, small for little memory; their least and greatest activations become the ends of the ranges.

    Returns:
        The graph in 8 bits, with the same input and outputs.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({"image": batch["image"].contiguous().numpy()} for batch in faces)
    reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
    with tempfile.TemporaryDirectory(prefix="facecls-") as folder:
        given, folded, quantised = (Path(folder, f"{name}.onnx") for name in ("given", "folded", "quantised"))
        given.write_bytes(model)
        quant_pre_process(given, folded, skip_symbolic_shape=True)  # torch has written all shapes
        quantize_static(
            folded,
            quantised,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=_kept_in_float(onnx.load(folded)),
        )
        return onnx.load(quantised)


def _kept_in_float(model: "ModelProto") -> list[str]:
    """Names of the nodes of the heads, of all that follow them, and of normalisations; nodes lie in order."""
    kept: list[str] = []
    of_heads: set[str] = set()
    for node in model.graph.node:
        if any(name.startswith("model.heads.") or name in of_heads for name in node.input):
            of_heads.update(node.output)
            kept.append(node.name)
        elif node.op_type in _IN_FLOAT:
            kept.append(node.name)
    return kept


def _session(model: bytes) -> "Callable[[Tensor], Estimates]":
    """The model in ONNX Runtime, on the CPU with as many threads as torch."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"image": images.contiguous().numpy()}), strict=True))


def _run(estimate: "Callable[[Tensor], Estimates]", faces: "Iterable[Mapping[str, Tensor]]") -> tuple[Estimates, float]:
    """What a model says of faces, and how many it does in a second."""
    found: list[Estimates] = []
    seconds, count, sizes = 0.0, 0, set()
    for batch in faces:
        images = batch["image"]
        if len(images) not in sizes:  # the first batch of a size also pays for preparations
            sizes.add(len(images))
            estimate(images)
        start = time.perf_counter()
        found.append(estimate(images))
        seconds += time.perf_counter() - start
        count += len(images)
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}, count / seconds


def _differences(wanted: Estimates, found: Estimates) -> dict[str, float]:
    """By output the largest absolute difference; of ages relative to the age, or to one year where it is less."""
    apart = {name: np.abs(found[name] - values) for name, values in wanted.items()}
    if "age" in apart:
        apart["age"] /= np.maximum(wanted["age"], 1)
    return {name: float(values.max()) for name, values in apart.items()}


def _check(wanted: Estimates, found: Estimates) -> None:
    for name, value in _differences(wanted, found).items():
        if not value <= TOLERANCE:  # nor where it is not a number
            raise UserError(
                f"Expected ONNX Runtime to agree with torch within {TOLERANCE:g}, but {name} differs by {value:.1e}; "
                "nothing was written; try another --opset or another release of onnxruntime."
            )


def _labels(faces: Any) -> dict[str, npt.NDArray[np.int64]]:
    rows = np.concatenate([plan.faces for plan in faces.sampler])
    return dict(zip(TASKS, faces.dataset.labels[rows].T, strict=True))


def _compared(estimates: Mapping[str, Estimates], labels: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, float]:
    """Differences, decisions and scores of each model."""
    wanted = estimates["torch"]
    facts: dict[str, float] = {"faces": len(labels["age"])}
    for model, found in estimates.items():
        if model != "torch":
            facts |= {f"difference/{name}/{model}": value for name, value in _differences(wanted, found).items()}
        for task in [task for task in TASKS if task in found]:
            known = labels[task] != MISSING
            if task in CLASSES:
                decided = found[task].argmax(1)
                if model != "torch":
                    facts[f"changed/{task}/{model}"] = float((decided != wanted[task].argmax(1)).mean())
                if known.any():
                    facts[f"accuracy/{task}/{model}"] = float((decided == labels[task])[known].mean())
            elif known.any():
                facts[f"mae_years/{model}"] = float(np.abs(found[task] - labels[task])[known].mean())
    return facts


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
