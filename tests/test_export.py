"""An exported file agrees with the checkpoint within rounding, and the report says what 8 bits change."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from narrow import narrow
from scipy.special import softmax
from sklearn.metrics import accuracy_score, mean_absolute_error
from trained_model import SIZE, TEMPERATURES, save_checkpoint

from facecls.analysis.scores import scores_of
from facecls.data.datamodule import FacesDataModule
from facecls.data.synthetic import write_faces
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.export import __main__ as export
from facecls.export import quantisation
from facecls.export.show import create_table
from facecls.model import onnx_file as graphs
from facecls.model.checkpoint import read_checkpoint
from facecls.model.module import FaceModule

pytestmark = pytest.mark.slow

Arrays = dict[str, npt.NDArray[Any]]
SHAPES = {"gender": ["batch", 2], "race": ["batch", 5], "age": ["batch"], "age_distribution": ["batch", 117]}
OTHER_TASKS: dict[str, Any] = {
    "race": {
        "classes": ["White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"]
    },
    "glasses": {"classes": ["without", "with"]},
}


def trained_on(checkpoint: Path, root: Path, **options: Any) -> Path:
    """Adds to a checkpoint what ``facecls.fit`` keeps of its data."""
    kept = torch.load(checkpoint, weights_only=True)
    transform = {"class_path": "facecls.data.transforms.TrainTransform", "init_args": {"size": SIZE, "noise": 0.0}}
    kept["datamodule_hyper_parameters"] = {
        "root": str(root),
        "image_size": SIZE,
        "val_fraction": 0.4,
        "test_fraction": 0.1,
        "split_file": None,
        "train_transform": transform,
        "seed": 3,
        "_instantiator": "pytorch_lightning.cli.instantiate_module",
        **options,
    }
    torch.save(kept, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on(save_checkpoint(tmp_path_factory.mktemp("model") / "best.ckpt"), faces)


@pytest.fixture(scope="module")
def graph(checkpoint: Path) -> onnx.ModelProto:
    """The graph of the checkpoint, exported only once, since that takes seconds."""
    return graphs.to_onnx(read_checkpoint(checkpoint).module, 18)


@pytest.fixture
def _reuse_graph(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(module: FaceModule, opset: int) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        return copy

    monkeypatch.setattr(graphs, "to_onnx", copied)


def draw_images(count: int, size: int = SIZE) -> torch.Tensor:
    """Faces that no checkpoint here has seen."""
    data = FacesDataModule(f"synthetic:{count}", size, count, num_workers=0, split="all", seed=11)
    data.setup()
    images: torch.Tensor = next(iter(data.test_dataloader()))["image"]
    return images


def run_onnx(model: Path | bytes, images: torch.Tensor) -> Arrays:
    """The outputs of ONNX Runtime for a file."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images.contiguous().numpy()}), strict=True))


def assert_agree(outputs: Arrays, module: FaceModule, images: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = {name: values.numpy() for name, values in module(images).items()}
    assert {*outputs} == {*expected}
    for name, values in expected.items():
        assert outputs[name].shape == values.shape
        assert outputs[name] == pytest.approx(
            values, rel=1e-4 if name == "age" else 0, abs=1e-3 if name == "age" else 1e-4
        )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shapes(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def test_a_file_agrees_with_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "model.onnx"
    facts = export.main([str(checkpoint), str(dest)])
    assert names_in(tmp_path) == ["model.onnx"]  # weights and all
    module = read_checkpoint(checkpoint).module
    for count in (1, 3, 40):
        assert_agree(run_onnx(dest, draw_images(count)), module, draw_images(count))
    with torch.inference_mode():
        assert module(draw_images(40))["gender"][:, 0].std() > 0.01  # else any order of the faces would do

    model = onnx.load(dest)
    assert shapes(model) == {"image": ["batch", 3, SIZE, SIZE], **SHAPES}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 8  # of ONNX 1.13, which brought opset 18
    for private in (str(Path(__file__).parent.parent), "site-packages", "stack_trace"):
        assert private.encode() not in dest.read_bytes()

    assert facts["faces"] == 32
    assert facts["mb/fp32"] == dest.stat().st_size / 1e6
    assert max(value for name, value in facts.items() if name.startswith("difference/")) < 1e-4
    assert min(facts["faces_per_second/torch"], facts["faces_per_second/fp32"]) > 0
    shown = capsys.readouterr().out
    for text in ("faces/s", "size, MB", "largest difference, age_distribution", "32 faces", "1 threads"):
        assert text in shown


@pytest.mark.usefixtures("_reuse_graph")
def test_metadata_describes_the_file(checkpoint: Path, tmp_path: Path) -> None:
    dest = tmp_path / "model.onnx"
    export.main([str(checkpoint), str(dest)])
    about = json.loads({entry.key: entry.value for entry in onnx.load(dest).metadata_props}["facecls"])
    assert about["tasks"] == {
        "gender": {"classes": ["male", "female"]},
        "race": {"classes": ["white", "black", "asian", "indian", "others"]},
        "age": {"highest": 116},
    }
    assert [*about["tasks"]] == ["gender", "race", "age"]
    assert about["image_size"] == SIZE
    assert [about["temperatures"][task] for task in about["tasks"]] == pytest.approx(TEMPERATURES)
    assert about["precision"] == "fp32"
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "MIT" in about["licence"]
    assert "non-commercial" in about["licence"]
    digest = subprocess.run(["sha256sum", checkpoint], capture_output=True, text=True, check=True).stdout.split()[0]
    assert about["source"] == f"test_resnet, best.ckpt, sha256 {digest}"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tasks": ["race"]}, ["race"]),
        ({"tasks": ["age"], "age_head": "regression", "hidden": [8]}, ["age"]),
    ],
    ids=["race", "regression"],
)
def test_a_file_has_the_outputs_that_the_model_has(options: Any, names: list[str], faces: Path, tmp_path: Path) -> None:
    checkpoint = trained_on(save_checkpoint(tmp_path / "best.ckpt", **options), faces)
    dest = tmp_path / "model.onnx"
    facts = export.main([str(checkpoint), str(dest), "--opset=21", "--int8"])
    model = onnx.load(dest)
    assert [output.name for output in model.graph.output] == names
    assert ("", 21) in {(entry.domain, entry.version) for entry in model.opset_import}
    assert {name.split("/")[1] for name in facts if name.startswith("difference/")} == {*names}
    for length in (1, 9):
        assert run_onnx(dest, draw_images(length))[names[0]].shape[0] == length


