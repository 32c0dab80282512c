"""Rewrites the operators of an ONNX model to those of a plain one; the shapes of all values are known."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from convert.onnx.editor import REDUCTIONS, Editor, Rewrite, Shapes, set_attributes, settings_of


def set_squeezed_axes(model: onnx.ModelProto) -> None:
    """Gives every ``Squeeze`` its axes, in place: all of size one but the batch, which no inference can tell from N."""
    squeezes = [node for node in model.graph.node if node.op_type == "Squeeze" and len(node.input) < 2]
    if not squeezes:
        return
    two = onnx.ModelProto()
    two.CopyFrom(model)
    two.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    inferred = onnx.shape_inference.infer_shapes(two, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input)
    }
    editor = Editor(model.graph)
    for node in squeezes:
        axes = [axis for axis, size in enumerate(shapes.get(node.input[0], [])) if size == 1 and axis]
        node.input.append(editor.add(node.output[0], np.array(axes, np.int64)))


def _window(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Writes out the padding, and what a pooling's last window would cover beyond the border."""
    settings = settings_of(node)
    kernel = settings.get("kernel_shape") or list(shapes[node.input[1]][2:])
    rank = len(kernel)
    strides, dilations = settings.get("strides") or [1] * rank, settings.get("dilations") or [1] * rank
    pads, how = list(settings.get("pads") or [0] * 2 * rank), settings.get("auto_pad", b"NOTSET")
    sizes = shapes[node.input[0]][1:]
    wide = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if how in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [max((-(-size // s) - 1) * s + w - size, 0) for size, s, w in zip(sizes, strides, wide, strict=True)]
        small, large = [each // 2 for each in total], [each - each // 2 for each in total]
        pads = [*small, *large] if how == b"SAME_UPPER" else [*large, *small]
    elif how == b"VALID":
        pads = [0] * 2 * rank
    set_attributes(node, kernel_shape=kernel, pads=pads, strides=strides, auto_pad=None)
    if node.op_type == "Conv":
        return
    del node.output[1:]  # the places of the largest
    if settings.get("storage_order"):
        raise ValueError(f"{node.output[0]} pools in column-major order")
    if rank != 2:
        raise ValueError(f"{node.output[0]} pools along {rank} axes, not height and width")
    if node.op_type == "MaxPool" and any(pad > each // 2 for pad, each in zip(pads, wide * 2, strict=True)):
        raise ValueError(f"{node.output[0]} pads by more than half of its window, which torch does not do")
    if settings.get("ceil_mode"):
        found = shapes[node.output[0]][1:]
        exact = [
            (size + pads[axis] + pads[axis + rank] - wide[axis]) // strides[axis] + 1 for axis, size in enumerate(sizes)
        ]
        if tuple(exact) == tuple(found):
            set_attributes(node, ceil_mode=None)
        elif node.op_type == "MaxPool":
            extra = [
                (count - 1) * strides[axis] + wide[axis] - sizes[axis] - pads[axis] - pads[axis + rank]
                for axis, count in enumerate(found)
            ]
            set_attributes(
                node, ceil_mode=None, pads=[*pads[:rank], *(p + e for p, e in zip(pads[rank:], extra, strict=True))]
            )


def _average_pool(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    _window(editor, node, shapes)
    settings = settings_of(node)
    pads, kernel = settings["pads"], settings["kernel_shape"]
    if pads[:2] == pads[2:] and all(2 * pad <= size for pad, size in zip(pads, kernel, strict=False)):
        return None
    if settings.get("ceil_mode"):
        raise ValueError(f"{node.output[0]} averages beyond uneven padding")
    # torch can't pad averages unevenly or far: with padding counted pad first, else divide by the share of the image
    x, output = node.input[0], node.output[0]
    whole = editor.add(output, np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64))
    plain = {"kernel_shape": settings["kernel_shape"], "strides": settings["strides"]}
    steps: tuple[tuple[Any, ...], ...] = (("Pad", [whole], {}), ("AveragePool", [], plain))
    if settings.get("count_include_pad"):
        return editor.chain(x, output, *steps)
    one = editor.add(output, np.float32(1))
    average, share = editor.unused(f"{output}/average"), editor.unused(f"{output}/share")
    return [
        *editor.chain(x, average, *steps),
        *editor.chain(x, share, ("Clip", [one, one], {}), *steps),
        helper.make_node("Div", [average, share], [output]),
    ]


def _gemm(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    """Folds the factors of a linear layer into its weights."""
    settings = settings_of(node)
    x, weight, *rest = node.input
    if settings.get("transA") or weight not in editor.constants or any(each not in editor.constants for each in rest):
        raise ValueError(f"{node.output[0]} multiplies what is not a layer's weight")
    matrix = editor.array(weight) * np.float32(settings.get("alpha", 1.0))
    matrix = matrix if settings.get("transB") else matrix.T
    inputs = [x, editor.add(weight, matrix)]
    if rest and rest[0]:
        bias = editor.array(rest[0]) * np.float32(settings.get("beta", 1.0))
        inputs.append(editor.add(rest[0], np.broadcast_to(bias.reshape(-1), (len(matrix),)).astype(np.float32)))
    return [helper.make_node("Gemm", inputs, node.output, node.name, transB=1)]


def _matmul(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    x, weight = node.input
    if weight in editor.constants and len(shapes.get(x, ())) == 1 and editor.array(weight).ndim == 2:
        inputs = [x, editor.add(weight, editor.array(weight).T)]
        return [helper.make_node("Gemm", inputs, node.output, node.name, transB=1)]
    return None


def _global_max_pool(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    return [helper.make_node("ReduceMax", node.input, node.output, node.name, axes=[2, 3], keepdims=1)]


def _lp_normalization(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    settings = settings_of(node)
    if settings.get("p", 2) != 2:
        raise ValueError(f"{node.output[0]} is normalised by another length than Euclid's")
    norm = editor.unused(f"{node.output[0]}/norm")
    return [
        helper.make_node("ReduceL2", node.input, [norm], axes=[settings.get("axis", -1)], keepdims=1),
        helper.make_node("Div", [node.input[0], norm], node.output),
    ]


def _split(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    """Each part as a slice, since a part that nobody reads is left out."""
    axis, start = settings_of(node).get("axis", 0), 0
    rank = len(shapes[node.input[0]]) + 1
    axis = axis + rank if axis < 0 else axis
    total = shapes[node.input[0]][axis - 1]
    count = len(node.output)
    sizes = editor.array(node.input[1]).tolist() if len(node.input) > 1 else [-(-total // count)] * count
    nodes = []
    for output, size in zip(node.output, sizes, strict=True):
        where = [
            editor.add(node.output[0], np.array([each], np.int64)) for each in (start, min(start + size, total), axis)
        ]
        nodes.append(helper.make_node("Slice", [node.input[0], *where], [output]))
        start += size
    return nodes


def _counted_axes(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    """Axes counted from the front, in order."""
    axes = editor.array(node.input[1]).tolist()
    rank = len(shapes[node.input[0]]) + 1 + (len(axes) if node.op_type == "Unsqueeze" else 0)
    counted = np.array(sorted(axis % rank for axis in axes), np.int64)
    inputs = [node.input[0], editor.add(node.output[0], counted)]
    return [helper.make_node(node.op_type, inputs, node.output, node.name)]


def _global_average_pool(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    rank = len(shapes[node.input[0]]) + 1
    if rank == 4:
        return None
    axes = list(range(2, rank))
    return [helper.make_node("ReduceMean", node.input, node.output, node.name, axes=axes, keepdims=1)]


def _depth_to_space(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    """With the blocks after the channels, as torch has them: channels are put in that order first."""
    settings = settings_of(node)
    if settings.get("mode", b"DCR") != b"DCR":
        return None
    block, channels = settings["blocksize"], shapes[node.input[0]][0]
    order = np.arange(channels, dtype=np.int64).reshape(block * block, -1).T.reshape(-1)
    steps: tuple[tuple[Any, ...], ...] = (
        ("Gather", [editor.add(node.output[0], order)], {"axis": 1}),
        ("DepthToSpace", [], {"blocksize": block, "mode": "CRD"}),
    )
    return editor.chain(node.input[0], node.output[0], *steps)


def _layer_norm(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Scale and bias in full."""
    axis, shape = settings_of(node).get("axis", -1), (0, *shapes[node.input[0]])
    for place, name in enumerate(node.input[1:], start=1):
        if name in editor.constants and editor.array(name).shape != shape[axis:]:
            node.input[place] = editor.add(name, np.broadcast_to(editor.array(name), shape[axis:]).copy())
    del node.output[1:]


def _pow(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if node.input[1] in editor.constants:
        node.input[1] = editor.add(node.input[1], editor.array(node.input[1]).astype(np.float32))


def _prelu(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    """A slope for each channel; other slopes are written out."""
    x, slope = node.input
    shape = shapes[x]
    if slope not in editor.constants:
        raise ValueError(f"{node.output[0]} has slopes that are computed")
    full = np.broadcast_to(editor.array(slope), (1, *shape))
    by_channel = full.reshape(shape[0], -1)
    if (by_channel == by_channel[:, :1]).all():
        node.input[1] = editor.add(slope, by_channel[:, 0].reshape(-1, *[1] * (len(shape) - 1)).copy())
        return None
    zero, positive = editor.add(node.output[0], np.float32(0)), editor.unused(f"{node.output[0]}/positive")
    negative = editor.unused(f"{node.output[0]}/negative")
    return [
        helper.make_node("Relu", [x], [positive]),
        *editor.chain(x, negative, ("Min", [zero], {}), ("Mul", [slope], {})),
        helper.make_node("Add", [positive, negative], node.output),
    ]


def _selu(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto] | None:
    """With numbers of its own, a scaled Elu."""
    settings = settings_of(node)
    if not settings:
        return None
    gamma = editor.add(node.output[0], np.float32(settings.get("gamma", 1.0507009873554805)))
    elu = {"alpha": settings.get("alpha", 1.6732632423543772)}
    return editor.chain(node.input[0], node.output[0], ("Elu", [], elu), ("Mul", [gamma], {}))


def _resize(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> list[onnx.NodeProto]:
    """By how much, in one form; only what torch computes in the same way."""
    settings = settings_of(node)
    before, after = shapes[node.input[0]], shapes[node.output[0]]
    factors = [new / old for old, new in zip(before, after, strict=True)]
    mode = settings.get("mode", b"nearest").decode()
    alignment = settings.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = settings.get("nearest_mode", b"round_prefer_floor").decode()
    is_whole = all(factor == int(factor) for factor in factors)
    exact = (
        (is_whole and (alignment, rounding) in _NEAREST)
        if mode == "nearest"
        else mode == "linear" and alignment in ("half_pixel", "pytorch_half_pixel", "align_corners")
    )
    if not exact or len(before) != 3 or factors[0] != 1:
        raise ValueError(f"{node.output[0]} is resized by {mode}, {alignment}, {rounding}, which torch does otherwise")
    scales = editor.add(node.output[0], np.array([1, *factors], np.float32))
    how = {"mode": mode, "coordinate_transformation_mode": alignment}
    if mode == "nearest":
        how = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return [helper.make_node("Resize", [node.input[0], "", scales], node.output, node.name, **how)]


_NEAREST = {
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
    ("pytorch_half_pixel", "round_prefer_ceil"),
}
"""Ways to take the nearest pixel that are the same where an image is enlarged a whole number of times."""


def _batch_norm(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    if settings_of(node).get("training_mode"):
        raise ValueError(f"{node.output[0]} is normalised by its own batch; export the network in evaluation mode")
    del node.output[1:]
    set_attributes(node, training_mode=None, spatial=None)


def _all_axes(editor: Editor, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Refuses what would mix the images of a batch."""
    axes = settings_of(node).get("axes")
    if node.op_type == "ReduceSum" and len(node.input) > 1:
        axes = editor.array(node.input[1]).tolist()
    rank = len(shapes[node.input[0]]) + 1
    if not axes or any(axis % rank == 0 for axis in axes):
        raise ValueError(f"{node.output[0]} is a reduction over the batch")


PLAIN: Mapping[str, Rewrite] = {
    **dict.fromkeys(REDUCTIONS, _all_axes),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _window,
    "DepthToSpace": _depth_to_space,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_normalization,
    "MatMul": _matmul,
    "MaxPool": _window,
    "PRelu": _prelu,
    "Pow": _pow,
    "Resize": _resize,
    "Selu": _selu,
    "Split": _split,
    "Squeeze": _counted_axes,
    "Unsqueeze": _counted_axes,
}
