"""How far converted networks are from their originals: ``python tests/parity_table.py FOLDER``.

Networks with random weights are built by real Keras 2, or by timm and exported by torch. Each file is converted by
``python -m convert`` in a process of its own, and the trunk's features are compared with what Keras, or torch, computes
for the same images. Prints a table: the largest difference as a share of the largest feature, seconds and the peak of
resident memory of the conversion. FOLDER takes 3 GB; files that are there already are used again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES, SEED = 2, 5
BGR_2, BGR_1, CAFFE = (91.4953, 103.8827, 131.0912), (93.5940, 104.7624, 129.1863), (103.939, 116.779, 123.68)
Contract = tuple[str, float | tuple[float, ...], float | tuple[float, ...]]
"""Channels, mean and standard deviation."""
TF, RAW = ("rgb", 127.5, 127.5), ("rgb", 0.0, 1.0)
APPLICATIONS: dict[str, Contract] = {
    "MobileNet": TF,
    "MobileNetV2": TF,
    "EfficientNetB0": RAW,
    "DenseNet121": ("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "InceptionV3": TF,
    "Xception": TF,
    "NASNetMobile": TF,
    "ResNet50V2": TF,
}
KERAS_VGGFACE: dict[str, Contract | None] = {
    **dict.fromkeys(("resnet50 whole", "resnet50 weights", "resnet50 weights without top"), None),
    **dict.fromkeys(("senet50 whole", "senet50 weights without top"), None),
    **dict.fromkeys(("vgg16 whole", "vgg16 weights without top"), None),
    "sequential": TF,
}
"""By what the file is; ``None`` where convert knows how images are prepared."""
TIMM = (
    "ghostnet_100",
    "mobilenetv3_small_100",
    "resnet18",
    "resnet18 fp16",
    "regnetx_002",
    "efficientnet_lite0",
    "iresnet18",
    "mobilefacenet",
)
"""Exported to ONNX at 112 pixels, one in half precision; the last two are those of face networks."""


def images(size: int) -> NDArray[np.uint8]:
    """Blotches with noise, (IMAGES, 3, size, size) uint8 RGB."""
    rng = np.random.default_rng(SEED)
    coarse = rng.integers(0, 200, (IMAGES, 3, 7, 7), np.uint8).repeat(-(-size // 7), 2).repeat(-(-size // 7), 3)
    found: NDArray[np.uint8] = coarse[:, :, :size, :size] + rng.integers(0, 56, (IMAGES, 3, size, size), np.uint8)
    return found


def prepared(contract: Contract, size: int) -> NDArray[np.float32]:
    """The images as a network takes them, channels first."""
    channels, mean, std = contract
    pixels = images(size).astype(np.float32)
    pixels = pixels if channels == "rgb" else pixels[:, ::-1]
    shaped = [np.broadcast_to(np.array(values, np.float32), 3).reshape(3, 1, 1) for values in (mean, std)]
    found: NDArray[np.float32] = (pixels - shaped[0]) / shaped[1]
    return found


def make_keras(folder: Path) -> None:
    """Builds and saves the networks of Keras, with the features that it computes. Imports TensorFlow."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tf_keras as keras
    from keras_files import resnet
    from keras_vggface_files import vgg16

    layers, rng = keras.layers, np.random.default_rng(SEED)

    def randomise(model: Any) -> None:
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                values = [(w.name, w.shape) for w in layer.weights]
                layer.set_weights(
                    [
                        rng.uniform(0.6, 1.4, s) if "gamma" in n or "var" in n else rng.normal(0, 0.2, s)
                        for n, s in values
                    ]
                )

    def keep(name: str, model: Any, features: Any, contract: Contract, saved: Callable[[Path], None]) -> None:
        if (folder / f"{name}.npy").exists():
            return
        size = model.input_shape[1]
        inputs = prepared(contract, size).transpose(0, 2, 3, 1)
        found = keras.Model(model.input, features).predict(inputs, verbose=0)
        saved(folder / f"{name}.h5")
        np.save(folder / f"{name}.npy", found.reshape(len(found), -1) if found.ndim == 2 else found.mean((1, 2)))

    for name, contract in APPLICATIONS.items():
        model = getattr(keras.applications, name)(weights=None)
        randomise(model)
        features = model.get_layer(index=-2).output
        if name == "MobileNet":  # a dropout, a convolution and two reshapes come after the features
            features = model.get_layer("global_average_pooling2d").output
        keep(name, model, features, contract, model.save)

    for name, squeeze in (("resnet50", False), ("senet50", True)):
        model = resnet(squeeze=squeeze)
        randomise(model)
        features, top = model.get_layer("avg_pool").output, ("bgr", BGR_2, 1.0)
        notop = keras.Model(model.input, features)
        keep(f"{name} whole", model, features, top, model.save)
        keep(f"{name} weights", model, features, top, model.save_weights)
        keep(f"{name} weights without top", model, features, top, notop.save_weights)
    model = vgg16(224, dense=4096, classes=2622)
    randomise(model)
    top = ("bgr", BGR_1, 1.0)
    keep("vgg16 whole", model, model.get_layer("fc7/relu").output, top, model.save)
    features = model.get_layer("pool5").output
    keep("vgg16 weights without top", model, features, top, keras.Model(model.input, features).save_weights)
    model = keras.Sequential(
        [
            layers.Conv2D(16, 5, 2, activation="relu", input_shape=(96, 96, 3)),
            layers.BatchNormalization(),
            layers.SeparableConv2D(32, 3, padding="same", activation="elu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="tanh"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    randomise(model)
    keep("sequential", model, model.layers[-3].output, TF, model.save)


def make_onnx(folder: Path) -> None:
    """Exports networks of timm and two face networks to ONNX, with the features that torch computes."""
    import timm
    import torch
    from face_networks import iresnet18, mobilefacenet

    own = {"iresnet18": iresnet18, "mobilefacenet": mobilefacenet}
    for name in TIMM:
        torch.manual_seed(0)
        architecture, *half = name.split()
        net = (own[name]() if name in own else timm.create_model(architecture, num_classes=0)).eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.normal_(module.running_mean, std=0.2)
        inputs = torch.from_numpy(prepared(TF, 112))
        with torch.inference_mode():
            np.save(folder / f"{name}.npy", net(inputs).numpy())
        example = inputs[:1]
        if half:
            net, example = net.half(), example.half()
        dynamo = name != "iresnet18"
        path = folder / f"{name}.onnx"
        torch.onnx.export(net, (example,), path, dynamo=dynamo, opset_version=18 if dynamo else 11)
        if half:  # torch folds the BatchNorms in half precision, so the weights of the file count
            np.save(folder / f"{name}.npy", run_in_float32(path, inputs.numpy()))


def run_in_float32(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ONNX Runtime computes with the weights of a model in half precision, one image after the other."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f4"), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = single
    del model.graph.value_info[:]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found: NDArray[np.float32] = np.concatenate([session.run(None, {name: image[None]})[0] for image in inputs])
    return found


def convert(source: Path, contract: Contract | None) -> tuple[str, float, float]:
    """Converts a file; the line that it ended with, seconds, and the peak of resident memory in GB."""
    words = [str(source), str(source.with_suffix(".safetensors"))]
    if contract:
        channels, *numbers = contract
        words += [f"--channels={channels}"]
        for name, values in zip(("mean", "std"), numbers, strict=True):
            words += [f"--{name}={','.join(map(str, np.atleast_1d(values)))}"]
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); print(done.returncode); print(done.stderr)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-m", "convert", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, status, *said = done.stdout.splitlines()
    return ("" if status == "0" else " ".join(said)), time.monotonic() - started, int(memory) / 1e6


def difference(source: Path) -> tuple[float, int]:
    """The largest difference of the trunk's features from the original's, as a share of the largest; their number."""
    import torch

    from facecls.model.trunk import create_trunk, read_trunk

    path = source.with_suffix(".safetensors")
    metadata = read_trunk(path)[1]
    trunk = create_trunk(metadata["architecture"], path).eval()
    with torch.inference_mode():
        found = trunk(torch.from_numpy(images(metadata["input"]["size"]))).numpy()
    expected = np.load(source.with_suffix(".npy"))
    if found.shape != expected.shape:
        return float("nan"), found.shape[1]
    return float(np.abs(found - expected).max() / np.abs(expected).max()), found.shape[1]


def main(folder: Path) -> None:
    """Makes the files, converts them and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for made in ("keras", "onnx"):
        if not (folder / f"{made}.made").exists():
            subprocess.run([sys.executable, __file__, folder, made], check=True)
            (folder / f"{made}.made").touch()
    contracts: dict[str, Contract | None] = {
        **{f"{name}.h5": contract for name, contract in (KERAS_VGGFACE | APPLICATIONS).items()},
        **{f"{name}.onnx": TF for name in TIMM},
    }
    print("| file | features | difference | seconds | memory, GB |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    for name, contract in contracts.items():
        said, seconds, memory = convert(folder / name, contract)
        if said:
            print(f"| {name} | | {said} | {seconds:.1f} | {memory:.1f} |", flush=True)
            continue
        far, features = difference(folder / name)
        print(f"| {name} | {features:,} | {far:.1e} | {seconds:.1f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        {"keras": make_keras, "onnx": make_onnx}[sys.argv[2]](Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
