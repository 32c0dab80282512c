"""identify prints what the weights say, reads labels in every form but runs no code in them, and refuses the rest."""

import io
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from facecls.errors import UserError
from facecls.identify import main, read_face, read_labels
from facecls.model.trunk import create_trunk, save_trunk

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.12, 0.8, 0.08], [0.25, 0.15, 0.6]])
NAMES = ["Ada Lovelace", " Émilie du Châtelet", "Grace Hopper"]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different pictures, of other sizes than the trunk's."""
    folder = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(1)
    paths = []
    for number, size in enumerate((96, 300, 224)):
        noise = random.integers(0, 256, (6, 6, 3), np.uint8)
        paths.append(folder / f"{number}.png")
        assert cv2.imwrite(str(paths[-1]), cv2.resize(noise, (size, size + 10), interpolation=cv2.INTER_CUBIC))
    return paths


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, faces: list[Path]) -> Iterator[Path]:
    """A trunk with a classifier solved for: it gives the three faces exactly ``PROBABILITIES``."""
    torch.manual_seed(0)
    trunk = create_trunk("vggface2_resnet50").eval()
    with torch.inference_mode():
        features = trunk(torch.stack([read_face(path, 224) for path in faces])).numpy().astype(np.float64)
    bias = np.array([1, 0, -1])
    solved, *_ = np.linalg.lstsq(features, np.log(PROBABILITIES) - bias, rcond=None)
    state = trunk.net.state_dict() | {
        "classifier.weight": torch.from_numpy(solved.T.astype(np.float32)),
        "classifier.bias": torch.from_numpy(bias.astype(np.float32)),
    }
    path = tmp_path_factory.mktemp("weights") / "trunk.safetensors"
    save_trunk(path, state, {"architecture": "vggface2_resnet50", "classes": 3, "input": {"size": 224}})
    yield path
    path.unlink()


def save_objects(path: Path) -> None:
    np.save(path, np.array(NAMES, dtype=object), allow_pickle=True)


def save_old_objects(path: Path) -> None:
    """As NumPy wrote it in 2018: pickle protocol 2, and numpy.core where NumPy 2 has numpy._core."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (3,)})
        pickled = pickle.dumps(np.array(NAMES, dtype=object), protocol=2)
        assert b"numpy._core" in pickled
        stream.write(pickled.replace(b"numpy._core", b"numpy.core"))


@pytest.mark.parametrize("save", [lambda path: np.save(path, np.array(NAMES)), save_objects, save_old_objects])
def test_labels_are_read_in_every_form(save: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    save(path)
    assert read_labels(path) == ["Ada Lovelace", "Émilie du Châtelet", "Grace Hopper"]


def test_labels_that_run_code_are_refused_and_do_not(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "labels.npy"
    np.save(path, np.array([Attack()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"labels\.npy is none"):
        read_labels(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Ada\nGrace\n",
        pickle.dumps(NAMES),
        npy(np.arange(3)),
        npy(np.array([["a", "b"]])),
        npy(np.array(["a", 1], dtype=object)),
        npy(np.array(["a", "b"]))[:-3],
        npy(np.array(["a", "b"], dtype=object))[:-3],
    ],
    ids=["empty", "text", "pickle", "numbers", "table", "mixed", "cut", "cut objects"],
)
def test_other_labels_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"array of names, but .*labels.npy is none"):
        read_labels(path)


def test_face_is_read_as_rgb_and_resized(tmp_path: Path) -> None:
    path = tmp_path / "face.png"
    Image.new("RGB", (300, 90), (255, 128, 0)).save(path)
    face = read_face(path, 224)
    assert face.shape == (3, 224, 224)
    assert face.dtype == torch.uint8
    assert [channel.unique().tolist() for channel in face] == [[255], [128], [0]]


def printed(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, float]]:
    """The rows of the printed tables."""
    rows = re.findall(r"^[│ ]+(\S.*?)\s*│\s*(\d\.\d+)", capsys.readouterr().out, re.MULTILINE)
    return [(name, float(probability)) for name, probability in rows]


def test_identities_and_probabilities_are_printed(
    weights: Path, faces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.npy"
    save_objects(labels)
    main([str(weights), *map(str, faces), "--labels", str(labels), "--top", "2"])
    rows = printed(capsys)
    assert [name for name, _ in rows] == [NAMES[k].strip() for k in (0, 1, 1, 0, 2, 0)]
    assert [probability for _, probability in rows] == pytest.approx([0.7, 0.2, 0.8, 0.12, 0.6, 0.25], abs=2e-3)


def test_without_labels_class_numbers_are_printed(
    weights: Path, faces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(weights), str(faces[2])])
    assert [name for name, _ in printed(capsys)] == ["class 2", "class 0", "class 1"]


def refused(arguments: Sequence[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("facecls.identify: error: ")
    assert re.search(message, said.err), said.err


def test_weights_without_a_classifier_are_refused(
    faces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trunk.safetensors"
    save_trunk(path, {"conv1.weight": torch.zeros(1)}, {"architecture": "vggface2_resnet50"})
    refused([path, faces[0]], "has none; convert them again with --keep-classifier", capsys)
    refused([tmp_path / "gone", faces[0]], "Expected a trunk file at", capsys)


def test_files_that_are_no_images_are_refused(
    weights: Path, faces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([weights, faces[0], tmp_path / "gone.png"], "image at .*gone.png, but: missing file", capsys)
    refused([weights, tmp_path], "image at .*, but: .*Is a directory", capsys)
    (tmp_path / "text.png").write_text("not a picture")
    refused([weights, tmp_path / "text.png"], "text.png is not an image", capsys)
    (tmp_path / "cut.png").write_bytes(faces[0].read_bytes()[:-40])
    refused([weights, tmp_path / "cut.png"], "cut.png is truncated", capsys)


def test_wrong_numbers_are_refused(
    weights: Path, faces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([weights, faces[0], "--top", "0"], "--top to be at least 1, but got 0", capsys)
    (tmp_path / "labels.npy").write_bytes(npy(np.array(["a", "b"])))
    refused([weights, faces[0], "--labels", tmp_path / "labels.npy"], "Expected 3 labels, but .* has 2", capsys)
    refused([weights, faces[0], "--labels", tmp_path / "gone.npy"], "labels at .*gone.npy, but: missing file", capsys)
