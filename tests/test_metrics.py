"""Metrics against scikit-learn and NumPy, over several batches."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.data.tasks import MISSING
from facecls.model.metrics import TaskMetrics


def test_metrics_are_those_of_scikit_learn_over_the_labelled_faces() -> None:
    rng = np.random.default_rng(0)
    sizes = {"gender": 2, "race": 5}
    labels = {task: rng.integers(-1, size, 50) for task, size in sizes.items()}  # -1: without a label
    labels["age"] = np.where(rng.random(50) < 0.2, MISSING, rng.integers(0, 117, 50))
    guesses = {task: rng.dirichlet(np.ones(size), 50) for task, size in sizes.items()}
    guesses["age"] = labels["age"] + rng.choice([-5.0, -4.9, 0.0, 5.0, 5.1], 50)
    metrics = TaskMetrics(["gender", "race", "age"])
    per_face = {task: np.where(values == MISSING, np.nan, rng.random(50)) for task, values in labels.items()}
    for part in (slice(0, 20), slice(20, 50)):
        metrics.update(
            {name: torch.tensor(values[part], dtype=torch.float64) for name, values in guesses.items()},
            {name: torch.tensor(values[part]) for name, values in labels.items()},
            {name: torch.tensor(np.nanmean(values[part])) for name, values in per_face.items()},
            {name: torch.tensor(np.isfinite(values[part]).sum()) for name, values in per_face.items()},
        )
    found = {name: value.item() for name, value in metrics.compute().items()}
    wanted = {f"{task}/loss": np.nanmean(values) for task, values in per_face.items()}
    for task in sizes:
        keep = labels[task] != MISSING
        truth, guess = labels[task][keep], guesses[task][keep].argmax(1)
        wanted[f"{task}/accuracy"] = accuracy_score(truth, guess)
        wanted[f"{task}/f1_macro"] = f1_score(truth, guess, average="macro")
    keep = labels["age"] != MISSING
    truth, guess = labels["age"][keep], guesses["age"][keep]
    wanted["age/mae_years"] = mean_absolute_error(truth, guess)
    wanted["age/cs5"] = np.mean(np.abs(truth - guess) <= 5)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_task_without_labels_is_left_out_and_reset_forgets() -> None:
    metrics = TaskMetrics(["gender", "age"])
    batch = {"gender": torch.tensor([0, 1]), "age": torch.tensor([MISSING, MISSING])}
    losses = {"gender": torch.tensor(0.3), "age": torch.tensor(0.0)}
    weights = {"gender": torch.tensor(2.0), "age": torch.tensor(0.0)}
    metrics.update({"gender": torch.eye(2), "age": torch.zeros(2)}, batch, losses, weights)
    assert sorted(metrics.compute()) == ["gender/accuracy", "gender/f1_macro", "gender/loss"]
    metrics.reset()
    metrics.update({"gender": torch.eye(2), "age": torch.zeros(2)}, {**batch, "gender": batch["age"]}, losses, weights)
    assert metrics.compute() == {}
