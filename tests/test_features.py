"""The choice of the features: convert.plain.features."""

import random
from pathlib import Path

import networkx
import pytest

from convert.plain.features import Step, choose_features, downstream
from facecls.errors import UserError

SOURCE = Path("network.onnx")


def _chain(roles: str) -> list[Step]:
    """Steps one after the other: Input, Weighted, Classifier, Probability, Reshape, iDentity, Other."""
    names = dict(
        i="input", w="weighted", c="classifier", p="probability", r="reshape", d="identity", o="other"
    )  # by letter
    return [
        Step(f"s{place}", (f"s{place - 1}",) if place else (), names[letter])  # type: ignore[arg-type]
        for place, letter in enumerate(roles)
    ]


@pytest.mark.parametrize(
    ("roles", "features"),
    [
        ("iwo", "s2"),
        ("iwow", "s3"),  # an embedding
        ("iwowp", "s2"),
        ("iwodwp", "s2"),
        ("iwodwrp", "s2"),
        ("iwowprd", "s2"),
        ("iwoc", "s2"),
        ("iwop", "s3"),  # a sigmoid that gates nothing is the network's own
        ("iwodd", "s2"),
    ],
)
def test_last_before_a_classifier(roles: str, features: str) -> None:
    steps = _chain(roles)
    assert choose_features(SOURCE, steps, [steps[-1].name], None) == features
    assert [step.name for step in steps[int(features[1:]) + 1 :]] == list(downstream(steps, features))


@pytest.mark.parametrize("seed", range(40))
def test_features_of_several_outputs_are_their_dominator(seed: int) -> None:
    """Random networks against networkx: the immediate dominator of a node that all outputs lead to."""
    rng = random.Random(seed)
    count = rng.randint(3, 40)
    steps = [Step("s0", (), "input")]
    for place in range(1, count):
        reach = range(max(0, place - rng.randint(1, 4)), place)
        chosen = rng.sample(reach, min(len(reach), rng.randint(1, 2)))
        steps.append(Step(f"s{place}", tuple(f"s{each}" for each in chosen), "other"))
    outputs = [step.name for step in rng.sample(steps[1:], 2)]
    graph = networkx.DiGraph([(source, step.name) for step in steps for source in step.inputs])
    graph.add_edges_from((output, "end") for output in outputs)
    expected = networkx.immediate_dominators(graph, "s0")["end"]
    if expected == "s0":
        with pytest.raises(UserError, match="on which all outputs"):
            choose_features(SOURCE, steps, outputs, None)
    else:
        assert choose_features(SOURCE, steps, outputs, None) == expected


def test_many_outputs_of_a_long_chain_are_found_at_once() -> None:
    """Where each step of 20,000 was compared with all others, this took minutes."""
    steps = _chain("i" + "o" * 20_000)
    outputs = ["s20000", *(f"s{place}" for place in range(10_000, 20_000, 10))]
    assert choose_features(SOURCE, steps, outputs, None) == "s10000"


def test_outputs_of_two_inputs_have_nothing_in_common() -> None:
    steps = [Step("a", (), "input"), Step("b", (), "input"), Step("c", ("a",), "other"), Step("d", ("b",), "other")]
    with pytest.raises(UserError, match=r"on which all outputs \(c, d\) depend, but there is none"):
        choose_features(SOURCE, steps, ["c", "d"], None)


@pytest.mark.parametrize("asked", ["s7", "s0"])
def test_unknown_name_is_refused_with_near_ones(asked: str) -> None:
    with pytest.raises(UserError, match=r"Expected the name of a layer in network.onnx, but got .*; did you mean s"):
        choose_features(SOURCE, _chain("iwo"), ["s2"], asked)
