"""Trunk and heads: all that is needed to use a trained model, without Lightning."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from facecls.data.tasks import Task
from facecls.errors import UserError
from facecls.model.heads import Head, HeadOptions, create_head
from facecls.model.trunk import Trunk
from facecls.model.views import Tta, count_views, views


class FaceModel(nn.Module):
    """A trunk, and a head for each task.

    Args:
        trunk: Faces to features.
        tasks: What the model predicts, in output order.
        options: How the heads are built and trained.

    Raises:
        UserError: If torch can't have a module of that name.

    Attributes:
        trunk: Faces to features.
        tasks: The tasks by name.
        heads: The heads by name of their task.
    """

    heads: Mapping[str, Head]

    def __init__(self, trunk: Trunk, tasks: Sequence[Task], options: HeadOptions) -> None:
        super().__init__()
        for task in tasks:
            if hasattr(nn.ModuleDict(), task.name):  # torch's dictionaries of modules refuse names of their own
                raise UserError(f"Expected another name for the task {task.name}, which torch uses itself; rename it.")
        self.trunk = trunk
        self.tasks = {task.name: task for task in tasks}
        heads = nn.ModuleDict({name: create_head(task, trunk.features, options) for name, task in self.tasks.items()})
        self.heads = cast("Mapping[str, Head]", heads)  # a ModuleDict does not say what its modules are

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Turns faces into logits.

        Args:
            images: (N, 3, H, W) RGB, 0..255, uint8 or float.

        Returns:
            (N, L) float32 by task.
        """
        return self.classify(self.trunk(images))

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Turns the trunk's features into logits.

        Args:
            features: (N, D) float.

        Returns:
            As ``forward``.
        """
        return {name: head(features) for name, head in self.heads.items()}

    def averaged(self, images: Tensor, tta: Tta) -> dict[str, Tensor]:
        """The logits of faces, averaged over views of them.

        Logits rather than probabilities, so that a temperature acts on the mean as on one of them.

        Args:
            images: As for ``forward``.
            tta: Over which views.

        Returns:
            As ``forward``.
        """
        total: dict[str, Tensor] = {}
        for view in views(images, tta):
            total = {name: values + total[name] if total else values for name, values in self(view).items()}
        return {name: values / count_views(tta) for name, values in total.items()}

    def estimate(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turns logits into estimates.

        Args:
            logits: As returned by ``forward``; a subset of the heads is fine.

        Returns:
            By ``Head.outputs``: for a classification ``<task>`` (N, C) probabilities; for an age ``<task>`` (N,) years
            and, from a distribution, ``<task>_distribution`` (N, A) probabilities of each year.
        """
        found: dict[str, Tensor] = {}
        for name, values in logits.items():
            found |= self.heads[name].estimate(values)
        return found
