"""One head per task on the trunk's features, and what its logits say."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from facecls.data.tasks import CLASSES, MAX_AGE, TASKS, Task
from facecls.errors import UserError
from facecls.model.trunk import Trunk

AgeHead = Literal["distribution", "regression"]
"""How age is learned: 117 bins of a year each, or one number by a sigmoid."""


def outputs(task: Task, age: AgeHead) -> int:
    """How many logits the head of a task has."""
    if task == "age":
        return MAX_AGE + 1 if age == "distribution" else 1
    return len(CLASSES[task])


def create_head(features: int, hidden: Sequence[int], dropout: float, logits: int) -> nn.Sequential:
    """A stack of hidden layers with ReLU and dropout, then the logits.

    Args:
        features: Length of the trunk's feature vectors.
        hidden: Sizes of the hidden layers; none for a linear head.
        dropout: Share of features dropped before the first layer and after each hidden one, 0..1.
        logits: Length of the output.

    Returns:
        The head: (N, features) -> (N, logits).
    """
    layers: list[nn.Module] = [nn.Dropout(dropout)]
    for size in hidden:
        layers += [nn.Linear(features, size), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, logits))


class FaceModel(nn.Module):
    """Trunk and heads; all that is needed to use a trained model, without Lightning.

    Attributes:
        trunk: Faces to features.
        heads: Features to logits, by task.
        age: Which kind the age head is.
        temperatures: (3,) float, by task in the order of ``TASKS``; what logits are divided by before the softmax
            (Guo et al. 2017, "On Calibration of Modern Neural Networks"). 1 until fitted on validation faces.
    """

    temperatures: Tensor

    def __init__(
        self, trunk: Trunk, tasks: Sequence[Task], hidden: Sequence[int], dropout: float, age: AgeHead = "distribution"
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"Expected some of the tasks {', '.join(TASKS)}, each once, but got {list(tasks)}.")
        self.trunk = trunk
        self.age = age
        self.heads = nn.ModuleDict(
            {task: create_head(trunk.features, hidden, dropout, outputs(task, age)) for task in TASKS if task in tasks}
        )
        self.register_buffer("temperatures", torch.ones(len(TASKS)))

    def forward(self, images: Tensor) -> dict[Task, Tensor]:
        """Turns faces into logits.

        Args:
            images: (N, 3, H, W) RGB, 0..255, uint8 or float.

        Returns:
            By task: gender (N, 2), race (N, 5), age (N, 117) or (N, 1); float32.
        """
        return self.classify(self.trunk(images))

    def classify(self, features: Tensor) -> dict[Task, Tensor]:
        """Turns the trunk's features into logits.

        Args:
            features: (N, D) float.

        Returns:
            As ``forward``.
        """
        return {task: head(features).float() for task, head in self.heads.items()}  # type: ignore[misc]

    def mirror_averaged(self, images: Tensor) -> dict[Task, Tensor]:
        """The logits of faces, averaged with those of their mirror images.

        Logits rather than probabilities, so that a temperature acts on the mean as on one of them.

        Args:
            images: As for ``forward``.

        Returns:
            As ``forward``.
        """
        mirrored = self(images.flip(3))
        return {task: (values + mirrored[task]) / 2 for task, values in self(images).items()}

    def estimate(self, logits: Mapping[Task, Tensor]) -> dict[str, Tensor]:
        """What the logits say.

        The temperature of age spreads the distribution alone: the estimated age is the mean that the head was trained
        to put right.

        Args:
            logits: As ``forward`` gives them.

        Returns:
            ``gender`` (N, 2) and ``race`` (N, 5) probabilities, ``age`` (N,) years, and with a distribution head
            ``age_distribution`` (N, 117) probabilities of each year.
        """
        found: dict[str, Tensor] = {}
        for task, temperature in zip(TASKS, self.temperatures, strict=True):
            if task not in logits:
                continue
            values = logits[task]
            if task != "age":
                found[task] = (values / temperature).softmax(1)  # (N, classes)
            elif self.age == "distribution":
                found["age"] = expected_age(values.softmax(1))  # (N,)
                found["age_distribution"] = (values / temperature).softmax(1)  # (N, 117)
            else:
                found["age"] = MAX_AGE * values.squeeze(1).sigmoid()  # (N,)
        return found


def expected_age(distribution: Tensor) -> Tensor:
    """The mean of distributions over the ages 0..116.

    Args:
        distribution: (N, 117) probabilities.

    Returns:
        (N,) years.
    """
    years = torch.arange(MAX_AGE + 1, dtype=distribution.dtype, device=distribution.device)
    return (distribution * years).sum(1)  # not a product of matrices, which autocast would round to bfloat16
