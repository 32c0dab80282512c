"""Benchmarks: ``pytest -m bench``, on a machine with no other load; not part of the default run.

Each writes its rows to ``benchmarks.json``, or to the file given by ``--bench_json``, with the device and the versions;
``python tests/write_benchmarks.py`` turns them into BENCHMARKS.md. ``--bench_data`` takes other faces than drawn ones.
Nothing is asserted about time: measurements stand beside their targets. What is compared is timed in alternation.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from photos import background, put
from run_folders import simulated_run
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from trained_model import SIZE, save_checkpoint

from facecls.bench.clock import Clock
from facecls.bench.loop import BareTraining
from facecls.data.datamodule import FacesDataModule
from facecls.data.parallel import in_order
from facecls.data.store import decode
from facecls.data.synthetic import draw_faces, write_faces
from facecls.export.__main__ import main as export
from facecls.model.engine import OPSET, open_predictor
from facecls.model.onnx_file import trunk_to_onnx
from facecls.model.predictor import OnnxTrunk
from facecls.model.trunk import create_trunk
from facecls.predict.faces import predict_stream
from facecls.predict.finder import Finder
from facecls.predict.inputs import stream
from facecls.training import probe
from facecls.training.cli import FaceCLI
from facecls.training.outcome import device_name, git_commit, versions
from facecls.training.precision import possible_precisions
from facecls.training.probe import use_features

pytestmark = [pytest.mark.bench, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
ROUNDS = 3
MIB = 2**20

Row = dict[str, Any]
Record = Callable[[str, list[Row]], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Writes rows to the JSON file, in place of those that an earlier run wrote under the same title."""
    path: Path = request.config.getoption("--bench_json")

    def add(title: str, rows: list[Row]) -> None:
        results = json.loads(path.read_text()) if path.exists() else {}
        trainer = pl.Trainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
        environment = {"device": device_name(trainer), "versions": versions(), "git_commit": git_commit()}
        results[title] = {**environment, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")

    return add


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest) -> str:
    """The faces to train on, as ``--bench_data`` says."""
    name: str = request.config.getoption("--bench_data")
    return name


def _row(what: str, value: float, unit: str, target: str = "", met: bool | None = None) -> Row:
    return {"what": what, "value": value, "unit": unit, "target": target, "met": met}


_LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""
"""A small process in between, since a child's peak memory starts from that of the process it was forked from."""


