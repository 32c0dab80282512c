"""Labels as people write them: codes, words, ages and ranges of ages."""

import re

MISSING = -1
"""Stands in a batch for a label that a face does not have."""
UNKNOWN = frozenset({"", "na", "n/a", "nan", "none", "null", "<na>", "-1", "-1.0", "unknown", "?", "u"})
"""Lower-case texts that mean a missing label; ``u`` is Adience's."""

_YEARS = re.compile(r"\s*(?:years?|yrs?)(?:\s+old)?$")
_AGE = r"(\d{1,3})"
_DECIMAL = re.compile(r"\+?(\d{1,3})(?:[.,]\d*)?", re.ASCII)
_RANGES = (
    (re.compile(rf"{_AGE}\s*(?:-|\N{{EN DASH}}|to)\s*{_AGE}"), lambda low, high, top: (low, min(high, top))),
    (re.compile(rf"\(\s*{_AGE}\s*,\s*{_AGE}\s*\)"), lambda low, high, top: (low, min(high, top))),
    (re.compile(rf"{_AGE}s"), lambda low, _, top: (low, min(low + 9, top))),
    (re.compile(rf"(?:>=?|more than|over|older than|at least)\s*{_AGE}"), lambda low, _, top: (low, top)),
    (re.compile(rf"{_AGE}\s*(?:\+|plus|(?:and|or) (?:over|above|older|more))"), lambda low, _, top: (low, top)),
    (re.compile(rf"(?:<|less than|under|younger than|below)\s*{_AGE}"), lambda high, _, top: (0, min(high - 1, top))),
)
"""How ranges of ages are written, and what they mean given the highest age. ``20-29`` and ``more than 70`` are
FairFace's (its oldest group follows ``60-69``, so 70 belongs to it), ``(25, 32)`` is Adience's."""


class LabelError(ValueError):
    """A text that can't be parsed as a label; its message becomes the reason for the reject."""


def parse_years(text: str, highest: int) -> tuple[int, int, int] | None:
    """Reads an age or a range of ages.

    Args:
        text: Such as ``26``, ``26.5``, ``20-29``, ``more than 70`` or ``60+``.
        highest: The highest age in years.

    Returns:
        Age, first and last year of a range, ``MISSING`` where there is none; ``None`` if the text is something else. A
        range of one year is an age.

    Examples:
        >>> parse_years("26 years", 116), parse_years("60+", 116), parse_years("young", 116)
        ((26, -1, -1), (-1, 60, 116), None)
    """
    text = _YEARS.sub("", text.strip().lower())
    if text in UNKNOWN:
        return MISSING, MISSING, MISSING
    if (match := _DECIMAL.fullmatch(text)) and (number := int(match[1])) <= highest:
        return number, MISSING, MISSING  # rounded down, as birthdays are
    for pattern, ends in _RANGES:
        if match := pattern.fullmatch(text):
            low, high = ends(int(match[1]), int(match[match.lastindex or 1]), highest)
            if low <= high:
                return (low, MISSING, MISSING) if low == high else (MISSING, low, high)
    return None


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, whatever separates them."""
    return re.findall(r"\w+", text.lower().replace("_", " "))


def key_of(text: str) -> str:
    """What texts of the same meaning share: the value of a whole number, or else the words."""
    number = whole_number(text)
    return " ".join(words_of(text)) if number is None else str(number)


def whole_number(text: str) -> int | None:
    """The value of a whole number, also written as ``26.0`` or ``26,0``; ``None`` for any other text."""
    match = re.fullmatch(r"\s*([+-]?\d{1,9})(?:[.,]0*)?\s*", text, re.ASCII)
    return int(match[1]) if match else None
