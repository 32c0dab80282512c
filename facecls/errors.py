"""User errors, and how a command reports them and exits."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A user's mistake; the message is one line: what was expected, what came, what to do."""


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