def _measure(words: list[str], folder: Path, stdin_file: Path | None = None) -> tuple[float, float]:
    """Runs Python with some words, output in ``log.txt``; returns seconds and peak memory in MiB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("w+") as log, Path(stdin_file or os.devnull).open() as stdin:
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, sys.executable, *words],
            cwd=folder, stdin=stdin, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (folder / "log.txt").read_text()[-2000:]
    seconds, mib = map(float, done.stdout.split())
    return seconds, mib


@pytest.mark.parametrize("name", ["base", "transfer"])
def test_the_loop_and_its_parts(name: str, data: str, record: Record, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["-m", "facecls.bench", f"--config={ROOT / 'configs' / name}.yaml", f"--data.root={data}"]
    _measure([*words, "--model.weights=null", f"--out={out}"], tmp_path)
    results = json.loads(out.read_text())
    rows = []
    targets = {
        "together": ("together / min(input, step)", 0.97),
        "pipeline / augmentation alone": ("pipeline in one process / its augmentation alone", 0.8),
        "pipeline / OpenCV alone": ("pipeline in one process / OpenCV's imdecode and resize alone", 0.8),
        "workers / linear": ("all workers / one worker x their number", 0.85),
        "step / peak": ("arithmetic of the step / products of matrices", None),
    }
    for stage in ("training", "evaluation"):
        for group in ("input", "loop"):
            rows += [
                _row(f"{stage}: {part}", rate["median"], "faces/s") for part, rate in results[stage][group].items()
            ]
        for part, (text, least) in targets.items():
            if (value := results[stage]["ratios"].get(part)) is not None:
                if part == "pipeline / augmentation alone" and name != "base":
                    least = None  # its augmentation is milder, so that decoding is more beside it
                met = None if least is None else value >= least
                rows.append(_row(f"{stage}: {text}", value, "", f"at least {least}" if least else "", met))
        value, least = results[stage]["ratios"]["step / bare"], 0.95 if stage == "evaluation" else None
        target = f"at least {least}" if least else ""
        rows.append(_row(f"{stage}: step / bare loop of torch", value, "", target, least and value >= least))
    memory, start = results["memory"], results["start_seconds"]
    rows.append(_row("start to first step", start, "s", "at most 15" if name == "base" else "", start <= 15))
    rows.append(_row("images, held once", memory["images_mib"], "MiB"))
    rows.append(_row("a worker's own memory, at most", max(memory["worker_private_mib"]), "MiB"))
    record(f"{name}.yaml at batches of {results['batch_size']}, {results['workers']} workers, {Path(data).name}", rows)


_TF2ONNX = """
import sys, tensorflow, tf_keras, tf2onnx
model = tf_keras.models.load_model(sys.argv[1], compile=False)
image = tensorflow.TensorSpec((None, 224, 224, 3), tensorflow.float32)
tf2onnx.convert.from_keras(model, [image], opset=17, output_path="peer.onnx")
"""


def test_conversion(record: Record, tmp_path: Path) -> None:
    _measure([str(ROOT / "tests/keras_files.py"), str(tmp_path)], tmp_path)
    measured: dict[str, list[tuple[float, float]]] = {"imports": [], "ours": []}
    for _ in range(ROUNDS):
        measured["imports"].append(_measure(["-c", "import torch, timm, onnxruntime"], tmp_path))
        measured["ours"].append(_measure(["-m", "convert", "whole.h5", "trunk.safetensors"], tmp_path))
    peer = _measure(["-c", _TF2ONNX, "whole.h5"], tmp_path)
    (seconds, mib), (base, base_mib) = (np.median(measured[name], axis=0).tolist() for name in ("ours", "imports"))
    above = (mib - base_mib) * MIB / 1e6
    rows = [
        _row("importing torch, timm and onnxruntime", base, "s"),
        _row("importing torch, timm and onnxruntime", base_mib, "MiB"),
        _row("python -m convert, verified", seconds, "s", "at most 6", seconds <= 6),
        _row("python -m convert, above the imports", above, "MB", "at most 500", above <= 500),
        _row("Keras 2 and tf2onnx, not verified", peer[0], "s"),
        _row("Keras 2 and tf2onnx, not verified", peer[1], "MiB"),
    ]
    record("conversion of a whole model of 166 MB that Keras 2 wrote", rows)


def test_start(record: Record, tmp_path: Path) -> None:
    commands = {
        "import pytorch_lightning.cli": ["-c", "import pytorch_lightning.cli"],
        "python -m facecls.fit --help": ["-m", "facecls.fit", "--help"],
        "python -m facecls.predict --help": ["-m", "facecls.predict", "--help"],
        "python -m convert --help": ["-m", "convert", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(2 * ROUNDS):
        for name, words in commands.items():
            seconds[name].append(_measure(words, tmp_path)[0])
    took = {name: median(rounds[1:]) for name, rounds in seconds.items()}
    rows = [_row(name, value, "s") for name, value in took.items()]
    ratio = took["python -m facecls.fit --help"] / took["import pytorch_lightning.cli"]
    rows.append(_row("fit --help / import pytorch_lightning.cli", ratio, "", "at most 1.3", ratio <= 1.3))
    for row in rows[2:4]:
        row |= {"target": "at most 1", "met": row["value"] <= 1}
    record("start", rows)


_TABLE = """
import hashlib, json, sys, time
from facecls.data import table
from facecls.data.sources import Record
from facecls.data.split import assign_split
from facecls.data.tasks import UTKFACE

def open_source(*_):
    for i in range(int(sys.argv[1])):
        name = f"faces/{i * 7919 % 117}_{i % 2}_{i % 5}_{20170116000000000 + i}.jpg.chip.jpg"
        yield Record(name, bytes)

