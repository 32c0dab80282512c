"""timm's own weights come from a hub, here on loopback; its models take other sizes of images where timm can."""

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
import onnxruntime
import pytest
import pytorch_lightning as pl
import timm
import torch
from narrow import narrow
from safetensors.torch import load_file, save
from timm.models import _builder
from torch import Tensor

from facecls.analysis.gradcam import grad_cam
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.model import timm_trunk
from facecls.model.checkpoint import read_checkpoint
from facecls.model.module import FaceModule
from facecls.model.onnx_file import to_onnx
from facecls.model.schedule import Schedule, layer_of
from facecls.model.trunk import create_trunk
from facecls.training.cli import without_noise

pytestmark = pytest.mark.slow

NAME = "test_resnet.r160_in1k"
KINDS = {
    "test_resnet": (96, 4),
    "test_efficientnet": (96, 5),
    "test_convnext": (96, 10),
    "test_vit": (96, 6),
    "test_vit3": (64, 10),
    "test_maxvit": (128, 4),
    "vit_tiny_patch16_dinov3_qkvb": (64, 4),
    "vit_xsmall_patch16_clip_224": (64, 4),
    "swin_tiny_patch4_window7_224": (64, 12),
}
"""By name, the smallest of each kind of timm's models: a size in pixels that is not its own, and its last layer."""
SMALLER: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 4},
    "vit_xsmall_patch16_clip_224": {"depth": 4},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24},
}
"""Of which kinds timm has no small model, and how one is made."""
EXPORTED = ("test_vit", "vit_tiny_patch16_dinov3_qkvb")
"""Those whose positions are resampled in the graph; to export one takes seconds."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """What the hub serves: weights of a whole model, classifier included."""
    torch.manual_seed(5)
    state = timm.create_model("test_resnet").state_dict()
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in state.items()}


@pytest.fixture
def hub(weights: dict[str, Tensor]) -> Iterator[ThreadingHTTPServer]:
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
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


FIT = ["-m", "facecls.fit", "--data.root=synthetic:40", f"--model.trunk={NAME}", "--model.weights=pretrained"]
FIT += ["--data.image_size=64", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
FIT += ["--trainer.precision=32-true"]
FIT += ["--trainer.limit_test_batches=0"]  # so there is no page to draw
FIT += ["--ema=null", "--model.schedule.frozen={0: -1}", "--trainer.enable_progress_bar=false"]
CREATE = [
    "-c",
    "from facecls.model.trunk import create_trunk\nfrom safetensors.torch import save_file\n"
    f"save_file(create_trunk('{NAME}', 'pretrained', 96).net.state_dict(), 'got.safetensors')",
]


def _run(words: list[str], folder: Path, port: int, cache: str = "hub") -> subprocess.CompletedProcess[str]:
    """Runs Python with a hub on loopback and a cache of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def _without_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def test_weights_come_from_the_hub_then_from_its_cache(
    hub: ThreadingHTTPServer, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _run(FIT, tmp_path, hub.server_port)  # the trunk is frozen
    assert done.returncode == 0, done.stderr
    hub.shutdown()
    hub.server_close()
    expected = _without_classifier(weights)

    def refuse(*_: object) -> None:
        raise AssertionError("a checkpoint needs no hub")

    monkeypatch.setattr("socket.socket.connect", refuse)
    kept = read_checkpoint(tmp_path / "runs/faces/version_0/checkpoints/best.ckpt").module.model.trunk.net.state_dict()
    assert kept.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    monkeypatch.undo()

    done = _run(CREATE, tmp_path, hub.server_port)  # nobody listens there any more
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "got.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_without_hub_and_cache_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = _run(FIT, tmp_path, 9)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr  # and no retries of the hub's client
    assert f"facecls.fit: error: Expected timm's weights of {NAME} from http://127.0.0.1:9/timm/{NAME}" in done.stderr
    assert f"nor the cache {tmp_path}/hub" in done.stderr
    assert "run it once with a connection, set HF_HOME to a folder where they are, or name a trunk file" in done.stderr
    assert not (tmp_path / "runs").exists()


def _serve(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> None:
    """Makes timm find these weights in place of those in the cache."""
    monkeypatch.setattr(timm_trunk, "_reach", lambda *_: None)
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_byobnet"])
def test_features_are_those_of_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    whole = timm.create_model(name).eval()
    _serve(monkeypatch, whole.state_dict())
    trunk = create_trunk(f"{name}.r160_in1k", "pretrained").eval()
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        features = trunk(images)
        logits = whole((images / 255 - trunk.mean / 255) / (trunk.std / 255))
        assert features.shape == (2, trunk.features)
        torch.testing.assert_close(whole.get_classifier()(features), logits, rtol=0, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    few = {name: tensor for name, tensor in weights.items() if name != "layer1.0.conv1.weight"}
    wide = weights | {"conv1.0.weight": torch.zeros(3, 3, 3, 3)}
    for state in (few, wide):
        _serve(monkeypatch, state)
        with pytest.raises(UserError, match=r"do not fit it \(Error\(s\) in loading.*delete them from the cache"):
            create_trunk(NAME, "pretrained")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("test_vit4", "did you mean test_vit.r160_in1k"),
        ("resnet50_clip_gap.nothing", "resnet50_clip_gap.openai"),
        ("vggface2_resnet50", "Or name a trunk file as model.weights"),
    ],
)
def test_a_model_without_weights_is_refused_with_names_that_have_some(name: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        create_trunk(name, "pretrained")
    assert near in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet10t.c4_in1k", r"a tag that timm knows as trunk, but got .*did you mean resnet10t\.c3_in1k"),
        ("hf-hub:timm/resnet10t.c3_in1k", "Expected a timm model as trunk"),
        ("pit_b_224", "whose layers timm counts"),
    ],
)
def test_names_that_cannot_be_trained_are_refused(name: str, said: str) -> None:
    for weights in (None, "pretrained"):
        with pytest.raises(UserError, match=said):
            create_trunk(name, weights)


