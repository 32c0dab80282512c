"""User errors, and how a command reports them and exits."""

import argparse
import errno
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

from facecls._version import __version__
from facecls.terminal import lasting_streams, say

_BUG = 70
"""The exit status of a fault in the program: EX_SOFTWARE of sysexits.h."""
_LONGEST = 2_000
"""Characters of a message that are shown."""
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EDQUOT",
        "EFBIG",
        "EIO",
        "EMFILE",
        "ENAMETOOLONG",
        "ENFILE",
        "ENOMEM",
        "ENOSPC",
        "EPERM",
        "EROFS",
    )
    if hasattr(errno, name)
}
"""Errors that come from the machine, not from a fault in the program: no permission, no space and the like."""


UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM")
    if hasattr(errno, name)
}
"""What file systems answer, those over a network above all, to a call that they do not have."""
_NO_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator: (can't allocate|not enough)|_ALLOC_FAILED|Failed to allocate memory"
)
"""What torch, CUDA's libraries and ONNX Runtime say where memory runs out."""
_WORKER_LOST = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)")


class UserError(Exception):
    """A user's mistake; the message is one line: what was expected, what came, what to do.

    Args:
        message: The line. Of one that a worker of a loader raised, torch makes a text with a traceback before it, which
            is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{UserError.__name__}: ")[2])


class Terminated(KeyboardInterrupt):
    """SIGTERM, which SLURM, Docker and systemd send to what they stop; it ends a command as Ctrl-C does."""


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status after Ctrl-C or SIGTERM, as a shell has it: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory has run out, that of the machine or that of a GPU."""
    is_of_a_library = not isinstance(error, UserError | OSError)
    return isinstance(error, MemoryError) or (is_of_a_library and _NO_MEMORY.search(str(error)) is not None)


@contextmanager
def memory_for(option: str, batch_size: int) -> Iterator[None]:
    """Says what to try where memory does not suffice for a batch.

    Args:
        option: That sets the size of a batch, with its dashes.
        batch_size: Faces in a batch.

    Raises:
        UserError: If memory runs out, or the system kills a process that prepares batches, as it does then.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            if _WORKER_LOST.search(str(error)):
                raise UserError(
                    "Expected the processes that prepare batches to go on, but one was killed, as the system does "
                    f"where memory runs out; lower --data.num_workers or {option} (now {batch_size})."
                ) from error
            raise
        place = "the GPU" if re.search("CUDA|CUDNN|CUBLAS", str(error)) else "the machine"
        remedy = f"try {option} {batch_size // 2}" if batch_size > 1 else "take smaller images or a smaller model"
        raise UserError(
            f"Expected memory for a batch of {batch_size} faces, but {place} has run out of it; {remedy}."
        ) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does, unless whoever started it has chosen otherwise."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Leaves it to whoever waits for a thread to say what the machine has refused it, as TensorBoard's writer does."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM wait for the end of what must not be left half done.

    Libraries in C++ that write by way of Python, as torch does, turn an interruption into an error of their own, and a
    thread that is just being woken, as TensorBoard's, may sleep on.
    """
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    came: list[int] = []
    try:
        with ExitStack() as stack:  # which puts back all of them, also where one is interrupted
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) is not None:  # what a library in C has set can't be put back
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda which, _: came.append(which))
            yield
    finally:
        for missed in dict.fromkeys(came):
            signal.raise_signal(missed)


def _terminate(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # what is saved now is not disturbed by another one
    raise Terminated


@contextmanager
def command(name: str, prints_data: bool = False) -> Iterator[None]:
    """Ends a command as users expect, by one line and a status.

    That is 2 for their mistake or a fault of their machine, 130 after Ctrl-C, 143 after SIGTERM, and 70 for any other
    exception, which is a fault of the program: its traceback is kept in a file. ``python -X dev`` lets it through, for
    a debugger.

    Args:
        name: What stands before the message, such as ``facecls.fit``.
        prints_data: Whether standard output is the result, so that the command must know if it can't be written.

    Raises:
        SystemExit: In place of the exception.
    """
    with lasting_streams(standard_output=not prints_data), _terminable(), _quiet_threads():
        try:
            yield
        except UserError as error:
            say(f"{name}: error: {_line(str(error))}")
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            say(f"{name}: {'terminated' if isinstance(stop, Terminated) else 'interrupted'}")
            raise SystemExit(status_of(stop)) from None
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
                place = "" if error.filename is None else f" with {error.filename}"
                say(f"{name}: error: Can't go on{place}: {error.strerror}; correct that and run the command again.")
                raise SystemExit(2) from error
            if is_out_of_memory(error):
                say(f"{name}: error: Expected more memory, but it has run out; free some, or do less at a time.")
                raise SystemExit(2) from error
            what = _line("".join(traceback.format_exception_only(error)))
            say(f"{name}: this is a bug, please report it with {_keep_traceback(error)}: {what}")
            raise SystemExit(_BUG) from error


def _line(text: str) -> str:
    """A text in one line, without its middle if it is very long, as those that name all columns of a table can be."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"


def _keep_traceback(error: Exception) -> str:
    """Writes a traceback to a file and returns its place; prints it if there is none for it."""
    text = "".join(traceback.format_exception(error))
    about = f"facecls {__version__}, Python {sys.version}\n{sys.orig_argv}\n\n"
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="facecls-", suffix=".log", delete=False) as log:
            log.write((about + text).encode(errors="backslashreplace").decode())
    except OSError:
        for line in text.splitlines():
            say(line)
        return "the lines above"
    return log.name


def program(module: str) -> str:
    """How the user started a command, for its usage line.

    Args:
        module: Of the command, such as ``facecls.fit``.

    Returns:
        ``python -m facecls.fit`` if Python was started so, else ``facecls fit``.
    """
    started_as_module = f" -m {module} " in f" {' '.join(sys.orig_argv)} "
    return f"python -m {module}" if started_as_module else f"facecls {module.removeprefix('facecls.')}"


def options_in(text: str) -> list[str]:
    """The options that a help text mentions, with their dashes."""
    return list(dict.fromkeys(re.findall(r"--[\w.]+", text)))


def near(name: str, known: Iterable[str]) -> str:
    """Suggests what a misspelt name may stand for.

    Args:
        name: What was written.
        known: The names there are.

    Returns:
        The end of a sentence.

    Examples:
        >>> near("batchsize", ["batch_size", "seed"]), near("x", ["seed"])
        ('; did you mean batch_size?', '; --help lists them.')
    """
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else "; --help lists them."


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with near names for unknown options; none may be cut short."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises a ``UserError``."""
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            known = options_in(self.format_help())
            raise UserError(f"Expected an option that is known, but got {unknown[1]}{near(unknown[1], known)}")
        if choice := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w.-]+", choice[3])
            suggestion = near(choice[2], known)
            raise UserError(f"Expected {choice[1]} to be one of {', '.join(known)}, but got {choice[2]}{suggestion}")
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help says what is expected.")
