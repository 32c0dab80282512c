"""Trunk files as sources of ``convert``: other layers of one, several joined. The trunks themselves are the truth."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from narrow import narrow
from plain_networks import small_network, write_folded_trunk, write_small_trunk, write_trunk
from torch import Tensor, nn
from torch.nn import functional

from convert.__main__ import main
from convert.plain.shapes import rename
from facecls import fit
from facecls.analysis.gradcam import grad_cam
from facecls.data.tasks import UTKFACE
from facecls.export import __main__ as export
from facecls.model.checkpoint import read_checkpoint
from facecls.model.graph import GRAPH
from facecls.model.graph_operators import ScaleAndShift
from facecls.model.heads import HeadOptions
from facecls.model.network import FaceModel
from facecls.model.schedule import layer_of
from facecls.model.trunk import VGGFACE2, Trunk, create_trunk, read_trunk, save_trunk

pytestmark = pytest.mark.slow

SIZE = 64


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, VGGFACE2, channels=(8, 16, 24, 32))


def _spread(net: nn.Module, seed: int) -> None:
    """Random statistics, so that a BatchNorm left out would show."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)


def _write(name: str, dest: Path, seed: int = 0) -> Path:
    """A trunk file of a kind."""
    if name == GRAPH:
        return write_small_trunk(dest, SIZE, seed)
    if name == "folded":
        return write_folded_trunk(dest, SIZE)
    torch.manual_seed(seed)
    trunk = create_trunk(name)
    _spread(trunk.net, seed)
    save_trunk(dest, trunk.net.state_dict(), {"architecture": name})
    return dest


def _faces(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 3, size, size), np.uint8))


def _open(path: Path, size: int | None = None) -> Trunk:
    return create_trunk(read_trunk(path)[1]["architecture"], path, size).eval()


def _features(trunk: Trunk, faces: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = trunk(faces)
    return features


def _close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("kinds", "size"),
    [
        ((GRAPH, "test_resnet"), SIZE),
        (("test_resnet", GRAPH, VGGFACE2), SIZE),
        (("folded", "test_efficientnet"), 96),
        ((GRAPH, GRAPH), 80),
    ],
)
def test_joined_features_are_those_of_each(kinds: tuple[str, ...], size: int, tmp_path: Path) -> None:
    paths = [_write(kind, tmp_path / f"{place}.safetensors", place) for place, kind in enumerate(kinds)]
    joined = tmp_path / "new" / "joined.safetensors"
    main([*map(str, paths), str(joined), "--size", str(size)])
    faces = _faces(size)
    expected = torch.cat([_features(_open(path, size), faces) for path in paths], 1)
    trunk = _open(joined)
    assert _close(_features(trunk, faces), expected)
    assert trunk.features == expected.shape[1]
    # they are trained as they were: BatchNorms stay, what was folded is scale and shift, no bias is added
    assert _parameters(trunk) == sum(_parameters(_open(path, size)) for path in paths)
    for kind in (nn.BatchNorm2d, ScaleAndShift):
        members = sum(_count(_open(path, size), kind) for path in paths)
        assert _count(trunk, kind) == members
    about = read_trunk(joined)[1]
    assert about["source"] == " + ".join(path.name for path in paths)
    assert about["input"]["size"] == size


def _parameters(trunk: Trunk) -> int:
    return sum(parameter.numel() for parameter in trunk.parameters())


def _count(trunk: Trunk, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in trunk.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", GRAPH, "folded"])
def test_a_trunk_file_converts_to_a_graph_that_computes_the_same(name: str, tmp_path: Path) -> None:
    source, dest = _write(name, tmp_path / "one.safetensors"), tmp_path / "graph.safetensors"
    main([str(source), str(dest), "--size", str(SIZE)])
    faces = _faces(SIZE)
    assert _close(_features(_open(dest), faces), _features(_open(source, SIZE), faces))


def test_the_first_trunk_decides_the_size(tmp_path: Path) -> None:
    vit, other = _write("test_vit", tmp_path / "vit.safetensors"), _write(GRAPH, tmp_path / "other.safetensors")
    main([str(vit), str(other), str(tmp_path / "joined.safetensors")])
    faces = _faces(160)
    expected = torch.cat([_features(_open(vit), faces), _features(_open(other, 160), faces)], 1)
    assert _close(_features(_open(tmp_path / "joined.safetensors"), faces), expected)


def _average(values: Tensor) -> Tensor:
    return values.mean((2, 3)) if values.ndim == 4 else values


def _modules(trunk: Trunk, layers: Sequence[str], faces: Tensor) -> Tensor:
    """What the modules of these names return, averaged over places and joined."""
    seen = dict[str, Tensor]()
    prefix = "nodes." if trunk.name == GRAPH else ""
    for layer in layers:
        trunk.net.get_submodule(prefix + layer).register_forward_hook(
            lambda module, inputs, values, layer=layer: seen.update({layer: _average(values.clone()).flatten(1)})
        )
    _features(trunk, faces)
    return torch.cat([seen[layer] for layer in layers], 1)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_efficientnet", ("blocks.3", "blocks.1", "blocks.0.0")),
        ("test_resnet", ("global_pool", "layer2.0", "maxpool")),
        (VGGFACE2, ("layer4", "layer3.5", "layer1")),
        (GRAPH, ("n9", "n6", "n2")),
    ],
)
def test_other_layers_are_those_of_its_modules(name: str, layers: tuple[str, ...], tmp_path: Path) -> None:
    source, dest = _write(name, tmp_path / "one.safetensors"), tmp_path / "layers.safetensors"
    output, *also = layers
    joined = [word for layer in also for word in ("--also", layer)]
    main([str(source), str(dest), "--size", str(SIZE), "--output", output, *joined])
    faces = _faces(SIZE)
    assert _close(_features(_open(dest), faces), _modules(_open(source, SIZE), layers, faces))


