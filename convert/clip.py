"""Reads the image tower of a CLIP checkpoint, such as FaRL's, as weights of a timm model.

FaRL (Zheng et al. 2022, arXiv:2112.03109) is trained by OpenAI's CLIP code and loaded into OpenAI's ViT-B/16, whose
activation is QuickGELU; timm has it in ``vit_base_patch16_clip_quickgelu_224``. Its ``vit_base_patch16_clip_224``, with
the usual GELU, has the same tensors and computes something else.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from convert import parity
from convert.plain.source import digest
from facecls._version import __version__
from facecls.errors import UserError
from facecls.model.checksums import check_members
from facecls.model.trunk import Trunk, create_trunk

ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
SIZE = 224
"""Pixels; the size it was trained at."""
_WIDTH, _BLOCKS, _HEADS, _PATCH, _TOKENS = 768, 12, 12, 16, 197
_TOWER = "visual."
_NOT_TAKEN = "proj"
"""From the features into the space that images share with texts."""


def read_clip(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint, verifies it and returns what ``save_trunk`` writes.

    Verified: timm's model computes the features of an independent implementation, which reads the file's own tensors.

    Args:
        path: A ``.pth`` with tensors named as in OpenAI's code (``visual.conv1.weight``), by themselves or under
            ``state_dict``; a text tower beside them is ignored. Nothing in it is run.

    Returns:
        The tensors of ``ARCHITECTURE`` without a classifier, under timm's names; the metadata.

    Raises:
        UserError: If it is no such file or another network, or timm's features differ.
    """
    tower = _read_tower(path)
    sha256, _ = digest(path, "a CLIP checkpoint")
    trunk = create_trunk(ARCHITECTURE).eval()
    wanted = trunk.net.state_dict()
    state = {
        name: tensor
        for name, tensor in checkpoint_filter_fn(dict(tower), trunk.net).items()
        if not name.startswith("head.")
    }
    if wrong := sorted(
        {(name, tuple(tensor.shape)) for name, tensor in state.items()}
        ^ {(name, tuple(tensor.shape)) for name, tensor in wanted.items()}
    ):
        raise UserError(
            f"Expected the tensors of CLIP's ViT-B/16 in {path}, but {wrong[0][0]} of shape {wrong[0][1]} is "
            f"{'missing' if wrong[0][0] in wanted and wrong[0][0] not in state else 'not one of them'}."
        )
    trunk.net.load_state_dict(state)
    difference = _verify(path, trunk, tower)
    metadata = {
        "architecture": ARCHITECTURE,
        "source": path.name,
        "source_sha256": sha256,
        "input": {
            "size": SIZE,
            "channels": "RGB",
            "range": [0, 255],
            "mean": trunk.mean.flatten().tolist(),
            "std": trunk.std.flatten().tolist(),
        },
        "parity": {"reference": difference},
        "converter": f"facecls {__version__}",
        "classes": 0,
    }
    return state, metadata


def _read_tower(path: Path) -> dict[str, Tensor]:
    """The tensors of the image tower in float32, named as in the file."""
    if not path.is_file():
        raise UserError(
            f"Expected a CLIP checkpoint at {path}, but there is none; get one with `python -m facecls.download farl`."
        )
    try:
        if zipfile.is_zipfile(path):  # else torch's format until 2020
            check_members(path)
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds for a file that is none of its own
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UserError(f"Expected a file of PyTorch tensors, but could not read {path}: {reason}.") from None
    kept = kept.get("state_dict", kept) if isinstance(kept, Mapping) else {}
    tower = {
        str(name): tensor
        for name, tensor in (kept.items() if isinstance(kept, Mapping) else ())
        if str(name).startswith(_TOWER) and isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    patches = tower.get(f"{_TOWER}conv1.weight")
    if patches is None:
        raise UserError(
            f"Expected CLIP's image tower in OpenAI's layout (visual.conv1.weight, ...), but {path} has none; only "
            "FaRL and CLIP's ViT-B/16 can be converted from PyTorch files, so export others to ONNX."
        )
    tokens = tower.get(f"{_TOWER}positional_embedding", torch.empty(0)).shape
    if tuple(patches.shape) != (_WIDTH, 3, _PATCH, _PATCH) or tuple(tokens) != (_TOKENS, _WIDTH):
        raise UserError(
            f"Expected CLIP's ViT-B/16 at {SIZE} pixels, patches {(_WIDTH, 3, _PATCH, _PATCH)} and positions "
            f"{(_TOKENS, _WIDTH)}, but {path} has {tuple(patches.shape)} and {tuple(tokens)}; export it to ONNX."
        )
    if sum(tensor.numel() for tensor in tower.values()) > path.stat().st_size:  # a view can repeat what it shows
        raise UserError(f"Expected a file of PyTorch tensors, but those of {path} are larger than the file.")
    tower = {name: tensor.float() for name, tensor in tower.items() if name != f"{_TOWER}{_NOT_TAKEN}"}
    if broken := [name for name, tensor in tower.items() if not tensor.isfinite().all()]:
        raise UserError(f"Expected finite weights, but {broken[0]} in {path} holds NaN or Inf; get the file again.")
    return tower


def reference_features(tower: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Computes the features from the file's own tensors: the tower written once more, without timm.

    Args:
        tower: The tensors under the file's names.
        images: (N, 3, 224, 224) float, normalised.

    Returns:
        (N, 768) float: the class token after the last norm.
    """
    own = {name.removeprefix(_TOWER): tensor for name, tensor in tower.items()}
    patches = F.conv2d(images, own["conv1.weight"], stride=_PATCH).flatten(2).mT  # (N, 196, 768)
    token = own["class_embedding"].expand(len(images), 1, _WIDTH)
    x = torch.cat([token, patches], 1) + own["positional_embedding"]
    x = _norm(own, "ln_pre", x)
    for number in range(_BLOCKS):
        block = f"transformer.resblocks.{number}"
        x = x + _attend(own, f"{block}.attn", _norm(own, f"{block}.ln_1", x))
        y = _linear(own, f"{block}.mlp.c_fc", _norm(own, f"{block}.ln_2", x))
        x = x + _linear(own, f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))  # QuickGELU
    return _norm(own, "ln_post", x[:, 0])


def _norm(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (_WIDTH,), own[f"{name}.weight"], own[f"{name}.bias"])


def _linear(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])


def _attend(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    joined = F.linear(x, own[f"{name}.in_proj_weight"], own[f"{name}.in_proj_bias"])
    count, tokens, _ = x.shape
    split = [part.reshape(count, tokens, _HEADS, -1).transpose(1, 2) for part in joined.chunk(3, 2)]
    queries, keys, values = split  # (N, heads, L, 64)
    weights = (queries @ keys.mT / keys.shape[-1] ** 0.5).softmax(-1)
    return _linear(own, f"{name}.out_proj", (weights @ values).transpose(1, 2).flatten(2))


def _verify(path: Path, trunk: Trunk, tower: Mapping[str, Tensor]) -> float:
    """The largest difference between trunk and reference, as a share of the largest feature."""
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = 255 * F.interpolate(noise, size=SIZE, mode="bilinear")  # blotches, closer to a photograph than noise
    with torch.inference_mode():
        expected = reference_features(tower, (images - trunk.mean) / trunk.std)
        difference = float((trunk(images) - expected).abs().max() / expected.abs().max())
    if not difference <= parity.LIMIT:  # also when it is not a number
        raise UserError(
            f"Expected timm's {ARCHITECTURE} to give the features of {path} within {parity.LIMIT:g} of the largest, "
            f"but it is off by {difference:.1e}; nothing was written."
        )
    return difference
