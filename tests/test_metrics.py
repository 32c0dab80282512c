"""Metrics against scikit-learn and NumPy, over several batches."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.data.tasks import MISSING, UTKFACE, create_tasks
from facecls.model.heads import Head, HeadOptions, create_head
from facecls.model.metrics import HeadMetrics

SIZES = {"gender": 2, "race": 5, "glasses": 3}


def _heads() -> dict[str, Head]:
    tasks = create_tasks({"glasses": {"classes": ["none", "reading", "sun"]}})
    return {name: create_head(task, 4, HeadOptions()) for name, task in tasks.items()}


def _update(
    metrics: HeadMetrics, head: Head, guess: np.ndarray, labels: Mapping[str, np.ndarray], loss: float = 0.0
) -> None:
    tensors = {name: torch.tensor(values) for name, values in labels.items()}
    metrics.update(torch.tensor(guess), head.targets(tensors), torch.tensor(loss), head.label_weight(tensors))


def test_metrics_are_those_of_scikit_learn_over_the_labelled_faces() -> None:
    rng = np.random.default_rng(0)
    labels = {task: rng.integers(-1, size, 50) for task, size in SIZES.items()}  # -1: without a label
    labels["age"] = np.where(rng.random(50) < 0.2, MISSING, rng.integers(0, 117, 50))
    guesses = {task: rng.dirichlet(np.ones(size), 50) for task, size in SIZES.items()}
    guesses["age"] = labels["age"] + rng.choice([-5.0, -4.9, 0.0, 5.0, 5.1], 50)
    for name, head in _heads().items():
        metrics, truth = HeadMetrics(head.create_metrics()), labels[name]
        per_face = np.where(truth == MISSING, np.nan, rng.random(50))
        for part in (slice(0, 20), slice(20, 50)):
            _update(metrics, head, guesses[name][part], {name: truth[part]}, float(np.nanmean(per_face[part])))
        keep = truth != MISSING
        truth, guess = truth[keep], guesses[name][keep]
        wanted = {"loss": np.nanmean(per_face)}
        if name in SIZES:
            wanted["accuracy"] = accuracy_score(truth, guess.argmax(1))
            wanted["f1_macro"] = f1_score(truth, guess.argmax(1), average="macro")
        else:
            wanted["mae_years"] = mean_absolute_error(truth, guess)
            wanted["cs5"] = np.mean(np.abs(truth - guess) <= 5)
        assert {key: value.item() for key, value in metrics.compute().items()} == pytest.approx(wanted, rel=1e-6)


def test_ranges_count_in_a_metric_of_their_own() -> None:
    head = create_head(UTKFACE["age"], 4, HeadOptions())
    metrics = HeadMetrics(head.create_metrics())
    labels = {
        "age": np.array([30, MISSING, MISSING, MISSING, MISSING]),
        "age_from": np.array([MISSING, 20, 20, 70, MISSING]),
        "age_to": np.array([MISSING, 29, 29, 116, MISSING]),
    }
    _update(metrics, head, np.array([32.0, 29.4, 29.6, 71.0, 1.0]), labels, 1.5)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx({"loss": 1.5, "mae_years": 2, "cs5": 1, "band_accuracy": 2 / 3})


def test_a_task_without_labels_is_left_out_and_reset_forgets() -> None:
    head = _heads()["gender"]
    metrics = HeadMetrics(head.create_metrics())
    assert metrics.compute() == {}
    _update(metrics, head, np.eye(2), {"gender": np.array([MISSING, MISSING])})
    assert metrics.compute() == {}
    _update(metrics, head, np.eye(2), {"gender": np.array([0, 1])}, 0.3)
    assert sorted(metrics.compute()) == ["accuracy", "f1_macro", "loss"]
    metrics.reset()
    assert metrics.compute() == {}
