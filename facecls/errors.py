"""User errors, and how a command reports them and exits."""

import argparse
import errno
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from facecls._version import __version__
from facecls.terminal import lasting_streams, say

_BUG = 70
"""The exit status of a fault in the program: EX_SOFTWARE of sysexits.h."""
_LONGEST = 2_000
"""Characters of a message that are shown."""
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EIO", "EMFILE", "ENAMETOOLONG", "ENFILE", "ENOMEM", "ENOSPC", "EPERM", "EROFS")
    if hasattr(errno, name)
}
"""Errors that come from the machine, not from a fault in the program: no permission, no space and the like."""


class UserError(Exception):
    """A user's mistake; the message is one line: what was expected, what came, what to do.

    Args:
        message: The line. Of one that a worker of a loader raised, torch makes a text with a traceback before it, which
            is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{UserError.__name__}: ")[2])


@contextmanager
def command(name: str, prints_data: bool = False) -> Iterator[None]:
    """Ends a command as users expect, by one line and a status.

    That is 2 for their mistake or a fault of their machine, 130 after Ctrl-C, and 70 for any other exception, which is
    a fault of the program: its traceback is kept in a file. ``python -X dev`` lets it through, for a debugger.

    Args:
        name: What stands before the message, such as ``facecls.fit``.
        prints_data: Whether standard output is the result, so that the command must know if it can't be written.

    Raises:
        SystemExit: In place of the exception.
    """
    with lasting_streams(standard_output=not prints_data):
        try:
            yield
        except UserError as error:
            say(f"{name}: error: {_line(str(error))}")
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            say(f"{name}: interrupted")
            raise SystemExit(130) from None
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
                place = "" if error.filename is None else f" with {error.filename}"
                say(f"{name}: error: Can't go on{place}: {error.strerror}; correct that and run the command again.")
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
    """A parser whose errors are one line, with near names for an option that it does not know."""

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
