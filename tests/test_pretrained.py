"""timm's own weights come from a hub, here on loopback; transformers take other image sizes where timm can."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save

from facecls import fit
from facecls.analysis.gradcam import grad_cam
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.export import __main__ as export
from facecls.model.checkpoint import read_checkpoint
from facecls.model.schedule import layer_of
from facecls.model.trunk import create_trunk

pytestmark = pytest.mark.slow

NAME = "test_resnet.r160_in1k"
TRUNKS = {"test_vit": 96, "test_convnext": 96, "test_efficientnet": 96}
"""Of which everything is tried, by name: a size in pixels that is not the one it was trained at."""
LARGE = {
    "vit_small_patch16_dinov3": 12,
    "vit_base_patch16_clip_quickgelu_224": 12,
    "swin_tiny_patch4_window7_224": 12,
    "vit_tiny_patch16_224": 12,
}
"""Of which only a pass is tried, by name: the number of their last layer."""


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """What the hub serves: weights of a whole model, classifier included."""
    torch.manual_seed(5)
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture
def hub(weights: dict[str, torch.Tensor]) -> Iterator[ThreadingHTTPServer]:
    """A server that answers what huggingface_hub asks for, for one file of one repository."""
    content = save(weights)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, with_body: bool) -> None:
            found = self.path == f"/timm/{NAME}/resolve/main/model.safetensors"
            self.send_response(200 if found else 404)
            body = content if found else b""
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _run(code: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Runs Python with a hub on loopback and a cache of its own."""
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0" if port else "1",  # without it the hub is asked five times, which takes half a minute
    }
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_weights_come_from_the_hub_then_from_its_cache(
    hub: ThreadingHTTPServer, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    code = (
        "from facecls.model.trunk import create_trunk\nfrom safetensors.torch import save_file\n"
        f"save_file(create_trunk('{NAME}', 'pretrained', 96).net.state_dict(), 'got.safetensors')"
    )
    done = _run(code, tmp_path, hub.server_port)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "got.safetensors")
    assert got.keys() == {name for name in weights if not name.startswith("fc.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in got.items())
    hub.shutdown()
    (tmp_path / "got.safetensors").unlink()
    done = _run(code, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got.safetensors").exists()


def test_without_hub_and_cache_one_line_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from facecls import fit\nfrom facecls.errors import command\n"
        f"with command('fit'): fit.main(['--data.root=synthetic:40', '--model.trunk={NAME}', "
        "'--model.weights=pretrained', '--data.image_size=64', '--trainer.accelerator=cpu'])"
    )
    done = _run(code, tmp_path, 0)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert "Can't get timm's weights of test_resnet.r160_in1k" in lines[-1]
    assert "connect to huggingface.co once" in lines[-1]
    assert len(lines) == 1, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_trains_from_the_hubs_weights(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    code = (
        "from facecls import fit\n"
        f"fit.main(['--data.root=synthetic:60', '--model.trunk={NAME}', '--model.weights=pretrained', "
        "'--data.image_size=64', '--data.num_workers=0', '--trainer.accelerator=cpu', '--trainer.max_epochs=1', "
        "'--ema=null', '--model.schedule.frozen={0: -1}', '--trainer.enable_progress_bar=false'])"
    )
    done = _run(code, tmp_path, hub.server_port)
    assert done.returncode == 0, done.stderr
    state = read_checkpoint(tmp_path / "runs/faces/version_0/checkpoints/best.ckpt").module.model.trunk.net.state_dict()
    torch.manual_seed(5)
    expected = timm.create_model("test_resnet").state_dict()  # as the hub served them
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_a_model_without_weights_is_refused_with_names_that_have_some() -> None:
    with pytest.raises(UserError, match=r"it has none for resnet50_clip_gap.nothing; did you mean resnet50"):
        create_trunk("resnet50_clip_gap.nothing", "pretrained")


@pytest.mark.parametrize("name", TRUNKS)
def test_models_of_timm_train_at_other_sizes(
    name: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("facecls.report.page.write_report", lambda *_: None)  # takes longer than all the rest
    size = TRUNKS[name]
    words = [f"--model.trunk={name}", f"--data.image_size={size}", f"--data.root={faces}", "--data.batch_size=8"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--ema=null"]
    words += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    fit.main([*words, "--model.schedule.frozen={0: 3}", "--model.schedule.layer_decay=0.8", "--seed_everything=1"])
    kept = "runs/faces/version_0/checkpoints/best.ckpt"
    module = read_checkpoint(kept).module
    layers = layer_of(module.model.trunk.net)
    assert max(layers.values()) >= 4
    torch.manual_seed(1)
    groups = torch.load("runs/faces/version_0/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert len({round(group["lr_scale"], 6) for group in groups}) >= max(layers.values())
    face = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    maps = [grad_cam(module.model, face, task) for task in UTKFACE.values()]
    assert all(cam.shape == (size, size) and np.isfinite(cam).all() for cam in maps)
    export.main([kept, "model.onnx", f"--data.root={faces}"])


@pytest.mark.parametrize("name", LARGE)
def test_transformers_take_other_sizes(name: str) -> None:
    trunk = create_trunk(name, None, 64).eval()
    with torch.inference_mode():
        assert trunk(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, trunk.features)
    assert max(layer_of(trunk.net).values()) == LARGE[name]


def test_a_size_that_a_transformer_cannot_take_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"Expected a data.image_size that vit_small_patch14_dinov2 takes, such as 518"):
        create_trunk("vit_small_patch14_dinov2", None, 100)
    assert create_trunk("vit_small_patch14_dinov2", None, 112).fixed_size is None
    trunk = create_trunk("cait_xxs24_224", None, 64)
    assert trunk.fixed_size == 64
    with pytest.raises(ValueError, match="H and W 64"):
        trunk(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