@pytest.mark.parametrize("name", ["features", "image", "relu", "net", "nodes", "val_3", "value/3", "features/0/pool"])
def test_a_layer_is_taken_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    model = small_network(SIZE)
    rename(model.graph, "n6", name)
    source = write_trunk(tmp_path / "one.safetensors", model, SIZE)
    main([str(source), str(tmp_path / "layer.safetensors"), "--output", name, "--also", "n2"])
    faces = _faces(SIZE)
    expected = _modules(_open(source), [name, "n2"], faces)
    assert _close(_features(_open(tmp_path / "layer.safetensors"), faces), expected)


@pytest.mark.parametrize("layer", ["sigmoid", "sigmoid_1", "conv2d_9", "mean_1"])
def test_names_that_an_exporter_gave_before_are_those_of_the_file(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=0).eval()
    _spread(net, 0)
    images, shapes = torch.zeros(2, 3, SIZE, SIZE), ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (images,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    source, dest = tmp_path / "net.safetensors", tmp_path / "layer.safetensors"
    main([str(tmp_path / "net.onnx"), str(source), "--channels=rgb", "--mean=127.5", "--std=127.5"])
    main([str(source), str(dest), "--output", layer])
    faces = _faces(SIZE)
    assert _close(_features(_open(dest), faces), _modules(_open(source), [layer], faces))


def test_layers_of_joined_trunks_are_counted_side_by_side(tmp_path: Path) -> None:
    paths = [_write(GRAPH, tmp_path / "a.safetensors"), _write("folded", tmp_path / "b.safetensors")]
    main([*map(str, paths), str(tmp_path / "joined.safetensors")])
    counts = [Counter(layer_of(_open(path).net).values()) for path in paths]
    assert Counter(layer_of(_open(tmp_path / "joined.safetensors").net).values()) == counts[0] + counts[1]


def test_images_have_the_size_of_the_file(tmp_path: Path) -> None:
    trunk = create_trunk("test_resnet")
    save_trunk(
        tmp_path / "one.safetensors", trunk.net.state_dict(), {"architecture": "test_resnet", "input": {"size": 96}}
    )
    main([str(tmp_path / "one.safetensors"), str(tmp_path / "graph.safetensors")])
    assert read_trunk(tmp_path / "graph.safetensors")[1]["input"]["size"] == 96


def test_a_classifier_is_left_out_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(GRAPH, tmp_path / "one.safetensors")
    state, about = read_trunk(source)
    save_trunk(source, state | {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.ones(5)}, about)
    main([str(source), str(tmp_path / "graph.safetensors")])
    assert re.search(r"left out +classifier", capsys.readouterr().out)


def test_a_forgotten_destination_costs_no_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    _write(GRAPH, one)
    _write(GRAPH, other)
    before = other.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main([str(one), str(other)])
    assert stopped.value.code == 2
    assert "name a DEST after it" in capsys.readouterr().err
    assert other.read_bytes() == before
    for _ in range(2):  # what it made itself it replaces
        main([str(one), str(other), str(third)])


def test_a_joined_trunk_is_trained_tested_and_exported(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(_write(kind, tmp_path / f"{kind}.safetensors")) for kind in ("folded", "test_resnet")]
    main([*paths, "joined.safetensors", "--size", str(SIZE)])
    words = ["--name=joined", "--seed_everything=1", "--data.image_size=64", "--data.batch_size=16"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1", "--ema=null", f"--data.root={faces}"]
    words += [f"--model.trunk={GRAPH}", "--model.weights=joined.safetensors", "--model.schedule.warmup=0"]
    results = fit.main(words)
    best = Path("runs/joined/version_0/checkpoints/best.ckpt")
    assert 0 <= results["test/gender/accuracy"] <= 1
    before, after = _open(Path("joined.safetensors")), read_checkpoint(best).module.model.trunk
    learned = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert learned == {name for name, _ in before.named_parameters()}
    constants = [name for name, _ in before.named_buffers() if name.endswith(".value")]
    assert constants  # how each prepares its images
    for name in constants:
        assert torch.equal(before.get_buffer(name), after.get_buffer(name))
    export.main([str(best), "joined.onnx"])
    assert Path("joined.onnx").is_file()


def test_a_joined_trunk_is_explained_by_the_last_maps_of_both(tmp_path: Path) -> None:
    paths = [_write(GRAPH, tmp_path / "a.safetensors", 1), _write("test_resnet", tmp_path / "b.safetensors", 2)]
    main([*map(str, paths), str(tmp_path / "joined.safetensors"), "--size", str(SIZE)])
    torch.manual_seed(0)
    model = FaceModel(_open(tmp_path / "joined.safetensors"), [UTKFACE["race"]], HeadOptions()).eval()
    face, features, maps = _faces(SIZE)[0], list[Tensor](), list[Tensor]()
    for path, layer in zip(paths, ("nodes.n9", "layer4"), strict=True):  # the same by hand, in the trunks themselves
        trunk = _open(path, SIZE)
        trunk.net.get_submodule(layer).register_forward_hook(lambda _, __, output: maps.append(output))
        features.append(trunk(face[None]))
    score = model.heads["race"](torch.cat(features, 1))[0, 3]
    gradients = torch.autograd.grad(score, maps)
    parts = [
        (values * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
        for values, gradient in zip(maps, gradients, strict=True)
    ]
    assert all(part.any() for part in parts)
    total = sum(functional.interpolate(part, (SIZE, SIZE), mode="bilinear") for part in parts)[0, 0].relu().detach()
    found = grad_cam(model, face, UTKFACE["race"], 3)
    np.testing.assert_allclose(found, (total / total.max()).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "--also=n2"], "each has layers of its own"),
        (["a", "b", "--output=n2"], "each has layers of its own"),
        (["a", "--mean=127.5"], "no --mean with a trunk file"),
        (["a", "b", "--channels=rgb", "--std=1"], "no --channels, --std with a trunk file"),
        (["a", "--keep-classifier"], "no --keep-classifier with a trunk file"),
        (["a", "--output=blocks.9"], "did you mean"),
        (["a", "--also=blocks.9"], "did you mean"),
        (["a", "--output=n9", "--also=n9"], "each once"),
        (["resnet", "--size=64", "--output=layer4", "--also=layer4.0"], "layer4 ends in layer4.0"),
        (["a", "fixed"], "Expected trunks that take images of 64 pixels, but fixed.safetensors can't"),
        (["fixed", "a", "--size=64"], "Expected trunks that take images of 64 pixels, but fixed.safetensors can't"),
        (["a", "--size=16"], "take images of 16 pixels, but a.safetensors can't: it takes 64 pixels or more"),
        (["a", "b", "--size=16"], "take images of 16 pixels, but a.safetensors can't: it takes 64 pixels or more"),
        (["a", "nothing"], "Expected a trunk file at nothing.safetensors, but there is none"),
        (["a", "other"], "Expected a timm model as trunk, but got 'no_such_model'"),
        (["a", "test_convnext", "--size=96"], "Expected trunks that can be a graph"),
        (["a", "network.onnx"], "convert it alone first"),
        (["network.onnx", "a"], "convert it alone first"),
        (["a", "text"], "is none; make one with"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_a_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        _write(GRAPH, Path(f"{name}.safetensors"))
    if "resnet" in words:
        _write("test_resnet", Path("resnet.safetensors"))
    if "test_convnext" in words:
        _write("test_convnext", Path("test_convnext.safetensors"))
    save_trunk(Path("other.safetensors"), {"x": torch.ones(1)}, {"architecture": "no_such_model"})
    if "fixed" in words:
        _write("test_vit", Path("vit.safetensors"))
        main(["vit.safetensors", "fixed.safetensors", "--size=96"])  # in a graph attention has its size
    onnx.save(small_network(SIZE), "network.onnx")
    Path("text.safetensors").write_text("hello")
    files = [word if "." in word or word.startswith("-") else f"{word}.safetensors" for word in words]
    with pytest.raises(SystemExit) as stopped:
        main([*files, "dest.safetensors"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("dest.safetensors").exists()


def test_a_source_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = _write(GRAPH, tmp_path / "a.safetensors"), _write(GRAPH, tmp_path / "b.safetensors")
    before = other.read_bytes()
    with pytest.raises(SystemExit):
        main([str(one), str(other), str(other)])
    assert other.read_bytes() == before
    assert "b.safetensors" in capsys.readouterr().err
