"""The trunk against PyTorch's own layers put together by hand, and its contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from facecls.errors import UserError
from facecls.model import timm_trunk
from facecls.model.trunk import VGGFACE2, VGGFACE2_MEAN, Trunk, create_trunk, read_trunk, save_trunk


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    torch.manual_seed(0)
    trunk = create_trunk(VGGFACE2).eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return trunk


def _by_hand(state: dict[str, Tensor], images: Tensor, size_before: int, size_after: int) -> Tensor:
    """The geometry of facts about the Keras file, written with functions; ``size_*``: the padding of the stem."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)
        statistics = (state[f"{norm}.running_mean"], state[f"{norm}.running_var"])
        return F.batch_norm(x, *statistics, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-3)

    x = images.float() - torch.tensor(VGGFACE2_MEAN).view(1, 3, 1, 1)
    x = F.pad(x, (size_before, size_after) * 2)
    x = F.max_pool2d(conv(x, "conv1", "bn1", stride=2).relu(), 3, 2)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = conv(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = conv(y, f"{name}.conv2", f"{name}.bn2", padding=1).relu()
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            shortcut = conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if block == 0 else x
            x = (y + shortcut).relu()
    return x.mean((2, 3))


@pytest.mark.parametrize(("size", "before", "after"), [(224, 2, 3), (64, 2, 3), (97, 3, 3)])
def test_geometry_is_that_of_the_keras_model(trunk: Trunk, size: int, before: int, after: int) -> None:
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = trunk(images), _by_hand(trunk.net.state_dict(), images, before, after)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_the_mean_of_black_is_not_zero_and_the_mean_of_the_mean_is(trunk: Trunk) -> None:
    mean = torch.tensor(VGGFACE2_MEAN).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    with torch.no_grad():
        inside = []
        hook = trunk.net.conv1.register_forward_pre_hook(lambda _, inputs: inside.append(inputs[0]))
        trunk(mean)
        hook.remove()
    assert inside[0].abs().max() == 0


def test_uint8_and_float_give_the_same(trunk: Trunk) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(trunk(images), trunk(images.float()))


@pytest.mark.parametrize("count", [0, 1, 16, 37])
def test_a_batch_in_pieces_gives_what_it_gives_at_once(count: int) -> None:
    trunk = create_trunk("test_resnet").eval()
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    at_once = trunk(images)  # with gradients nothing is cut
    sizes = []
    trunk.net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        in_pieces = trunk(images)
    assert sum(sizes) == count
    assert max(sizes) <= 16
    torch.testing.assert_close(in_pieces, at_once, rtol=1e-5, atol=1e-6)


def test_floats_of_0_to_1_are_refused(trunk: Trunk) -> None:
    with pytest.raises(ValueError, match=r"Expected images with values 0\.\.255, but got floats up to 1"):
        trunk(torch.ones(1, 3, 64, 64))
    trunk(torch.ones(1, 3, 64, 64, dtype=torch.uint8))  # nearly black, but uint8 can't be meant as 0..1


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64), (1, 3, 63, 64)])
def test_other_shapes_are_refused(trunk: Trunk, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected images of shape"):
        trunk(torch.zeros(shape, dtype=torch.uint8))


def test_other_timm_models_take_their_own_mean_and_std() -> None:
    trunk = create_trunk("resnet10t")
    assert trunk.mean.flatten().tolist() == pytest.approx([255 * 0.485, 255 * 0.456, 255 * 0.406])
    assert trunk.std.flatten().tolist() == pytest.approx([255 * 0.229, 255 * 0.224, 255 * 0.225])


@pytest.mark.parametrize(("name", "features"), [("test_resnet", 96), ("test_vit", 64)])
def test_models_that_compute_while_they_are_built(name: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm's RegNets did before 1.0.30: the meta device, on which models are tried, has no numbers."""
    real = timm.create_model

    def create(name: str, **options: Any) -> nn.Module:
        torch.unique(torch.arange(3.0))
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    timm_trunk._size_options.cache_clear()
    assert create_trunk(name, image_size=96)(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, features)


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UserError, match=r"'resnet51'; did you mean .*resnet50"):
        create_trunk("resnet51")


def test_a_trunk_file_is_the_same_bytes_each_time_and_reads_back(trunk: Trunk, tmp_path: Path) -> None:
    metadata = {"architecture": VGGFACE2, "input": {"size": 224, "mean": list(VGGFACE2_MEAN)}, "b": 1, "a": 2}
    for name in ("one", "two"):
        save_trunk(tmp_path / name, trunk.net.state_dict(), metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    state, told = read_trunk(tmp_path / "one")
    assert told == metadata
    assert all(torch.equal(state[name], tensor) for name, tensor in trunk.net.state_dict().items())
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(create_trunk(VGGFACE2, tmp_path / "one").eval()(images), trunk(images))


def _write(path: Path, state: dict[str, Tensor], architecture: str = "resnet10t") -> Path:
    save_file(state, path, {"facecls": json.dumps({"architecture": architecture})})
    return path


@pytest.mark.parametrize("metadata", ["[]", "{}", "null", '"x"', '{"architecture": 1}', "{"])
def test_a_file_that_does_not_say_what_it_holds_is_no_trunk_file(metadata: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "trunk.safetensors", {"facecls": metadata})
    with pytest.raises(UserError, match=r"Expected a trunk file, but .* is none"):
        create_trunk("graph", tmp_path / "trunk.safetensors")


def test_loading_is_strict(tmp_path: Path) -> None:
    state = create_trunk("resnet10t").net.state_dict()
    path = tmp_path / "trunk.safetensors"
    fewer = {name: tensor for name, tensor in state.items() if name != "layer1.0.bn1.bias"}
    for wrong, words in (
        (fewer, r"layer1\.0\.bn1\.bias is missing \(1 such"),
        ({**state, "more": torch.zeros(1)}, "more is not part of the trunk"),
        ({**state, "layer1.0.bn1.bias": torch.zeros(3)}, r"layer1\.0\.bn1\.bias is \(3,\), not \(64,\)"),
    ):
        with pytest.raises(UserError, match=words):
            create_trunk("resnet10t", _write(path, wrong))
    with pytest.raises(UserError, match=r"Expected weights of resnet10t, but .* holds resnet18"):
        create_trunk("resnet10t", _write(path, state, "resnet18"))
    create_trunk("resnet10t", _write(path, {**state, "classifier.weight": torch.zeros(1)}))  # kept for identify


def test_a_missing_or_foreign_file_says_how_to_get_one(tmp_path: Path) -> None:
    advice = r"there is none; convert a network with `python -m convert FILE .*`python -m facecls\.download weights`"
    with pytest.raises(UserError, match=advice):
        create_trunk(VGGFACE2, tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name in ("text", "foreign"):
        with pytest.raises(UserError, match="Expected a trunk file"):
            create_trunk(VGGFACE2, tmp_path / name)
