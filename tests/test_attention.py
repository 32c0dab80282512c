"""Grad-CAM agrees with gradients taken by hand, whatever form the trunk's features have, and leaves the model alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facecls.analysis.gradcam import grad_cam, overlay
from facecls.data.tasks import UTKFACE, Classification, Task
from facecls.model.heads import HeadOptions
from facecls.model.network import FaceModel
from facecls.model.trunk import Trunk, create_trunk

PATCH = 8
GLASSES = Classification("glasses", ("without", "with"))
TASKS = (*UTKFACE.values(), GLASSES)
GENDER, RACE, AGE, _ = TASKS


class TinyNet(nn.Module):
    """As timm's nets are built: one convolution of patches, its features in one of timm's forms, their average."""

    head_hidden_size = num_features = 6
    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # noqa: RUF012 - as timm's

    def __init__(self, form: str = "NCHW", prefix: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, PATCH, PATCH)
        self.norm = nn.BatchNorm2d(6)
        self.form = form
        if prefix:
            self.num_prefix_tokens = prefix

    def forward_features(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x))
        if self.form == "NCHW":
            return x
        if self.form == "NHWC":
            return x.permute(0, 2, 3, 1)
        prefix = getattr(self, "num_prefix_tokens", 0)
        tokens = torch.cat([x.new_full((len(x), prefix, 6), 9.0), x.flatten(2).transpose(1, 2)], 1)
        return {"list": [tokens], "odd": tokens[:, 1:]}.get(self.form, tokens)

    def forward_head(self, x: Tensor) -> Tensor:
        if self.form == "NCHW":
            return x.mean((2, 3))
        return x.mean((1, 2)) if self.form == "NHWC" else x[:, getattr(self, "num_prefix_tokens", 0) :].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def tiny(form: str = "NCHW", prefix: int = 0, age: Any = "distribution") -> FaceModel:
    torch.manual_seed(3)
    return FaceModel(Trunk(TinyNet(form, prefix), "tiny"), TASKS, HeadOptions([8], 0.5, age)).eval()


def random_image(*size: int) -> Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(features: Tensor, score: Tensor, size: tuple[int, int], form: str = "NCHW") -> npt.NDArray[np.float32]:
    """Selvaraju et al. 2017, equations 1 and 2, for features in one of timm's forms that lead to the score."""
    (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
    features = features.detach()
    if form == "class token":
        features, gradient = features[:, 1:], gradient[:, 1:]
    if form in {"NLC", "class token"}:
        side = round(features.shape[1] ** 0.5)
        features, gradient = features.unflatten(1, (side, side)), gradient.unflatten(1, (side, side))
    if form != "NCHW":
        features, gradient = features.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True))
    cam = F.interpolate(cam, size, mode="bilinear", align_corners=False)[0, 0]
    return (cam / cam.max() if cam.max() > 0 else cam).numpy()


SCORES: dict[str, tuple[Task, int | None, Any, Callable[[Tensor], Tensor]]] = {
    "gender 0": (GENDER, 0, "distribution", lambda logits: logits[0, 0]),
    "gender 1": (GENDER, 1, "distribution", lambda logits: logits[0, 1]),
    "race predicted": (RACE, None, "distribution", lambda logits: logits[0].max()),
    "glasses 1": (GLASSES, 1, "distribution", lambda logits: logits[0, 1]),
    "expected age": (AGE, None, "distribution", lambda logits: logits[0].softmax(0) @ torch.arange(117.0)),
    "age by regression": (AGE, None, "regression", lambda logits: 116 * logits[0, 0].sigmoid()),
}


@pytest.mark.parametrize("what", SCORES)
def test_it_agrees_with_gradients_by_hand(what: str) -> None:
    task, target, age, score = SCORES[what]
    model, image = tiny(age=age), random_image(64, 96)
    for head in model.heads.values():
        head.temperature.fill_(3.0)  # calibration changes no age and no class
    features = model.trunk.net.forward_features(image[None].float())
    hand = by_hand(features, score(model.heads[task.name](model.trunk.net.forward_head(features))), (64, 96))
    assert hand.max() == 1
    np.testing.assert_allclose(grad_cam(model, image, task, target), hand, atol=1e-5)


@pytest.mark.parametrize(("form", "prefix"), [("NHWC", 0), ("NLC", 0), ("NLC", 1), ("NLC", 5)])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (80, 64)])
def test_the_form_of_the_features_does_not_matter(form: str, prefix: int, size: tuple[int, int]) -> None:
    image = random_image(*size)
    expected = grad_cam(tiny(), image, GENDER)
    np.testing.assert_allclose(grad_cam(tiny(form, prefix), image, GENDER), expected, atol=1e-5)


