"""The features of all faces, computed once, for heads that learn on a trunk that stays as it is."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import facecls
from facecls.data.datamodule import FacesDataModule
from facecls.files import replacing
from facecls.model.trunk import Trunk

_FEATURES = "features"
_KEY = "key"


def features_key(trunk: Trunk, data: FacesDataModule, precision: str) -> str:
    """Tells apart all that features follow from: the trunk's weights, the faces in their order, and the pipeline.

    Args:
        trunk: What turns faces into features.
        data: After its ``setup``.
        precision: Lightning's name of what is computed in.

    Returns:
        A SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(f"{facecls.__version__} {trunk.name} {precision} {data.eval_transform!r}".encode())
    for name, tensor in (*trunk.state_dict().items(), ("mean", trunk.mean), ("std", trunk.std)):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for sha1 in data.faces["sha1"]:
        digest.update(sha1.encode())
    return digest.hexdigest()


@torch.inference_mode()
def compute_features(
    trunk: Trunk,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    advance: Callable[[int], None],
) -> Tensor:
    """Runs the trunk over faces, in evaluation mode.

    Args:
        trunk: What turns faces into features.
        batches: With ``image`` (N, 3, H, W) uint8 RGB.
        device: Where to compute; the trunk is moved there.
        autocast: Makes the context of the precision.
        advance: Told how many faces are done, after each batch.

    Returns:
        (F, D) float32 on the host, in the order of the batches.
    """
    trunk.to(device).eval()
    found = []
    for batch in batches:
        with autocast():
            features = trunk(batch["image"].to(device, non_blocking=True))
        found.append(features.float().cpu())
        advance(len(features))
    trunk.train()
    return torch.cat(found)


def read_features(path: Path, key: str) -> Tensor | None:
    """Reads features that were kept.

    Args:
        path: The safetensors file; there need not be one.
        key: As ``features_key`` gives it.

    Returns:
        (F, D) float32; ``None`` if there are none, or what they follow from was another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_KEY) == key:
                features: Tensor = file.get_tensor(_FEATURES)
                return features
    except (OSError, SafetensorError):
        pass
    return None


def write_features(path: Path, key: str, features: Tensor) -> None:
    """Keeps features.

    Args:
        path: The safetensors file to be made or replaced; its folder must exist.
        key: As ``features_key`` gives it.
        features: (F, D) float32.

    Raises:
        UserError: If it can't be written.
    """
    with replacing(path) as part:
        try:
            save_file({_FEATURES: features}, part, {_KEY: key})
        except SafetensorError as error:  # its own exception for a full disk
            raise OSError(str(error)) from None
