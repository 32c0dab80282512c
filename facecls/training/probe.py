"""A probe: the frozen trunk runs once over each face, and the heads are trained on the features it computed.

Features are kept beside the folders of the runs and used again as long as nothing that they depend on has changed. The
module takes batches with ``features`` in place of ``image``; the checkpoint of a probe is that of an ordinary model.
The trunk runs over all views of each face that the test averages over, and the heads see one at a time. On a
CPU ONNX Runtime computes them where it is faster than torch. All features of a file are by one of the two, and the
file says which; the key does not, since the two agree (but for the rounding of bf16-mixed, which ONNX Runtime has not).
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from facecls._version import __version__
from facecls.console import count_progress
from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError
from facecls.files import make_folder, replacing
from facecls.model.checksums import digest_of
from facecls.model.engine import faster_trunk
from facecls.model.module import FaceModule
from facecls.model.predictor import OnnxTrunk, TorchPredictor
from facecls.model.schedule import FREEZE_ALL
from facecls.model.trunk import Trunk
from facecls.model.views import Tta, count_views, views
from facecls.training.callbacks import run_folder

FEATURES = "features.safetensors"
"""File name, in the folder that all runs of one name share."""
_TENSOR, _KEY = "features", "key"
_ENGINES = TorchPredictor.engine, OnnxTrunk.engine
_PIECE = 16
"""Faces that a CPU takes at a time, and by which engines are compared. Views of larger batches leave its caches, and
memory is fetched anew for each: all six of 128 faces took 3 to 5 ms a face, in these pieces 1.5."""


def check_options(config: Any) -> None:
    """Refuses options that train the trunk or augment faces.

    Args:
        config: All options of the run.

    Raises:
        UserError: If the trunk is not frozen throughout, or faces are to be augmented.
    """
    frozen = config.model.schedule.frozen
    if set(frozen.values()) != {FREEZE_ALL} or 0 not in frozen:
        raise UserError(
            f"Expected model.schedule.frozen {{0: {FREEZE_ALL}}} with probe, which trains the heads alone, but got "
            f"{frozen}."
        )
    if config.restore_batchnorm:
        raise UserError("Expected no restore_batchnorm with probe, whose trunk does not learn; leave one of them out.")
    if config.data.train_transform is not None:
        raise UserError(
            "Expected no data.train_transform with probe, which computes the features of each face once, without "
            "augmentation, but got one; set model.tta to flip or zoom for more views of a face."
        )


def use_features(trainer: pl.Trainer, module: FaceModule, data: FacesDataModule) -> str:
    """Makes the batches of the data carry the trunk's features, which are read from a file or computed and saved.

    Args:
        trainer: Before training.
        module: The module.
        data: The faces, after ``setup``.

    Returns:
        One line that says where the features come from.

    Raises:
        UserError: If the features can't be saved, or there are several devices.
    """
    if trainer.world_size > 1:
        raise UserError(f"Expected one device with probe, but got {trainer.world_size}; set trainer.devices to 1.")
    trunk, tta = module.model.trunk, module.tta
    path, key = run_folder(trainer).parent / FEATURES, features_key(trunk, data, str(trainer.precision), tta)
    kept = read_features(path, key)
    if kept is not None:
        features, engine = kept
        source = f"read from {path}, computed by {engine}"
    else:
        is_shown = trainer.progress_bar_callback is not None
        with count_progress("features", len(data.faces)) if is_shown else nullcontext(lambda faces: None) as advance:
            features, engine, rate = _compute(trainer, trunk, data, advance, tta)
        source = f"computed by {engine} at {rate:.0f} faces/s, saved in {path}"
        make_folder(path.parent)
        write_features(path, key, features, engine)
    data.use_features(features)
    return f"features of {len(features):,} faces {source}"


@torch.no_grad()  # inference_mode would keep torch from exporting the trunk
def _compute(
    trainer: pl.Trainer, trunk: Trunk, data: FacesDataModule, advance: Callable[[int], None], tta: Tta
) -> tuple[Tensor, str, float]:
    """The features of all faces by the faster engine, its name, and how many faces a second it took."""
    device = trainer.strategy.root_device
    trunk.to(device).eval()

    def by_torch(images: Tensor) -> Tensor:
        with trainer.precision_plugin.forward_context():
            features: Tensor = trunk(images)
        return features.float().cpu()

    batches = iter(data.whole_dataloader())
    first = next(batches)
    other = None
    if device.type == "cpu" and trainer.precision != "64-true":  # ONNX Runtime computes in float32
        some = first["image"][:_PIECE]
        other = faster_trunk(trunk, by_torch, some, len(data.faces) * count_views(tta))
    started = time.monotonic()
    run = by_torch if other is None else other
    features = compute_features(run, chain([first], batches), device, advance, tta)
    trunk.train()
    return features, _ENGINES[other is not None], len(features) / (time.monotonic() - started)


def features_key(trunk: Trunk, data: FacesDataModule, precision: str, tta: Tta) -> str:
    """Hashes everything that features depend on: version, trunk and its weights, faces and their order, transform.

    Args:
        trunk: The trunk.
        data: The faces, after ``setup``.
        precision: Lightning's name of the precision that the trunk computes in.
        tta: Of which views.

    Returns:
        A SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(f"{__version__} {trunk.name} {precision} {data.eval_transform!r} {tta}".encode())
    digest.update(repr(getattr(trunk.net, "description", None)).encode())  # of a graph
    for name, tensor in (*trunk.state_dict().items(), ("mean", trunk.mean), ("std", trunk.std)):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for sha1 in data.faces["sha1"]:
        digest.update(sha1.encode())
    return digest.hexdigest()


