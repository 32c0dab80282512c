"""A trained model -> an ONNX graph that holds all that ``FaceModule`` does.

uint8 RGB in; mean and standard deviation, trunk, heads, temperatures, softmax and the estimated age inside.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch

import facecls
from facecls.data.tasks import CLASSES, TASKS
from facecls.errors import UserError
from facecls.model.module import FaceModule
from facecls.training.cli import without_noise

LICENCE = (
    "Code: MIT. Weights: under the terms of the data that they were trained on; VGGFace2, ImageNet and UTKFace are "
    "for non-commercial research only."
)


def to_onnx(module: FaceModule, opset: int) -> onnx.ModelProto:
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


def metadata(module: FaceModule, checkpoint: Path) -> dict[str, Any]:
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


def finished(model: onnx.ModelProto, about: Mapping[str, Any]) -> bytes:
    """Leaves out of a graph what nobody needs who runs it, says in it what it is, and checks it.

    Args:
        model: The graph; it is changed.
        about: As ``metadata`` gives it.

    Returns:
        The bytes of the file; nothing lies outside it.
    """
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
