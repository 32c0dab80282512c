"""Losses, one pure function per kind of task; faces without the label (``MISSING``) count in none."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from facecls.data.tasks import MAX_AGE, MISSING, Task
from facecls.model.heads import expected_age


def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of gender or race.

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


def weight_of_labels(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What the mean of a loss was divided by.

    Args:
        labels: (N,) int64 codes or years, ``MISSING`` where a face has none.
        weights: (C,) float, the weight of a face by its class.

    Returns:
        Scalar float: the number of labelled faces, or the sum of their weights.
    """
    known = labels != MISSING
    return known.sum().float() if weights is None else weights[labels[known]].sum()


def label_distribution(ages: Tensor, sigma: float) -> Tensor:
    """Gaussian distributions around true ages, cut to 0..116 and normalised.

    Args:
        ages: (N,) years.
        sigma: Standard deviation in years.

    Returns:
        (N, 117) float32 probabilities.
    """
    years = torch.arange(MAX_AGE + 1, device=ages.device)
    return (-((years - ages[:, None]) ** 2) / (2 * sigma**2)).softmax(1)


def age_distribution_loss(logits: Tensor, ages: Tensor, sigma: float) -> Tensor:
    """DLDL-v2: the divergence from the label distribution plus the error of the expected age.

    Source: Gao et al. 2018, "Age Estimation Using Expectation of Label Distribution Learning", with their weight of 1
    between the two parts.

    Args:
        logits: (N, 117) float.
        ages: (N,) int64 years, ``MISSING`` where a face has none.
        sigma: Standard deviation of the label distribution in years.

    Returns:
        Scalar: nats + years, the mean over the labelled faces, 0 without any.
    """
    known = ages != MISSING
    if not known.any():
        return logits.sum() * 0
    logits, ages = logits[known], ages[known]
    divergence = F.kl_div(logits.log_softmax(1), label_distribution(ages, sigma), reduction="batchmean")
    return divergence + F.l1_loss(expected_age(logits.softmax(1)), ages.float())


def age_regression_loss(logits: Tensor, ages: Tensor) -> Tensor:
    """Mean squared error of sigmoid outputs against ages as a share of 116 years, as in the seed.

    Args:
        logits: (N, 1) float.
        ages: (N,) int64 years, ``MISSING`` where a face has none.

    Returns:
        Scalar: squared shares of 116 years, the mean over the labelled faces, 0 without any.
    """
    known = ages != MISSING
    if not known.any():
        return logits.sum() * 0
    return F.mse_loss(logits[known, 0].sigmoid(), ages[known] / MAX_AGE)


def weighted_sum(losses: Mapping[Task, Tensor], weights: Mapping[Task, float]) -> Tensor:
    """The sum of task losses, each times its weight; 1 where none is given."""
    return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()


def uncertainty_sum(losses: Mapping[Task, Tensor], log_variances: Mapping[Task, Tensor]) -> Tensor:
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
