"""Work in a child of this process, which has imported everything, for the fuzzers: it may crash, or never end."""

import os
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        status: Its exit status; of a signal that ended it, the negative number.
        seconds: How long it took.
        memory: The most that it had in memory, bytes.
    """

    status: int
    seconds: float
    memory: int


def run_in_child(work: Callable[[], int], said: Path, seconds: int) -> Ended:
    """Calls a function in a child.

    Args:
        work: Returns the exit status, which is 1 where it raises.
        said: Gets what the child writes to standard output and standard error.
        seconds: Of the processor, after which the child is ended.
    """
    started = time.monotonic()
    child = os.fork()
    if not child:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        status = 1
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    _, status, usage = os.wait4(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - started, usage.ru_maxrss * 1024)