def test_other_tasks_come_along(faces: Path, tmp_path: Path) -> None:
    races, years = OTHER_TASKS["race"]["classes"], {"26": (26, 26), "20-29": (20, 29), "more than 70": (70, 116)}
    rows = [
        {
            "path": str(path),
            "gender": ["Male", "F"][number % 2],
            "race": races[number % 7],
            "age": [*years][number % 3],
            "glasses": ["without", "With", ""][number % 3],
        }
        for number, path in enumerate(sorted(faces.glob("*.chip.jpg"))[:80])
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "faces.csv", index=False)
    checkpoint = save_checkpoint(tmp_path / "best.ckpt", task_options=OTHER_TASKS)
    trained_on(checkpoint, tmp_path / "faces.csv", tasks=OTHER_TASKS)
    module = read_checkpoint(checkpoint).module
    plain, dest = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export.main([str(checkpoint), str(plain)])
    assert_agree(run_onnx(plain, draw_images(9)), module, draw_images(9))
    facts = export.main([str(checkpoint), str(dest), "--int8"])
    model = onnx.load(dest)
    assert shapes(model) == {
        "image": ["batch", 3, SIZE, SIZE], **SHAPES, "race": ["batch", 7], "glasses": ["batch", 2]
    }  # fmt: skip
    about = json.loads(model.metadata_props[0].value)
    assert {name: about["tasks"][name] for name in OTHER_TASKS} == OTHER_TASKS
    assert [*about["temperatures"]] == [*about["tasks"]] == ["gender", "race", "age", "glasses"]

    data = FacesDataModule(
        str(tmp_path / "faces.csv"), SIZE, 100, 0, val_fraction=0.4, test_fraction=0.1, seed=3, tasks=OTHER_TASKS
    )
    data.setup()
    batch = next(iter(data.val_dataloader()))
    truth = pd.DataFrame(rows).set_index("path").loc[data.faces["path"].iloc[batch["index"].numpy()]]
    with torch.inference_mode():
        before = {name: values.numpy() for name, values in module(batch["image"]).items()}
    after = run_onnx(dest, batch["image"])
    for model_name, each in (("torch", before), ("int8", after)):
        named = np.array([name.lower() for name in OTHER_TASKS["glasses"]["classes"]])[each["glasses"].argmax(1)]
        known = (truth["glasses"] != "").to_numpy()
        right = accuracy_score(truth["glasses"].str.lower()[known], named[known])
        assert facts[f"accuracy/glasses/{model_name}"] == pytest.approx(right)
        assert facts[f"accuracy/race/{model_name}"] == pytest.approx(
            accuracy_score(truth["race"], np.array(races)[each["race"].argmax(1)])
        )
        low, high = np.array([years[text] for text in truth["age"]]).T
        single, rounded = low == high, each["age"].round()
        within = (low <= rounded) & (rounded <= high)
        assert facts[f"band_accuracy/age/{model_name}"] == pytest.approx(within[~single].mean())
        off = mean_absolute_error(low[single], each["age"][single])
        assert facts[f"mae_years/age/{model_name}"] == pytest.approx(off, rel=1e-5)
    changed = (before["glasses"].argmax(1) != after["glasses"].argmax(1)).mean()
    assert facts["changed/glasses/int8"] == pytest.approx(changed)


