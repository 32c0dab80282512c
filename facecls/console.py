"""The console for user-facing output."""

from typing import Any

from rich.console import Console
from rich.text import Text

from facecls.terminal import printable


class _PlainConsole(Console):
    """Prints texts as they are: what looks like markup is no markup, and control characters are shown."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def console(quiet: bool = False) -> Console:
    """The console for user-facing output; it prints nothing if quiet."""
    return _PlainConsole(soft_wrap=True, quiet=quiet, markup=False, emoji=False)
