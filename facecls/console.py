"""Where the commands write what people read."""

from rich.console import Console


def console(quiet: bool = False) -> Console:
    """Where the commands write what people read; nowhere if quiet."""
    return Console(soft_wrap=True, quiet=quiet)
