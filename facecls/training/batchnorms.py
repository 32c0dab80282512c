"""Gives BatchNorms back whose statistics were folded into a scale and a shift.

Networks are often published in that form. They compute the same, but without normalisation they bear low learning rates
only. Measured on faces of the training, the statistics can be taken out of scale and shift again.
"""

from typing import Any

import torch
from torch import Tensor, nn

from facecls.data.datamodule import FacesDataModule
from facecls.errors import UserError
from facecls.model.graph import Statistics, with_batchnorms
from facecls.model.graph_operators import ScaleAndShift
from facecls.model.module import FaceModule

_MEASURED = 1024
"""Faces that the statistics are of."""


class _Moments:
    """Sums over faces and places of the values that a layer takes, (N, C, ...)."""

    def __init__(self) -> None:
        self._count, self._rank = 0, 0
        self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds values, as a hook that runs before the layer."""
        values = inputs[0].double()
        others = [0, *range(2, values.ndim)]
        self._count, self._rank = self._count + values.numel() // values.shape[1], values.ndim
        self._sum, self._squares = self._sum + values.sum(others), self._squares + values.square().sum(others)

    def statistics(self) -> Statistics:
        """Of all values that were added."""
        mean = self._sum / self._count
        return Statistics(mean, (self._squares / self._count - mean.square()).clamp(min=0), self._rank)


def check_folded(module: FaceModule) -> None:
    """Refuses a trunk without BatchNorms to restore.

    Args:
        module: The model.

    Raises:
        UserError: If none was folded into scale and shift.
    """
    if not _folded(module):
        raise UserError(
            "Expected a trunk with BatchNorms that were folded into scale and shift with restore_batchnorm, but "
            f"{module.hparams['weights'] or module.model.trunk.name} has none; leave it out."
        )


def _folded(module: FaceModule) -> list[str]:
    return [name for name, node in module.model.trunk.net.named_modules() if isinstance(node, ScaleAndShift)]


def restore_batchnorms(module: FaceModule, data: FacesDataModule) -> str:
    """Makes BatchNorms, with statistics of training faces, of those that were folded into scale and shift.

    Until they train, the features are what they were, but for rounding.

    Args:
        module: Its trunk, which has some, is replaced.
        data: The faces, after ``setup``.

    Returns:
        One line that says what was done.
    """
    trunk, folded = module.model.trunk.eval(), _folded(module)
    net: Any = trunk.net
    moments = {name: _Moments() for name in folded}
    hooks = [net.get_submodule(name).register_forward_pre_hook(each.add) for name, each in moments.items()]
    rows = data.sample(_MEASURED)
    with torch.no_grad():
        for batch in data.loader(rows):
            trunk(batch["image"])
    for hook in hooks:
        hook.remove()
    statistics = {name.removeprefix("nodes."): each.statistics() for name, each in moments.items()}
    module.take_graph(with_batchnorms(net, statistics))
    return f"{len(folded)} BatchNorms have statistics again, of {len(rows):,} faces of the training"
