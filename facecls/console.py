"""The console for user-facing output."""

from rich.console import Console


def console(quiet: bool = False) -> Console:
    """The console for user-facing output; it prints nothing if quiet."""
    return Console(soft_wrap=True, quiet=quiet)