table.open_source = open_source
started = time.perf_counter()
files = table._files("faces", 0, UTKFACE)
faces = table._collect(((file, hashlib.sha1(file.path.encode()).hexdigest()) for file in files), UTKFACE).faces
split = assign_split(faces, 0.1, 0.1, 0, UTKFACE)
print(json.dumps(time.perf_counter() - started))
"""
"""Names -> labels -> table -> split; images have no bytes here."""


def test_table_of_names(record: Record, tmp_path: Path) -> None:
    rows = []
    for count, least in ((23_708, 1), (1_000_000, 20)):
        _, mib = _measure(["-c", _TABLE, str(count)], tmp_path)
        seconds = float((tmp_path / "log.txt").read_text())
        rows.append(_row(f"table and split of {count:,} names", seconds, "s", f"at most {least}", seconds <= least))
        megabytes = mib * MIB / 1e6
        target = ("at most 1000", megabytes <= 1000) if count > 100_000 else ("", None)
        rows.append(_row(f"table and split of {count:,} names, imports included", megabytes, "MB", *target))
    record("a table of names", rows)


def test_memory_of_predict(record: Record, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", 50, seed=0)
    save_checkpoint(tmp_path / "model.ckpt")
    names = [f"faces/{path.name}" for path in (tmp_path / "faces").iterdir()]
    peaks = {}
    for count in (1_000, 100_000):
        listed = tmp_path / "list.txt"
        listed.write_text("".join(f"{names[i % len(names)]}\n" for i in range(count)))
        words = ["-m", "facecls.predict", "model.ckpt", "-", f"--out={count}.csv", "--device=cpu"]
        peaks[count] = _measure(words, tmp_path, listed)[1]
    ratio = peaks[100_000] / peaks[1_000]
    rows = [_row(f"predict, {count:,} inputs", mib, "MiB") for count, mib in peaks.items()]
    rows.append(_row("100,000 inputs / 1,000 inputs", ratio, "", "0.95 to 1.05", 0.95 <= ratio <= 1.05))
    record(f"memory of predict, a small trunk at {SIZE} pixels", rows)


def test_input_against_torchvision(record: Record, tmp_path: Path) -> None:
    write_faces(tmp_path / "all/faces", 512, seed=0)
    size = 224
    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.RandomAffine(12, (0.05, 0.05), (0.9, 1.1))]),
            v2.RandomResizedCrop(size, (0.75, 1.0), (0.9, 1.1)),
            v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3, 0.03)], p=0.8),
            v2.PILToTensor(),
        ]
    )
    peer = ImageFolder(tmp_path / "all", augment)
    module = FacesDataModule(str(tmp_path / "all"), size, num_workers=0)
    module.setup()
    clock, threads = Clock(), torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(ROUNDS + 1):
        timer = clock if turn else Clock()
        batches = list(range(0, len(peer) - 63, 64))
        with timer.block("peer", 64 * len(batches)):
            for start in batches:
                torch.stack([peer[start + place][0] for place in range(64)])
        loader = module.train_dataloader()
        with timer.block("ours", 64 * len(loader)):
            for _ in loader:
                pass
    torch.set_num_threads(threads)
    rates = clock.rates()
    rows = [
        _row("facecls: TrainTransform, from memory", rates["ours"].median, "faces/s"),
        _row("torchvision: ImageFolder, PIL, v2 transforms alike", rates["peer"].median, "faces/s"),
        _row("ours / theirs", clock.ratio("ours", "peer"), ""),
    ]
    record("training input in one process, drawn faces, 224 pixels", rows)


@pytest.fixture(scope="module", params=["resnet18", "mobilenetv1_100"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A trunk, and a model with it as fit leaves it."""
    folder, trunk = tmp_path_factory.mktemp("trained"), request.param
    words = ["-m", "facecls.fit", "--name=run", f"--model.trunk={trunk}", "--data.root=synthetic:64"]
    _measure([*words, "--data.batch_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"], folder)
    return trunk, folder / "runs/run/version_0/checkpoints/best.ckpt"


