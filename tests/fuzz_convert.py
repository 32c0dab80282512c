"""Feeds ``convert`` thousands of damaged and hostile files: ``python tests/fuzz_convert.py KIND COUNT``.

KIND is ``h5``, ``keras``, ``onnx`` or ``pth``. Each file is a sound one with random changes: bytes flipped, cut,
repeated or zeroed; in the JSON of a Keras model and the messages of an ONNX model, values replaced by any others. Each
is converted in a process of its own, which must write a trunk file and exit with 0, or write nothing, print one line
and exit with 2; within a minute and 4 GB. Prints what was neither, keeps those files, and exits with 1 if there is any.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import open_clip
import pytest
import torch
from children import run_in_child
from damage import damaged
from narrow import narrow
from plain_networks import small_network

from convert import __main__ as convert
from convert import clip

SECONDS, BYTES = 60, 4 << 30
WIDTH, BLOCKS = 32, 2
"""Of the vision transformer whose files are damaged."""
KERAS = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tf_keras as keras, keras as keras3
def small(keras):
    L = keras.layers
    image = L.Input((32, 32, 3))
    x = L.Conv2D(4, 3, strides=2, padding="same", name="a")(image)
    x = L.BatchNormalization(name="b")(x)
    x = L.ReLU(6.0, name="c")(x)
    y = L.DepthwiseConv2D(3, padding="same", name="d")(x)
    x = L.Add(name="e")([x, L.Activation("swish", name="f")(y)])
    x = L.GlobalAveragePooling2D(name="g")(x)
    return keras.Model(image, L.Dense(3, activation="softmax", name="h")(x))
folder = sys.argv[1]
model = small(keras)
model.save(folder + "/0.h5")
keras.Sequential([model, keras.layers.Dense(2, name="i")]).save(folder + "/1.h5")
small(keras3).save(folder + "/2.h5")
small(keras3).save(folder + "/3.keras")
"""
CONTRACT = ["--channels=bgr", "--mean=100", "--std=50"]
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 2**15, 2**31, 2**40, 2**63, -(2**31), 0.5, -1e30, 1e30, float("nan"),
    "", "relu", "softmax", "same", "Lambda", "../x", [], {}, [0], [[]], [1, 2], [2**20, 2**20], ["a", 0, 0],
)  # fmt: skip


def _json(value: Any, rng: random.Random) -> Any:
    """Changes one place of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        if rng.random() < 0.04:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: _json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.93:
        at = rng.randrange(len(value))
        if rng.random() < 0.06:
            return rng.choice((value[:at], value + value, value[::-1], [value]))
        return [*value[:at], _json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _keras(source: Path, dest: Path, rng: random.Random) -> None:
    data = source.read_bytes()
    if source.suffix != ".h5" or rng.random() < 0.4:
        dest.write_bytes(damaged(data, rng))
        return
    dest.write_bytes(data)
    with h5py.File(dest, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for _ in range(rng.choice((1, 1, 1, 3))):
            config = _json(config, rng)
        text = json.dumps(config)
        if rng.random() < 0.02:
            text = "[" * 100_000 + text
        del file.attrs["model_config"]
        if len(text) < 60_000:
            file.attrs["model_config"] = text
        else:
            file.attrs.create("model_config", text, dtype=h5py.string_dtype())
        if rng.random() < 0.3:
            _dataset(file, rng)


def _dataset(file: Any, rng: random.Random) -> None:
    """Replaces a weight by one of another shape or type, or by nothing."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    name = rng.choice(names)
    shape = file[name].shape
    del file[name]
    match rng.randrange(6):
        case 0:
            file.create_dataset(name, (*shape, 2), "f4")
        case 1:
            file.create_dataset(name, shape, "i8")
        case 2:
            file.create_dataset(name, tuple(1 << 20 for _ in shape), "f4", chunks=True)  # takes no room in the file
        case 3:
            file.create_dataset(name, data=np.full(shape, np.nan))
        case 4:
            file[name] = h5py.SoftLink(f"/{name}")
        case 5:
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")


def _onnx(source: Path, dest: Path, rng: random.Random) -> None:
    data = source.read_bytes()
    if rng.random() < 0.4:
        dest.write_bytes(damaged(data, rng))
        return
    model = onnx.load(source)
    for _ in range(rng.choice((1, 1, 1, 3))):
        _message(model, rng)
    dest.write_bytes(model.SerializeToString())


def _message(message: Any, rng: random.Random) -> None:
    """Changes one field somewhere in a protobuf message."""
    fields = message.ListFields()
    while fields:
        field, value = rng.choice(fields)
        if field.type == field.TYPE_MESSAGE and rng.random() < 0.9:
            message = rng.choice(value) if field.is_repeated else value
            fields = message.ListFields()
            continue
        break
    else:
        return
    try:
        if field.is_repeated:
            match rng.randrange(4):
                case 0:
                    del value[rng.randrange(len(value))]
                case 1:
                    value.append(value[0])
                case 2:
                    value.extend(list(value)[:64])
                case 3:
                    value[rng.randrange(len(value))] = _scalar(field, rng)
        elif rng.random() < 0.2:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _scalar(field, rng))
    except (TypeError, ValueError, IndexError, AttributeError):
        pass  # not every value fits every field


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        text = rng.choice(("", "images", "n0", "Loop", "If", "Scan", "Conv", "../../etc/passwd", "x" * 5000, "w0"))
        return text if field.type == field.TYPE_STRING else text.encode()
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    return rng.choice((0, 1, 2, 3, 7, 10, -1, 2**15, 2**31 - 1, 2**40, 2**62, -(2**62)))


