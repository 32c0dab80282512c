"""What is logged of each task, by torchmetrics; faces without the label count in none."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from facecls.data.tasks import CLASSES, MISSING, Task


class CumulativeScore(Metric):
    """Share of faces whose estimated age is at most ``years`` off, 0..1; "within five years" in papers on age."""

    full_state_update = False
    within: Tensor
    total: Tensor

    def __init__(self, years: float) -> None:
        super().__init__()
        self.years = years
        self.add_state("within", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            preds: (N,) float, years.
            target: (N,) years.
        """
        self.within += ((preds - target).abs() <= self.years).sum()
        self.total += target.numel()

    def compute(self) -> Tensor:
        """The share of all faces so far; NaN without any."""
        return self.within / self.total


def create_metrics(task: Task) -> MetricCollection:
    """The metrics of a task by the second part of their log key, such as ``accuracy`` of ``val/race/accuracy``.

    Accuracy is micro-averaged (the share of faces that are right), F1 is the plain mean over the classes.
    """
    if task == "age":
        return MetricCollection({"mae_years": MeanAbsoluteError(), "cs5": CumulativeScore(5)})
    classes = len(CLASSES[task])
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1_macro": MulticlassF1Score(classes, average="macro"),
        }
    )


class TaskMetrics(nn.Module):
    """The metrics and the loss of several tasks over one stage."""

    def __init__(self, tasks: list[Task]) -> None:
        super().__init__()
        self.collections = nn.ModuleDict({task: create_metrics(task) for task in tasks})
        self.losses = nn.ModuleDict({task: MeanMetric() for task in tasks})
        self.faces = nn.ModuleDict({task: _Count() for task in tasks})

    def update(
        self,
        estimates: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        losses: Mapping[Task, Tensor],
        weights: Mapping[Task, Tensor],
    ) -> None:
        """Counts a batch.

        Args:
            estimates: As ``FaceModel.estimate`` gives them.
            labels: (N,) int64 by task, ``MISSING`` where a face has none.
            losses: Scalars by task, each the mean over the faces that have the label.
            weights: Scalars by task, what those faces weigh together in that mean.
        """
        for task, collection in self.collections.items():
            known = labels[task] != MISSING
            cast(_Count, self.faces[task]).update(known)
            if known.any():
                cast(MetricCollection, collection).update(estimates[task][known], labels[task][known])
                name = cast(Task, task)
                cast(MeanMetric, self.losses[task]).update(losses[name], weight=weights[name])

    def compute(self) -> dict[str, Tensor]:
        """The values so far by ``task/metric``, ``task/loss`` with them; no task of which no face had a label."""
        values: dict[str, Tensor] = {}
        for task, collection in self.collections.items():
            faces = cast(_Count, self.faces[task])
            if faces.update_called and faces.compute() > 0:  # a run resumed at an epoch's end trains on nothing in it
                values[f"{task}/loss"] = cast(MeanMetric, self.losses[task]).compute()
                for name, value in cast(MetricCollection, collection).compute().items():
                    values[f"{task}/{name}"] = value
        return values

    def reset(self) -> None:
        """Forgets all faces, for the next epoch."""
        for module in (*self.collections.values(), *self.losses.values(), *self.faces.values()):
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
