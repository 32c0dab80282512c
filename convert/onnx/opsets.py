"""Brings models of other opsets to 17, where ONNX' own version converter does not, or does it wrong."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from convert.onnx.editor import REDUCTIONS, Editor, Rewrite, Shapes, set_attributes, settings_of


def _reduce_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if len(node.input) > 1 and node.input[1] and node.op_type != "ReduceSum":
        if node.input[1] not in editor.constants:
            raise ValueError(f"{node.output[0]} reduces axes that are not constant")
        set_attributes(node, axes=editor.array(node.input[1]).tolist(), noop_with_empty_axes=None)
    if node.op_type != "ReduceSum":
        del node.input[1:]


def _split_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    set_attributes(node, num_outputs=None)  # the sizes are added where shapes are known


def _pad_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if len(node.input) > 3:
        raise ValueError(f"{node.output[0]} pads some axes only")


def _resize_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    settings = settings_of(node)
    policy = settings.get("keep_aspect_ratio_policy", b"stretch")
    if settings.get("antialias") or settings.get("axes") or policy != b"stretch":
        raise ValueError(f"{node.output[0]} is resized in a way that is not known")
    set_attributes(node, antialias=None, axes=None, keep_aspect_ratio_policy=None)


def _gelu(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    x, output = node.input[0], node.output[0]
    half, one = (editor.add(output, np.float32(value)) for value in (0.5, 1.0))
    share = editor.unused(f"{output}/share")
    if settings_of(node).get("approximate", b"none") == b"tanh":
        cube, scale = (editor.add(output, np.float32(value)) for value in (0.044715, np.sqrt(2 / np.pi)))
        square, inner = editor.unused(f"{output}/square"), editor.unused(f"{output}/inner")
        nodes = [helper.make_node("Mul", [x, x], [square])]
        nodes += editor.chain(square, inner, ("Mul", [cube], {}), ("Add", [one], {}), ("Mul", [x], {}))
        nodes += editor.chain(inner, share, ("Mul", [scale], {}), ("Tanh", [], {}), ("Add", [one], {}))
    else:
        root = editor.add(output, np.float32(np.sqrt(0.5)))
        nodes = editor.chain(x, share, ("Mul", [root], {}), ("Erf", [], {}), ("Add", [one], {}))
    return [*nodes, *editor.chain(x, output, ("Mul", [share], {}), ("Mul", [half], {}))]


def _mish(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    gate = editor.unused(f"{node.output[0]}/gate")
    gated = editor.chain(node.input[0], gate, ("Softplus", [], {}), ("Tanh", [], {}))
    return [*gated, helper.make_node("Mul", [node.input[0], gate], node.output)]


def _cast_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    set_attributes(node, saturate=None)


def _average_pool_down(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if any(each != 1 for each in settings_of(node).get("dilations", [])):
        raise ValueError(f"{node.output[0]} averages pixels that are not side by side")
    set_attributes(node, dilations=None)


DOWN: Mapping[str, Rewrite] = {
    **dict.fromkeys(REDUCTIONS, _reduce_down),
    "AveragePool": _average_pool_down,
    "Cast": _cast_down,
    "Gelu": _gelu,
    "Mish": _mish,
    "Pad": _pad_down,
    "Resize": _resize_down,
    "Split": _split_down,
}


# Before opset 11, whose linear resizing the version converter takes for a newer one's


def _old_resize(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if settings_of(node).get("mode", b"nearest") != b"nearest":
        raise ValueError(f"{node.output[0]} is resized linearly from the corner, which torch does otherwise")


OLD: Mapping[str, Rewrite] = {"Resize": _old_resize, "Upsample": _old_resize}
