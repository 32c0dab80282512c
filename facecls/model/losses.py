"""Losses as pure functions; faces without a label (``MISSING``) are ignored."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from facecls.data.parsing import MISSING
from facecls.data.tasks import Tasks, classifications
from facecls.errors import UserError


def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of a classification.

    Args:
        logits: (N, C) float.
        labels: (N,) int64 codes, ``MISSING`` where a face has none.
        smoothing: Share of the target spread evenly over the classes (Szegedy et al. 2016), 0..1.
        weights: (C,) float, the weight of a face by its class.

    Returns:
        Scalar: the mean over the labelled faces, 0 without any.
    """
    known = labels != MISSING
    if not known.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[known], labels[known], weight=weights, label_smoothing=smoothing)


def expected_age(distribution: Tensor) -> Tensor:
    """The mean of distributions over the ages 0, 1, 2 and so on.

    Args:
        distribution: (N, A) probabilities.

    Returns:
        (N,) years.
    """
    years = torch.arange(distribution.shape[1], dtype=distribution.dtype, device=distribution.device)
    return (distribution * years).sum(1)  # not a matrix product, which autocast would round to bfloat16


def label_distribution(ages: Tensor, sigma: float, count: int) -> Tensor:
    """Gaussian distributions around true ages, truncated to 0..``count`` - 1 and normalised.

    Args:
        ages: (N,) years.
        sigma: Standard deviation in years.
        count: How many ages A there are.

    Returns:
        (N, A) float32 probabilities.
    """
    years = torch.arange(count, device=ages.device)
    return (-((years - ages[:, None]) ** 2) / (2 * sigma**2)).softmax(1)


def age_distribution_loss(logits: Tensor, ages: Tensor, sigma: float) -> Tensor:
    """DLDL-v2: the divergence from the label distribution plus the error of the expected age.

    Source: Gao et al. 2018, "Age Estimation Using Expectation of Label Distribution Learning", with their weight of 1
    between the two parts.

    Args:
        logits: (N, A) float.
        ages: (N,) int64 years, ``MISSING`` where a face has none.
        sigma: Standard deviation of the label distribution in years.

    Returns:
        Scalar: nats + years, the mean over the labelled faces, 0 without any.
    """
    known = ages != MISSING
    if not known.any():
        return logits.sum() * 0
    logits, ages = logits[known], ages[known]
    target = label_distribution(ages, sigma, logits.shape[1])
    divergence = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    return divergence + F.l1_loss(expected_age(logits.softmax(1)), ages.float())


def range_distribution_loss(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Like ``age_distribution_loss``, for ranges: -log P(low <= age <= high) plus the error of the expected age.

    The error is the distance of the expected age from the range, 0 inside it. Both parts have the units of those for
    single years, so that one task weight serves both, and faces with either label can be mixed.

    Args:
        logits: (N, A) float.
        low: (N,) int64, first year of the range, ``MISSING`` where a face has none.
        high: (N,) int64, last year of the range.

    Returns:
        Scalar: nats + years, the mean over the faces with a range, 0 without any.
    """
    known = low != MISSING
    if not known.any():
        return logits.sum() * 0
    years = torch.arange(logits.shape[1], device=logits.device)
    logits, low, high = logits[known], low[known], high[known]
    outside = (years < low[:, None]) | (years > high[:, None])  # (N, A)
    divergence = -logits.log_softmax(1).masked_fill(outside, -torch.inf).logsumexp(1).mean()
    expected = expected_age(logits.softmax(1))
    return divergence + (expected - expected.clamp(low, high)).abs().mean()


def age_regression_loss(logits: Tensor, ages: Tensor, highest: int) -> Tensor:
    """Mean squared error of sigmoid outputs against ages as a share of the highest age, as in the original notebook.

    Args:
        logits: (N, 1) float.
        ages: (N,) int64 years, ``MISSING`` where a face has none.
        highest: The highest age in years.

    Returns:
        Scalar: squared shares of the highest age, the mean over the labelled faces, 0 without any.
    """
    known = ages != MISSING
    if not known.any():
        return logits.sum() * 0
    return F.mse_loss(logits[known, 0].sigmoid(), ages[known] / highest)


def range_regression_loss(logits: Tensor, low: Tensor, high: Tensor, highest: int) -> Tensor:
    """Mean squared distance of sigmoid outputs from ranges of ages; 0 inside the range.

    Args:
        logits: (N, 1) float.
        low: (N,) int64, first year of the range, ``MISSING`` where a face has none.
        high: (N,) int64, last year of the range.
        highest: The highest age in years.

    Returns:
        Scalar: squared shares of the highest age, the mean over the faces with a range, 0 without any.
    """
    known = low != MISSING
    if not known.any():
        return logits.sum() * 0
    share = logits[known, 0].sigmoid()
    nearest = share.detach().clamp(low[known] / highest, high[known] / highest)
    return F.mse_loss(share, nearest)


def check_weights(
    known: Tasks, class_weights: Mapping[str, Sequence[float]], task_weights: Mapping[str, float]
) -> None:
    """Checks that everything that is weighted exists, and that its weights can be used.

    Args:
        known: All tasks.
        class_weights: Weight of each class, by task.
        task_weights: Weight of each task's loss.

    Raises:
        UserError: If a task is unknown or has no classes, or if there are not as many weights as classes or one of
            them is not above 0; weights of tasks may be 0.
    """
    classes = {task.name: task.classes for task in classifications(known.values())}
    for task, weights in class_weights.items():
        if task not in classes:
            raise UserError(f"Expected model.class_weights for {', '.join(classes)}, but got {task!r}; correct it.")
        if len(weights) != len(classes[task]) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(
                f"Expected model.class_weights.{task} above 0 for each of {', '.join(classes[task])}, but got "
                f"{weights}; give one number per class."
            )
    for task, weight in task_weights.items():
        if task not in known or not 0 <= weight < math.inf:
            raise UserError(
                f"Expected model.task_weights of 0 or more for {', '.join(known)}, but got {task}: {weight}."
            )


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of task losses, each times its weight; 1 where none is given."""
    return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()


def uncertainty_sum(losses: Mapping[str, Tensor], log_variances: Mapping[str, Tensor]) -> Tensor:
    """The sum of task losses weighted by learned homoscedastic uncertainty.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", in the form
    ``exp(-s) * loss + s / 2`` with ``s`` the logarithm of the variance.

    Args:
        losses: Scalars by task.
        log_variances: Learned scalars by task.

    Returns:
        Scalar; it can be negative.
    """
    return torch.stack([torch.exp(-log_variances[t]) * loss + log_variances[t] / 2 for t, loss in losses.items()]).sum()
