"""A trained model and the options of its data, read from a checkpoint."""

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from facecls.data.limits import SIDE
from facecls.errors import UserError, uninterrupted
from facecls.files import replacing
from facecls.finding.frame import Frame, read_frame
from facecls.model.checksums import check_finite, check_members
from facecls.model.module import FaceModule
from facecls.model.network import FaceModel
from facecls.model.upgrade import upgrade

_OWN = frozenset({"self", "weights", "optimizer", "schedule"})
"""Parameters of ``FaceModule`` that only training needs, and the trunk file, which a checkpoint stands in for."""


def check_side(size: Any) -> int:
    """Checks the side of a model's images, as a file says it.

    Args:
        size: In pixels.

    Returns:
        The same.

    Raises:
        ValueError: If it is no such number, or one for which no images could be made.
    """
    if type(size) is not int or not 1 <= size <= SIDE:
        raise ValueError(f"its image_size is {size!r}, not from 1 to {SIDE:,}")
    return size


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        module: The trained model, on the CPU and in evaluation mode.
        data: Options of ``FacesDataModule`` by name, as in the training.
        frame: How the faces of the training lie in their images; ``None`` if no faces were found in them.
        is_frame_assumed: Whether the checkpoint does not say it, and the frame is UTKFace's.
        optimizer: ``class_path`` and ``init_args``, as in the training; empty if it does not say so.
        precision: Lightning's name of it, as in the training; ``None`` if it does not say so.
    """

    module: FaceModule
    data: Mapping[str, Any]
    frame: Frame | None
    is_frame_assumed: bool
    optimizer: Mapping[str, Any]
    precision: str | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint; nothing in it is called or imported.

    Lightning's own ``load_from_checkpoint`` calls what a checkpoint names. Here the weights are read as tensors and
    the hyperparameters as plain values, from which our own class is made.

    Args:
        path: A checkpoint that ``facecls.fit`` wrote; its trunk file is not needed.

    Returns:
        Model and options of the data.

    Raises:
        UserError: If there is no such file, or it is not such a checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(
            f"Expected a checkpoint at {path}, but there is none; runs keep theirs in checkpoints/best.ckpt."
        )
    try:
        check_members(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of a file of TorchScript, which is none
            kept = torch.load(path, map_location="cpu", weights_only=True)
        upgrade(kept)
        options: Mapping[str, Any] = kept["hyper_parameters"]
        check_side(options.get("image_size", 224))
        names = inspect.signature(FaceModule.__init__).parameters.keys() - _OWN
        module = FaceModule(**{name: options[name] for name in names if name in options})
        check_finite(kept["state_dict"], path)
        _check_types(kept["state_dict"], module.state_dict())
        module.load_state_dict(kept["state_dict"])
        frame, is_assumed = read_frame(options)
        data = {name: value for name, value in kept.get("datamodule_hyper_parameters", {}).items() if name[:1] != "_"}
        del module.hparams["optimizer"]  # the default is a function, which Lightning can't pickle and warns about
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds for a file that is none of its own
        # the rest of torch's message advises to load it unsafely
        reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(":.")
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise UserError(
            f"Expected a checkpoint of facecls.fit, but could not read {path}: {reason}; name another."
        ) from error
    optimizer = options.get("optimizer")
    precision = options.get("precision")
    return Checkpoint(
        module.eval(),
        data,
        frame,
        is_assumed,
        optimizer if isinstance(optimizer, Mapping) else {},
        None if precision is None else str(precision),
    )


def load_heads(model: FaceModel, trained: FaceModel, path: str | Path) -> list[str]:
    """Starts heads from those that were trained on the same trunk, such as a probe's.

    Args:
        model: Its heads are changed, their temperatures are not.
        trained: The model whose heads are taken.
        path: Its checkpoint, for messages.

    Returns:
        The tasks whose heads were taken; heads of others stay as they are.

    Raises:
        UserError: If it was trained on another trunk, or its heads are built in another way.
    """
    own, theirs = model.trunk.state_dict(), trained.trunk.state_dict()
    if own.keys() != theirs.keys() or not all(torch.equal(tensor, theirs[name]) for name, tensor in own.items()):
        raise UserError(
            f"Expected heads that were trained on this trunk as it is, but the trunk of {path} is another or was "
            "trained, too; name a probe of the same model.trunk and model.weights."
        )
    shared = [name for name, task in model.tasks.items() if trained.tasks.get(name) == task]
    if not shared:
        raise UserError(f"Expected heads of {', '.join(model.tasks)}, but {path} has {', '.join(trained.tasks)}.")
    for name in shared:
        head = model.heads[name]
        state = {**trained.heads[name].state_dict(), "temperature": head.temperature}
        try:
            head.load_state_dict(state)
        except RuntimeError:  # torch's words name tensors, not options
            raise UserError(
                f"Expected heads as in {path}, but that of {name} has other layers; set model.hidden, "
                "model.feature_norm and model.age_head as there."
            ) from None
    return shared


def _check_types(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Rejects tensors that would lose something as weights, and temperatures that would turn answers round."""
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"its {name} is {tensor.dtype}")
        if name.endswith(".temperature") and not (tensor > 0).all():
            raise ValueError(f"its {name} is not above 0")


def write_checkpoint(content: Mapping[str, Any], dest: Path) -> None:
    """Writes a checkpoint, completely or not at all.

    Args:
        content: Tensors and plain values by name.
        dest: The file to create or replace; its folder must exist.

    Raises:
        UserError: If it can't be written.
    """
    with uninterrupted(), replacing(dest) as part, part.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's own, for what the stream has raised before
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
