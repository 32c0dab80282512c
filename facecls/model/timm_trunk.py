"""timm's models as trunks: with random weights or timm's own, and for other image sizes than they were trained at."""

import difflib
from typing import Any

import timm
import torch
from torch import nn

from facecls.errors import UserError

PRETRAINED = "pretrained"
"""As ``model.weights``: timm's own."""


def create_timm(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    """Creates a timm model without its classifier.

    Convolutional networks take images of any size. Transformers that can interpolate their position embeddings do so;
    others, such as CaiT, are built for one size, which is their attribute ``fixed_size``.

    Args:
        name: Its name, with or without a tag that says which weights (``resnet10t.c3_in1k``).
        pretrained: Whether to load timm's weights, from the cache of the Hugging Face hub or from the hub.
        image_size: Side of the images in pixels; ``None`` for what it was trained at.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If timm does not know the name, has no weights for it or can't get them, or the model can't take
            images of that size.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"Expected a timm model as trunk, but got {name!r}; {_did_you_mean(near)}")
    if pretrained and not timm.is_model_pretrained(name):
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=3)
        raise UserError(
            f"Expected a model that timm has weights for, but it has none for {name}; {_did_you_mean(near)}"
        )
    options = _size_options(name, image_size)
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:
        if not pretrained:
            raise
        # of the hub, of the connection or of the file, by what went wrong
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Can't get timm's weights of {name} ({type(error).__name__}: {reason}); connect to huggingface.co once, "
            "copy its cache (HF_HOME) from a machine that has them, or name a trunk file as model.weights."
        ) from None
    if "img_size" in options:
        net.fixed_size = image_size  # type: ignore[assignment]
    return net


def _did_you_mean(near: list[str]) -> str:
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "timm.list_models() lists the names."


def _size_options(name: str, image_size: int | None) -> dict[str, Any]:
    """How a model is created for images of a size."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size or image_size is None:
        return {}
    with torch.device("meta"):  # takes neither memory nor time
        plain = timm.create_model(name, num_classes=0)
        candidates: list[dict[str, Any]] = [{"img_size": image_size}]
        if image_size == config.input_size[-1]:
            candidates = [{}]
        elif hasattr(plain, "dynamic_img_size"):
            candidates = [{"dynamic_img_size": True}]
        for options in candidates:
            try:
                net = timm.create_model(name, num_classes=0, **options).eval()
                net(torch.empty(2, 3, image_size, image_size))
                return options
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
    raise UserError(
        f"Expected a data.image_size that {name} takes, such as {config.input_size[-1]}, but got {image_size}: {reason}"
    )
