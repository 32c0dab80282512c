"""Losses and heads against SciPy, NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy, norm
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.preprocessing import StandardScaler

from facecls.data.parsing import MISSING
from facecls.data.tasks import UTKFACE, Classification, choose_tasks, create_tasks
from facecls.errors import UserError
from facecls.model.heads import HeadOptions, create_head
from facecls.model.losses import (
    age_distribution_loss,
    age_regression_loss,
    check_weights,
    class_loss,
    expected_age,
    label_distribution,
    range_distribution_loss,
    range_regression_loss,
    uncertainty_sum,
    weighted_sum,
)
from facecls.model.network import FaceModel
from facecls.model.trunk import create_trunk

YEARS = np.arange(117)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_class_loss_is_log_loss_over_the_labelled(rng: np.random.Generator) -> None:
    logits, labels = rng.normal(size=(9, 5)), np.array([0, 1, 2, 3, 4, 0, 1, MISSING, MISSING])
    found = class_loss(torch.tensor(logits), torch.tensor(labels))
    assert found.item() == pytest.approx(log_loss(labels[:7], softmax(logits[:7], 1), labels=range(5)))


def test_class_weights_and_smoothing(rng: np.random.Generator) -> None:
    logits, labels, weights = rng.normal(size=(6, 2)), np.array([0, 1, 1, 0, 1, 0]), np.array([1.0, 3.0])
    found = class_loss(torch.tensor(logits), torch.tensor(labels), weights=torch.tensor(weights))
    assert found.item() == pytest.approx(log_loss(labels, softmax(logits, 1), sample_weight=weights[labels]))
    targets = 0.9 * np.eye(2)[labels] + 0.1 / 2
    smoothed = class_loss(torch.tensor(logits), torch.tensor(labels), smoothing=0.1)
    assert smoothed.item() == pytest.approx(-(targets * np.log(softmax(logits, 1))).sum(1).mean())


@pytest.mark.parametrize("age", [0, 30, 116])
def test_label_distribution_is_a_normal_cut_to_the_range(age: int) -> None:
    wanted = norm.pdf(YEARS, age, 2.5)
    found = label_distribution(torch.tensor([age]), 2.5, 117)
    np.testing.assert_allclose(found[0], wanted / wanted.sum(), rtol=2e-5, atol=1e-9)


def test_age_distribution_loss_is_divergence_plus_error_of_the_mean(rng: np.random.Generator) -> None:
    logits, ages = rng.normal(size=(5, 117)), np.array([3, 116, 40, MISSING, 0])
    guess, known = softmax(logits, 1), ages != MISSING
    targets = norm.pdf(YEARS, ages[:, None], 2.0)
    targets /= targets.sum(1, keepdims=True)
    divergence = entropy(targets[known], guess[known], axis=1).mean()
    error = np.abs(guess @ YEARS - ages)[known].mean()
    found = age_distribution_loss(torch.tensor(logits, dtype=torch.float32), torch.tensor(ages), 2.0)
    assert found.item() == pytest.approx(divergence + error, rel=1e-4)


def test_age_regression_loss_is_the_notebooks(rng: np.random.Generator) -> None:
    logits, ages = rng.normal(size=(5, 1)), np.array([3, 116, 40, MISSING, 0])
    found = age_regression_loss(torch.tensor(logits, dtype=torch.float32), torch.tensor(ages), 116)
    keep = ages != MISSING
    assert found.item() == pytest.approx(mean_squared_error(ages[keep] / 116, expit(logits[keep, 0])), rel=1e-5)


def test_without_labels_a_loss_is_zero_and_has_a_gradient() -> None:
    none = torch.full((3,), MISSING)
    for size, loss in (
        (5, class_loss),
        (117, lambda x, y: age_distribution_loss(x, y, 2.0)),
        (117, lambda x, y: range_distribution_loss(x, y, y)),
        (1, lambda x, y: age_regression_loss(x, y, 116)),
        (1, lambda x, y: range_regression_loss(x, y, y, 116)),
    ):
        logits = torch.randn(3, size, requires_grad=True)
        value = loss(logits, none)
        value.backward()
        assert value.item() == 0
        assert logits.grad is not None
        assert logits.grad.abs().sum() == 0


def test_sums_of_losses() -> None:
    losses = {"gender": torch.tensor(0.5), "race": torch.tensor(1.0), "age": torch.tensor(6.0)}
    assert weighted_sum(losses, {"age": 0.1}).item() == pytest.approx(2.1)
    logs = {task: torch.tensor(value) for task, value in zip(UTKFACE, (0.0, 1.0, 2.0), strict=True)}
    wanted = sum(np.exp(-s) * loss + s / 2 for s, loss in ((0, 0.5), (1, 1.0), (2, 6.0)))
    assert uncertainty_sum(losses, logs).item() == pytest.approx(wanted)


def test_the_learned_weight_of_a_loss_settles_where_theory_says() -> None:
    log_variance = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([log_variance], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        uncertainty_sum({"age": torch.tensor(6.0)}, {"age": log_variance}).backward()
        optimizer.step()
    assert log_variance.exp().item() == pytest.approx(12, rel=1e-3)  # d/ds (6 exp(-s) + s/2) = 0


def test_expected_age_is_the_mean(rng: np.random.Generator) -> None:
    guess = rng.dirichlet(np.ones(117), size=4)
    np.testing.assert_allclose(expected_age(torch.tensor(guess)), [np.average(YEARS, weights=row) for row in guess])


def test_ages_are_not_rounded_by_autocast() -> None:
    guess = torch.zeros(2, 117)
    guess[0, [98, 99]], guess[1, [32, 33]] = 0.5, torch.tensor([0.3, 0.7])
    with torch.autocast("cpu", torch.bfloat16):
        found = expected_age(guess)
    assert found.tolist() == pytest.approx([98.5, 32.7], abs=1e-4)


def test_a_range_learns_by_its_probability_and_the_distance_of_the_mean(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(4, 117))
    low, high = np.array([20, 70, MISSING, 0]), np.array([29, 116, MISSING, 2])
    guess = softmax(logits, 1)
    means = guess @ YEARS  # about 58
    nats = [-np.log(guess[row, low[row] : high[row] + 1].sum()) for row in (0, 1, 3)]
    off = [max(low[row] - means[row], means[row] - high[row], 0) for row in (0, 1, 3)]
    assert sum(value > 0 for value in off) >= 2
    wanted = np.mean(nats) + np.mean(off)
    found = range_distribution_loss(torch.tensor(logits), torch.tensor(low), torch.tensor(high))
    assert found.item() == pytest.approx(wanted)


def test_a_regression_learns_a_range_by_its_distance_from_it() -> None:
    years = np.array([15.0, 25.0, 40.0, 90.0])
    logits = torch.tensor(np.log(years / (116 - years)))[:, None].requires_grad_()
    low, high = torch.tensor([20, 20, 20, MISSING]), torch.tensor([29, 29, 29, MISSING])
    found = range_regression_loss(logits, low, high, 116)
    assert found.item() == pytest.approx((5**2 + 0 + 11**2) / 3 / 116**2)
    found.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0].sign() == torch.tensor([-1, 0, 1, 0])).all()


@pytest.mark.parametrize("kind", ["distribution", "regression"])
def test_a_loss_is_the_mean_over_ages_and_ranges_together(kind: str, rng: np.random.Generator) -> None:
    head = create_head(UTKFACE["age"], 4, HeadOptions(age_head=kind))
    logits = torch.tensor(rng.normal(size=(4, head.layers[-1].out_features)), dtype=torch.float32)
    ages = {"age": torch.tensor([30, MISSING, MISSING, MISSING])}
    ranges = {"age_from": torch.tensor([MISSING, 20, 60, MISSING]), "age_to": torch.tensor([MISSING, 29, 116, MISSING])}
    alone = [
        head.loss(logits[row : row + 1], {n: v[row : row + 1] for n, v in (ages | ranges).items()}) for row in range(4)
    ]
    together = head.loss(logits, ages | ranges)
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone) / 3, rel=1e-5)
    assert alone[3].item() == 0
    assert head.label_weight(ages | ranges).item() == 3
    assert head.label_weight(ages).item() == 1


def test_features_are_standardised_as_by_scikit_learn() -> None:
    torch.manual_seed(0)
    features = torch.randn(4000, 6) * torch.tensor([0.1, 0.3, 1, 3, 10, 100]) + torch.tensor([0.1, 5, -1, 0, 2, -50])
    head = create_head(UTKFACE["race"], 6, HeadOptions(feature_norm=True))
    linear = head.layers[-1]
    alike = torch.from_numpy(StandardScaler().fit_transform(features)).float()
    with torch.inference_mode():
        expected = linear(alike)
        torch.testing.assert_close(head.train()(features), expected, rtol=1e-3, atol=1e-2)
        for _ in range(100):
            head(features)
        torch.testing.assert_close(head.eval()(features), expected, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(head(features[:1]), expected[:1], rtol=1e-3, atol=1e-2)


def test_the_notebooks_head_has_the_notebooks_layers() -> None:
    head = create_head(UTKFACE["race"], 2048, HeadOptions([512, 256, 32], 0.2))
    linear = [(layer.in_features, layer.out_features) for layer in head.layers if isinstance(layer, torch.nn.Linear)]
    assert linear == [(2048, 512), (512, 256), (256, 32), (32, 5)]


@pytest.mark.parametrize(("kind", "bins"), [("distribution", 117), ("regression", 1)])
def test_estimates_follow_from_logits(kind: str, bins: int, rng: np.random.Generator) -> None:
    tasks = create_tasks({"glasses": {"classes": ["none", "reading", "sun"]}})
    model = FaceModel(create_trunk("resnet10t"), tasks.values(), HeadOptions([8], age_head=kind)).eval()
    assert list(model.heads) == ["gender", "race", "age", "glasses"]
    temperatures = dict(zip(model.heads, (0.5, 2.0, 3.0, 1.5), strict=True))
    for name, head in model.heads.items():
        head.temperature.fill_(temperatures[name])
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        estimates = model.estimate(logits)
    assert {task: tuple(value.shape) for task, value in logits.items()} == {
        "gender": (2, 2),
        "race": (2, 5),
        "age": (2, bins),
        "glasses": (2, 3),
    }
    for task in ("gender", "race", "glasses"):
        np.testing.assert_allclose(estimates[task], softmax(logits[task].numpy() / temperatures[task], 1), rtol=1e-5)
    values = logits["age"].numpy()
    wanted = softmax(values, 1) @ YEARS if bins > 1 else 116 * expit(values[:, 0])
    np.testing.assert_allclose(estimates["age"], wanted, rtol=1e-5)
    if bins > 1:
        np.testing.assert_allclose(estimates["age_distribution"], softmax(values / 3, 1), rtol=1e-5)
    assert list(estimates) == [name for head in model.heads.values() for name in head.outputs]


def test_tasks_must_be_known_and_named_once() -> None:
    for names in (["age", "age"], ["height"], []):
        with pytest.raises(UserError, match=r"Expected model\.tasks with some of gender, race, age, each once"):
            choose_tasks(UTKFACE, names)
    assert [task.name for task in choose_tasks(UTKFACE, ["age", "gender"])] == ["gender", "age"]


@pytest.mark.parametrize(
    ("class_weights", "task_weights", "said"),
    [
        ({"age": [1.0]}, {}, "class_weights for gender, race, but got 'age'"),
        ({"race": [1, 1]}, {}, r"class_weights\.race above 0 for each of white, black"),
        ({"gender": [0, 1]}, {}, "above 0"),
        ({"gender": [-1, 1]}, {}, "above 0"),
        ({}, {"height": 1.0}, "task_weights of 0 or more for gender, race, age, but got height"),
        ({}, {"age": -0.1}, "but got age: -0.1"),
    ],
)
def test_weights_that_would_not_do_are_refused(
    class_weights: dict[str, list[float]], task_weights: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_weights(UTKFACE, class_weights, task_weights)
    check_weights(UTKFACE, {"gender": [1, 2.5]}, {"age": 0, "race": 1})


def test_class_weights_may_be_whole_numbers() -> None:
    head = create_head(UTKFACE["gender"], 3, HeadOptions(class_weights={"gender": [1, 3]}))
    labels = {"gender": torch.tensor([0, 1, 1])}
    found = head.loss(torch.zeros(3, 2), labels)
    assert found.item() == pytest.approx(np.log(2))
    assert head.label_weight(labels).item() == 7


@pytest.mark.parametrize("name", ["type", "training", "keys", "half"])
def test_names_that_torch_uses_itself_are_refused(name: str) -> None:
    task = Classification(name, ("a", "b"))
    with pytest.raises(UserError, match=f"another name for the task {name}"):
        FaceModel(create_trunk("resnet10t"), [task], HeadOptions())