def test_prediction_and_export(trained: tuple[str, Path], record: Record, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", 256, seed=0)
    trunk, checkpoint = trained
    torch_model = open_predictor(checkpoint, "cpu", engine="torch")
    export([str(checkpoint), str(tmp_path / "model.onnx")])
    onnx_model = open_predictor(tmp_path / "model.onnx", "cpu")
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    bare: Any = torch_model
    finder = Finder(torch_model, "whole")
    clock = Clock()
    for turn in range(ROUNDS + 1):
        timer = clock if turn else Clock()
        with timer.block("predict", 256):
            for _ in predict_stream(torch_model, finder, stream([str(tmp_path / "faces")])):
                pass
        with timer.block("bare", 256), torch.inference_mode():
            for _ in range(4):
                bare.model(images)
        with timer.block("ONNX Runtime", 256):
            for _ in range(4):
                onnx_model.estimate(images)
    rates = clock.rates()
    ratios = clock.ratio("predict", "bare"), clock.ratio("ONNX Runtime", "bare")
    rows = [
        _row("torch, on a batch in memory", rates["bare"].median, "faces/s"),
        _row("predict by torch, from files of faces to rows", rates["predict"].median, "faces/s"),
        _row("predict / torch", ratios[0], ""),
        _row("ONNX Runtime, the exported file", rates["ONNX Runtime"].median, "faces/s"),
        _row("ONNX Runtime / torch", ratios[1], ""),
    ]
    record(f"prediction, {trunk} at 224 pixels, batches of 64", rows)


def test_prediction_of_photos(trained: tuple[str, Path], record: Record, tmp_path: Path) -> None:
    """Photos of 1,000 x 800 pixels with a face each: reading, finding, aligning and predicting at the same time."""
    trunk, checkpoint = trained
    for number, (_, data) in enumerate(draw_faces(64, seed=0)):
        rng = np.random.default_rng(number)
        picture = background("texture", 1000, 800, seed=number)
        put(picture, decode(np.frombuffer(data, np.uint8)), *rng.uniform(300, 500, 2), rng.uniform(60, 400))
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), picture[..., ::-1])
    predictor = open_predictor(checkpoint, "cpu", engine="torch")
    finder = Finder(predictor)
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    clock = Clock()
    for turn in range(ROUNDS + 1):
        timer = clock if turn else Clock()
        with timer.block("detector", 64):
            for _ in in_order(lambda given: finder.take(given.load()), stream([str(tmp_path)])):
                pass
        with timer.block("model", 64):
            predictor.estimate(images)
        with timer.block("predict", 64):
            for _ in predict_stream(predictor, finder, stream([str(tmp_path)])):
                pass
    rates = {name: rate.median for name, rate in clock.rates().items()}
    ratio = rates["predict"] / min(rates["detector"], rates["model"])
    both = 1 / (1 / rates["detector"] + 1 / rates["model"])
    rows = [
        _row("reading, finding and aligning alone", rates["detector"], "photos/s"),
        _row("the model alone, by torch", rates["model"], "photos/s"),
        _row("one after the other, each on all cores", both, "photos/s"),
        _row("predict", rates["predict"], "photos/s"),
        _row("predict / one after the other", rates["predict"] / both, ""),
        _row("predict / the slower of both", ratio, "", "at least 0.9", ratio >= 0.9),
    ]
    record(f"prediction of photos of 1,000 x 800 pixels, {trunk} at 224 pixels", rows)


