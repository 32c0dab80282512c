"""Where in a face a prediction comes from: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), computed by captum."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from facecls.data.tasks import Classification, Task
from facecls.model.graph import GraphNet
from facecls.model.network import FaceModel
from facecls.model.trunk import Trunk

_COLOURS = "viridis"
"""Perceptually uniform, and without the hues of skin."""
_OPACITY = 0.6
"""Opacity of the colours where the map is 1, so that the face stays visible."""


def grad_cam(model: FaceModel, image: Tensor, task: Task, target: int | None = None) -> npt.NDArray[np.float32]:
    """Maps how much each location of a face contributes to what a head predicts.

    Locations are those of the trunk's last feature map, as timm's ``forward_features`` returns it. For transformers
    whose head reads only a class token, they are those of the last layer from which that token reads the patches. For
    networks that were joined, the map is the sum of those of each. The model is left unchanged, including training mode
    and frozen parameters.

    Args:
        model: With a timm trunk whose last features are a single map or a single sequence of tokens.
        image: (3, H, W) uint8 RGB, of a size that the trunk takes.
        task: One of the model's tasks.
        target: The class whose logit is explained, ``None`` for the predicted one. ``None`` for an age, whose map shows
            what raises the predicted age.

    Returns:
        (H, W) float32: 1 where the face contributes most to the target, 0 where it contributes nothing or counts
        against it; 0 everywhere if nothing contributes to it.

    Raises:
        ValueError: If an argument is not as described, or the trunk's features have no locations.
    """
    _check(model, image, task, target)
    size = (image.shape[1], image.shape[2])
    with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
        images = image[None].to(model.trunk.mean.device, model.trunk.mean.dtype, copy=True).requires_grad_()
        if layers := _last_maps(model.trunk, images):
            scores = [_Score(model, task, target, size, layer) for layer in layers]
            relevance = torch.stack([_resized(_relevance(score, images), size) for score in scores]).sum(0)
        else:
            relevance = _relevance(_Score(model, task, target, size), images)
        if not relevance.any() and (layer := _last_layer_read(_Score(model, task, target, size), images)) is not None:
            relevance = _relevance(_Score(model, task, target, size, layer), images)
        cam = _resized(relevance.relu(), size)[0, 0]  # (H, W)
    scaled: npt.NDArray[np.float32] = (cam / cam.max().clamp(min=torch.finfo(cam.dtype).tiny)).cpu().numpy()
    return scaled


def overlay(image: Tensor, cam: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Colours a face by its map: the higher the map, the stronger the colour.

    Args:
        image: (3, H, W) uint8 RGB.
        cam: (H, W) 0..1, as ``grad_cam`` returns it.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colours = 255 * mpl.colormaps[_COLOURS](cam)[..., :3]  # (H, W, 3)
    opacity = _OPACITY * cam[..., None]
    mixed = (1 - opacity) * image.permute(1, 2, 0).cpu().numpy() + opacity * colours
    laid: npt.NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return laid


def _check(model: FaceModel, image: Tensor, task: Task, target: int | None) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"Expected an image (3, H, W) of uint8, but got {tuple(image.shape)} of {image.dtype}.")
    if task.name not in model.heads:
        raise ValueError(f"Expected one of the model's tasks {', '.join(model.heads)}, but got {task.name}.")
    classes = len(task.classes) if isinstance(task, Classification) else 0
    if target is not None and not 0 <= target < classes:
        allowed = f"a class from 0 to {classes - 1} or None" if classes else "None"
        raise ValueError(f"Expected {allowed} as target of {task.name}, but got {target}.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores the mode of each module afterwards, which may differ from that of its parent."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Places(nn.Module):
    """Returns features unchanged, and passes those with a location through ``maps`` as (N, C, h, w).

    Args:
        net: The timm model whose features they are.
        size: (H, W) of the images.
    """

    def __init__(self, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.maps = nn.Identity()
        self.channels = net.num_features
        self.prefix: int = getattr(net, "num_prefix_tokens", 0)  # class and register tokens
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        shape = tuple(getattr(features, "shape", ()))
        if len(shape) == 4 and shape[1] == (self.channels or shape[1]):  # joined networks have several maps
            return self.maps(features)  # type: ignore[no-any-return]
        if len(shape) == 4 and shape[3] == self.channels:
            return self.maps(features.movedim(3, 1)).movedim(1, 3)  # type: ignore[no-any-return]
        if len(shape) == 3 and (height := self._height(shape[1] - self.prefix)):
            maps: Tensor = self.maps(features[:, self.prefix :].mT.reshape(shape[0], shape[2], height, -1))
            return torch.cat([features[:, : self.prefix], maps.flatten(2).mT], 1)
        got = shape or type(features).__name__
        raise ValueError(f"Expected features (N, C, h, w), (N, h, w, C) or (N, h * w, C), but the trunk gives {got}.")

    def _height(self, patches: int) -> int:
        """Number of rows of patches, in the aspect ratio of the image; 0 if they do not fill it."""
        height = round((patches * self.size[0] / self.size[1]) ** 0.5)
        return height if height and patches % height == 0 else 0


class _Score(nn.Module):
    """Faces -> the number (N,) that is explained.

    Args:
        model: Trunk and heads.
        task: The task whose head is explained.
        target: As in ``grad_cam``.
        size: (H, W) of the images.
        layer: The layer of the trunk whose output has the locations; ``None`` for the trunk's last features.
    """

    def __init__(
        self, model: FaceModel, task: Task, target: int | None, size: tuple[int, int], layer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.target = target
        self.layer = layer
        self.places = _Places(model.trunk.net, size)

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.model.trunk
        inputs = (images - trunk.mean) / trunk.std
        if self.layer is None:
            features = self.places(trunk.net.forward_features(inputs))  # type: ignore[operator]
        else:
            hook = self.layer.register_forward_hook(lambda layer, inputs, output: self.places(output))
            try:
                features = trunk.net.forward_features(inputs)  # type: ignore[operator]
            finally:
                hook.remove()
        head = self.model.heads[self.task.name]
        return head.score(head(trunk.net.forward_head(features)), self.target)  # type: ignore[operator]


def _relevance(score: _Score, images: Tensor) -> Tensor:
    """Grad-CAM before the ReLU, (1, 1, h, w)."""
    relevance: Tensor = LayerGradCam(score, score.places.maps).attribute(images).detach()
    return relevance


def _resized(relevance: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (1, 1, h, w) at the size of the images."""
    resized: Tensor = LayerAttribution.interpolate(relevance, size, "bilinear")
    return resized