def test_a_checkpoint_of_version_0_1(tmp_path: Path) -> None:
    old = Path(__file__).parent / "data/version_0_1.ckpt"
    dest = tmp_path / "model.onnx"
    export.main([str(old), str(dest)])
    outputs = run_onnx(dest, draw_images(9))
    with torch.inference_mode():
        features = read_checkpoint(old).module.model.trunk(draw_images(9)).numpy()
    weights = {name: values.numpy() for name, values in torch.load(old, weights_only=True)["state_dict"].items()}
    temperatures = weights["model.temperatures"]  # of gender, race and age
    logits = {
        task: features @ weights[f"model.heads.{task}.1.weight"].T + weights[f"model.heads.{task}.1.bias"]
        for task in ("gender", "race", "age")
    }
    for task, temperature in zip(("gender", "race"), temperatures, strict=False):
        assert outputs[task] == pytest.approx(softmax(logits[task] / temperature, 1), abs=1e-5)
    assert outputs["age"] == pytest.approx(softmax(logits["age"], 1) @ np.arange(117), rel=1e-5)
    assert outputs["age_distribution"] == pytest.approx(softmax(logits["age"] / temperatures[2], 1), abs=1e-6)


def test_padding_of_vggface2(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, "vggface2_resnet50", channels=(16, 32, 64, 128))
    torch.manual_seed(0)
    module = FaceModule(hidden=[4], image_size=65).eval()  # another padding than at even sizes
    file = graphs.serialise(graphs.to_onnx(module, 18), {})
    assert_agree(run_onnx(file, draw_images(3, 65)), module, draw_images(3, 65))


