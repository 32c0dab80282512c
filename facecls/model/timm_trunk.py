"""timm's models as trunks: their names, their own pre-trained weights, and the sizes of images that they take."""

import difflib
import inspect
from contextlib import suppress
from functools import cache
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from torch import nn

from facecls.errors import UserError

PRETRAINED = "pretrained"
"""In place of a trunk file: timm's own weights."""


def create_timm(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    """Creates a timm model without its classifier.

    Models that can take images of any size are created so (``dynamic_img_size``). Others that need to know the size are
    created for one, which is their attribute ``fixed_size``; timm resamples its weights to it where it can.

    Args:
        name: Of the model, with or without a tag that says which weights, such as ``resnet10t.c3_in1k``.
        pretrained: Whether to load timm's own weights, from the cache of Hugging Face's hub or from the hub.
        image_size: Side of its images in pixels; ``None`` for what it was trained at.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If timm does not know the name, the model does not take such images or can't be trained in layers,
            or the weights don't exist or can't be had.
    """
    config = _check_name(name)
    if pretrained and not (config and config.has_weights):
        raise UserError(
            f"Expected a trunk with pre-trained weights, but timm has none for {name}; "
            f"{_did_you_mean(name, timm.list_pretrained())} Or name a trunk file as model.weights."
        )
    options = _size_options(name, image_size)
    if config and pretrained:
        net = _create_pretrained(name, config, options)
    else:
        net = timm.create_model(name, num_classes=0, **options)
    if "img_size" in options:
        net.fixed_size = options["img_size"]
    return net


def _check_name(name: str) -> PretrainedCfg | None:
    """What timm knows of a model's weights."""
    if not timm.is_model(name):
        raise UserError(f"Expected a timm model as trunk, but got {name!r}; {_did_you_mean(name, timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UserError(
            f"Expected a name with a tag that timm knows as trunk, but got {name!r}; {_did_you_mean(name, tagged)}"
        ) from None


def _did_you_mean(name: str, names: list[str]) -> str:
    """The nearest names; where only some have a tag, by their architecture."""
    architectures = {each.partition(".")[0]: each for each in reversed(names)} | {each: each for each in names}
    near = dict.fromkeys(architectures[each] for each in difflib.get_close_matches(name, architectures, n=6))
    if near:
        return f"did you mean {' or '.join(list(near)[:3])}?"
    return "timm.list_models() lists the names."


@cache
def _size_options(name: str, image_size: int | None) -> dict[str, Any]:
    """The arguments of the model that make it take images of a size; tried on the meta device, which computes shapes.

    timm's own record of a model, its configuration, does not say whether it takes ``dynamic_img_size``.
    """
    net: Any = _outline(name)  # with what timm gives its models
    if not hasattr(net, "group_matcher"):
        raise UserError(f"Expected a trunk whose layers timm counts, but {name} is none; choose another.")
    usual: int = net.pretrained_cfg["input_size"][-1]
    options: dict[str, Any] = {}
    kinds = [kind for kind in type(net).__mro__ if issubclass(kind, nn.Module)]  # some pass on what their base takes
    if any("dynamic_img_size" in inspect.signature(kind).parameters for kind in kinds):
        options = {"dynamic_img_size": True}
    elif net.pretrained_cfg.get("fixed_input_size"):
        options = {"img_size": image_size or usual}
    if image_size in (None, usual):
        return options
    try:
        sized = _outline(name, **options) if options else net
        with torch.device("meta"), torch.no_grad():
            sized.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # timm's models check sizes in many ways, or not at all
        raise UserError(
            f"Expected data.image_size as {name} takes it, such as {usual}, but got {image_size}"
            f"{_in_brackets(error)}; choose another size or another trunk."
        ) from None
    return options


def _outline(name: str, **options: Any) -> nn.Module:
    """A model without weights, on the meta device."""
    try:
        with torch.device("meta"):
            net: nn.Module = timm.create_model(name, num_classes=0, **options)
    except NotImplementedError:  # up to timm 1.0.29 some, such as RegNets, compute their widths with tensors
        net = timm.create_model(name, num_classes=0, **options).to("meta")
    return net


def _create_pretrained(name: str, config: PretrainedCfg, options: dict[str, Any]) -> nn.Module:
    where = f"{ENDPOINT}/{config.hf_hub_id}" if config.hf_hub_id else config.url
    cache = HF_HUB_CACHE if config.hf_hub_id else torch.hub.get_dir()
    try:
        if config.hf_hub_id and not HF_HUB_OFFLINE:
            _reach(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        # with the classifier, since timm lets any tensor be missing as soon as the classifier's may
        net: nn.Module = timm.create_model(name, pretrained=True, **options)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"Expected timm's weights of {name}, but those from {where} do not fit it{_in_brackets(error)}; delete "
            f"them from the cache {cache} to get them again, or set data.image_size to {config.input_size[-1]}."
        ) from None
    except Exception as error:  # of the hub, of its client and of the operating system
        raise UserError(
            f"Expected timm's weights of {name} from {where}, but neither that nor the cache {cache} gives them"
            f"{_in_brackets(error)}; run it once with a connection, set HF_HOME to a folder where they are, or name a "
            "trunk file as model.weights."
        ) from None
    net.reset_classifier(0)  # type: ignore[operator] # all of timm's models have it
    return net


def _reach(repository: str, file: str) -> None:
    """Asks the hub once for a file that is not in the cache; the hub's client would try for most of a minute."""
    repository, _, revision = repository.partition("@")
    if not isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str):
        with suppress(EntryNotFoundError):  # there are others
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision or None))


def _in_brackets(error: Exception) -> str:
    """The first line of an error; nothing if it has none."""
    first = str(error).strip().partition("\n")[0].rstrip(".:")
    return f" ({first})" if first else ""
