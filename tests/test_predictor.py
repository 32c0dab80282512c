"""A trained model says the same whichever file it comes from and however faces are handed to it."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import expit, softmax
from trained_model import GLASSES, SIZE, TEMPERATURES, save_checkpoint

import facecls
from facecls.data.synthetic import draw_faces
from facecls.data.tasks import UTKFACE, create_tasks
from facecls.data.transforms import EvalTransform
from facecls.errors import UserError
from facecls.model import engine, onnx_file
from facecls.model.checkpoint import read_checkpoint
from facecls.model.engine import FastestPredictor, open_predictor
from facecls.model.predictor import OnnxPredictor, TorchPredictor, averaged
from facecls.model.views import views
from facecls.predict.__main__ import main as predict_command
from facecls.predict.faces import FacePredictor, predict_stream
from facecls.predict.finder import Finder
from facecls.predict.inputs import Input

GENDERS, RACES = ("male", "female"), ("white", "black", "asian", "indian", "others")
SIZES = {"gender": 2, "race": 5, "age": 117}
COLUMNS = ["path", "gender", "p_male", "p_female", "race", *(f"p_{name}" for name in RACES)]
COLUMNS += ["age", "age_low", "age_high", "error"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "best.ckpt")


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    """The same model as ``facecls.export`` writes it."""
    module = read_checkpoint(model).module
    path = model.with_name("model.onnx")
    path.write_bytes(onnx_file.serialise(onnx_file.to_onnx(module, 18), onnx_file.metadata(module, model)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve drawn faces of different sizes, as PNG files."""
    folder = tmp_path_factory.mktemp("drawn")
    paths = []
    for number, (_, data) in enumerate(draw_faces(12, seed=3, size=150)):
        jpeg = folder / f"{number}.jpg"
        jpeg.write_bytes(data)
        paths.append(folder / f"{number}.png")
        with Image.open(jpeg) as image:
            image.resize((90 + 10 * number, 120)).save(paths[-1])
    return paths


def pixels_of(files: list[Path]) -> list[npt.NDArray[np.uint8]]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in files]