def tampered(graph: onnx.ModelProto, shift: float) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    bias = next(entry for entry in copy.graph.initializer if entry.name == "model.heads.race.layers.1.bias")
    shifted = onnx.numpy_helper.to_array(bias) + np.array([shift, 0, 0, 0, 0], np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    return copy


@pytest.mark.parametrize("shift", [1e-2, 1e-3, float("nan")])
def test_a_file_that_differs_is_not_written(
    shift: float, checkpoint: Path, graph: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "to_onnx", lambda module, opset: tampered(graph, shift))
    dest = tmp_path / "model.onnx"
    dest.write_bytes(b"an older file")
    with pytest.raises(UserError, match=r"agree with torch within 0\.0001, but race differs by"):
        export.main([str(checkpoint), str(dest)])
    assert names_in(tmp_path) == ["model.onnx"]
    assert dest.read_bytes() == b"an older file"


def test_a_difference_of_rounding_is_accepted(
    checkpoint: Path, graph: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "to_onnx", lambda module, opset: tampered(graph, 5e-5))
    facts = export.main([str(checkpoint), str(tmp_path / "model.onnx")])
    assert 1e-6 < facts["difference/race/fp32"] < 5e-5


@pytest.mark.usefixtures("_reuse_graph")
def test_int8_reports_what_it_changes(
    checkpoint: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, dest, plain = tmp_path / "scratch", tmp_path / "int8.onnx", tmp_path / "fp32.onnx"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    calibrated: list[int] = []
    quantise = quantisation.quantise

    def spied(model: bytes, batches: Any) -> onnx.ModelProto:
        calibrated.extend(torch.cat([batch["index"] for batch in batches]).tolist())
        return quantise(model, batches)

    monkeypatch.setattr(quantisation, "quantise", spied)
    facts = export.main([str(checkpoint), str(dest), "--int8"])
    export.main([str(checkpoint), str(plain)])
    assert names_in(scratch) == []
    assert dest.stat().st_size < plain.stat().st_size / 2

    data = FacesDataModule(str(faces), SIZE, 100, num_workers=0, val_fraction=0.4, test_fraction=0.1, seed=3)
    data.setup()
    assert {*calibrated} == {*np.flatnonzero(data.faces["split"] == "train")}
    batch = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        before = {name: values.numpy() for name, values in read_checkpoint(checkpoint).module(batch["image"]).items()}
    after = run_onnx(dest, batch["image"])
    for task in ("gender", "race"):
        decided = [each[task].argmax(1) for each in (before, after)]
        assert facts[f"changed/{task}/int8"] == pytest.approx(1 - accuracy_score(*decided))
        for model, guess in zip(("torch", "int8"), decided, strict=True):
            assert facts[f"accuracy/{task}/{model}"] == pytest.approx(accuracy_score(batch[task], guess))
    for model, each in (("torch", before), ("int8", after)):
        assert facts[f"mae_years/age/{model}"] == pytest.approx(
            mean_absolute_error(batch["age"], each["age"]), rel=1e-5
        )
    for name in before:
        apart = np.abs(after[name] - before[name]) / (before[name] if name == "age" else 1)
        assert 1e-4 < facts[f"difference/{name}/int8"] == pytest.approx(apart.max(), rel=1e-2)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"{facts['mae_years/age/int8']:.3f} ({facts['mae_years/age/int8'] - facts['mae_years/age/torch']:+.3f})"
        in shown
    )
    assert f"{facts['changed/race/int8']:.2%}" in shown

    model = onnx.load(dest)
    assert json.loads(model.metadata_props[0].value)["precision"] == "int8"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    kinds = {entry.name: entry.data_type for entry in model.graph.initializer}
    given = {node.output[0]: node.input for node in model.graph.node}
    weights = {kind: [node.input[1] for node in model.graph.node if node.op_type == kind] for kind in ("Conv", "Gemm")}
    assert {kinds[given[name][0]] for name in weights["Conv"]} == {onnx.TensorProto.INT8}
    assert {kinds[given[name][1]] for name in weights["Conv"]} == {onnx.TensorProto.FLOAT}  # the scales
    assert (
        min(
            len(onnx.numpy_helper.to_array(entry))
            for entry in model.graph.initializer
            if entry.name == given[weights["Conv"][0]][1]
        )
        > 1
    )
    assert sorted(weights["Gemm"]) == [f"model.heads.{task}.layers.1.weight" for task in ("age", "gender", "race")]
    assert {kinds[name] for name in weights["Gemm"]} == {onnx.TensorProto.FLOAT}


@pytest.mark.usefixtures("_reuse_graph")
def test_other_faces_can_be_named(checkpoint: Path, tmp_path: Path) -> None:
    kept = torch.load(checkpoint, weights_only=True)
    kept["datamodule_hyper_parameters"] |= {"root": "gone", "split_file": "gone.csv"}
    moved = tmp_path / "moved.ckpt"
    torch.save(kept, moved)
    words = [str(moved), str(tmp_path / "model.onnx")]
    with pytest.raises(UserError, match=r"nothing at gone.* Name others with --data\.root"):
        export.main(words)
    write_faces(tmp_path / "others", 20, seed=5)
    assert export.main([*words, f"--data.root={tmp_path / 'others'}"])["faces"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.ckpt", "model.onnx"], "Expected a checkpoint at none.ckpt, but there is none"),
        (["best.ckpt", "nowhere/model.onnx"], "Can't write nowhere/model.onnx: No such file or directory"),
        (["best.ckpt", "best.ckpt"], "Expected a file name that ends in .onnx, but got best.ckpt"),
        (["best.ckpt", "model.onnx", "--opset", "17"], "Expected --opset from 18 to 21, but got 17"),
        (["best.ckpt", "model.onnx", "--opset", "22"], "Expected --opset from 18 to 21, but got 22"),
        (["best.ckpt", "model.onnx", "--data.root", "nowhere"], "nothing at nowhere"),
        (["empty.ckpt", "model.onnx"], "does not say what data it was trained on"),
    ],
    ids=["checkpoint", "folder", "name", "old", "new", "data", "untold"],
)
def test_mistakes_are_one_line(
    words: Sequence[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("best.ckpt").symlink_to(checkpoint)
    save_checkpoint(Path("empty.ckpt"))
    with pytest.raises(UserError) as caught:
        export.main(words)
    assert message in str(caught.value)
    assert names_in(tmp_path) == ["best.ckpt", "empty.ckpt"]


def test_help_and_mistakes_are_answered_at_once() -> None:
    code = "import sys, runpy; sys.argv = ['export', *{words}]\n"
    code += "try: runpy.run_module('facecls.export', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'onnx' in sys.modules)"
    for words, status in ((["--help"], 0), (["a.ckpt", "b.onnx", "--opset=9"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(words=words)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == f"{status} False False"
        assert len(done.stderr.splitlines()) == (status != 0)


def test_the_table_calls_the_scores_as_the_report_does() -> None:
    facts = {"band_accuracy/age/torch": 0.5, "band_accuracy/age/fp32": 0.625}
    table = create_table(facts, ["torch", "fp32"], "title")
    title = scores_of(UTKFACE)["age/band_accuracy"].title
    assert [list(column.cells) for column in table.columns] == [[title.lower()], ["50.00%"], ["62.50% (+12.50%)"]]