def compute_features(
    run: Callable[[Tensor], Tensor],
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    advance: Callable[[int], None],
    tta: Tta,
) -> Tensor:
    """Runs a trunk over all faces.

    Args:
        run: Images on the device to features, (N, D) float32 on the CPU.
        batches: With ``image`` (N, 3, H, W) uint8 RGB.
        device: Where the images are taken.
        advance: Called after each batch with its number of faces.
        tta: Over which views to run it.

    Returns:
        (F, V, D) float32 on the CPU, in the order of the batches; V views.
    """
    parts = []
    for batch in batches:
        images = batch["image"].to(device, non_blocking=True)
        pieces = torch.split(images, _PIECE) if device.type == "cpu" else [images]
        parts += [torch.stack([run(view) for view in views(piece, tta)], 1) for piece in pieces]  # each (N, V, D)
        advance(len(images))
    return torch.cat(parts)


def read_features(path: Path, key: str) -> tuple[Tensor, str] | None:
    """Reads saved features.

    Args:
        path: The safetensors file, which may be missing or damaged.
        key: As ``features_key`` returns it.

    Returns:
        (F, V, D) float32, and the engine that computed them; ``None`` if there are none with this key.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kept, _, more = (file.metadata() or {}).get(_KEY, "").partition(" ")
            digest, _, engine = more.partition(" ")
            if kept == key:
                features: Tensor = file.get_tensor(_TENSOR)
                if digest == digest_of({_TENSOR: features}) and engine in ("", *_ENGINES):
                    return features, engine or _ENGINES[0]  # as all were, until files said it
    except (OSError, SafetensorError):
        pass
    return None


def write_features(path: Path, key: str, features: Tensor, engine: str) -> None:
    """Saves features.

    Args:
        path: The safetensors file to be created or replaced; its folder must exist.
        key: As ``features_key`` returns it.
        features: (F, V, D) float32.
        engine: What computed them.

    Raises:
        UserError: If the file can't be written.
    """
    with replacing(path) as part:
        try:
            save_file({_TENSOR: features}, part, {_KEY: f"{key} {digest_of({_TENSOR: features})} {engine}"})
        except SafetensorError as error:  # what safetensors raises on a full disk
            raise OSError(str(error)) from None