def resized(files: list[Path]) -> torch.Tensor:
    arrays = [EvalTransform(SIZE)(image=pixels)["image"] for pixels in pixels_of(files)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def logits_of(model: Path, images: torch.Tensor) -> dict[str, npt.NDArray[np.float64]]:
    with torch.inference_mode():
        return {task: values.double().numpy() for task, values in read_checkpoint(model).module.model(images).items()}


def wanted(logits: dict[str, npt.NDArray[np.float64]]) -> dict[str, npt.NDArray[np.float64]]:
    years = np.arange(117)
    return {
        "gender": softmax(logits["gender"] / TEMPERATURES[0], axis=1),
        "race": softmax(logits["race"] / TEMPERATURES[1], axis=1),
        "age": softmax(logits["age"], axis=1) @ years,
        "age_distribution": softmax(logits["age"] / TEMPERATURES[2], axis=1),
    }


@pytest.mark.parametrize("tta", ["none", "flip", "zoom"])
@pytest.mark.parametrize("kind", ["model", "exported"])
def test_estimates_follow_from_the_logits(
    kind: str, tta: Any, files: list[Path], model: Path, request: pytest.FixtureRequest
) -> None:
    images = resized(files)
    logits = logits_of(model, images)
    if tta != "none":
        seen = [logits_of(model, view) for view in views(images, tta)]
        logits = {task: np.mean([each[task] for each in seen], 0) for task in logits}
    predictor = open_predictor(request.getfixturevalue(kind), "cpu", tta)
    assert isinstance(predictor, TorchPredictor if kind == "model" else OnnxPredictor)
    assert (predictor.image_size, predictor.tasks) == (SIZE, UTKFACE)
    assert {*predictor.outputs} == {"gender", "race", "age", "age_distribution"}
    estimates = predictor.estimate(images)
    truth = wanted(logits)
    assert {*truth} <= {*estimates}
    for name, values in truth.items():
        assert estimates[name].dtype == np.float32
        assert estimates[name] == pytest.approx(values, abs=5e-3 if name == "age" else 2e-5)
    assert np.ptp(truth["gender"][:, 0]) > 0.02  # else any order of the faces would do


def test_logits_are_averaged_though_only_probabilities_are_left() -> None:
    random = np.random.default_rng(0)
    one, other = ({task: 3 * random.normal(size=(9, size)) for task, size in SIZES.items()} for _ in "ab")
    mean = {task: (one[task] + other[task]) / 2 for task in one}
    estimates = averaged(UTKFACE, [_float32(wanted(one)), _float32(wanted(other))], {"age": TEMPERATURES[2]})
    for name, values in wanted(mean).items():
        assert estimates[name] == pytest.approx(values, abs=1e-3 if name == "age" else 1e-5)
    first, second = random.normal(size=(2, 9))
    tasks = create_tasks({"age": {"highest": 90}})
    regressed = averaged({"age": tasks["age"]}, [{"age": 90 * expit(first)}, {"age": 90 * expit(second)}], {"age": 1.0})
    assert regressed["age"] == pytest.approx(90 * expit((first + second) / 2), abs=1e-4)


def _float32(values: dict[str, npt.NDArray[np.float64]]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: array.astype(np.float32) for name, array in values.items()}


def same(one: pd.DataFrame, other: pd.DataFrame, tolerance: float = 1e-5) -> None:
    assert list(one.columns) == list(other.columns)
    for name in one.columns.drop("path"):
        if one[name].dtype == "float32":
            assert one[name].to_numpy() == pytest.approx(other[name].to_numpy(), rel=tolerance, abs=tolerance)
        else:
            assert one[name].equals(other[name]), name


def test_the_table_of_files(model: Path, files: list[Path]) -> None:
    table = facecls.load(model, device="cpu").predict(files, batch_size=5)
    truth = wanted(logits_of(model, resized(files)))
    assert list(table.columns) == COLUMNS
    assert table["path"].tolist() == [path.as_posix() for path in files]
    assert table["error"].isna().all()
    assert table[["p_male", "p_female"]].to_numpy() == pytest.approx(truth["gender"], abs=1e-4)
    assert table[[f"p_{name}" for name in RACES]].to_numpy() == pytest.approx(truth["race"], abs=1e-4)
    assert table["gender"].tolist() == [GENDERS[code] for code in truth["gender"].argmax(1)]
    assert table["race"].tolist() == [RACES[code] for code in truth["race"].argmax(1)]
    assert table["age"].to_numpy() == pytest.approx(truth["age"], abs=1e-2)
    for row, distribution in zip(table.itertuples(), truth["age_distribution"], strict=True):
        assert distribution[: row.age_low].sum() < 0.05 <= distribution[: row.age_low + 1].sum() + 1e-6
        assert distribution[: row.age_high].sum() < 0.95 <= distribution[: row.age_high + 1].sum() + 1e-6
    assert dict(table.dtypes.astype(str)) == {
        name: {"p": "float32", "age": "float32", "age_low": "Int16", "age_high": "Int16"}.get(
            "p" if name.startswith("p_") else name, "str"
        )
        for name in COLUMNS
    }


def test_faces_may_come_in_any_form(model: Path, files: list[Path]) -> None:
    faces = facecls.load(model, device="cpu")
    table = faces.predict(files)
    arrays = pixels_of(files)
    images = [Image.open(path) for path in files]
    same(table, faces.predict(list(map(str, files))))
    same(table, faces.predict(arrays))
    same(table, faces.predict(images))
    same(table, faces.predict([*arrays[:2], images[2], *files[3:]]))
    tensor = resized(files)
    same(table, faces.predict(tensor))
    same(table, faces.predict(tensor.float() - 0.4))
    same(table, faces.predict(list(tensor.permute(0, 2, 3, 1).numpy())))
    for one in (files[4], str(files[4]), arrays[4], images[4], tensor[4:5]):
        same(table.iloc[[4]].reset_index(drop=True), faces.predict(one))
    assert faces.predict(arrays)["path"].isna().all()
    empty = faces.predict([])
    assert list(empty.columns) == COLUMNS
    assert len(empty) == 0


def _exotic() -> Iterator[tuple[str, dict[str, Any], Image.Image]]:
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    image = Image.fromarray(noise).resize((180, 140))
    exif = Image.Exif()
    exif[0x112] = 6
    yield "lying.png", {"exif": exif}, image
    yield "cmyk.tif", {}, image.convert("CMYK")
    yield "grey.png", {}, image.convert("L")
    yield "deep.png", {}, Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    yield "palette.png", {"transparency": bytes(range(256))}, image.quantize(256)
    yield "alpha.png", {}, image.convert("RGBA")


def test_pictures_of_pillow_are_seen_as_their_files(model: Path, tmp_path: Path) -> None:
    faces = facecls.load(model, device="cpu")
    paths = []
    for name, options, image in _exotic():
        paths.append(tmp_path / name)
        image.save(paths[-1], **options)
    table = faces.predict(paths)
    assert table["error"].isna().all()
    same(table, faces.predict([Image.open(path) for path in paths]))


def test_what_cannot_be_read_has_a_row_with_the_reason(model: Path, files: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(files[0].read_bytes()[:-30])
    faces = facecls.load(model, device="cpu")
    lazy = Image.open(io.BytesIO(files[1].read_bytes()[:400]))
    table = faces.predict([cut, files[0], tmp_path / "gone.png", tmp_path, lazy], batch_size=2)
    assert table["error"].tolist() == [
        "truncated",
        np.nan,
        "missing file",
        "truncated",  # the same file, in its folder
        "not an image",
    ]
    assert table.loc[[0, 2, 3, 4], COLUMNS[1:-1]].isna().all(axis=None)
    same(table.iloc[[1]].reset_index(drop=True), faces.predict(files[0]))


def test_what_is_no_face_at_all_is_refused(model: Path) -> None:
    faces = facecls.load(model, device="cpu")
    for wrong, error, said in [
        (np.zeros((9, 9), np.uint8), ValueError, r"\(H, W, 3\), but got uint8 of shape \(9, 9\)"),
        ([np.zeros((9, 9), np.uint8)], ValueError, r"\(H, W, 3\), but got uint8 of shape \(9, 9\)"),
        ([np.zeros((9, 9, 3), np.float32)], ValueError, "got float32"),
        ([None], TypeError, "got NoneType"),
        (torch.zeros(3, 9, 9), ValueError, r"\(N, 3, H, W\), but got \(3, 9, 9\)"),
        (torch.rand(1, 3, 9, 9), ValueError, "look like 0..1"),
        (torch.full((1, 3, 9, 9), 2.64), ValueError, "up to 2.64, which look like 0..1 or standardised"),
        (torch.full((1, 3, 9, 9), float("nan")), ValueError, "floats up to nan"),
        (torch.zeros(1, 3, 9, 9, dtype=torch.int64), ValueError, "got torch.int64"),
    ]:
        with pytest.raises(error, match=said):
            faces.predict(wrong)


def test_a_model_of_some_tasks_has_their_columns_alone(tmp_path: Path, files: list[Path]) -> None:
    path = save_checkpoint(tmp_path / "best.ckpt", tasks=["race", "age"], age_head="regression")
    for tta in ("none", "flip"):
        table = facecls.load(path, device="cpu", tta=tta).predict([files[0], "gone.png"])
        assert list(table.columns) == ["path", "race", *(f"p_{name}" for name in RACES), "age", "error"]
        assert table["age"].between(0, 116).tolist() == [True, False]


def test_a_further_attribute_has_columns_of_its_own(tmp_path: Path, files: list[Path]) -> None:
    path = save_checkpoint(tmp_path / "best.ckpt", tasks=["glasses", "gender"], task_options=GLASSES)
    logits = logits_of(path, resized(files))
    for tta in ("none", "flip"):
        table = facecls.load(path, device="cpu", tta=tta).predict(files)
        own = ["glasses", "p_glasses_without", "p_glasses_with"]
        assert list(table.columns) == ["path", "gender", "p_male", "p_female", *own, "error"]
    table = facecls.load(path, device="cpu").predict(files)
    p = softmax(logits["glasses"] / 2.0, axis=1)
    assert table[own[1:]].to_numpy() == pytest.approx(p, abs=1e-4)
    assert table["glasses"].tolist() == [("without", "with")[code] for code in p.argmax(1)]


def _exported_as(model: Path, exported: Path, dest: Path, **changes: Any) -> Path:
    """The exported model with other metadata."""
    file = onnx.load(exported)
    about = json.loads(next(entry.value for entry in file.metadata_props if entry.key == "facecls"))
    del about["sha256"]  # of the file as it was
    onnx.helper.set_model_props(file, {"facecls": json.dumps(about | changes)})
    onnx.save(file, dest)
    return dest


def test_exported_files_of_version_0_1_are_still_read(
    model: Path, exported: Path, files: list[Path], tmp_path: Path
) -> None:
    classes = {"gender": GENDERS, "race": RACES}
    temperatures = dict(zip(("gender", "race", "age"), TEMPERATURES, strict=True))
    old = {"tasks": ["gender", "race", "age"], "classes": classes, "temperatures": temperatures}
    for name, changes in {
        "old.onnx": old,
        "new.onnx": {"tasks": {name: task.options for name, task in UTKFACE.items()}, "temperatures": temperatures},
    }.items():
        path = _exported_as(model, exported, tmp_path / name, **changes)
        predictor = open_predictor(path, "cpu")
        assert predictor.tasks == UTKFACE
        assert list(predictor.tasks) == ["gender", "race", "age"]
        for tta in ("none", "flip"):
            same(
                facecls.load(path, device="cpu", tta=tta).predict(files),
                facecls.load(model, device="cpu", tta=tta).predict(files),
                1e-3,
            )


def test_no_more_faces_are_taken_than_two_batches_ahead(model: Path) -> None:
    class Counting:
        image_size, tasks, outputs, frame = SIZE, {"gender": UTKFACE["gender"]}, ("gender",), None

        def estimate(self, images: torch.Tensor) -> dict[str, npt.NDArray[np.float32]]:
            ahead.append(taken - seen)
            assert images.shape == (4, 3, SIZE, SIZE)
            return {"gender": images.float().mean((2, 3))[:, :2].numpy()}

    taken, seen, ahead = 0, 0, list[int]()

    def inputs() -> Iterator[Input]:
        nonlocal taken
        while taken < 200:
            number = taken
            taken += 1
            yield Input(str(number), partial(np.full, (80, 70, 3), number, np.uint8))

    counting: Any = Counting()
    for batch in predict_stream(counting, Finder(counting), inputs(), batch_size=4):
        numbers = list(range(seen, seen + 4))
        assert batch.table["path"].tolist() == list(map(str, numbers))
        assert batch.table["p_male"].tolist() == numbers  # each with its own pixels
        seen += 4
    assert (taken, seen) == (200, 200)
    assert max(ahead) <= 4 + 2 * 4 + 8


def test_models_that_are_none_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.ckpt").write_text("no model")
    with pytest.raises(UserError, match=r"Expected a model at .*gone\.onnx"):
        facecls.load(tmp_path / "gone.onnx")
    with pytest.raises(UserError, match=r"Expected a checkpoint at .*gone\.ckpt"):
        facecls.load(tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match=r"written by facecls\.export, but could not load .*text\.onnx"):
        facecls.load(tmp_path / "text.onnx")
    value = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1])
    other = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["image"], ["age"])], "other", [value], [])
    other.output.append(onnx.helper.make_tensor_value_info("age", onnx.TensorProto.UINT8, [1]))
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(other, opset_imports=opset, ir_version=8), tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"written by facecls\.export, but .*other\.onnx lacks its metadata"):
        facecls.load(tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"checkpoint of facecls\.fit, but could not read .*text\.ckpt"):
        facecls.load(tmp_path / "text.ckpt")
    with pytest.raises(UserError, match="Expected a GPU"):
        facecls.load(model, device="cuda")


