"""Private or undocumented API of other packages, each where no public way exists, with the version it was seen in."""

import signal
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers import subprocess_script

DEPRECATED = "isinstance.treespec, LeafSpec.. is deprecated"
"""What torch since 2.12 says of a private class of its own, where Lightning 2.6 and its own ONNX exporter use it."""


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16: AVX512-BF16 or AMX.

    Private until ``torch.cpu.get_capabilities``, which torch 2.14 has; 2.11, the oldest supported, may not.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def create_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """The contents of a checkpoint with everything that resuming needs, without waiting for other processes.

    ``Trainer.save_checkpoint`` (Lightning 2.6) is public, but ends in a barrier: it hangs if only one process saves.

    Args:
        trainer: While it trains.

    Returns:
        What ``trainer.strategy.save_checkpoint`` writes.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def set_place(checkpoint: dict[str, Any], epoch: int, batch: int) -> None:
    """Makes Lightning go on with a batch, in whatever batches the run that saved the checkpoint counted.

    The state of loops (Lightning 2.6) is undocumented. It counts batches of the epoch, and how much Lightning would do
    again depends on the hook in which it was saved; here it is always as between two batches or two epochs.

    Args:
        checkpoint: Its contents, changed in place.
        epoch: The epoch to go on in.
        batch: The batch of it to go on with, from 0.
    """
    state = checkpoint["loops"]["fit_loop"]
    begun = epoch + (batch > 0)
    done = {"started": begun, "processed": epoch, "completed": epoch}
    state["epoch_progress"] = {"total": {"ready": begun, **done}, "current": {"ready": begun, **done}}
    total = state["epoch_loop.batch_progress"]["total"]["processed"]
    state["epoch_loop.batch_progress"] = {
        name: {"ready": count, "started": count, "processed": count, "completed": count}
        for name, count in (("total", total), ("current", batch))
    } | {"is_last_batch": False}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
    none = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    state["epoch_loop.val_loop.batch_progress"] = {"total": {**none}, "current": {**none}, "is_last_batch": False}


def kill_launched_processes(trainer: pl.Trainer) -> None:
    """Kills the processes that Lightning started for the other devices of this node; they would wait forever.

    Launchers (Lightning 2.6) are undocumented. Processes started by torchrun or SLURM are left alone.

    Args:
        trainer: After an error or Ctrl-C.
    """
    launcher: Any = trainer.strategy.launcher
    if getattr(launcher, "procs", None):
        launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has but the latter
        launcher.procs.clear()  # Lightning watches them, and would end this process with status 1


def guard_restoring(trainer: pl.Trainer, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wraps all that restores a run from a checkpoint, and nothing else of ``Trainer.fit``.

    Lightning (2.6) restores in two steps, between which the strategy is set up.

    Args:
        trainer: Before it runs.
        guard: Wraps a function.
    """
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, guard(getattr(connector, name)))


def observe_launched_processes(observe: Callable[[list["subprocess.Popen[bytes]"]], None]) -> None:
    """Has a function called with the processes that Lightning starts for other devices, in place of its own observer.

    That one (Lightning 2.6) kills this process as well, without a word, when one of them fails.

    Args:
        observe: Must return at once.
    """
    subprocess_script._launch_process_observer = observe  # type: ignore[assignment, attr-defined]


def leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning from doing anything of its own at SIGTERM, beside the handler that is there already.

    It (Lightning 2.6) passes the signal on and starts a broadcast in the handler, amid whatever else the processes are
    telling each other, and ends with status 0.

    Args:
        trainer: Before it runs.
    """
    trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]


def keep_tensorboard_from_importing_tensorflow() -> None:
    """Saves seconds and dozens of lines on stderr wherever TensorFlow is installed.

    TensorBoard (2.21) looks for this module, which only its own build without TensorFlow has
    (tensorboard/compat/__init__.py).
    """
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
