"""FaRL's layout: a CLIP checkpoint of OpenAI's form, made and run by open_clip, becomes the same trunk in timm."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from convert.clip import ARCHITECTURE
from facecls.model.trunk import create_trunk, read_trunk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Any:
    """CLIP's ViT-B/16 with OpenAI's activation, a small tower of texts, and random weights that are not small."""
    torch.manual_seed(0)
    images = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    texts = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(512, images, texts, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As FaRL's file: a state dict of both towers, and the epoch."""
    path = tmp_path_factory.mktemp("clip") / "farl.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 64}, path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    dest = checkpoint.with_name("farl.safetensors")
    main([str(checkpoint), str(dest)])
    return dest


def _images() -> Tensor:
    coarse = torch.randint(0, 256, (2, 3, 14, 14), generator=torch.Generator().manual_seed(1))
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3).to(torch.uint8)


def test_the_trunk_gives_what_open_clip_gives(model: Any, converted: Path) -> None:
    trunk = create_trunk(ARCHITECTURE, converted).eval()
    images = _images()
    model.visual.proj = None  # the features before the projection
    with torch.inference_mode():
        expected = model.visual((images - trunk.mean) / trunk.std)
        found = trunk(images)
    assert found.shape == (2, 768)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert read_trunk(converted)[1]["input"]["size"] == 224


def test_the_usual_activation_is_another_network(converted: Path) -> None:
    state, _ = read_trunk(converted)
    other = create_trunk("vit_base_patch16_clip_224").eval()
    other.net.load_state_dict(state)
    with torch.inference_mode():
        found, wrong = create_trunk(ARCHITECTURE, converted).eval()(_images()), other(_images())
    assert (found - wrong).abs().max() > 1e-2 * found.abs().max()


def _half(kept: dict[str, Any]) -> Any:
    return {name: tensor.half() for name, tensor in kept["state_dict"].items()}


def test_half_precision_without_a_wrapper_is_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.pt"
    torch.save(_half(torch.load(checkpoint, weights_only=True)), path)
    main([str(path), str(tmp_path / "t.safetensors")])
    assert "CLIP's image tower, PyTorch" in capsys.readouterr().out
    assert read_trunk(tmp_path / "t.safetensors")[0]["patch_embed.proj.weight"].dtype == torch.float32


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda kept: {key: value for key, value in kept["state_dict"].items() if key != name}


def _with(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda kept: kept["state_dict"] | {name: value}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tower": (lambda kept: {"a": torch.zeros(3)}, r"image tower in OpenAI's layout .* has none"),
    "no dictionary": (lambda kept: [1, 2], "has none"),
    "other patches": (_with("visual.conv1.weight", torch.zeros(768, 3, 32, 32)), r"but .* has \(768, 3, 32, 32\)"),
    "missing": (_without("visual.ln_post.bias"), r"norm\.bias of shape \(768,\) is missing"),
    "another": (_with("visual.more.weight", torch.zeros(3)), "more.weight .* is not one of them"),
    "NaN": (_with("visual.ln_post.bias", torch.full((768,), float("nan"))), "holds NaN or Inf"),
    "a view": (_with("visual.ln_post.bias", torch.zeros(1).expand(1 << 34)), "larger than the file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files_are_refused(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = WRONG[name]
    path = tmp_path / "x.pth"
    torch.save(edit(torch.load(checkpoint, weights_only=True)), path)
    with pytest.raises(SystemExit) as end:
        main([str(path), str(tmp_path / "t.safetensors")])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert re.search(message, said), said
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02c__builtin__\neval\n"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "t.safetensors")])
    assert "Expected a file of PyTorch tensors, but could not read" in capsys.readouterr().err


def test_options_for_other_files_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(checkpoint), str(tmp_path / "t.safetensors"), "--mean=1", "--output=x"])
    assert "no --mean, --output with a CLIP checkpoint" in capsys.readouterr().err