def test_the_map_is_highest_on_the_patch_that_decides() -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.trunk.net.conv.weight[0, 0] = 1.0  # red
        model.trunk.net.norm.weight.fill_(1.0)
        layers = model.heads["race"].layers
        for layer in (layers[1], layers[4]):
            layer.weight[2, 0] = 1.0
        layers[4].weight[2] = 1.0
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[0, 48:56, 16:24] = 200
    image[1, 8:16, 72:80] = 255  # green says nothing
    cam = grad_cam(model, image, RACE, 2)
    row, column = divmod(int(cam.argmax()), 96)
    assert 48 <= row < 56
    assert 16 <= column < 24
    assert cam[8:16, 72:80].max() == 0
    assert not grad_cam(model, image, RACE, 1).any()  # nothing speaks for it


TRUNKS: dict[str, tuple[int, str]] = {
    "resnet18": (64, "NCHW"),
    "vggface2_resnet50": (64, "NCHW"),
    "tf_efficientnet_lite0": (64, "NCHW"),
    "mobilenetv4_conv_small": (64, "NCHW"),
    "convnext_atto": (64, "NCHW"),
    "swin_tiny_patch4_window7_224": (224, "NHWC"),
    "mixer_s32_224": (224, "NLC"),
    "vit_tiny_patch16_224": (224, "class token"),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_it_agrees_with_gradients_by_hand_for_trunks_of_timm(name: str) -> None:
    side, form = TRUNKS[name]
    torch.manual_seed(0)
    model = FaceModel(create_trunk(name), [GENDER], HeadOptions(dropout=0.2)).eval()
    image = random_image(side, side)
    net: Any = model.trunk.net
    normed: list[Tensor] = []
    if form == "class token":  # the last that the token reads of the patches is what goes into the last attention
        hook = net.blocks[-1].attn.register_forward_pre_hook(lambda layer, inputs: normed.append(inputs[0]))
    features = net.forward_features((image[None] - model.trunk.mean) / model.trunk.std)
    logits = model.heads["gender"](net.forward_head(features))
    if form == "class token":
        hook.remove()
        features = normed[0]
    maps = [by_hand(features, logits[0, target], (side, side), form) for target in (0, 1)]
    assert max(cam.max() for cam in maps) == 1
    for target, cam in enumerate(maps):
        np.testing.assert_allclose(grad_cam(model, image, GENDER, target), cam, atol=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    model, image = tiny("NLC", 1).train(), random_image(64, 64)
    model.trunk.net.norm.eval()  # as the schedule keeps frozen norms
    model.trunk.requires_grad_(False)
    evaluated = grad_cam(tiny("NLC", 1), image, AGE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            np.testing.assert_array_equal(grad_cam(model, image.clone(), AGE), evaluated)
            assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.trunk.parameters()] == [False] * 4
    assert all(p.requires_grad for p in model.heads.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooks
    assert torch.equal(image, random_image(64, 64))


def test_the_class_token_of_a_frozen_model_is_explained_without_traces() -> None:
    torch.manual_seed(0)
    model = FaceModel(create_trunk("vit_tiny_patch16_224"), [GENDER], HeadOptions(dropout=0.2)).requires_grad_(False)
    with torch.no_grad():
        maps = [grad_cam(model, random_image(224, 224), GENDER, target) for target in (0, 1)]
    assert max(cam.max() for cam in maps) == 1
    assert model.training
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_what_cannot_be_explained_is_refused() -> None:
    model, image = tiny(), random_image(64, 64)
    with pytest.raises(ValueError, match=r"\(3, H, W\) of uint8, but got \(3, 64, 64\) of torch.float32"):
        grad_cam(model, image.float(), GENDER)
    with pytest.raises(ValueError, match=r"but got \(64, 64, 3\) of torch.uint8"):
        grad_cam(model, image.permute(1, 2, 0), GENDER)
    with pytest.raises(ValueError, match=r"a class from 0 to 1 or None as target of gender, but got 2"):
        grad_cam(model, image, GENDER, 2)
    with pytest.raises(ValueError, match=r"Expected None as target of age, but got 30"):
        grad_cam(model, image, AGE, 30)
    with pytest.raises(ValueError, match=r"one of the model's tasks race, but got age"):
        grad_cam(FaceModel(model.trunk, [RACE], HeadOptions()), image, AGE)
    with pytest.raises(ValueError, match="but the trunk gives list"):
        grad_cam(tiny("list"), image, GENDER)
    with pytest.raises(ValueError, match=r"but the trunk gives \(1, 63, 6\)"):  # they fill no square
        grad_cam(tiny("odd"), image, GENDER)


def test_overlay_colours_what_counts_and_leaves_the_rest() -> None:
    image = random_image(4, 6)
    cam = np.zeros((4, 6), np.float32)
    cam[1, 2], cam[3, 5] = 1.0, 0.5
    laid = overlay(image, cam)
    assert (laid.shape, laid.dtype) == ((4, 6, 3), np.uint8)
    face = image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(laid[cam == 0], face[cam == 0])
    # the end and the middle of viridis: #fde725 and #21918c
    np.testing.assert_allclose(laid[1, 2], 0.4 * face[1, 2] + 0.6 * np.array([0xFD, 0xE7, 0x25]), atol=1)
    np.testing.assert_allclose(laid[3, 5], 0.7 * face[3, 5] + 0.3 * np.array([0x21, 0x91, 0x8C]), atol=1)
