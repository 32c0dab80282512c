"""Loads an ONNX file, checks what could do harm, and runs it as it is."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from convert.plain.network import MAX_WEIGHTS
from convert.plain.source import digest
from facecls.errors import UserError
from facecls.files import resolved

_MAX_NODES = 20_000
_MAX_DEPTH = 100
WIDENED: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
"""Types of numbers that become float32."""


def load(path: Path) -> tuple[onnx.ModelProto, str]:
    """Loads a model with all its weights, and replaces calls of its own functions by their nodes.

    Args:
        path: The file.

    Returns:
        The model, and the SHA-256 of the file's bytes in hexadecimal.

    Raises:
        UserError: If it can't be read, is no ONNX model, lacks weights or has too many.
    """
    if not path.is_file():
        raise UserError(f"Expected an ONNX file at {path}, but there is none; name another.")
    sha256, _ = digest(path, "an ONNX file")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
        if (count := _count_nodes(model)) > _MAX_NODES:
            raise ValueError(f"it has {count:,} nodes")
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf and the inliner have exceptions of their own
        raise damaged(path, error) from None
    if not model.graph.node:
        raise UserError(f"Expected an ONNX model, but {path} has no graph; get the file again.")
    _load_external(path, model)
    total = 0
    for tensor in _tensors(model.graph):
        total += 4 * math.prod(tensor.dims)
        if total > MAX_WEIGHTS:
            raise UserError(f"Expected at most {MAX_WEIGHTS:,} bytes of weights, but {path} has more.")
        _check_tensor(path, tensor)
    return model, sha256


def _count_nodes(model: onnx.ModelProto) -> int:
    """How many nodes there are when the model's own functions are replaced by theirs; they may multiply."""
    functions = {(each.domain, each.name): each for each in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[onnx.NodeProto], depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError("its functions call each other without an end")
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in functions and key not in counts:
                counts[key] = count(functions[key].node, depth + 1)
            inner = [each.g for each in node.attribute if each.HasField("g")]
            total += counts.get(key, 1) + sum(count(graph.node, depth + 1) for graph in inner)
        return total

    return count(model.graph.node, 0)


def damaged(path: Path, error: Exception | str) -> UserError:
    """What to say about a file that can't be understood."""
    reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    return UserError(f"Expected an ONNX model, but {path} can't be understood ({reason}); export or get it again.")


def widen(model: onnx.ModelProto) -> list[str]:
    """Turns half and double precision to float32, in place.

    Args:
        model: The model, whose weights are loaded.

    Returns:
        The types that there were.
    """
    found = set()
    for tensor in _tensors(model.graph):
        if tensor.data_type in WIDENED:
            found.add(WIDENED[tensor.data_type])
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in WIDENED:
            found.add(WIDENED[value.type.tensor_type.elem_type])
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in WIDENED:
                attribute.i = TensorProto.FLOAT
    if found:
        del model.graph.value_info[:]
    return sorted(found)


class Runner:
    """A model in ONNX Runtime, on one thread and without any optimisation.

    Args:
        model: The model.

    Raises:
        UserError: If ONNX Runtime can't load it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print, and try the same again
            )
        except Exception as error:  # ONNX Runtime raises exceptions of its own
            raise _unrunnable(error) from None

    def run(self, name: str, inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Runs the model.

        Args:
            name: Name of the input.
            inputs: Its value.

        Returns:
            All outputs.

        Raises:
            UserError: If ONNX Runtime can't run it.
        """
        try:
            found: list[NDArray[Any]] = self.session.run(None, {name: inputs})
        except Exception as error:
            raise _unrunnable(error) from None
        return found


def _unrunnable(error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0][:300]
    return UserError(f"Expected a network that ONNX Runtime can run, but it says: {reason}; export it again.")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors with numbers: weights, and constants in the attributes of nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _load_external(path: Path, model: onnx.ModelProto) -> None:
    """Loads weights that are in files beside the model, and nowhere else."""
    folder = resolved(path.parent)
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        try:
            about = external_data_helper.ExternalDataInfo(tensor)
            file = folder / about.location
            if not about.location or not resolved(file).is_relative_to(folder) or file.is_symlink():
                raise UserError(
                    f"Expected weights beside {path}, but {tensor.name} is said to be in {about.location!r}."
                )
            if not file.is_file():
                raise UserError(f"Expected weights of {path} in {file}, but there is no such file; put it there.")
            size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            with file.open("rb") as stream:
                stream.seek(about.offset or 0)
                data = stream.read(min(size, file.stat().st_size))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise damaged(path, error) from None
        if len(data) != size or size != (about.length or size):
            raise UserError(f"Expected {size:,} bytes of {tensor.name} in {file}, but it is shorter; get it again.")
        tensor.raw_data = data
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    try:
        if any(size < 0 for size in tensor.dims):
            raise ValueError(f"{tensor.name} has a negative size")
        array = numpy_helper.to_array(tensor)
    except Exception as error:  # of NumPy and of ONNX, by what is wrong
        raise damaged(path, error) from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"Expected finite weights, but {tensor.name} in {path} holds NaN or Inf; get the file again.")
