"""What every trunk can do, over the kinds of trunks: ours, one of timm's, a converted graph."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from narrow import narrow
from plain_networks import write_small_trunk
from run_folders import without_drawing

from facecls import evaluate, fit
from facecls.analysis.gradcam import grad_cam
from facecls.data.tasks import UTKFACE
from facecls.export import __main__ as export
from facecls.model.checkpoint import read_checkpoint
from facecls.model.graph import GRAPH
from facecls.model.schedule import layer_of
from facecls.model.trunk import VGGFACE2, create_trunk, save_trunk
from facecls.predict import __main__ as predict

pytestmark = pytest.mark.slow

LAYERS = {VGGFACE2: 17, "test_resnet": 5, GRAPH: 3}
"""By kind of trunk: how many layers it has."""
BEST, LAST = "runs/kind/version_0/checkpoints/best.ckpt", "runs/kind/version_0/checkpoints/last.ckpt"
WORDS = ["--name=kind", "--seed_everything=1", "--data.image_size=64", "--data.batch_size=16", "--data.num_workers=0"]
WORDS += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
WORDS += ["--ema=null", "--model.schedule.layer_decay=0.9", "--model.schedule.warmup=0"]


@pytest.fixture(scope="module", params=LAYERS)
def kind(request: pytest.FixtureRequest, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A kind of trunk, in a folder with its trunk file and a run of two epochs in which two layers were frozen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("kind"))
        without_drawing(patch)
        narrow(patch, VGGFACE2, channels=(16, 32, 64, 128))
        torch.manual_seed(0)
        if request.param == GRAPH:
            write_small_trunk(Path("trunk.safetensors"))
        else:
            net = create_trunk(request.param).net
            save_trunk(Path("trunk.safetensors"), net.state_dict(), {"architecture": request.param})
        _fit(request.param, faces, "--model.schedule.frozen={0: 2}")
        yield request.param


def _fit(kind: str, faces: Path, *words: str) -> dict[str, Any]:
    weights = [f"--model.trunk={kind}", "--model.weights=trunk.safetensors"]
    return fit.main([*WORDS, *weights, f"--data.root={faces}", "--trainer.max_epochs=2", *words])


def test_layers_freeze_and_learn_at_their_own_rates(kind: str) -> None:
    before = create_trunk(kind, "trunk.safetensors").net
    after = read_checkpoint(LAST).module.model.trunk.net.state_dict()
    layers = layer_of(before)
    assert max(layers.values()) + 1 == LAYERS[kind]
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after[name]) == (layers[name] < 2), name
    groups = torch.load(LAST, weights_only=True)["optimizer_states"][0]["param_groups"]
    rates = {round(group["lr_scale"], 6) for group in groups}
    # timm counts what follows the last block as one more layer
    assert {round(0.9**depth, 6) for depth in range(LAYERS[kind])} <= rates


def test_a_checkpoint_needs_no_trunk_file(kind: str, faces: Path) -> None:
    away = Path("trunk.safetensors").rename("away")
    try:
        results = evaluate.main(
            [f"--ckpt_path={BEST}", "--accelerator=cpu", "--precision=32-true", "--data.num_workers=0"]
        )
        told = json.loads(Path("runs/kind/version_0/metrics.json").read_text())
        for name in ("test/gender/accuracy", "test/age/mae_years"):
            assert results[name] == pytest.approx(told[name], abs=1e-4)
        predict.main([BEST, str(faces), "--out=rows.csv", "--device=cpu"])
        assert len(Path("rows.csv").read_text().splitlines()) == 1 + 85
    finally:
        away.rename("trunk.safetensors")


def test_a_run_that_is_resumed_ends_as_one_that_never_stopped(kind: str, faces: Path) -> None:
    words = [
        "--model.schedule.frozen={0: 2, 1: 0}",
        "--model.schedule.decay=constant",
        "--trainer.limit_train_batches=2",
    ]
    _fit(kind, faces, *words, "--name=whole")
    _fit(kind, faces, *words, "--name=parts", "--trainer.max_epochs=1")
    _fit(kind, faces, *words, "--name=parts", "--ckpt_path=runs/parts/version_0/checkpoints/last.ckpt")
    one, other = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_its_map_shows_where(kind: str) -> None:
    module = read_checkpoint(BEST).module
    face = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = [grad_cam(module.model, face, task) for task in UTKFACE.values()]
    assert all(cam.shape == (64, 64) and np.isfinite(cam).all() for cam in maps)
    assert any(cam.max() == 1 for cam in maps)


def test_it_is_probed(kind: str, faces: Path) -> None:
    _fit(kind, faces, "--probe=true", "--name=probed", "--model.schedule.frozen={0: -1}")
    after = read_checkpoint("runs/probed/version_0/checkpoints/best.ckpt").module.model.trunk.net.state_dict()
    before = create_trunk(kind, "trunk.safetensors").net.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_it_is_exported(kind: str, faces: Path) -> None:
    export.main([BEST, "model.onnx", f"--data.root={faces}"])
    torch_rows, onnx_rows = (pd.read_csv(_predict(model, faces)) for model in (BEST, "model.onnx"))
    np.testing.assert_allclose(torch_rows["age"], onnx_rows["age"], atol=1e-3)


def _predict(model: str, faces: Path) -> Path:
    out = Path(model).with_suffix(".csv")
    predict.main([model, str(faces), f"--out={out}", "--device=cpu"])
    return out
