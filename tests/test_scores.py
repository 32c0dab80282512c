"""Scores against scikit-learn, their intervals against SciPy, and both against planted values."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from simulated_predictions import FAIRFACE, predicted, simulated, simulated_labels, with_ranges, without_some_labels
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.analysis.scores import (
    Verdict,
    compare_with_guess,
    constant_guesses,
    main_scores,
    score,
    scores_of,
    trivial,
)
from facecls.data.tasks import UTKFACE
from facecls.model.metrics import RangeAccuracy

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
    found = score(table, UTKFACE)
    assert list(found) == [name for name in scores_of(UTKFACE) if name != "age/band_accuracy"] == list(TRUTH)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(truths(table))
    assert [interval.faces for interval in found.values()] == [len(pairs(table, name)[0]) for name in TRUTH]


def test_a_class_that_no_face_has_counts_only_when_it_is_predicted() -> None:
    table = simulated(300, 2)
    few = table[table.race.isin([0, 2])]
    assert {0, 2} < set(few.race_predicted)
    assert score(few, UTKFACE)["race/f1_macro"].value == pytest.approx(truths(few)["race/f1_macro"])
    fewer = few[few.race_predicted.isin([0, 2])]
    assert score(fewer, UTKFACE)["race/f1_macro"].value == pytest.approx(truths(fewer)["race/f1_macro"])


@pytest.mark.parametrize("name", list(TRUTH))
def test_intervals_are_those_of_scipys_bootstrap(name: str) -> None:
    table = simulated(400, 3)
    found = score(table, UTKFACE)[name]
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
    found = [score(simulated(400, seed, gender=0.9, race=0.8, age=6.0), UTKFACE) for seed in range(150)]
    for name, value in planted.items():
        covered = sum(interval[name].low <= value <= interval[name].high for interval in found)
        assert stats.binomtest(covered, len(found), 0.95).pvalue > 0.005, name


def test_a_seed_repeats_and_another_one_draws_anew() -> None:
    table = simulated(300, 4)
    assert score(table, UTKFACE, seed=1) == score(table, UTKFACE, seed=1)
    assert score(table, UTKFACE, seed=1)["age/mae_years"].low != score(table, UTKFACE, seed=2)["age/mae_years"].low


@pytest.mark.parametrize("faces", [1, 20, 300])
def test_where_all_are_right_or_wrong_the_bound_is_the_exact_one(faces: int) -> None:
    right = predicted(simulated_labels(faces, 5), 5, gender=1.0, race=0.0)
    found = score(right, UTKFACE)
    for name, hits in (("gender/accuracy", faces), ("race/accuracy", 0)):
        wanted = stats.binomtest(hits, faces).proportion_ci(method="exact")
        assert found[name][:3] == pytest.approx((hits / faces, wanted.low, wanted.high))


def test_a_single_face_has_an_error_but_no_interval_of_it() -> None:
    found = score(simulated(1, 6), UTKFACE)["age/mae_years"]
    assert found.value > 0
    assert np.isnan([found.low, found.high]).all()


def test_only_tasks_with_predictions_and_labels_have_scores() -> None:
    table = simulated(50, 7)
    table = table.drop(columns="race_predicted").assign(age=pd.array([pd.NA] * 50, dtype="Int16"))
    assert list(score(table, UTKFACE)) == ["gender/accuracy", "gender/f1_macro"]
    assert list(trivial(table, simulated(50, 8), UTKFACE)) == ["gender/accuracy", "gender/f1_macro"]
    assert score(table[:0], UTKFACE) == trivial(table[:0], table, UTKFACE) == {}


def test_trivial_guesses_are_those_of_scikit_learns_dummies() -> None:
    table, reference = without_some_labels(simulated(300, 9), 9), without_some_labels(simulated(900, 10), 10)
    wanted = {}
    for name, truth in TRUTH.items():
        dummy = DummyRegressor(strategy="median") if name.startswith("age") else DummyClassifier()
        learned, (labels, _) = pairs(reference, name)[0], pairs(table, name)
        guess = dummy.fit(np.zeros((len(learned), 1)), learned).predict(np.zeros((len(labels), 1)))
        wanted[name] = truth(labels, guess)
    assert trivial(table, reference, UTKFACE) == pytest.approx(wanted)


def test_seven_races_and_a_fourth_attribute_have_the_scores_of_scikit_learn() -> None:
    table = without_some_labels(simulated(600, 11, FAIRFACE, glasses=0.8), 11, FAIRFACE)
    found = score(table, FAIRFACE)
    names = [*TRUTH, "glasses/accuracy", "glasses/f1_macro"]
    assert list(found) == names
    for name in names:
        truth = TRUTH.get(name, TRUTH[name.replace("glasses", "gender")] if "glasses" in name else None)
        assert truth is not None
        assert found[name].value == pytest.approx(truth(*pairs(table, name)))
    assert [scores_of(FAIRFACE)[name].title for name in names[-2:]] == ["Glasses accuracy", "Glasses macro F1"]
    assert scores_of(FAIRFACE)["glasses/accuracy"].task is FAIRFACE["glasses"]


def test_ranges_are_scored_as_the_metric_scores_them_and_not_in_years() -> None:
    table = simulated(500, 12)
    is_range = np.arange(500) % 3 == 0
    mixed = without_some_labels(with_ranges(table, is_range), 12)
    found = score(mixed, UTKFACE)
    years = mixed.dropna(subset="age")
    assert found["age/mae_years"].value == pytest.approx(mean_absolute_error(years.age, years.age_predicted))
    ranges = mixed.dropna(subset="age_from")
    inside = [
        low <= round(float(age)) <= high
        for age, low, high in zip(ranges.age_predicted, ranges.age_from, ranges.age_to, strict=True)
    ]
    metric = RangeAccuracy()
    metric.update(
        torch.tensor(ranges.age_predicted.to_numpy(np.float32)),
        torch.tensor(ranges[["age_from", "age_to"]].to_numpy(np.int64)),
    )
    band = found["age/band_accuracy"]
    assert band.value == pytest.approx(np.mean(inside)) == pytest.approx(metric.compute().item())
    assert 0.2 < band.value < 0.9
    assert band.faces == is_range.sum()
    only = score(with_ranges(table), UTKFACE)
    assert [name for name in only if name.startswith("age/")] == ["age/band_accuracy"]
    assert main_scores(only, UTKFACE)["age"] == "age/band_accuracy"
    assert main_scores(found, UTKFACE) == {
        "gender": "gender/accuracy", "race": "race/accuracy", "age": "age/mae_years",
    }  # fmt: skip


def test_the_guess_of_ages_known_as_ranges_is_the_middle_of_the_most_common_one() -> None:
    table = with_ranges(simulated(400, 13))
    reference = with_ranges(simulated(2000, 14))
    most = reference.age_from.mode()[0]
    assert trivial(table, reference, UTKFACE)["age/band_accuracy"] == (table.age_from == most).mean()


def test_a_model_that_learned_nothing_is_not_compare_with_guess() -> None:
    """Its predictions are labels of other faces, or the guess itself with noise that helps nobody."""
    claims = []
    for seed in range(60):
        reference = simulated_labels(2000, seed + 500, FAIRFACE)
        table = simulated(300, seed, FAIRFACE)
        rng = np.random.default_rng(seed)
        for name in FAIRFACE:
            guess = reference[name].median() if name == "age" else reference[name].mode()[0]
            shuffled = rng.permutation(table[name].to_numpy(float))
            table[f"{name}_predicted"] = np.where(rng.random(300) < 0.9, guess, shuffled)
        found = compare_with_guess(table, FAIRFACE, reference, seed)
        assert list(found) == list(FAIRFACE)
        claims += [verdict is Verdict.BETTER for verdict in found.values()]
    assert np.mean(claims) < 0.05


def test_a_model_that_learned_something_is_compare_with_guess() -> None:
    reference = simulated_labels(2000, 15, FAIRFACE)
    table = simulated(400, 16, FAIRFACE, gender=0.65, race=0.25, glasses=0.65, age=9.0)
    assert compare_with_guess(table, FAIRFACE, reference) == dict.fromkeys(FAIRFACE, Verdict.BETTER)
    some = compare_with_guess(table.assign(gender_predicted=table.glasses_predicted), FAIRFACE, reference)
    assert some == dict.fromkeys(FAIRFACE, Verdict.BETTER) | {"gender": Verdict.UNCLEAR}
    ranges = compare_with_guess(with_ranges(table), FAIRFACE, with_ranges(reference))
    assert ranges == dict.fromkeys(FAIRFACE, Verdict.BETTER)


def test_a_difference_that_needs_pairing_is_seen() -> None:
    """The model repeats the guess but for 3 % of the faces, on which it is right: within its own interval."""
    reference = simulated_labels(2000, 17)
    table = simulated(800, 18)
    guess = reference.gender.mode()[0]
    other = np.flatnonzero(table.gender != guess)[:24]
    table["gender_predicted"] = guess
    table.loc[other, "gender_predicted"] = 1 - guess
    found, guessed = score(table, UTKFACE)["gender/accuracy"], trivial(table, reference, UTKFACE)["gender/accuracy"]
    assert found.low < guessed
    assert compare_with_guess(table, UTKFACE, reference)["gender"] is Verdict.BETTER


def test_few_faces_prove_nothing_and_what_cannot_be_compared_is_left_out() -> None:
    reference = simulated_labels(500, 19)
    right = simulated(400, 20, gender=1.0, race=1.0, age=0.1)
    rare = right[right.race == 4]  # where the guess is always wrong and the model always right
    assert compare_with_guess(rare[:5], UTKFACE, reference)["race"] is Verdict.TOO_FEW
    assert compare_with_guess(rare[:6], UTKFACE, reference)["race"] is Verdict.BETTER
    without = right.drop(columns="race_predicted").assign(age=pd.array([pd.NA] * 400, dtype="Int16"))
    assert list(compare_with_guess(without, UTKFACE, reference)) == ["gender"]
    assert compare_with_guess(right[:0], UTKFACE, reference) == {}


def test_a_model_is_called_worse_only_where_it_is_shown_to_be() -> None:
    reference = simulated_labels(500, 21)
    table = simulated(400, 22, race=0.9)
    guess = reference.race.mode()[0]
    wrong = (table.race == guess).to_numpy(bool)
    worse = table.assign(race_predicted=np.where(wrong, 4, guess).astype(np.int16))  # right for none of them
    assert compare_with_guess(worse, UTKFACE, reference)["race"] is Verdict.WORSE
    equal = table.assign(race_predicted=guess)
    assert compare_with_guess(equal, UTKFACE, reference)["race"] is Verdict.UNCLEAR
    older = table.assign(age_predicted=table.age.astype(float) + 50)
    assert compare_with_guess(older, UTKFACE, reference)["age"] is Verdict.WORSE


def test_a_guess_is_taken_from_the_tested_faces_where_the_reference_has_no_label() -> None:
    reference, table = simulated_labels(500, 23, FAIRFACE), simulated(300, 24, FAIRFACE)
    without = with_ranges(reference).drop(columns="glasses")
    found = constant_guesses(table, without, FAIRFACE)
    assert found["glasses"] == (table.glasses.mode()[0], "most common class", False)
    assert found["race"] == (reference.race.mode()[0], "most common class", True)
    assert found["age"][1:] == ("middle of the most common range", True)
    assert constant_guesses(table, reference, FAIRFACE)["age"] == (reference.age.median(), "median age", True)
    assert trivial(table, without, FAIRFACE)["glasses/accuracy"] == table.glasses.value_counts(normalize=True).max()
    assert list(compare_with_guess(table, FAIRFACE, without)) == list(FAIRFACE)
    assert constant_guesses(table, reference[:0], FAIRFACE)["gender"].from_reference is False
    assert constant_guesses(table[:0], reference[:0], FAIRFACE) == {}
