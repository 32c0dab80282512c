"""What is shown on a terminal: texts without control characters, and streams that outlive who reads them."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNSHOWN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls of terminals, line ends, other directions of writing, and halves of characters; not tabs."""


def printable(text: str) -> str:
    r"""Shows control characters, which would move the cursor, change colours or write to the clipboard.

    Args:
        text: Any, such as a file's name.

    Returns:
        The text with its control characters, line ends among them, as Python writes them.

    Examples:
        >>> printable("a\x1b[31m.jpg")
        'a\\x1b[31m.jpg'
    """
    return _UNSHOWN.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str) -> None:
    """Prints one line on standard error.

    Args:
        text: Anything; control characters are shown.
    """
    print(printable(text), file=sys.stderr, flush=True)  # a process may be about to end at once


@contextmanager
def lasting_streams(standard_output: bool) -> Iterator[None]:
    """Standard output and standard error that can be written whatever the locale, and when nobody reads them.

    After Ctrl-C in ``facecls fit | tee log``, ``tee`` may end first. What is then printed is lost, but the command goes
    on to save what it has. What goes to a file or a program is UTF-8; a terminal gets the characters that it has.

    Args:
        standard_output: Whether that is so of standard output too, rather than of standard error alone.

    Yields:
        Nothing; afterwards the streams are as they were.
    """
    _fill_streams()
    names = ["stdout", "stderr"] if standard_output else ["stderr"]
    kept = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for stream in kept.values():
        _accept_all(stream)
    try:
        for name in names:
            # not a stream that a test or a notebook has put in its place
            if kept[name] is not None and kept[name] is getattr(sys, f"__{name}__"):
                setattr(sys, name, _lasting(kept[name]))
        yield
    finally:
        for name, stream in kept.items():
            if (own := getattr(sys, name)) is not None:
                own.flush()
            setattr(sys, name, stream)


def _fill_streams() -> None:
    """Opens nothing in place of standard streams that are closed, whose numbers the next files would get."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


class _Lasting(io.FileIO):
    """A file that loses what can't be written."""

    def write(self, data: "io.ReadableBuffer") -> int:  # type: ignore[name-defined]
        try:
            return super().write(data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # also what C libraries and exit handlers print
            return len(data)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)


def _accept_all(stream: object) -> None:
    """Makes a stream take any text."""
    if isinstance(stream, io.TextIOWrapper):
        encoding = None if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