def test_probe(record: Record, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--config={ROOT / 'configs/probe.yaml'}", "--model.weights=null", "--data.root=synthetic:640"]
    words += ["--model.trunk=vggface2_resnet50"]
    cli = FaceCLI([*words, "--data.batch_size=64", "--trainer.enable_progress_bar=false"])
    cli.datamodule.setup()
    model, device = cli.model.model, cli.trainer.strategy.root_device
    images = next(iter(cli.datamodule.whole_dataloader()))["image"].to(device)
    clock = Clock()

    def bare() -> None:
        with torch.inference_mode(), cli.trainer.precision_plugin.forward_context(), clock.block("bare", 640):
            for _ in range(10):
                model.trunk.eval()(images)

    with torch.inference_mode():
        model.trunk.to(device).eval()(images)
    bare()
    with clock.block("probe", 640), monkeypatch.context() as patch:
        patch.setattr(probe, "faster_trunk", lambda *_: None)  # by torch, as the pass beside it
        use_features(cli.trainer, cli.model, cli.datamodule)
    bare()
    rates = clock.rates()
    ratio = rates["bare"].median / rates["probe"].median
    small = ["--model.trunk=test_resnet", "--data.image_size=64", "--trainer.max_epochs=50"]
    words = ["-m", "facecls.fit", words[0], "--model.weights=null", f"--data.root={data}", *small]
    _measure(words, tmp_path)  # the features are computed
    seconds, _ = _measure(words, tmp_path)  # and used again
    rows = [
        _row("one bare pass of the trunk", rates["bare"].median, "faces/s"),
        _row("features of all faces, read, resized, kept", rates["probe"].median, "faces/s"),
        _row("time of the features / time of a bare pass", ratio, "", "at most 1.1", ratio <= 1.1),
        _row(f"50 epochs of the heads on {Path(data).name}, start, test and report included", seconds, "s"),
    ]
    record("probe, the VGGFace2 trunk at 224 pixels", rows)


@pytest.mark.parametrize("trunk", ["vggface2_resnet50", "mobilenetv1_100", "tf_efficientnet_lite0"])
def test_engines_of_a_probe(trunk: str, record: Record) -> None:
    """The trunk alone on a CPU: what ``faster_trunk`` chooses from, and what its export costs."""
    net = create_trunk(trunk, image_size=224).eval()
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    by_onnx = OnnxTrunk(trunk_to_onnx(net, 224, OPSET))
    exported = time.perf_counter() - started
    clock = Clock()
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            timer = clock if turn else Clock()
            with timer.block("torch", 64):
                net(images)
            with timer.block("bfloat16", 64), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                net(images)
            with timer.block("ONNX Runtime", 64):
                by_onnx(images)
    rows = [_row(f"features by {name}", rate.median, "faces/s") for name, rate in clock.rates().items()]
    rows.append(_row("ONNX Runtime / torch", clock.ratio("ONNX Runtime", "torch"), ""))
    rows.append(_row("export", exported, "s"))
    record(f"engines of a probe on a CPU, {trunk} at 224 pixels", rows)


@pytest.mark.parametrize("trunk", ["vggface2_resnet50", "mobilenetv1_100", "tf_efficientnet_lite0"])
def test_precisions(trunk: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a training in each precision, beside what ``auto`` takes after some seconds."""
    monkeypatch.chdir(tmp_path)
    words = [f"--model.trunk={trunk}", "--data.root=synthetic:64", "--data.batch_size=32"]
    started = time.perf_counter()
    chosen = str(FaceCLI([*words, "--trainer.precision=auto"]).trainer.precision)
    took = time.perf_counter() - started
    started = time.perf_counter()
    made = FaceCLI([*words, "--trainer.precision=32-true"])
    took -= time.perf_counter() - started
    images = torch.zeros(32, 3, 224, 224, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    device = made.trainer.strategy.root_device
    clock = Clock(torch.cuda.synchronize) if device.type == "cuda" else Clock()
    batch = {"image": images.to(device)} | dict.fromkeys(made.model.model.tasks, torch.ones(32, device=device).long())
    steps = {}
    for name in possible_precisions("auto")[0]:
        steps[name] = BareTraining(pl.Trainer(precision=name, logger=False, enable_checkpointing=False), made.model)
    for turn in range(ROUNDS + 1):
        timer = clock if turn else Clock(clock.synchronize)
        for name, step in steps.items():
            with timer.block(name, 32):
                step(batch)
    rates = {name: rate.median for name, rate in clock.rates().items()}
    ratio = rates[chosen] / max(rates.values())
    rows = [_row(f"training step, {name}", rate, "faces/s") for name, rate in rates.items()]
    rows.append(_row(f"auto takes {chosen}: its rate / the highest", ratio, "", "at least 0.95", ratio >= 0.95))
    rows.append(_row("auto, what the trial takes", took, "s", "at most 10", took <= 10))
    record(f"precision, {trunk} at 224 pixels, batches of 32", rows)


def test_report(record: Record, tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run", 5_000)
    seconds, mib = _measure(["-m", "facecls.report", str(run)], tmp_path)
    size = (run / "report.html").stat().st_size / 1e6
    rows = [
        _row("python -m facecls.report", seconds, "s", "at most 30", seconds <= 30),
        _row("python -m facecls.report", mib, "MiB"),
        _row("report.html", size, "MB", "at most 8", size <= 8),
    ]
    record("report of 5,000 predictions, without Grad-CAM", rows)
