"""A trained model -> an ONNX graph that takes uint8 RGB and holds everything ``FaceModule`` computes.

Normalisation, trunk, heads, temperatures, softmax and the mean of an age distribution are all inside; a trunk
can be written alone as well.
"""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from facecls._version import __version__
from facecls.compat import DEPRECATED
from facecls.errors import UserError
from facecls.files import sha256
from facecls.model.checksums import SEAL, sealed
from facecls.model.module import FaceModule
from facecls.model.trunk import Trunk

LICENCE = (
    "Code: MIT. Weights: under the terms of the data that they were trained on; VGGFace2, ImageNet and UTKFace are "
    "for non-commercial research only."
)


def to_onnx(module: FaceModule, opset: int) -> onnx.ModelProto:
    """Exports a model with torch's current exporter (``dynamo=True``); the older one is deprecated.

    Args:
        module: The model, in evaluation mode.
        opset: Version of the ONNX operator set.

    Returns:
        The graph, from ``image`` (N, 3, S, S) uint8 RGB with any N to the outputs of ``FaceModel.estimate``.

    Raises:
        UserError: If torch can't export this trunk.
    """
    names = [name for head in module.model.heads.values() for name in head.outputs]
    size = module.hparams["image_size"]
    return export(module, module.model.trunk.name, torch.zeros(2, 3, size, size, dtype=torch.uint8), names, opset)


def trunk_to_onnx(trunk: Trunk, size: int, opset: int) -> bytes:
    """Exports a trunk alone, as ``to_onnx`` does.

    Args:
        trunk: The trunk, in evaluation mode.
        size: Side S of the images in pixels.
        opset: Version of the ONNX operator set.

    Returns:
        The bytes of a graph from ``image`` (N, 3, S, S) uint8 RGB with any N to ``features`` (N, D) float32.

    Raises:
        UserError: If torch can't export it.
    """
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    written: bytes = export(trunk, trunk.name, images, ["features"], opset).SerializeToString()
    return written


def export(
    net: nn.Module, what: str, images: Tensor, outputs: Sequence[str], opset: int, optimise: bool = True
) -> onnx.ModelProto:
    """Exports a network.

    Args:
        net: The network, in evaluation mode.
        what: What its trunk is called, for messages.
        images: Two images as it takes them; with one, torch.export may fix N to 1.
        outputs: Names of its outputs.
        opset: Version of the ONNX operator set.
        optimise: Whether the exporter may simplify the graph, such as by folding constants.

    Returns:
        The graph from ``image``, with any N, to ``outputs``.

    Raises:
        UserError: If torch can't export it.
    """
    plain: Any = copy.deepcopy(net)
    # in channels last, the flattening after the pooling would be exported as a gather
    plain.to(memory_format=torch.contiguous_format)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{DEPRECATED}")
            program = torch.onnx.export(
                plain,
                (images,),
                input_names=["image"],
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
                optimize=optimise,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(_innermost(error)).strip().partition("\n")[0]
        raise UserError(
            f"Expected a trunk that torch can export to ONNX, but it can't export {what}: {reason}; take another trunk."
        ) from error
    assert program is not None  # as always with dynamo
    return program.model_proto


def _innermost(error: BaseException) -> BaseException:
    """What an exception came from; the exporter's own say only in which of its steps."""
    return _innermost(error.__cause__) if error.__cause__ else error


def metadata(module: FaceModule, checkpoint: Path | None) -> dict[str, Any]:
    """What a file says about itself, under the metadata key ``facecls``.

    Args:
        module: The model.
        checkpoint: The file it was read from, if it shall be named.

    Returns:
        Values for JSON. ``tasks`` are options of ``create_tasks``; ``temperatures`` are by task, 1 where there is none.
    """
    source = "" if checkpoint is None else f", {checkpoint.name}, sha256 {sha256(checkpoint)}"
    return {
        "version": __version__,
        "versions": {name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
        "tasks": {name: task.options for name, task in module.model.tasks.items()},
        "image_size": module.hparams["image_size"],
        "face_frame": module.hparams["face_frame"],
        "temperatures": {name: head.temperature.item() for name, head in module.model.heads.items()},
        "precision": "fp32",
        "licence": LICENCE,
        "source": f"{module.model.trunk.name}{source}",
    }


def serialise(model: onnx.ModelProto, about: Mapping[str, Any]) -> bytes:
    """Strips a graph of what is not needed to run it, adds its metadata with a checksum of the file, and checks it.

    Args:
        model: The graph; it is changed in place.
        about: The metadata, as ``metadata`` returns it.

    Returns:
        The bytes of the file, weights included.
    """
    graph = model.graph
    for entry in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        entry.ClearField("metadata_props")  # with paths on the machine that exported
    used = {node.domain for node in graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used]  # onnxruntime lists all that it knows
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)  # so that older runtimes can read it
    onnx.helper.set_model_props(model, {"facecls": json.dumps({**about, **SEAL})})
    onnx.checker.check_model(model, full_check=True)
    return sealed(model.SerializeToString())
