"""What trains when, and how fast: pure functions of epoch and step.

Every parameter is in the optimizer from the start, and what is frozen is computed afresh each epoch, so that a run that
is resumed after an unfreezing continues as if it had never stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from facecls.errors import UserError

T = TypeVar("T", int, float)
FREEZE_ALL = -1
"""In ``Schedule.frozen``: every layer of the trunk."""
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Schedule:
    """What trains when, and how fast.

    Attributes:
        frozen: By epoch, how many layers of the trunk, counted from the input, are frozen from then on; -1 for all.
            Layers are timm's: the stem, then each block. ``{0: -1, 2: 12, 5: 0}`` trains the heads alone for two
            epochs, then all but the first 12 layers, and everything from epoch 5 on.
        batchnorm: BatchNorm statistics of the trunk: ``train`` updates them in the layers that train and keeps them in
            frozen layers; ``frozen`` keeps all of them as loaded.
        layer_decay: Factor of the learning rate from a layer to the one before it (BEiT, Bao et al. 2021); 1 for none.
        warmup: Share of all steps over which the learning rate rises from 0, 0..1.
        decay: After that it stays ``constant`` or falls to 0 along a ``cosine``.
        lr_milestones: Factor on the learning rate from an epoch on, such as ``{10: 0.1}``.
    """

    frozen: dict[int, int] = field(default_factory=lambda: {0: 0})
    batchnorm: Literal["train", "frozen"] = "train"
    layer_decay: float = 1.0
    warmup: float = 0.05
    decay: Literal["cosine", "constant"] = "cosine"
    lr_milestones: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what types can't say.

        Raises:
            UserError: If a value is out of range.
        """
        if not 0 <= self.warmup <= 1:
            raise UserError(f"Expected schedule.warmup as a share of all steps, 0..1, but got {self.warmup}.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"Expected schedule.layer_decay above 0 and at most 1, but got {self.layer_decay}.")
        if any(epoch < 0 for epoch in (*self.frozen, *self.lr_milestones)) or any(
            count < FREEZE_ALL for count in self.frozen.values()
        ):
            raise UserError(
                "Expected schedule.frozen and schedule.lr_milestones by epoch from 0 on, counts from -1 (all) on."
            )
        if not all(0 <= factor < math.inf for factor in self.lr_milestones.values()):
            raise UserError(f"Expected factors of 0 or more as schedule.lr_milestones, but got {self.lr_milestones}.")


def at_epoch(changes: Mapping[int, T], epoch: int, before: T) -> T:
    """The value of the last change up to and including an epoch; ``before`` if there is none yet."""
    past = [start for start in changes if start <= epoch]
    return changes[max(past)] if past else before


def learning_rate_factor(schedule: Schedule, step: int, steps: int, epoch: int) -> float:
    """The factor on the learning rate in a step.

    Args:
        schedule: As configured.
        step: Optimizer step from 0.
        steps: How many there will be in all.
        epoch: The epoch of the step.

    Returns:
        0..1 times the factor of the last milestone.
    """
    factor = at_epoch(schedule.lr_milestones, epoch, 1.0)
    warmup = schedule.warmup * steps
    if step < warmup:
        return factor * (step + 1) / (warmup + 1)
    if schedule.decay == "constant":
        return factor
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return factor * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Course:
    """The optimizer steps of a training, counted as its present settings make them.

    A run that was resumed may have made others before, with batches of another size.

    Attributes:
        steps: How many there are in all.
        per_epoch: Those of an epoch.
        start: The first one that is made, from 0.
        before: Steps of all epochs before it and of its own epoch before it, with the present batches.
    """

    steps: int
    per_epoch: int
    start: int = 0
    before: int = 0

    def factor(self, schedule: Schedule, step: int) -> float:
        """The factor on the learning rate in a step, see ``learning_rate_factor``."""
        return learning_rate_factor(schedule, step, self.steps, (step - self.start + self.before) // self.per_epoch)


def plan_course(
    per_epoch: int, max_epochs: int, max_steps: int, epoch: int = 0, step_in_epoch: int = 0, made: int = 0
) -> Course:
    """Plans the steps that are left so that their learning rates are those of a run that never stopped.

    Where epochs end the training, what was done is a share of them, in whatever steps it was; where ``max_steps`` does,
    it is a share of the steps.

    Args:
        per_epoch: Steps of an epoch.
        max_epochs: Epochs in all; -1 for no limit, if ``max_steps`` is one.
        max_steps: Steps in all, those made before resuming among them; -1 for no limit.
        epoch: The epoch to go on in.
        step_in_epoch: Its first step that is left, with the present batches.
        made: Steps that were made before, with whatever batches.

    Returns:
        The course.

    Examples:
        >>> plan_course(per_epoch=4, max_epochs=4, max_steps=-1, epoch=1, made=30)
        Course(steps=16, per_epoch=4, start=4, before=4)
    """
    before = epoch * per_epoch + step_in_epoch
    if max_steps != -1 and (max_epochs == -1 or max_steps - made < max_epochs * per_epoch - before):
        return Course(max_steps, per_epoch, made, before)
    return Course(max_epochs * per_epoch, per_epoch, before, before)


def layer_of(net: nn.Module) -> dict[str, int]:
    """The layer of each parameter of a timm model: 0 at the input, counted by timm's own groups of blocks."""
    layers: dict[str, int] = group_parameters(net, net.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return layers


def freeze(net: nn.Module, schedule: Schedule, epoch: int) -> list[nn.Module]:
    """Sets which parameters of the trunk train in an epoch.

    Args:
        net: The timm model.
        schedule: As configured.
        epoch: From 0.

    Returns:
        The BatchNorms whose statistics must not change in this epoch, which have to run in evaluation mode.
    """
    layers = layer_of(net)
    count = at_epoch(schedule.frozen, epoch, 0)
    frozen = {name for name, layer in layers.items() if count == FREEZE_ALL or layer < count}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return [
        module
        for name, module in net.named_modules()
        if isinstance(module, _BATCHNORMS) and (schedule.batchnorm == "frozen" or f"{name}.weight" in frozen)
    ]


def parameter_groups(trunk: nn.Module, rest: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, each with the factor on its learning rate.

    Args:
        trunk: The timm model; its groups follow timm's layers.
        rest: Everything else that trains, at a factor of 1.
        layer_decay: Factor from a layer to the one before it.

    Returns:
        Groups with ``params``, ``lr_scale`` and, for vectors (biases and norms), ``weight_decay`` 0. All parameters are
        in them, whether they train now or not.
    """
    for parameter in trunk.parameters():
        parameter.requires_grad_(True)  # timm leaves frozen ones out
    groups: list[dict[str, Any]] = param_groups_layer_decay(trunk, weight_decay=1.0, layer_decay=layer_decay)
    for decays in (True, False):
        params = [parameter for parameter in rest.parameters() if (parameter.ndim > 1) == decays]
        if params:
            groups.append({"params": params, "lr_scale": 1.0, "weight_decay": float(decays)})
    for group in groups:
        if group["weight_decay"]:
            del group["weight_decay"]  # the optimizer's own then holds
    return groups
