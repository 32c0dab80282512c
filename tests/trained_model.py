"""A small model with random weights whose estimates differ from face to face, in a checkpoint as fit leaves it."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from facecls.data.tasks import UTKFACE
from facecls.model.module import FaceModule

SIZE = 64
"""Side of its faces in pixels."""
TEMPERATURES = (1.5, 0.7, 1.3)
"""Of gender, race and age."""
GLASSES = {"glasses": {"classes": ["without", "with"]}}
"""A task beside those of UTKFace, as ``task_options``."""


def save_checkpoint(path: Path, **options: Any) -> Path:
    """Makes a model and saves it by Lightning, with options as ``FaceModule`` takes them."""
    torch.manual_seed(0)
    module = FaceModule(trunk="test_resnet", image_size=SIZE, **options)
    for head in module.model.heads.values():
        head.layers[-1].weight.data *= 50  # type: ignore[operator, union-attr]
        if head.has_distribution:
            head.temperature.fill_(dict(zip(UTKFACE, TEMPERATURES, strict=True)).get(head.name, 2.0))
    for name in ("optimizer", "schedule"):
        module.hparams.pop(name)  # not to be pickled; the command line keeps them in another form
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path
