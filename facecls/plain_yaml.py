"""YAML of others: values, but nothing that a few lines blow up to millions, and nothing that holds itself."""

from collections.abc import Callable
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Values and names, with those behind each alias counted where it stands."""


def load(text: str, parse: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Reads YAML.

    Args:
        text: What is written.
        parse: Makes values of it.

    Returns:
        The values.

    Raises:
        yaml.YAMLError: If it is no YAML, has too many values, is nested too deeply or refers to itself.

    Examples:
        >>> load("{a: &a [1, 2], b: *a}")
        {'a': [1, 2], 'b': [1, 2]}
    """
    try:
        if "*" in text:
            _check_aliases(text)
        return parse(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _check_aliases(text: str) -> None:
    """Counts the values without making any."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor and count of each collection that is being read
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise yaml.YAMLError(f"*{event.anchor} is within &{event.anchor}, which has no end")
            count += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values of it")
