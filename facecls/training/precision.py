"""The precision in which a device computes fastest."""

from typing import Any

import torch

from facecls.compat import cpu_computes_bfloat16
from facecls.errors import UserError


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


def choose_precision(accelerator: Any) -> tuple[str, str]:
    """Chooses bfloat16 where the device has instructions for it, and float32 elsewhere.

    A CPU that only emulates bfloat16 is 15 times slower in it than in float32 (ResNet-50, measured with AVX2).

    Args:
        accelerator: As given to the trainer: ``auto``, ``cpu``, ``gpu``, ``cuda`` or another one.

    Returns:
        Lightning's name of the precision, and the reason.
    """
    if uses_cuda(accelerator):
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", f"{name} computes in bfloat16"
        return "32-true", f"{name} does not compute in bfloat16"
    if accelerator in ("auto", "cpu") and not (accelerator == "auto" and torch.backends.mps.is_available()):
        if cpu_computes_bfloat16():
            return "bf16-mixed", "the CPU computes in bfloat16 (AVX512-BF16 or AMX)"
        return "32-true", "the CPU has neither AVX512-BF16 nor AMX and would only emulate bfloat16"
    return "32-true", f"bfloat16 is not used on {accelerator}"