def _last_maps(trunk: Trunk, images: Tensor) -> list[nn.Module]:
    """The layers of joined networks whose outputs are their last maps; none if one has no map, or for a single one."""
    net = trunk.net
    if not isinstance(net, GraphNet) or not net.joined:
        return []
    outputs: dict[str, Tensor] = {}
    layers = {name: getattr(net.nodes, name) for cuts in net.joined for name in cuts}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        trunk(images.detach())
    for hook in hooks:
        hook.remove()
    maps = [
        [name for name in cuts if outputs[name].ndim == 4 and outputs[name][0, 0].numel() > 1] for cuts in net.joined
    ]
    return [layers[names[-1]] for names in maps] if all(maps) else []


def _last_layer_read(score: _Score, images: Tensor) -> nn.Module | None:
    """The last layer whose patches affect the score, if the trunk's features are tokens.

    Where only the class token is pooled, the patches of the last features have no effect; the last layer from which it
    reads them is the norm before the last attention.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []

    def keep(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 3 and output.requires_grad:  # constants don't
            outputs.append((layer, output))

    hooks = [layer.register_forward_hook(keep) for layer in score.modules()]
    try:
        total = score(images).sum()
    finally:
        for hook in hooks:
            hook.remove()
    shape = next((output.shape for layer, output in outputs if layer is score.places), None)
    tokens = [(layer, output) for layer, output in outputs if output.shape == shape]
    if not tokens:
        return None
    gradients = torch.autograd.grad(total, [output for _, output in tokens], allow_unused=True)
    for (layer, _), gradient in zip(reversed(tokens), reversed(gradients), strict=True):
        if gradient is not None and gradient[:, score.places.prefix :].any():
            return layer
    return None
