"""User errors, and how a command reports them and exits."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn


class UserError(Exception):
    """A user's mistake; the message is one line: what was expected, what came, what to do.

    Args:
        message: The line. Of one that a worker of a loader raised, torch makes a text with a traceback before it, which
            is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{UserError.__name__}: ")[2])


@contextmanager
def command(name: str) -> Iterator[None]:
    """Ends a command as users expect: one line and status 2 for their mistake, 130 after Ctrl-C.

    Args:
        name: What stands before the message, such as ``facecls.fit``.

    Raises:
        SystemExit: With status 2 in place of a ``UserError``, with 130 in place of a ``KeyboardInterrupt``.
    """
    try:
        yield
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


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
