"""Whether two ways to run a model agree."""

import numpy as np
from torch import Tensor

from facecls.data.tasks import Tasks, ages
from facecls.model.predictor import Estimates

TOLERANCE = 1e-4
"""Largest accepted difference between torch and ONNX Runtime: of probabilities, of ages relative to the age, and of
features relative to the largest one."""


def differences(reference: Estimates, estimates: Estimates, tasks: Tasks) -> dict[str, float]:
    """The largest differences between estimates of the same faces.

    Args:
        reference: By output, as ``Predictor.estimate`` returns them.
        estimates: The others.
        tasks: Of the model.

    Returns:
        By output the largest absolute difference; of ages relative to the age, or to one year below that.
    """
    apart = {name: np.abs(estimates[name] - values) for name, values in reference.items()}
    for task in ages(tasks.values()):
        apart[task.name] = apart[task.name] / np.maximum(reference[task.name], 1)
    return {name: float(values.max()) for name, values in apart.items()}


def relative_difference(reference: Tensor, features: Tensor) -> float:
    """The largest difference between features of the same faces, relative to the largest feature.

    Args:
        reference: (N, D) float.
        features: (N, D) float, the others.

    Returns:
        The difference; NaN if one of them is.
    """
    return float((features - reference).abs().max() / reference.abs().max())
