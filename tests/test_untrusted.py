"""Checkpoints, labels, networks and configurations are data: nothing in them runs, opens other files or has no end."""

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper
from run_folders import without_drawing
from trained_model import SIZE, save_checkpoint

import facecls
from convert.clip import read_clip
from convert.keras.h5 import open_keras
from facecls import evaluate, fit, plain_yaml
from facecls.errors import UserError
from facecls.export.__main__ import main as export_main
from facecls.identify import read_labels
from facecls.model.checkpoint import read_checkpoint
from facecls.model.predictor import OnnxPredictor
from facecls.predict.inputs import stream
from facecls.training.cli import trusted_options

TRAP = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Trap:\n    pass\ntrap = Trap\n"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears once a module called ``trap_module`` of the working folder is imported."""
    (tmp_path / "trap_module.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "ran"
    sys.modules.pop("trap_module", None)


FOREIGN: dict[str, Any] = {
    "class": {"class_path": "trap_module.Trap"},
    "a name alone": "trap_module.Trap",
    "within another": {
        "class_path": "albumentations.Compose",
        "init_args": {"transforms": [{"class_path": "trap_module.Trap"}]},
    },
    "function": {"class_path": "albumentations.Lambda", "init_args": {"image": "trap_module.trap"}},
    "with a hyphen": {"class_path": "trap-module.Trap"},
}


def hostile(folder: Path, faces: Path, **data: Any) -> Path:
    path = save_checkpoint(folder / "best.ckpt")
    kept = torch.load(path, weights_only=True)
    kept["hyper_parameters"] |= {name: FOREIGN["class"] for name in ("optimizer", "schedule", "_class_path", "trunk_")}
    kept["hyper_parameters"]["_instantiator"] = "trap_module.trap"
    kept["datamodule_hyper_parameters"] = {
        "root": str(faces), "image_size": SIZE, "seed": 0, "_instantiator": "trap_module.trap", **data
    }  # fmt: skip
    torch.save(kept, path)
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_evaluate_and_export_import_nothing_that_a_checkpoint_names(kind: str, trap: Path, faces: Path) -> None:
    path = hostile(trap.parent, faces, eval_transform=FOREIGN[kind])
    with pytest.raises(UserError, match=r"data\.eval_transform of .*trap.module\.\w+, which could run any code"):
        evaluate.main([f"--ckpt_path={path}", "--accelerator=cpu"])
    with pytest.raises(UserError, match=r"data\.eval_transform of .*trap.module\.\w+, which could run any code"):
        export_main([str(path), str(trap.parent / "x.onnx")])
    assert not trap.exists()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_augmentation_is_left_out_where_nothing_is_trained(kind: str) -> None:
    kept = {"root": "x", "train_transform": FOREIGN[kind], "unknown": 1}
    assert trusted_options(kept, "best.ckpt") == {"root": "x"}
    own = {"class_path": "albumentations.Compose", "init_args": {"transforms": [], "p": 0.5}}
    assert trusted_options({"train_transform": own}, "best.ckpt") == {"train_transform": own}
    assert trusted_options({"eval_transform": FOREIGN[kind]}, "best.ckpt", {"eval_transform": own}) == {}


def test_prediction_imports_nothing_that_a_checkpoint_names(trap: Path, faces: Path) -> None:
    model = facecls.load(hostile(trap.parent, faces, eval_transform=FOREIGN["class"]), engine="torch")
    assert model.predict(next(faces.glob("*.jpg")), faces="whole")["error"].isna().all()
    assert not trap.exists()


@pytest.mark.slow
def test_resuming_imports_nothing_that_a_checkpoint_names(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    words = [
        "--data.root=synthetic:60", "--model.trunk=test_resnet", "--model.weights=null", f"--data.image_size={SIZE}",
        "--data.num_workers=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--model.tasks=[age]",
        "--trainer.precision=32-true",
        "--trainer.default_root_dir=runs", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    fit.main(words)
    last = next(trap.parent.rglob("last.ckpt"))
    kept = torch.load(last, weights_only=True)
    kept["hyper_parameters"]["_class_path"] = "trap_module.Trap"
    kept["hyper_parameters"]["_instantiator"] = "trap_module.trap"
    kept["datamodule_hyper_parameters"] |= {"train_transform": FOREIGN["class"], "_instantiator": "trap_module.trap"}
    torch.save(kept, last)
    fit.main([*words, f"--ckpt_path={last}", "--trainer.max_epochs=2"])
    kept["hyper_parameters"]["optimizer"] = FOREIGN["class"]
    torch.save(kept, last)
    with pytest.raises(UserError, match=r"Expected the optimizer of .* to resume it"):
        fit.main([*words, f"--ckpt_path={last}", "--trainer.max_epochs=3"])
    assert not trap.exists()


def _pack(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def _overlap(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist.extend(archive.filelist * 2)
        archive.comment = b"or else the directory is not written"


@pytest.mark.parametrize("read", [read_checkpoint, read_clip])
@pytest.mark.parametrize("change", [_pack, _overlap])
def test_a_file_of_tensors_that_unpacks_to_more_is_not_read(
    change: Any, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(10_000)}}, path)
    change(path)
    with pytest.raises(
        UserError, match="side by side and unpacked, as torch writes them, but they are packed or overlap"
    ):
        read(path)


@pytest.mark.parametrize("side", [0, -1, 10**9, 64.0, "64", None, True])
def test_a_checkpoint_with_an_impossible_size_is_one_line(side: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "best.ckpt")
    kept = torch.load(path, weights_only=True)
    kept["hyper_parameters"]["image_size"] = side
    torch.save(kept, path)
    with pytest.raises(UserError, match=r"could not read .*image_size"):
        read_checkpoint(path)


def _without_weights(kept: dict[str, Any]) -> None:
    del kept["state_dict"]


def _complex(kept: dict[str, Any]) -> None:
    kept["state_dict"] = {name: tensor.to(torch.complex64) for name, tensor in kept["state_dict"].items()}


def _whole(kept: dict[str, Any]) -> None:
    kept["state_dict"] = {name: tensor.long() for name, tensor in kept["state_dict"].items()}


def _of_temperature(value: float) -> Callable[[dict[str, Any]], None]:
    def change(kept: dict[str, Any]) -> None:
        kept["state_dict"]["model.heads.gender.temperature"].fill_(value)

    return change


def _with(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda kept: kept.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        _without_weights,
        _complex,
        _whole,
        *(_of_temperature(value) for value in (0.0, -1.0, float("nan"))),
        *(_with("datamodule_hyper_parameters", value) for value in (None, [], "x", 5, {1: 2}, [1, 2])),
        *(_with("hyper_parameters", value) for value in (None, [], "x", {"trunk": 5}, {"trunk": "../x"})),
        *(_with("state_dict", value) for value in (None, [], "x", {}, {"a": "b"}, {5: torch.zeros(1)})),
    ],
)
def test_a_checkpoint_that_holds_something_else_is_one_line(
    change: Callable[[dict[str, Any]], None], kept: dict[str, Any], tmp_path: Path
) -> None:
    change(kept)
    torch.save(kept, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"best\.ckpt|Expected a timm model"):
        read_checkpoint(tmp_path / "best.ckpt")


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = torch.load(save_checkpoint(tmp_path / "kept.ckpt"), weights_only=True)
    return content


def npy(description: str, shape: Sequence[int], content: bytes) -> bytes:
    stream = io.BytesIO()
    header = {"descr": description, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def object_array(state: bytes) -> bytes:
    """A pickle that makes an array of objects over bytes of its own: its pointers."""
    return (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89"
    ) + state + b"tb."  # fmt: skip


HOSTILE_LABELS = {
    "pointers": npy("|O", [1], object_array(b"U\x08\x41\x41\x41\x41\x41\x41\x41\x41")),
    "memory for a memo": npy("|O", [1], b"\x80\x02Nr\xff\xff\xff\x7f."),
    "memory for bytes": npy("|O", [1], b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."),
    "more than there is": npy("<U8", [10**12], b"x" * 32),
    "no characters": npy("<U1", [2], b"\xff" * 8),
    "records": npy("[('a', '|O')]", [1], pickle.dumps(["a"])),
    "bytes": npy("|S4", [1], b"name"),
    "a deep header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 5000) + b"(" * 5000,
}


@pytest.mark.parametrize("kind", HOSTILE_LABELS)
def test_hostile_labels_are_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "labels.npy").write_bytes(HOSTILE_LABELS[kind])
    with pytest.raises(UserError, match=r"array of names, but .*labels\.npy is none"):
        read_labels(tmp_path / "labels.npy")


def test_no_array_of_objects_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Ada", "Émilie", "Ada"]
    np.save(tmp_path / "labels.npy", np.array(names, dtype=object), allow_pickle=True)
    monkeypatch.setattr(np._core.multiarray, "_reconstruct", lambda *_: pytest.fail("an array was made"))
    assert read_labels(tmp_path / "labels.npy") == names


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/model_weights"), h5py.SoftLink("/there")])
def test_weights_of_another_file_are_refused(link: Any, tmp_path: Path) -> None:
    for name in ("net.h5", "other.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            group = file.create_group("there" if name == "net.h5" else "model_weights")
            group.attrs["layer_names"] = [b"a"]
            group.create_group("a").attrs["weight_names"] = [b"a/kernel:0"]
            group["a/a/kernel:0"] = np.ones(3, np.float32)
            if name == "net.h5":
                file["model_weights"] = link
    with (
        pytest.raises(UserError, match=r"Expected model_weights in .* itself, but there is a link"),
        open_keras(tmp_path / "net.h5"),
    ):
        pass


def _external(group: h5py.Group, folder: Path) -> None:
    (folder / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    group.create_dataset("a/kernel:0", (3,), np.float32, external=[(str(folder / "secret"), 0, 12)])


def _virtual(group: h5py.Group, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.ones(3, np.float32)
    layout = h5py.VirtualLayout((3,), np.float32)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (3,))
    group.create_virtual_dataset("a/kernel:0", layout)


@pytest.mark.parametrize("store", [_external, _virtual])
def test_weights_that_lie_in_another_file_are_refused(
    store: Callable[[h5py.Group, Path], None], tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["layer_names"] = [b"a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = [b"a/kernel:0"]
        store(group, tmp_path)
        assert group["a/kernel:0"][:].tolist() == [1, 1, 1]  # HDF5 itself reads the other file
    with (
        open_keras(tmp_path / "net.h5") as file,
        pytest.raises(UserError, match=r"weight a/kernel in .* lies in another file"),
    ):
        file.weights.read(("a",), {"kernel": (3,)})


PLAYLISTS = {
    "concat": b"ffconcat version 1.0\nfile 'other.avi'\n",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.avi\n#EXT-X-ENDLIST\n",
    "one of several images": cv2.imencode(".jpg", np.full((48, 64, 3), 200, np.uint8))[1].tobytes(),
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_video_that_names_other_files_is_none(kind: str, tmp_path: Path) -> None:
    video = cv2.VideoWriter(str(tmp_path / "other.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(20):
        video.write(np.full((48, 64, 3), 200, np.uint8))
    video.release()
    assert len(list(stream([str(tmp_path / "other.avi")]))) == 2  # a frame a second
    for number in (1, 2):
        (tmp_path / f"{number}.mp4").write_bytes(PLAYLISTS[kind])
    (given,) = stream([str(tmp_path / "1.mp4")])
    assert given.problem == "not a video that OpenCV reads"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "aliases": (BOMB, "more than 100,000 values"),
    "merged": (BOMB.replace("[x", "[{x: 1}").replace("a: &a", "a: &a") + "z: {<<: *i}", "more than 100,000 values"),
    "itself": ("a: &a [*a]", "has no end"),
    "itself, deeper": ("&a {b: {c: [1, *a]}}", "has no end"),
    "deep": ("[" * 5_000, "nested too deeply|while parsing"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_without_an_end_is_refused(kind: str, tmp_path: Path) -> None:
    text, message = YAML[kind]
    with pytest.raises(yaml.YAMLError, match=message):
        plain_yaml.load(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        fit.main(["--config", str(tmp_path / "config.yaml")])


def test_yaml_with_aliases_is_read() -> None:
    text = "a: &a {x: 1, y: [2, &b 3]}\nb: [*a, *a, *b]\nc: {<<: *a, z: 4}\n"
    assert plain_yaml.load(text) == yaml.safe_load(text)


def network(metadata: str, name: str = "image", kind: int = TensorProto.UINT8, side: int = SIZE) -> bytes:
    """An ONNX file that says an age of each image."""
    given = helper.make_tensor_value_info(name, kind, ["N", 3, side, side])
    age = helper.make_tensor_value_info("age", TensorProto.FLOAT, ["N"])
    nodes = [
        helper.make_node("Cast", [name], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["age"], axes=[1, 2, 3], keepdims=0),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [given], [age]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    helper.set_model_props(model, {"facecls": metadata})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


ABOUT = {"image_size": SIZE, "face_frame": None, "tasks": {"age": {"highest": 90}}, "temperatures": {"age": 1.0}}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ABOUT.items() if key != name}


@pytest.mark.parametrize(
    "file",
    [
        network("no JSON"),
        network("[" * 100_000),
        network("[]"),
        network("{}"),
        *(network(json.dumps(without(name))) for name in ("image_size", "tasks", "temperatures")),
        *(network(json.dumps(ABOUT | {"image_size": size})) for size in (0, 10**9, "64", 32)),
        *(network(json.dumps(ABOUT | {"tasks": tasks})) for tasks in (3, ["age", 5], {"age": 5}, {"gender": None})),
        *(network(json.dumps(ABOUT | {"temperatures": values})) for values in (3, {"age": "x"})),
        network(json.dumps(ABOUT | {"face_frame": [1]})),
        network(json.dumps(ABOUT), name="pixels"),
        network(json.dumps(ABOUT), kind=TensorProto.FLOAT),
        network(json.dumps(ABOUT), side=32),
    ],
)  # fmt: skip
def test_an_onnx_file_that_says_something_else_is_one_line(file: bytes) -> None:
    with pytest.raises(UserError, match=r"^Expected .*"):
        OnnxPredictor(file, "cpu")


def test_an_onnx_file_that_fits_is_read() -> None:
    assert list(OnnxPredictor(network(json.dumps(ABOUT)), "cpu").tasks) == ["age"]