def test_a_gpu_is_refused_where_onnx_runtime_has_none(exported: Path) -> None:
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        facecls.load(exported, device="cuda")


def test_importing_and_asking_for_help_do_not_import_torch() -> None:
    code = (
        "import sys, facecls, facecls.predict.__main__ as predict\n"
        "assert callable(facecls.load)\n"
        "try: predict.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'numpy', 'pandas', 'cv2'} & {*sys.modules}) or None)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--resume" in ended.stdout


def test_the_names_of_the_package() -> None:
    assert facecls.__all__ == ["FacePredictor", "UserError", "__version__", "load"]
    assert facecls.FacePredictor is FacePredictor
    assert facecls.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'Faces'"):
        _ = facecls.Faces  # type: ignore[attr-defined]


def test_a_model_says_what_it_predicts(model: Path) -> None:
    assert (
        repr(facecls.load(model, device="cpu"))
        == "FacePredictor(gender, race, age; 64 x 64 pixels; photos as they are)"
    )


@pytest.fixture
def _quick_export(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that was exported before, since an export takes seconds."""
    monkeypatch.setattr(onnx_file, "to_onnx", lambda *_: onnx.load(exported))


def slower_by(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each engine take so many seconds a batch."""

    def timed(run: Any, images: torch.Tensor) -> Any:
        return times[run.__self__.engine if isinstance(run.__self__, OnnxPredictor) else "torch"], run(images)

    monkeypatch.setattr(engine, "_timed", timed)


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize("is_faster", [True, False])
def test_the_faster_engine_goes_on(
    is_faster: bool, tta: Any, model: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half a minute both are timed; the answers are those of torch within 1e-4."""
    slower_by({"torch": 8.0, "ONNX Runtime": 7.0 if is_faster else 9.0}, monkeypatch)
    predictor, images = open_predictor(model, "cpu", tta), resized(files)
    reference = TorchPredictor(read_checkpoint(model), torch.device("cpu"), tta).estimate(images)
    engines = []
    for _ in range(6):
        estimates = predictor.estimate(images)
        engines.append(predictor.engine)
        for name, values in reference.items():
            assert np.abs(estimates[name] - values).max() <= 1e-4 * (100 if name == "age" else 1)
    assert engines == ["torch"] * 3 + ["torch, then ONNX Runtime" if is_faster else "torch"] * 3


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize("wanted", ["torch", "onnx"])
def test_an_engine_that_is_asked_for(
    wanted: Any, model: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slower_by(
        {"torch": 50.0, "ONNX Runtime": 40.0} if wanted == "torch" else {"torch": 1.0, "ONNX Runtime": 2.0}, monkeypatch
    )
    if wanted == "torch":
        monkeypatch.setattr(onnx_file, "to_onnx", lambda *_: pytest.fail("nothing is to be exported"))
    predictor = open_predictor(model, "cpu", engine=wanted)
    for _ in range(2):
        predictor.estimate(resized(files))
    assert predictor.engine == {"torch": "torch", "onnx": "ONNX Runtime"}[wanted]


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize("change", [0.001, float("nan")])
def test_an_engine_that_differs_is_not_taken(
    change: float, model: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slower_by({"torch": 50.0, "ONNX Runtime": 1.0}, monkeypatch)
    run = OnnxPredictor.estimate

    def changed(self: OnnxPredictor, images: torch.Tensor) -> Any:
        return {name: values + np.float32(change) for name, values in run(self, images).items()}

    monkeypatch.setattr(OnnxPredictor, "estimate", changed)
    predictor = open_predictor(model, "cpu")
    for _ in range(3):
        predictor.estimate(resized(files))
    assert predictor.engine == "torch"
    forced = open_predictor(model, "cpu", engine="onnx")
    for _ in range(2):  # it is not forgotten
        with pytest.raises(UserError, match=r"to agree with torch within 0.0001, but .*leave --engine"):
            forced.estimate(resized(files))


def test_an_engine_for_another_file(exported: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"a checkpoint for torch to run, but got .*model.onnx"):
        open_predictor(exported, "cpu", engine="torch")
    other: Any = "tensorflow"
    with pytest.raises(UserError, match="Expected an engine among auto, torch, onnx, but got tensorflow"):
        open_predictor(model, "cpu", engine=other)


@pytest.mark.parametrize("error", [UserError("no export"), ValueError("2 GB"), MemoryError(), RuntimeError("graph")])
def test_an_engine_that_cannot_run_a_model(
    error: Exception, model: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch goes on; only where the other is asked for is it an error."""

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(onnx_file, "to_onnx", fails)
    monkeypatch.setattr(engine, "_PATIENCE", 0.0)
    predictor = open_predictor(model, "cpu")
    assert isinstance(predictor, FastestPredictor)
    assert len(predictor.estimate(resized(files)[:0])["age"]) == 0
    for _ in range(2):
        assert len(predictor.estimate(resized(files))["age"]) == len(files)
    assert predictor.engine == "torch"
    with pytest.raises(type(error)):
        open_predictor(model, "cpu", engine="onnx")


@pytest.mark.usefixtures("_quick_export")
def test_the_checkpoint_may_be_gone_by_then(
    model: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower_by({"torch": 50.0, "ONNX Runtime": 1.0}, monkeypatch)
    (tmp_path / "gone.ckpt").write_bytes(model.read_bytes())
    predictor = open_predictor(tmp_path / "gone.ckpt", "cpu")
    (tmp_path / "gone.ckpt").unlink()
    predictor.estimate(resized(files))
    assert predictor.engine == "torch, then ONNX Runtime"


def test_the_command_takes_an_engine(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truly exported here."""
    tables = []
    for name in ("torch", "onnx"):
        out = tmp_path / f"{name}.parquet"
        predict_command([str(model), "synthetic:3", "--faces", "whole", "--engine", name, "--out", str(out)])
        tables.append(pd.read_parquet(out))
        assert f" by {'ONNX Runtime' if name == 'onnx' else 'torch'})\n" in capsys.readouterr().err
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)
