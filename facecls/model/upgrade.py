"""Converts checkpoints of earlier versions."""

import re
from typing import Any

_STATES = ("state_dict", "current_model_state")
"""Where a checkpoint keeps weights: the average, if there is one, and the weights themselves."""
_HEAD = re.compile(r"(model\.heads\.\w+\.)(\d+\.\w+)")
_TASKS = ("gender", "race", "age")
"""The order of version 0.1's vector of temperatures, which always held all three."""


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Converts a version 0.1 checkpoint in place; leaves later ones unchanged.

    Its place within an epoch is counted in batches of one device, since it does not say how many there were.

    Args:
        checkpoint: As Lightning keeps it.
    """
    for place in _STATES:
        state = checkpoint.get(place, {})
        if (temperatures := state.pop("model.temperatures", None)) is None:
            continue
        for name in [name for name in state if _HEAD.fullmatch(name)]:
            state[_HEAD.sub(r"\1layers.\2", name)] = state.pop(name)
        for task, temperature in zip(_TASKS, temperatures, strict=True):
            if any(name.startswith(f"model.heads.{task}.") for name in state):
                state[f"model.heads.{task}.temperature"] = temperature
    place = checkpoint.get("FacesDataModule", {})
    if "batch" in place:
        place["faces"] = place.pop("batch") * checkpoint["datamodule_hyper_parameters"]["batch_size"]
