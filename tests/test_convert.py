"""The command against Keras 2 itself, on VGGFace2's ResNet-50: what it writes and prints, and what it refuses.

One file, because all of it needs the files that Keras writes once (keras_files.py), and workers share no fixtures.
"""

import doctest
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from numpy.typing import NDArray

import facecls.model.trunk
from convert import parity, trunk_weights
from convert.__main__ import main
from facecls._version import __version__
from facecls.errors import UserError
from facecls.model.trunk import create_trunk, read_trunk

pytestmark = pytest.mark.slow

KINDS = ("whole", "weights", "notop")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What keras_files.py writes; made in another process, so that TensorFlow stays out of this one."""
    path = tmp_path_factory.mktemp("keras")
    script = Path(__file__).with_name("keras_files.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict[str, Path]:
    """All three files converted, with the classifier where there is one, and the ONNX model of the whole one."""
    dests = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    main([str(folder / "whole.h5"), str(dests["whole"]), "--keep-classifier", "--onnx", str(folder / "whole.onnx")])
    main([str(folder / "weights.h5"), str(dests["weights"]), "--keep-classifier"])
    main([str(folder / "notop.h5"), str(dests["notop"])])
    return dests


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, of the largest value expected."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The same as Keras


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_gives_what_keras_gives(kind: str, converted: dict[str, Path], oracle: dict[str, NDArray[Any]]) -> None:
    trunk = create_trunk("vggface2_resnet50", converted[kind]).eval()
    with torch.inference_mode():
        features = trunk(torch.from_numpy(oracle["images"])).numpy()
    assert relative(features, oracle["features"]) < TOLERANCE
    state, metadata = read_trunk(converted[kind])
    assert metadata["classes"] == (0 if kind == "notop" else 8631)
    if kind != "notop":
        logits = features @ state["classifier.weight"].numpy().T + state["classifier.bias"].numpy()
        odds = np.exp(logits - logits.max(1, keepdims=True))
        assert relative(odds / odds.sum(1, keepdims=True), oracle["probabilities"]) < TOLERANCE


def test_oracle_tells_images_apart(oracle: dict[str, NDArray[Any]]) -> None:
    features, probabilities = oracle["features"], oracle["probabilities"]
    assert np.isfinite(features).all()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(features[one] - features[other]).mean() > 0.1 * features.std()
        assert np.abs(probabilities[one] - probabilities[other]).max() > 0.01


def test_all_three_files_give_the_same_tensors(converted: dict[str, Path]) -> None:
    states = {kind: read_trunk(path)[0] for kind, path in converted.items()}
    assert states["whole"].keys() == states["weights"].keys()
    assert states["whole"].keys() - states["notop"].keys() == {"classifier.weight", "classifier.bias"}
    for kind in ("weights", "notop"):
        assert all(torch.equal(states["whole"][name], tensor) for name, tensor in states[kind].items())


def test_metadata_says_what_it_is(converted: dict[str, Path], folder: Path) -> None:
    _, metadata = read_trunk(converted["whole"])
    at_most = metadata["parity"].pop("at_most")
    assert set(at_most) == {
        f"{who} {what}" for who in ("onnx2torch", "trunk") for what in ("features", "probabilities")
    }
    assert all(0 < bound <= 1e-5 for bound in at_most.values())
    assert metadata == {
        "architecture": "vggface2_resnet50",
        "source": "whole.h5",
        "source_sha256": hashlib.sha256((folder / "whole.h5").read_bytes()).hexdigest(),
        "input": {
            "size": 224,
            "channels": "RGB",
            "range": [0, 255],
            "mean": [131.0912, 103.8827, 91.4953],
            "std": [1, 1, 1],
        },
        "classes": 8631,
        "features": "flatten",
        "parity": {"reference": "onnxruntime", "images": 2, "seed": 0, "limit": 1e-5},
        "converter": f"facecls {__version__}",
    }


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], check=False)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""
"""Runs a command and prints its peak memory. A small process, because a child's peak begins with its parent's."""


def test_whole_command_in_little_memory_and_the_same_bytes(
    converted: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "again.safetensors"
    command = [sys.executable, "-W", "error", "-m", "convert", folder / "whole.h5", dest, "--keep-classifier"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        env=os.environ | {"COLUMNS": "150"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < 1.7e9
    assert dest.read_bytes() == converted["whole"].read_bytes()
    sha256 = hashlib.sha256((folder / "whole.h5").read_bytes()).hexdigest()
    for fact in (
        "whole model, Keras 2.",
        "176 layers, 41,246,071 parameters",
        sha256,
        "trunk probabilities",
        str(dest),
    ):
        assert fact in done.stdout


def test_help_does_not_wait_for_the_big_libraries() -> None:
    code = (
        "import sys, convert.__main__ as c\ntry: c.main(['-h'])\nfinally: assert not {'torch', 'onnx'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--keep-classifier" in done.stdout


# ONNX


def test_onnx_model_does_what_keras_does(
    converted: dict[str, Path], folder: Path, oracle: dict[str, NDArray[Any]]
) -> None:
    assert converted
    session = onnxruntime.InferenceSession(folder / "whole.onnx", providers=["CPUExecutionProvider"])
    bgr = oracle["images"][:, ::-1] - np.array([91.4953, 103.8827, 131.0912], np.float32).reshape(3, 1, 1)
    for batch in (bgr, bgr[:1]):
        features, probabilities = session.run(["features", "probabilities"], {"images": batch})
        assert relative(features, oracle["features"][: len(batch)]) < TOLERANCE
        assert relative(probabilities, oracle["probabilities"][: len(batch)]) < TOLERANCE


def test_onnx_model_has_one_node_a_layer_and_written_out_pads(converted: dict[str, Path], folder: Path) -> None:
    assert converted
    onnx.checker.check_model(folder / "whole.onnx", full_check=True)
    model = onnx.load(folder / "whole.onnx")
    kinds = [node.op_type for node in model.graph.node]
    with h5py.File(folder / "whole.h5") as file:
        layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    assert len(kinds) == len(layers) - 1 + 1  # no node for the input, one for the softmax that the classifier has fused
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Conv": 53,
        "BatchNormalization": 53,
        "Relu": 49,
        "MaxPool": 1,
        "Add": 16,
        "AveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
        "Softmax": 1,
    }
    assert 13 <= model.opset_import[0].version <= 17
    attributes = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
    ]
    assert not any("auto_pad" in attribute for attribute in attributes)
    assert attributes[0]["pads"] == [2, 2, 3, 3]
    assert attributes[3]["pads"] == [0, 0, 0, 0]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)] == [
        "N"
    ] * 3


# Names


def test_name_table_covers_the_trunk_and_timm_s_own_names() -> None:
    table = trunk_weights.tensor_table(classifier=True)
    names = set(timm.create_model("resnet50", num_classes=0).state_dict())
    assert set(table.values()) == names | {"classifier.weight", "classifier.bias"}
    assert len(table) == len(set(table.values())) == 53 + 5 * 53 + 2
    assert table["conv4_6_1x1_increase.weight"] == "layer3.5.conv3.weight"
    assert table["conv3_1_1x1_proj/bn.running_var"] == "layer2.0.downsample.1.running_var"


@pytest.mark.parametrize(("change", "expected"), [("drop", "is missing"), ("add", "is not known")])
def test_a_tensor_too_few_or_too_many_is_refused(change: str, expected: str) -> None:
    tensors = {name: torch.zeros(1, 3) for name in trunk_weights.tensor_table(classifier=False)}
    if change == "drop":
        del tensors["conv2_1_3x3.weight"]
    else:
        tensors["conv9.weight"] = torch.zeros(1)

    class Module(torch.nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return tensors

    with pytest.raises(UserError, match=rf"conv\S+\.weight {expected}"):
        trunk_weights.trunk_state(Module(), classifier=False)  # type: ignore[arg-type]


# Parity


def test_swapped_names_are_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = trunk_weights.conv_table()
    one, other = "conv4_2_3x3", "conv4_3_3x3"
    table[one], table[other] = table[other], table[one]
    monkeypatch.setattr(trunk_weights, "conv_table", lambda: table)
    assert_refused(folder / "notop.h5", tmp_path, capsys, "features of trunk within 1e-05 .* nothing was written")


@pytest.mark.parametrize("wrong", [2.00003, np.nan, np.inf])
def test_difference_above_the_limit_or_no_number_is_refused(wrong: float) -> None:
    features, probabilities = np.array([[0.5, 2.0], [1, 1]], np.float32), np.array([[0.1, 0.2]], np.float32)
    measured = parity.differences(
        "x", [features, probabilities], [features + np.float32(8e-6), probabilities + np.float32(3e-6)]
    )
    assert measured == {
        "x features": pytest.approx(4e-6, rel=0.05),  # of the largest, which is 2
        "x probabilities": pytest.approx(3e-6, rel=0.05),
    }
    with pytest.raises(UserError, match="features of x within 1e-05"):
        parity.differences("x", [features], [np.array([[0.5, wrong], [1, 1]], np.float32)])
    for same in (0 * features, 0 * features + 3):
        with pytest.raises(UserError, match="differ between images, but they are all the same"):
            parity.differences("x", [same], [same])
    with pytest.raises(UserError, match="probabilities of x within 1e-05"):
        parity.differences("x", [features, probabilities], [features, np.array([[0.1, wrong - 1.8]], np.float32)])


def test_seeded_images_are_always_the_same_and_use_the_whole_range() -> None:
    images = parity.seeded_images(224)
    assert images.shape == (2, 3, 224, 224)
    assert (images == parity.seeded_images(224)).all()
    assert (images.min(), images.max()) == (0, 254)


def test_docstrings() -> None:
    assert doctest.testmod(parity).failed == 0


# Refusals


def assert_refused(
    source: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    message: str,
    options: Sequence[str] = (),
    dest: Path | None = None,
) -> None:
    """Runs the command: it ends with status 2 and one line, a file that was there stays, and none is left."""
    old = folder / "trunk.safetensors"
    old.write_bytes(b"an older trunk")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main([str(source), str(dest or old), *options])
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("convert: error: ")
    assert re.search(message, said.err), said.err
    assert old.read_bytes() == b"an older trunk"
    assert sorted(folder.rglob("*")) == before


FORMATS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text": (lambda folder: b"<!DOCTYPE html><html>quota exceeded", "HDF5 file, but .* begins with b'<!DOCTYPE html>"),
    "empty": (lambda folder: b"", "HDF5 file, but .* begins with b''"),
    "pointer": (
        lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 165549684\n",
        "Git LFS pointer .* run `git lfs pull`",
    ),
    "short": (
        lambda folder: (folder / "notop.h5").read_bytes()[:60_000_000],
        r"cut short or damaged \(.*truncated file",
    ),
    "head": (lambda folder: (folder / "whole.h5").read_bytes()[:50], "cut short or damaged"),
    "keras3": (lambda folder: (folder / "keras3.keras").read_bytes(), r"square images .* has the shape \(4,\)"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = FORMATS[name]
    path = tmp_path / "other.h5"
    path.write_bytes(make(folder))
    assert_refused(path, tmp_path, capsys, message)


def test_missing_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(tmp_path / "gone.h5", tmp_path, capsys, "there is none; is it misspelt.*facecls.download weights")


def test_classifier_that_is_not_there_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(folder / "notop.h5", tmp_path, capsys, "no classifier to keep", ["--keep-classifier"])


def test_writing_over_the_source_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "notop.h5"
    assert_refused(path, tmp_path, capsys, "is both", dest=path)


@pytest.mark.parametrize("what", ["file/trunk.safetensors", "folder"])
def test_place_that_can_not_be_written_is_refused(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert_refused(folder / "notop.h5", tmp_path, capsys, "Can't create the folder|is a folder", dest=tmp_path / what)


def test_onnx_place_that_can_not_be_written_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = ["--onnx", str(tmp_path / "file" / "model.onnx")]
    assert_refused(folder / "notop.h5", tmp_path, capsys, "Can't create the folder .*file", options)


def no_room(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "place"),
    [
        (onnx.checker, "check_model", r"\S*model\.onnx"),
        (onnx, "save_model", r"beside \S*trunk\.safetensors"),
        (facecls.model.trunk, "save_file", r"\S*trunk\.safetensors"),
    ],
    ids=["onnx", "scratch", "trunk"],
)
def test_full_disk_is_refused(
    owner: Any,
    name: str,
    place: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, no_room)
    options = ["--onnx", str(tmp_path / "model.onnx")]
    assert_refused(folder / "notop.h5", tmp_path, capsys, f"Can't write {place}: No space left on device", options)


def test_write_that_really_fails_is_refused(folder: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 90 MB of a file; the trunk has 94."""
    dest = tmp_path / "trunk.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "convert", folder / "notop.h5", dest],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90_000_000, 90_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"convert: error: Can't write .*File too large.*\n", done.stderr)
    assert not list(tmp_path.iterdir())