@pytest.mark.parametrize("name", KINDS)
def test_a_trunk_of_timm_does_all_that_a_trunk_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, name, **SMALLER.get(name, {}))
    size, last = KINDS[name]
    torch.manual_seed(1)
    module = FaceModule(trunk=name, image_size=size, schedule=Schedule(frozen={0: 3}, layer_decay=0.8, warmup=0))
    for option in ("optimizer", "schedule"):
        module.hparams.pop(option)  # not to be pickled; the command line keeps them in another form
    before = {key: value.clone() for key, value in module.model.trunk.net.state_dict().items()}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with without_noise():
        trainer.fit(module, FacesDataModule("synthetic:24", size, batch_size=4, num_workers=0))
    net = module.model.trunk.net
    layers = layer_of(net)
    assert max(layers.values()) == last
    changed = {layers[key] for key, value in net.named_parameters() if not torch.equal(value, before[key])}
    assert changed == set(range(3, last + 1))
    rates = {id(each): group["lr_scale"] for group in trainer.optimizers[0].param_groups for each in group["params"]}
    for key, parameter in net.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.8 ** (last - layers[key]))

    trainer.save_checkpoint(tmp_path / "kept.ckpt", weights_only=True)
    kept = read_checkpoint(tmp_path / "kept.ckpt").module
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        estimates = kept(images)
        for key, value in module.eval()(images).items():
            assert torch.equal(value, estimates[key])
    cams = [grad_cam(kept.model, images[0], UTKFACE["race"], target) for target in range(5)]
    assert max(cam.max() for cam in cams) == 1
    if name in EXPORTED:
        session = onnxruntime.InferenceSession(to_onnx(kept, 18).SerializeToString())
        found = session.run(list(estimates), {"image": images.numpy()})
        for value, expected in zip(found, estimates.values(), strict=True):
            np.testing.assert_allclose(value, expected.numpy(), atol=1e-4)


def test_a_size_that_a_trunk_cannot_take_is_refused_before_training() -> None:
    for name, size, said in (
        ("vit_small_patch14_dinov2", 100, r"such as 518, but got 100 \(Input height \(100\) should be divisible"),
        ("halonet26t", 100, "such as 256, but got 100; choose another size"),  # timm asserts without a word
        ("crossvit_tiny_240", 96, "such as 240, but got 96"),
    ):
        with pytest.raises(UserError, match=f"Expected data.image_size as {name} takes it, {said}"):
            FaceModule(trunk=name, image_size=size)


def test_models_that_know_one_size_are_made_for_it() -> None:
    assert create_trunk("vit_small_patch14_dinov2", None, 112).fixed_size is None
    trunk = create_trunk("mixer_s32_224", None, 96)
    assert trunk.fixed_size == 96
    with pytest.raises(ValueError, match=r"with H and W 96, but got \(1, 3, 224, 224\)"):
        trunk(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert create_trunk("mixer_s32_224").fixed_size == 224
