"""The logged metrics of each head, by torchmetrics; faces without a label are ignored."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from facecls.data.tasks import MISSING


class _Share(Metric):
    """The share of faces for which something holds, 0..1; NaN without faces."""

    full_state_update = False
    within: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("within", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def _count(self, holds: Tensor) -> None:
        self.within += holds.sum()
        self.total += holds.numel()

    def compute(self) -> Tensor:
        """The share of all faces so far."""
        return self.within / self.total


class CumulativeScore(_Share):
    """Share of faces whose estimated age is at most ``years`` off; "within five years" in papers on age.

    Examples:
        >>> score = CumulativeScore(5)
        >>> score(torch.tensor([30.0, 36.0]), torch.tensor([25, 30]))
        tensor(0.5000)
    """

    def __init__(self, years: float) -> None:
        super().__init__()
        self.years = years

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            preds: (N,) float, years.
            target: (N,) years.
        """
        self._count((preds - target).abs() <= self.years)


class RangeAccuracy(_Share):
    """Share of faces whose estimated age, rounded to whole years, lies in the range that their label gives.

    Examples:
        >>> accuracy = RangeAccuracy()
        >>> accuracy(torch.tensor([29.4, 29.6]), torch.tensor([[20, 29], [20, 29]]))
        tensor(0.5000)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            preds: (N,) float, years.
            target: (N, 2) first and last year of the range.
        """
        rounded = preds.round()
        self._count((target[:, 0] <= rounded) & (rounded <= target[:, 1]))


class HeadMetrics(nn.Module):
    """The metrics and the loss of one head over an epoch.

    Args:
        collections: The head's metrics, as ``Head.create_metrics`` returns them.
    """

    def __init__(self, collections: Mapping[str, MetricCollection]) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.labelled_batches = _Count()
        self.collections = nn.ModuleDict(collections)
        self.counts = nn.ModuleDict({kind: _Count() for kind in self.collections})

    def update(self, estimates: Tensor, targets: Mapping[str, Tensor], loss: Tensor, weight: Tensor) -> None:
        """Counts a batch.

        Args:
            estimates: (N, C) probabilities or (N,) years.
            targets: The labels of N faces, as ``Head.targets`` returns them.
            loss: Scalar, the mean over the faces that have the label.
            weight: Scalar, what that mean was divided by.
        """
        for kind, target in targets.items():
            known = (target if target.ndim == 1 else target[:, 0]) != MISSING
            cast(_Count, self.counts[kind]).update(known)
            if known.any():
                cast(MetricCollection, self.collections[kind]).update(estimates[known], target[known])
        self.labelled_batches.update(weight > 0)
        if weight > 0:
            self.loss.update(loss, weight=weight)

    def compute(self) -> dict[str, Tensor]:
        """The values so far by name, including ``loss``; metrics without a labelled face are left out."""
        values: dict[str, Tensor] = {}
        if not _any(self.labelled_batches):
            return values
        values["loss"] = self.loss.compute()
        for kind, collection in self.collections.items():
            if _any(cast(_Count, self.counts[kind])):
                values |= cast(MetricCollection, collection).compute()
        return values

    def reset(self) -> None:
        """Forgets all faces, for the next epoch."""
        for module in (self.loss, self.labelled_batches, *self.collections.values(), *self.counts.values()):
            cast(Metric, module).reset()


class _Count(Metric):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, known: Tensor) -> None:
        self.total += known.sum()

    def compute(self) -> Tensor:
        return self.total


def _any(count: _Count) -> bool:
    """Whether anything was counted on any device; a run resumed at an epoch's end trains on nothing in it."""
    return count.update_called and bool(count.compute() > 0)
