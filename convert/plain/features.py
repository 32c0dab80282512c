"""Chooses the layer whose output is the features: the one asked for, or the last before a classifier."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from facecls.errors import UserError

Role = Literal["input", "weighted", "classifier", "probability", "reshape", "identity", "other"]


@dataclass(frozen=True)
class Step:
    """A layer or operator, as far as the choice of the features needs it.

    Attributes:
        name: Its name, or that of its output.
        inputs: Names of the steps that it reads.
        role: ``weighted`` for a dense layer or a convolution, ``classifier`` for one with a softmax or sigmoid of its
            own; ``probability`` for a softmax or sigmoid; ``reshape`` for what keeps the order of values;
            ``identity`` for what does nothing at inference, such as dropout.
    """

    name: str
    inputs: tuple[str, ...]
    role: Role


def choose_features(path: Path, steps: Sequence[Step], outputs: Sequence[str], asked: str | None) -> str:
    """Chooses the step whose output is the features.

    By default it is the last before a classifier, that is, before a weighted step whose output goes through a softmax
    or sigmoid; without a classifier it is the network's output; with several outputs, as of heads on a common trunk, it
    is the last step on which all of them depend.

    Args:
        path: The file, for messages.
        steps: The network, each step after those that it reads.
        outputs: Names of the steps whose outputs are the network's.
        asked: The name that the user asked for; ``None`` for the default.

    Returns:
        The name of the step.

    Raises:
        UserError: If there is no step of that name, or none on which all outputs depend.
    """
    by_name = {step.name: step for step in steps}
    if asked is not None:
        if asked not in by_name or by_name[asked].role == "input":
            known = [step.name for step in steps if step.role != "input"]
            near = difflib.get_close_matches(asked, known, n=3) or [step.name for step in steps[-3:]]
            raise UserError(f"Expected the name of a layer in {path}, but got {asked}; did you mean {', '.join(near)}?")
        return asked
    if len(outputs) == 1:
        return _skip_identity(by_name, _before_classifier(by_name, outputs[0]))
    common = _last_common(steps, outputs)
    if common is None or by_name[common].role == "input":
        raise UserError(
            f"Expected one layer in {path} on which all outputs ({', '.join(outputs[:5])}) depend, but there is none; "
            "name the features by --output."
        )
    return _skip_identity(by_name, common)


def downstream(steps: Sequence[Step], features: str) -> tuple[str, ...]:
    """Names of the steps that are not needed to compute the features, in their order."""
    needed = {features}
    for step in reversed(steps):
        if step.name in needed:
            needed.update(step.inputs)
    return tuple(step.name for step in steps if step.name not in needed)


def _before_classifier(steps: Mapping[str, Step], output: str) -> str:
    """The input of the classifier that ends in ``output``; ``output`` itself if none does."""
    step, is_probability = steps[output], False
    while step.role in ("probability", "reshape", "identity") and len(step.inputs) == 1:
        is_probability |= step.role == "probability"
        step = steps[step.inputs[0]]
    if step.role == "classifier" or (step.role == "weighted" and is_probability):
        return step.inputs[0]
    return output


def _skip_identity(steps: Mapping[str, Step], name: str) -> str:
    while steps[name].role == "identity" and len(steps[name].inputs) == 1:
        name = steps[name].inputs[0]
    return name


def _last_common(steps: Sequence[Step], outputs: Sequence[str]) -> str | None:
    """The last step through which every path from an input to any output leads (their common dominator)."""
    above: dict[str, str | None] = {}  # the last other step through which every path to a step leads
    depth: dict[str | None, int] = {None: 0}

    def common(names: Sequence[str]) -> str | None:
        found: str | None = names[0]
        for name in names[1:]:
            other: str | None = name
            while found != other:  # climb from the deeper one
                if found is not None and depth[found] >= depth[other]:
                    found = above[found]
                elif other is not None:
                    other = above[other]
        return found

    for step in steps:
        above[step.name] = common(step.inputs) if step.inputs else None
        depth[step.name] = depth[above[step.name]] + 1
    return common(outputs)