def _pth(source: Path, dest: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        dest.write_bytes(damaged(source.read_bytes(), rng))
        return
    kept = torch.load(source, weights_only=True)
    state = kept.get("state_dict", kept)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice([name for name, tensor in state.items() if isinstance(tensor, torch.Tensor)])
        tensor = state[name]
        match rng.randrange(7):
            case 0:
                del state[name]
            case 1:
                state[name] = tensor.flatten()
            case 2:
                state[name] = rng.choice(VALUES)
            case 3:
                state[name] = torch.full_like(tensor, float("nan"))
            case 4:
                state[name] = torch.zeros(1).expand(1 << 30)  # a view of one number
            case 5:
                state[name] = tensor.to(torch.int8)
            case 6:
                kept = rng.choice((state, [state], {"state_dict": kept}, {}))
                break
    torch.save(kept, dest)


def _seeds(kind: str, folder: Path) -> list[Path]:
    """Sound files."""
    if kind in ("h5", "keras"):
        subprocess.run([sys.executable, "-c", KERAS, folder], check=True, capture_output=True)
        return sorted(folder.glob(f"*.{kind}"))
    if kind == "onnx":
        onnx.save(small_network(32), folder / "0.onnx")
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.PReLU(4), torch.nn.Flatten(), torch.nn.Linear(3600, 5)
        )
        torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), folder / "1.onnx", opset_version=11, dynamo=False)
        return sorted(folder.glob("*.onnx"))
    tower = open_clip.transformer.VisionTransformer(
        224, 16, WIDTH, BLOCKS, heads=1, mlp_ratio=4, output_dim=8, act_layer=open_clip.model.QuickGELU
    )
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, folder / "0.pth")
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "1.pth")
    return sorted(folder.glob("*.pth"))


def _narrow_clip() -> None:
    """Makes CLIP's ViT-B/16 narrow and short for this process: 0.2 MB in place of 340 are converted at once."""
    narrow(pytest.MonkeyPatch(), clip.ARCHITECTURE, embed_dim=WIDTH, depth=BLOCKS, num_heads=1)
    clip._WIDTH, clip._BLOCKS, clip._HEADS = WIDTH, BLOCKS, 1


def _convert(source: Path, dest: Path) -> int:
    try:
        convert.main([str(source), str(dest), *(CONTRACT if source.suffix != ".pth" else [])])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def _run(source: Path, dest: Path, said: Path) -> tuple[str, float]:
    """Converts a file in a child of this process; says how that ended, and after how many seconds."""
    ended = run_in_child(partial(_convert, source, dest), said, SECONDS)
    lines = said.read_text(errors="replace").splitlines()
    if ended.status < 0:
        return f"signal {-ended.status}", ended.seconds
    if ended.memory > BYTES:
        return "memory", ended.seconds
    if ended.status == 0:
        return ("converted" if dest.is_file() else "nothing written"), ended.seconds
    if ended.status == 2 and len(lines) == 1 and not dest.exists():
        return "refused", ended.seconds
    return f"status {ended.status}, {len(lines)} lines{', written' if dest.exists() else ''}", ended.seconds


def main(kind: str, count: int) -> int:
    """Runs the cases of a kind.

    Args:
        kind: ``h5``, ``keras``, ``onnx`` or ``pth``.
        count: How many.

    Returns:
        The number of those that ended badly.
    """
    change: Callable[[Path, Path, random.Random], None] = {"onnx": _onnx, "pth": _pth}.get(kind, _keras)
    torch.set_num_threads(1)
    _narrow_clip()
    ends: Counter[str] = Counter()
    longest = 0.0
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = _seeds(kind, folder)
        for seed in seeds[:1]:  # imports everything, so that children need not
            end, _ = _run(seed, folder / "seed.safetensors", folder / "said")
            print(f"{seed.name} as it is: {end}: {(folder / 'said').read_text()[:300]}")
        with suppress(SystemExit):
            convert.main([str(seeds[0]), str(folder / "seed.safetensors"), *(CONTRACT if kind != "pth" else [])])
        for number in range(count):
            rng = random.Random(number)
            work = folder / "work"
            work.mkdir()
            source, dest = work / f"{number}.{kind}", work / "trunk.safetensors"
            change(rng.choice(seeds), source, rng)
            end, seconds = _run(source, dest, folder / "said")
            longest = max(longest, seconds)
            left = {path.name for path in work.iterdir()} - {source.name, dest.name}
            end = f"{end}, left {sorted(left)}" if left else end
            ends[end] += 1
            if end not in ("converted", "refused"):
                source.rename(kept / source.name)
                (kept / f"{number}.txt").write_text(f"{end}\n{(folder / 'said').read_text(errors='replace')}")
            subprocess.run(["rm", "-rf", work], check=True)
    bad = sum(ends.values()) - ends["converted"] - ends["refused"]
    print(f"{kind}: {count} files: {dict(ends)}, longest {longest:.1f} s" + (f"; see {kept}" if bad else ""))
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])) > 0)
