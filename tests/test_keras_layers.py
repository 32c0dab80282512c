"""Every Keras layer and setting against Keras 2 and 3 themselves, through ONNX Runtime, onnx2torch and a trunk."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx2torch
import onnxruntime
import pytest
import torch
from keras_layer_files import cases
from numpy.typing import NDArray

from convert.finish import FEATURES, finish, last_map
from convert.graph_trunk import describe
from convert.keras.network import read_keras
from convert.plain.network import PLAIN_OPERATORS, Asked, Network
from facecls.model.graph import create_graph

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
CONTRACT = {"channels": "rgb", "mean": (0.0,) * 3, "std": (1.0,) * 3}
CASES = [
    (version, size, name)
    for version, size in (("k2", 13), ("k2", 12), ("k3", 13))
    for name in cases(version, size)
    if version == "k2" or name not in cases(version, 12)
]
"""Of Keras 3 only what does not depend on windows, which are the same."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What keras_layer_files.py writes; made in another process, so that TensorFlow stays out of this one."""
    path = tmp_path_factory.mktemp("layers")
    script = Path(__file__).with_name("keras_layer_files.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


def read(path: Path, name: str) -> Network:
    return read_keras(path, Asked(output=f"case_{name}", **CONTRACT))  # type: ignore[arg-type]


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, of the largest value expected."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def run(model: onnx.ModelProto, images: NDArray[Any], output: str) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run([output], {"images": images})[0]
    return result


@pytest.mark.parametrize(("version", "size", "name"), CASES, ids=lambda part: str(part))
def test_layer_gives_what_keras_gives(version: str, size: int, name: str, folder: Path) -> None:
    network = read(folder / f"{version}_{size}.h5", name)
    with np.load(folder / f"{version}_{size}.npz") as arrays:
        images, expected = arrays["images"], arrays[name]
    model = network.model
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= PLAIN_OPERATORS
    channels_first = expected.transpose(0, 3, 1, 2) if expected.ndim == 4 else expected
    got = run(model, images, model.graph.output[0].name)
    assert relative(got, channels_first) < TOLERANCE

    with torch.inference_mode():
        module = onnx2torch.convert(model).eval()
        assert relative(module(torch.from_numpy(images)).numpy(), channels_first) < TOLERANCE
    if expected.ndim == 3:
        return  # a trunk ends in a map or a vector
    shapes = finish(network)
    features = run(network.model, images, FEATURES)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    net = create_graph(description).eval()
    net.load_state_dict(state)
    with torch.inference_mode():
        assert relative(net(torch.from_numpy(images)).numpy(), features) < TOLERANCE
