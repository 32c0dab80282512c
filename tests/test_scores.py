"""Scores against scikit-learn, their intervals against SciPy, and against what was planted."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_predictions import predicted, simulated, simulated_labels, without_some_labels
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.analysis.scores import SCORES, score, trivial

Truth = Callable[[np.ndarray, np.ndarray], float]
WITHIN: Truth = lambda truth, guess: float(np.mean(np.abs(truth - guess) <= 5))  # noqa: E731
TRUTH: dict[str, Truth] = {
    "gender/accuracy": accuracy_score,
    "gender/f1_macro": lambda truth, guess: f1_score(truth, guess, average="macro"),
    "race/accuracy": accuracy_score,
    "race/f1_macro": lambda truth, guess: f1_score(truth, guess, average="macro"),
    "age/mae_years": mean_absolute_error,
    "age/cs5": WITHIN,
}


def pairs(table: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of the labelled faces."""
    task = name.split("/")[0]
    known = table.dropna(subset=task)
    kind = float if task == "age" else int
    return known[task].to_numpy(kind), known[f"{task}_predicted"].to_numpy(kind)


def truths(table: pd.DataFrame) -> dict[str, float]:
    return {name: truth(*pairs(table, name)) for name, truth in TRUTH.items()}


def test_values_are_those_of_scikit_learn_over_the_labelled_faces() -> None:
    table = without_some_labels(simulated(500, 1), 1)
    found = score(table)
    assert list(found) == list(SCORES) == list(TRUTH)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(truths(table))
    assert [interval.faces for interval in found.values()] == [len(pairs(table, name)[0]) for name in TRUTH]


def test_a_class_that_no_face_has_counts_only_when_it_is_predicted() -> None:
    table = simulated(300, 2)
    few = table[table.race.isin([0, 2])]
    assert {0, 2} < set(few.race_predicted)
    assert score(few)["race/f1_macro"].value == pytest.approx(truths(few)["race/f1_macro"])
    fewer = few[few.race_predicted.isin([0, 2])]
    assert score(fewer)["race/f1_macro"].value == pytest.approx(truths(fewer)["race/f1_macro"])


@pytest.mark.parametrize("name", list(TRUTH))
def test_intervals_are_those_of_scipys_bootstrap(name: str) -> None:
    table = simulated(400, 3)
    found = score(table)[name]
    wanted = stats.bootstrap(
        pairs(table, name),
        TRUTH[name],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = wanted.high - wanted.low
    # both ends are quantiles of 1,000 draws, each with a standard error of about 3 % of the width
    assert found.low == pytest.approx(wanted.low, abs=0.12 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.12 * width)


def test_intervals_cover_the_planted_scores_as_often_as_they_claim() -> None:
    planted = {"gender/accuracy": 0.9, "race/accuracy": 0.8, "age/mae_years": 6.0}
    found = [score(simulated(400, seed, gender=0.9, race=0.8, age=6.0)) for seed in range(150)]
    for name, value in planted.items():
        covered = sum(interval[name].low <= value <= interval[name].high for interval in found)
        assert stats.binomtest(covered, len(found), 0.95).pvalue > 0.005, name


def test_a_seed_repeats_and_another_one_draws_anew() -> None:
    table = simulated(300, 4)
    assert score(table, seed=1) == score(table, seed=1)
    assert score(table, seed=1)["age/mae_years"].low != score(table, seed=2)["age/mae_years"].low


@pytest.mark.parametrize("faces", [1, 20, 300])
def test_where_all_are_right_or_wrong_the_bound_is_the_exact_one(faces: int) -> None:
    right = predicted(simulated_labels(faces, 5), 5, gender=1.0, race=0.0)
    found = score(right)
    for name, hits in (("gender/accuracy", faces), ("race/accuracy", 0)):
        wanted = stats.binomtest(hits, faces).proportion_ci(method="exact")
        assert found[name][:3] == pytest.approx((hits / faces, wanted.low, wanted.high))


def test_a_single_face_has_an_error_but_no_interval_of_it() -> None:
    found = score(simulated(1, 6))["age/mae_years"]
    assert found.value > 0
    assert np.isnan([found.low, found.high]).all()


def test_only_tasks_with_predictions_and_labels_have_scores() -> None:
    table = simulated(50, 7)
    table = table.drop(columns="race_predicted").assign(age=pd.array([pd.NA] * 50, dtype="Int16"))
    assert list(score(table)) == ["gender/accuracy", "gender/f1_macro"]
    assert list(trivial(table, simulated(50, 8))) == ["gender/accuracy", "gender/f1_macro"]
    assert score(table[:0]) == trivial(table[:0], table) == {}


def test_trivial_guesses_are_those_of_scikit_learns_dummies() -> None:
    table, reference = without_some_labels(simulated(300, 9), 9), without_some_labels(simulated(900, 10), 10)
    wanted = {}
    for name, truth in TRUTH.items():
        dummy = DummyRegressor(strategy="median") if name.startswith("age") else DummyClassifier()
        learned, (labels, _) = pairs(reference, name)[0], pairs(table, name)
        guess = dummy.fit(np.zeros((len(learned), 1)), learned).predict(np.zeros((len(labels), 1)))
        wanted[name] = truth(labels, guess)
    assert trivial(table, reference) == pytest.approx(wanted)
