"""Processes that train one model: when one of them ends, the others do not wait for it, and say why they end."""

import _thread
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from facecls.compat import kill_launched_processes, leave_sigterm_alone, observe_launched_processes
from facecls.errors import UserError
from facecls.ranks import launched
from facecls.terminal import say

_STARTED_BY = "FACECLS_STARTED_BY"
"""Variable by which the processes that Lightning starts know the one that started them."""
_EVERY = 1.0
"""Seconds between two looks at the other processes."""
_PATIENCE, _PATIENCE_OF_OTHERS = 40.0, 5.0
"""Seconds in which the first process of a node, which may save, and those that it started have to end by themselves."""
_FAILED = re.compile("gloo/transport|NCCL|ProcessGroup|Rendezvous|TCPStore|Broken pipe|Connection (closed|reset)")
"""What torch says when a process of the group does not answer any more."""


class LostError(UserError):
    """Another process of the run has ended."""

    def __init__(self, error: BaseException | None = None) -> None:
        reason = "" if error is None else f" ({str(error).strip().partition(chr(10))[0]})"
        super().__init__(
            f"Expected all processes of the run to answer, but another one has ended or can't be reached{reason}; it "
            "says why itself unless it was killed, as where memory runs out."
        )


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of torch where another process has ended."""
    return isinstance(error, RuntimeError) and _FAILED.search(str(error)) is not None


def check_launch(trainer: pl.Trainer) -> None:
    """Checks that as many processes were started as train, by what Lightning knows.

    Args:
        trainer: Before it runs.

    Raises:
        UserError: If not: they would wait for others.
    """
    processes, devices = launched().count, trainer.num_devices * trainer.num_nodes
    environment = getattr(trainer.strategy, "cluster_environment", None)  # only where there are several devices
    starts_others = environment is None or isinstance(environment, LightningEnvironment)
    if processes != devices and (processes > 1 or not starts_others):
        raise UserError(
            f"Expected trainer.devices x trainer.num_nodes to be the {processes} processes that were started, but "
            f"got {trainer.num_devices} x {trainer.num_nodes}; set devices per node and the number of nodes, and start "
            "the command by torchrun or srun."
        )
    if processes > 1 and starts_others:
        raise UserError(
            f"Expected the {processes} processes to be started by torchrun, or by srun in a job of a name other than "
            "bash and interactive, but Lightning knows of neither; use one of them, or unset their variables."
        )
    if environment is not None:
        try:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except ValueError as error:
            raise UserError(str(error)) from error


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Trains or tests with all processes of the trainer: none goes on, or waits, without the others.

    After an error those that Lightning started are killed. Its exit with status 1 after Ctrl-C or SIGTERM becomes what
    it was before. Processes started by torchrun or SLURM are watched by them.

    Args:
        trainer: Before it runs.

    Raises:
        LostError: If another process ends first.
    """
    over, lost = threading.Event(), threading.Event()
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        leave_sigterm_alone(trainer)

    def watch(has_ended: Callable[[], bool], patience: float) -> None:
        while not has_ended():
            if over.wait(_EVERY):
                return
        if not trainer.interrupted:  # else this process is what ends the others, or knows already
            lost.set()
            _thread.interrupt_main(signal.SIGTERM)
        if not over.wait(patience):  # it waits for an answer, which can't be interrupted
            say(f"facecls: error: {LostError()}")
            kill_launched_processes(trainer)
            os._exit(2)

    def start(has_ended: Callable[[], bool], patience: float) -> None:
        threading.Thread(target=watch, args=(has_ended, patience), daemon=True).start()

    if trainer.world_size > 1 and launched().count == 1:
        if trainer.local_rank > 0 and _STARTED_BY in os.environ:
            first = int(os.environ[_STARTED_BY])
            start(lambda: os.getppid() != first, _PATIENCE_OF_OTHERS)
        else:
            os.environ[_STARTED_BY] = str(os.getpid())
            observe_launched_processes(lambda others: start(lambda: any(each.poll() for each in others), _PATIENCE))
    try:
        yield
    except BaseException as error:
        kill_launched_processes(trainer)
        if lost.is_set() or is_lost(error):
            raise LostError(error if is_lost(error) else None) from error
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        over.set()
