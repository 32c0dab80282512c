"""Folded BatchNorms have statistics again: torch's own over the same faces, and the same features until they train."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_networks import build, write_folded_trunk, write_trunk
from run_folders import without_drawing
from torch import Tensor, nn

from facecls import fit
from facecls.data.datamodule import FacesDataModule
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.model.agreement import differences
from facecls.model.checkpoint import read_checkpoint
from facecls.model.engine import open_predictor
from facecls.model.graph import GRAPH
from facecls.model.graph_operators import ScaleAndShift
from facecls.model.module import FaceModule
from facecls.model.trunk import read_trunk, save_trunk
from facecls.training.batchnorms import restore_batchnorms

SIZE = 64
SMALL = [f"--model.trunk={GRAPH}", "--model.weights=trunk.safetensors", f"--data.image_size={SIZE}"]
SMALL += ["--data.batch_size=16", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
SMALL += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--restore_batchnorm=true"]


@pytest.fixture(autouse=True)
def _own_folder(own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)


def _write_flat(dest: Path) -> Path:
    """A network that scales and shifts both a map and the features of it."""
    random = np.random.default_rng(0)
    constants = {"w": random.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    for name in ("a", "b"):
        constants |= {f"{name}{part}": random.uniform(0.5, 2, 4).astype(np.float32) for part in "gb"}
        constants |= {f"{name}m": np.zeros(4, np.float32), f"{name}v": np.ones(4, np.float32)}
    plain = [
        ("Conv", ["images", "w"], {"strides": [2, 2]}),
        ("BatchNormalization", ["n0", "ag", "ab", "am", "av"], {"epsilon": 0.0}),
        ("GlobalAveragePool", ["n1"], {}),
        ("Flatten", ["n2"], {}),
        ("BatchNormalization", ["n3", "bg", "bb", "bm", "bv"], {"epsilon": 0.0}),
    ]
    return write_trunk(dest, build(plain, constants, SIZE), SIZE)


@pytest.mark.parametrize("write", [write_folded_trunk, _write_flat])
def test_statistics_are_those_of_torch_and_the_features_stay(write: object, faces: Path) -> None:
    write(Path("trunk.safetensors"))  # type: ignore[operator]
    module = FaceModule(GRAPH, "trunk.safetensors", image_size=SIZE)
    data = FacesDataModule(str(faces), image_size=SIZE, batch_size=7, num_workers=0)
    data.setup()
    images = torch.cat([batch["image"] for batch in data.loader(data.rows("train"))])
    taken: dict[str, list[Tensor]] = {}
    before = module.model.trunk.eval()
    folded = {name: node for name, node in before.named_modules() if isinstance(node, ScaleAndShift)}
    assert len(folded) == 2
    for name, node in folded.items():
        keep = taken.setdefault(name, [])
        node.register_forward_pre_hook(lambda _, inputs, keep=keep: keep.append(inputs[0].clone()))
    with torch.no_grad():
        features = before(images)

    assert f"2 BatchNorms have statistics again, of {len(images)} faces" in restore_batchnorms(module, data)

    trunk = module.model.trunk.eval()
    for name, pieces in taken.items():
        values = torch.cat(pieces)
        own = trunk.get_submodule(name)
        torchs = type(own)(values.shape[1], momentum=None)
        assert isinstance(torchs, nn.BatchNorm1d | nn.BatchNorm2d)
        torchs(values)
        count = values.numel() / values.shape[1]
        assert torch.allclose(own.running_mean, torchs.running_mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(own.running_var, torchs.running_var * (count - 1) / count, rtol=1e-4)
    with torch.no_grad():
        assert torch.allclose(trunk(images), features, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(trunk.train()(images[:8]), features[:8], rtol=0.01, atol=0.01)


def test_a_training_has_them_and_is_resumed(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folded_trunk(Path("trunk.safetensors"))
    words = [*SMALL, f"--data.root={faces}", "--name=run", "--seed_everything=1"]
    fit.main([*words, "--trainer.max_epochs=1"])
    assert "2 BatchNorms have statistics again, of 64 faces" in capsys.readouterr().out
    last, best = (f"runs/run/version_0/checkpoints/{name}.ckpt" for name in ("last", "best"))
    steps = _steps(last)
    assert steps > 0
    fit.main([*words, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    said = capsys.readouterr().out
    assert f"resuming from {last}" in said
    assert "statistics again" not in said
    assert _steps(last) > steps
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, SIZE, SIZE), np.uint8))
    one, other = (open_predictor(best, engine=engine).estimate(images) for engine in ("torch", "onnx"))
    assert max(differences(one, other, UTKFACE).values()) <= 1e-3


def test_a_run_is_resumed_with_the_norms_it_began_with(faces: Path) -> None:
    write_folded_trunk(Path("trunk.safetensors"))
    _write_flat(Path("flat.safetensors"))
    words = [*SMALL, f"--data.root={faces}", "--seed_everything=1", "--trainer.limit_train_batches=1"]
    fit.main([*words, "--trainer.max_epochs=1", "--name=with"])
    without = "--restore_batchnorm=false"
    fit.main([*words, "--trainer.max_epochs=1", "--name=without", without])
    other = ["--model.trunk=test_resnet", "--model.weights=null"]
    fit.main([*words, "--trainer.max_epochs=1", "--name=other", without, *other])
    last = "runs/{}/version_0/checkpoints/last.ckpt"
    for name, more, said in (
        ("with", [without], "Expected restore_batchnorm true as in the run of .* but got false"),
        ("without", [], "Expected restore_batchnorm false as in the run of .* but got true"),
        ("with", ["--model.weights=flat.safetensors"], "Expected the model of .* to resume it"),
        ("other", other, "restore_batchnorm, but test_resnet has none; leave it out"),
    ):
        with pytest.raises(UserError, match=said):
            fit.main([*words, "--trainer.max_epochs=2", f"--name={name}", f"--ckpt_path={last.format(name)}", *more])


def test_another_preparation_of_images_is_not_resumed_with(faces: Path) -> None:
    path = write_folded_trunk(Path("trunk.safetensors"))
    state, about = read_trunk(path)
    about[GRAPH]["input"]["mean"] = [1.0, 2.0, 3.0]
    save_trunk(Path("other.safetensors"), state, about)
    words = [*SMALL, f"--data.root={faces}", "--trainer.limit_train_batches=1", "--name=prepared"]
    words += ["--restore_batchnorm=false"]
    fit.main([*words, "--trainer.max_epochs=1"])
    resume = ["--trainer.max_epochs=2", "--ckpt_path=runs/prepared/version_0/checkpoints/last.ckpt"]
    with pytest.raises(UserError, match=r"other\.safetensors subtracts and divides by other numbers"):
        fit.main([*words, *resume, "--model.weights=other.safetensors"])


def _steps(checkpoint: str) -> int:
    """How many steps the BatchNorms of a checkpoint saw."""
    trunk = read_checkpoint(checkpoint).module.model.trunk
    norms = [each for each in trunk.modules() if isinstance(each, nn.BatchNorm2d)]
    (steps,) = {int(norm.num_batches_tracked) for norm in norms}  # type: ignore[arg-type]
    return steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.trunk=test_resnet", "--model.weights=null"], "but test_resnet has none; leave it out"),
        (["--data.batch_size=1"], r"data\.batch_size"),
        (["--probe=true", "--model.schedule.frozen={0: -1}"], "no restore_batchnorm with probe"),
    ],
)
def test_what_has_no_folded_batchnorm_is_refused(words: list[str], said: str, faces: Path) -> None:
    write_folded_trunk(Path("trunk.safetensors"))
    with pytest.raises(UserError, match=said):
        fit.main([*SMALL, f"--data.root={faces}", *words])
    assert not list(Path("runs").rglob("*.*"))
