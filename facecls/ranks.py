"""Which of several processes this one is, according to torchrun or SLURM."""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from facecls.errors import UserError

_NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"),
)
_COUNTS = (
    *("WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"),
)
"""Variables that this project or Lightning reads; Lightning 2.6 even when it is imported."""
_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BY_SRUN = ("SLURM_LOCALID", "SLURM_NODEID")
"""What Lightning needs where one of the two has started several processes."""


@dataclass(frozen=True)
class Rank:
    """One of several processes that share the work.

    Attributes:
        number: From 0.
        count: Number of processes on all nodes; 1 for a single process.
        local: Its number on its node, from 0.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    def takes(self, path: str) -> bool:
        """Whether this process takes an input; depends on its path alone, not on the order or number of inputs."""
        return zlib.crc32(path.encode()) % self.count == self.number

    def shards(self, file: Path) -> list[Path]:
        """The files that the processes write in place of one, such as ``out.rank0of2.csv``."""
        if self.count == 1:
            return [file]
        return [file.with_name(f"{file.stem}.rank{number}of{self.count}{file.suffix}") for number in range(self.count)]


def launched(environment: Mapping[str, str] = os.environ) -> Rank:
    """Reads which process this is.

    Args:
        environment: Variables, as torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html) or srun
            (https://slurm.schedmd.com/srun.html) set them.

    Returns:
        The rank; that of a single process in a shell, and in a batch script, which is not a task of a step.

    Raises:
        UserError: If a variable is no such number or missing, or they contradict each other.
    """
    for name in (*_NUMBERS, *_COUNTS):
        least = int(name in _COUNTS)
        if name in environment and not (environment[name].isdecimal() and int(environment[name]) >= least):
            raise UserError(
                f"Expected {name} in the environment as a whole number from {least} up, as torchrun and srun set it, "
                f"but got {environment[name]!r}; unset it, or start all processes by one of the two."
            )
    _check_all(environment)
    if "RANK" in environment:
        number, count, local = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif "SLURM_PROCID" in environment and not ("SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment):
        # a shell within an allocation has the tasks of the allocation in SLURM_NTASKS, and is one task itself
        count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        number, local = "SLURM_PROCID", "SLURM_LOCALID"
        if int(environment.get(count, 1)) > 1:
            _check_there(_BY_SRUN, "srun", environment)
    else:
        return Rank()
    rank = Rank(int(environment[number]), int(environment.get(count, 1)), int(environment.get(local, 0)))
    if rank.number >= rank.count or rank.local > rank.number:
        raise UserError(
            f"Expected {number} below {count} and {local} not above it, but got {rank.number}, {rank.count} and "
            f"{rank.local}; start all processes by torchrun or srun."
        )
    return rank


def _check_all(environment: Mapping[str, str]) -> None:
    """Refuses a part of what torchrun sets; Lightning tells the processes that it starts no ``RANK``."""
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_there(_BY_TORCHRUN, "torchrun", environment)
    elif "RANK" in environment or (int(environment.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" not in environment):
        _check_there(("RANK", "WORLD_SIZE"), "torchrun", environment)


def _check_there(names: Sequence[str], setter: str, environment: Mapping[str, str]) -> None:
    if missing := [name for name in names if name not in environment]:
        raise UserError(
            f"Expected {', '.join(missing)} in the environment beside what else {setter} sets, but there is none; "
            f"start all processes by {setter}, or unset its variables."
        )
