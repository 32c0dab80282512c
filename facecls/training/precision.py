"""The precision in which a device computes fastest, and the trainer's option for it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from facecls.compat import cpu_computes_bfloat16
from facecls.errors import UserError

AUTO = "auto"
Precision = Literal[
    "auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true",
    "transformer-engine", "transformer-engine-float16", "bf16", "32", "64", "16", 32, 64, 16,
]  # fmt: skip
"""What ``trainer.precision`` takes: Lightning's names, and ``auto``."""
_PLAIN = "32-true"
_GAIN = 1.05
"""How much faster another precision must be than float32 to be taken, since it rounds more."""


class Trainer(pl.Trainer):
    """Lightning's trainer, whose option ``precision`` may be ``auto``.

    Args:
        precision: ``32-true`` (float32), ``bf16-mixed`` (bfloat16 where it does no harm), ``16-mixed``, ``64-true`` or
            ``bf16-true``; ``auto`` for the fastest, which a few steps of each find out.
    """

    def __init__(self, *args: Any, precision: Precision | None = "auto", **kwargs: Any) -> None:
        assert not is_automatic(precision), "the command chooses before it creates the trainer"
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]


def is_automatic(precision: Any) -> bool:
    """Whether the precision is left to the command: ``auto``, or null, which configurations used to say."""
    return precision in (None, AUTO)


def uses_cuda(accelerator: Any) -> bool:
    """Whether the trainer will compute on a CUDA device."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def check_precision(precision: Any) -> None:
    """Refuses formats in which training does not work.

    Args:
        precision: As given to the trainer.

    Raises:
        UserError: If weights would be kept in float16, in which small updates vanish and losses overflow, or it takes
            NVIDIA's TransformerEngine.
    """
    if str(precision) == "16-true" or str(precision).startswith("transformer-engine"):
        raise UserError(
            f"Expected trainer.precision 32-true, 64-true, bf16-true, bf16-mixed or 16-mixed, but got {precision}; "
            "16-mixed computes in float16 and keeps weights in float32."
        )


def possible_precisions(accelerator: Any) -> tuple[list[str], str]:
    """The precisions that may be fastest: float32, and what the device has instructions for.

    A CPU that only emulates bfloat16 is 15 times slower in it than in float32 (ResNet-50, measured with AVX2).

    Args:
        accelerator: As given to the trainer: ``auto``, ``cpu``, ``gpu``, ``cuda`` or another one.

    Returns:
        Lightning's names, that which is fastest for most networks last, and a reason for it.
    """
    if uses_cuda(accelerator):
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return [_PLAIN, "bf16-mixed"], f"{name} computes in bfloat16"
        if torch.cuda.get_device_capability() >= (7, 0):  # tensor cores; before them float16 saves memory alone
            return [_PLAIN, "16-mixed"], f"{name} computes in float16"
        return [_PLAIN], f"{name} computes in neither bfloat16 nor float16"
    if accelerator in ("auto", "cpu") and not (accelerator == "auto" and torch.backends.mps.is_available()):
        if cpu_computes_bfloat16():
            return [_PLAIN, "bf16-mixed"], "the CPU computes in bfloat16 (AVX512-BF16 or AMX)"
        return [_PLAIN], "the CPU has neither AVX512-BF16 nor AMX and would only emulate bfloat16"
    return [_PLAIN], f"bfloat16 is not used on {accelerator}"


def most_reduced(precision: Any, accelerator: Any) -> str:
    """The precision that was asked for; of those that may be chosen the one that rounds most, so as to check for all.

    Args:
        precision: As given to the trainer.
        accelerator: As given to the trainer.
    """
    return possible_precisions(accelerator)[0][-1] if is_automatic(precision) else str(precision)


def choose_precision(accelerator: Any, measure: Callable[[list[str]], Mapping[str, float]] | None) -> tuple[str, str]:
    """Chooses the precision in which the device is fastest.

    Args:
        accelerator: As given to the trainer.
        measure: Returns faces per second for each of some precisions, 0 for one that can't be used. It is asked only
            where there is a choice. ``None`` where several processes, which can't ask each other yet, must choose the
            same.

    Returns:
        Lightning's name of the precision, and the reason.
    """
    possible, reason = possible_precisions(accelerator)
    if len(possible) == 1 or measure is None:
        return possible[-1], reason
    rates = measure(possible)
    best = max(possible, key=lambda name: rates[name] * (_GAIN if name == _PLAIN else 1))
    others = " and ".join(f"{_rate(rates[name])} with {name}" for name in possible if name != best)
    return best, f"{_rate(rates[best])} faces/s against {others}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
