"""Heads: one per task, on the trunk's features; a class per kind of task.

A head defines everything that depends on the kind of its task: logits, loss, estimates and metrics. Other code loops
over a model's heads without checking their type.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from facecls.data.parsing import MISSING
from facecls.data.tasks import Age, Classification, Task
from facecls.errors import UserError
from facecls.model.losses import (
    age_distribution_loss,
    age_regression_loss,
    class_loss,
    expected_age,
    range_distribution_loss,
    range_regression_loss,
)
from facecls.model.metrics import CumulativeScore, RangeAccuracy

AgeHeadKind = Literal["distribution", "regression"]
"""How an age is learned: a probability for each year, or one number by a sigmoid."""
Labels = Mapping[str, Tensor]
"""(N,) int64 by column of a task (``Task.columns``), ``MISSING`` where a face has none; a column that no face of the
data needs, such as the ranges of an age, may be absent."""


@dataclass(frozen=True)
class HeadOptions:
    """How heads are built and trained.

    Attributes:
        hidden: Sizes of the hidden layers; none for a linear head.
        dropout: Share of features dropped before the first layer and after each hidden one, 0..1.
        age_head: Kind of the head of an age.
        age_sigma: Standard deviation of the label distribution of an age, in years.
        label_smoothing: Of classifications, 0..1.
        class_weights: Weight of a face in the loss by its class, by task; 1 where not given.
        feature_norm: Whether the features are standardised first, by BatchNorm without a scale and shift of its own (as
            in the linear probes of He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners").

    Raises:
        UserError: If a value is out of range.
    """

    hidden: Sequence[int] = ()
    dropout: float = 0.0
    age_head: AgeHeadKind = "distribution"
    age_sigma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    feature_norm: bool = False

    def __post_init__(self) -> None:
        """Checks what types can't say."""
        for name, value in (("dropout", self.dropout), ("label_smoothing", self.label_smoothing)):
            if not 0 <= value < 1:
                raise UserError(f"Expected model.{name} from 0 to below 1, but got {value}.")
        if not 0 < self.age_sigma < math.inf:
            raise UserError(f"Expected model.age_sigma above 0 years, but got {self.age_sigma}.")
        if any(size < 1 for size in self.hidden):
            raise UserError(
                f"Expected model.hidden as sizes of 1 or more, but got {list(self.hidden)}; [] is for none."
            )


class Head(nn.Module, ABC):
    """Features -> logits of one task, and what they mean.

    Args:
        name: The task's.
        features: Length D of the trunk's feature vectors.
        logits: Length L of the output.
        options: Supplies hidden sizes, dropout and whether features are standardised.

    Attributes:
        name: The task's.
        temperature: Scalar float; what logits are divided by before the softmax (Guo et al. 2017, "On Calibration of
            Modern Neural Networks"). 1 until it is fitted on validation faces, and where there is no softmax.
        outputs: Names of what ``estimate`` gives.
        has_distribution: Whether the logits are those of a distribution, which a temperature can spread.
    """

    temperature: Tensor
    outputs: tuple[str, ...]
    has_distribution = True

    def __init__(self, name: str, features: int, logits: int, options: HeadOptions) -> None:
        super().__init__()
        self.name = name
        layers: list[nn.Module] = [nn.BatchNorm1d(features, affine=False)] if options.feature_norm else []
        layers.append(nn.Dropout(options.dropout))
        for size in options.hidden:
            layers += [nn.Linear(features, size), nn.ReLU(inplace=True), nn.Dropout(options.dropout)]
            features = size
        self.layers = nn.Sequential(*layers, nn.Linear(features, logits))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Turns features into logits: (N, D) -> (N, L) float32."""
        logits: Tensor = self.layers(features)
        return logits.float()

    @abstractmethod
    def loss(self, logits: Tensor, labels: Labels) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (N, L) float.
            labels: The labels of N faces.

        Returns:
            Scalar: the mean over the labelled faces, 0 without any.
        """

    @abstractmethod
    def label_weight(self, labels: Labels) -> Tensor:
        """What the mean of the loss was divided by: scalar float."""

    @abstractmethod
    def estimate(self, logits: Tensor) -> dict[str, Tensor]:
        """Estimates from the logits and the head's temperature, keyed by ``outputs``.

        Args:
            logits: (N, L) float.
        """

    @abstractmethod
    def score(self, logits: Tensor, target: int | None = None) -> Tensor:
        """The scalar that Grad-CAM explains: (N,) float.

        Args:
            logits: (N, L) float.
            target: A class; ``None`` for the predicted one, or for the estimate where there are no classes.
        """

    @abstractmethod
    def create_metrics(self) -> dict[str, MetricCollection]:
        """Creates this head's metrics, keyed by the kind of label they compare with (see ``targets``)."""

    @abstractmethod
    def targets(self, labels: Labels) -> dict[str, Tensor]:
        """The labels that metrics compare with.

        Args:
            labels: The labels of N faces.

        Returns:
            By kind of label, (N,) or (N, 2) int64; ``MISSING`` where a face has none.
        """


class ClassificationHead(Head):
    """Probabilities of classes, by cross-entropy. ``estimate``: ``<task>`` (N, C) probabilities."""

    weights: Tensor | None

    def __init__(self, task: Classification, features: int, options: HeadOptions) -> None:
        super().__init__(task.name, features, len(task.classes), options)
        self.classes = len(task.classes)
        self.outputs = (task.name,)
        self.smoothing = options.label_smoothing
        weights = options.class_weights.get(task.name)
        values = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", values, persistent=False)

    def loss(self, logits: Tensor, labels: Labels) -> Tensor:  # noqa: D102 - as in Head
        return class_loss(logits, labels[self.name], self.smoothing, self.weights)

    def label_weight(self, labels: Labels) -> Tensor:  # noqa: D102 - as in Head
        known = labels[self.name] != MISSING
        return known.sum().float() if self.weights is None else self.weights[labels[self.name][known]].sum()

    def estimate(self, logits: Tensor) -> dict[str, Tensor]:  # noqa: D102 - as in Head
        return {self.name: (logits / self.temperature).softmax(1)}  # (N, C)

    def score(self, logits: Tensor, target: int | None = None) -> Tensor:  # noqa: D102 - as in Head
        return logits.max(1).values if target is None else logits[:, target]

    def create_metrics(self) -> dict[str, MetricCollection]:
        """Accuracy is micro-averaged (the share of faces that are right), F1 is the plain mean over the classes."""
        accuracy = MulticlassAccuracy(self.classes, average="micro")
        return {
            "class": MetricCollection(
                {"accuracy": accuracy, "f1_macro": MulticlassF1Score(self.classes, average="macro")}
            )
        }

    def targets(self, labels: Labels) -> dict[str, Tensor]:  # noqa: D102 - as in Head
        return {"class": labels[self.name]}


class _AgeHead(Head):
    """What both kinds of age heads share: labels of single years and of ranges."""

    def __init__(self, task: Age, features: int, logits: int, options: HeadOptions) -> None:
        super().__init__(task.name, features, logits, options)
        self.highest = task.highest
        self.range = task.range

    @abstractmethod
    def _year_loss(self, logits: Tensor, ages: Tensor) -> Tensor:
        """The mean loss over the faces whose age is known to the year."""

    @abstractmethod
    def _range_loss(self, logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The mean loss over the faces whose age is known as a range."""

    def loss(self, logits: Tensor, labels: Labels) -> Tensor:
        ages = labels[self.name]
        by_year = self._year_loss(logits, ages)
        if self.range[0] not in labels:
            return by_year
        low, high = (labels[column] for column in self.range)
        years, ranges = (ages != MISSING).sum(), (low != MISSING).sum()
        total = by_year * years + self._range_loss(logits, low, high) * ranges
        return total / (years + ranges).clamp(min=1)

    def label_weight(self, labels: Labels) -> Tensor:
        known = labels[self.name] != MISSING
        if self.range[0] in labels:
            known = known | (labels[self.range[0]] != MISSING)
        return known.sum().float()

    def score(self, logits: Tensor, target: int | None = None) -> Tensor:
        return self.estimate(logits)[self.name]

    def create_metrics(self) -> dict[str, MetricCollection]:
        """Errors in years over the ages known to the year; the share of right ranges over those known as a range."""
        return {
            "year": MetricCollection({"mae_years": MeanAbsoluteError(), "cs5": CumulativeScore(5)}),
            "range": MetricCollection({"band_accuracy": RangeAccuracy()}),
        }

    def targets(self, labels: Labels) -> dict[str, Tensor]:
        found = {"year": labels[self.name]}
        if self.range[0] in labels:
            found["range"] = torch.stack([labels[column] for column in self.range], 1)  # (N, 2)
        return found


class AgeDistributionHead(_AgeHead):
    """A probability for each year from 0 to the highest, by DLDL-v2, for ranges by their probability.

    ``estimate``: ``<task>`` (N,) years, the mean of the distribution, and ``<task>_distribution`` (N, A). The
    temperature scales only the distribution, not the mean, which is trained directly.
    """

    def __init__(self, task: Age, features: int, options: HeadOptions) -> None:
        super().__init__(task, features, task.highest + 1, options)
        self.outputs = (task.name, f"{task.name}_distribution")
        self.sigma = options.age_sigma

    def _year_loss(self, logits: Tensor, ages: Tensor) -> Tensor:
        return age_distribution_loss(logits, ages, self.sigma)

    def _range_loss(self, logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return range_distribution_loss(logits, low, high)

    def estimate(self, logits: Tensor) -> dict[str, Tensor]:  # noqa: D102 - as in Head
        values = expected_age(logits.softmax(1)), (logits / self.temperature).softmax(1)  # (N,), (N, A)
        return dict(zip(self.outputs, values, strict=True))


class AgeRegressionHead(_AgeHead):
    """A sigmoid times the highest age, as in the original notebook. ``estimate``: ``<task>`` (N,) years."""

    has_distribution = False

    def __init__(self, task: Age, features: int, options: HeadOptions) -> None:
        super().__init__(task, features, 1, options)
        self.outputs = (task.name,)

    def _year_loss(self, logits: Tensor, ages: Tensor) -> Tensor:
        return age_regression_loss(logits, ages, self.highest)

    def _range_loss(self, logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return range_regression_loss(logits, low, high, self.highest)

    def estimate(self, logits: Tensor) -> dict[str, Tensor]:  # noqa: D102 - as in Head
        return {self.name: self.highest * logits.squeeze(1).sigmoid()}  # (N,)


_AGE_HEADS: dict[AgeHeadKind, type[AgeDistributionHead] | type[AgeRegressionHead]] = {
    "distribution": AgeDistributionHead,
    "regression": AgeRegressionHead,
}


def create_head(task: Task, features: int, options: HeadOptions) -> Head:
    """Makes the head of a task.

    Args:
        task: The task.
        features: Length D of the trunk's feature vectors.
        options: How it is built and trained.

    Returns:
        The head, with random weights.
    """
    if isinstance(task, Classification):
        return ClassificationHead(task, features, options)
    return _AGE_HEADS[options.age_head](task, features, options)
