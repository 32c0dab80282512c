"""The comparison of the exported models as a table."""

from collections.abc import Mapping, Sequence

from rich.table import Table

_ROWS = {
    "mb": ("size, MB", "{:.1f}"),
    "faces_per_second": ("faces/s", "{:,.0f}"),
    "difference": ("largest difference, {}", "{:.1e}"),
    "changed": ("changed decisions, {}", "{:.2%}"),
    "accuracy": ("accuracy, {}", "{:.2%}"),
    "mae_years": ("MAE in years, {}", "{:.3f}"),
    "band_accuracy": ("{} within its range", "{:.2%}"),
}
"""Text and format of the rows by the first part of their key, in order; other facts are not shown."""
_SCORES = frozenset({"accuracy", "mae_years", "band_accuracy"})
"""Rows that also show the change from torch."""


def create_table(facts: Mapping[str, float], models: Sequence[str], title: str) -> Table:
    """Creates the table.

    Args:
        facts: By ``KIND/WHAT/MODEL`` or ``KIND/MODEL``.
        models: The columns; the first is torch.
        title: Above the table.

    Returns:
        The table, one row for each ``KIND/WHAT``.
    """
    table = Table("", title=title, title_justify="left", caption_justify="left")
    for model in models:
        table.add_column(model, justify="right")
    rows = dict.fromkeys(key.rpartition("/")[0] for key in facts if key.partition("/")[0] in _ROWS)
    for row in sorted(rows, key=lambda row: list(_ROWS).index(row.partition("/")[0])):
        kind, _, what = row.partition("/")
        text, form = _ROWS[kind]
        values = [facts.get(f"{row}/{model}") for model in models]
        cells = ["" if value is None else form.format(value) for value in values]
        if kind in _SCORES:
            change = form.replace(":", ":+")
            cells[1:] = [
                f"{cell} ({change.format(facts[f'{row}/{model}'] - facts[f'{row}/{models[0]}'])})"
                for cell, model in zip(cells[1:], models[1:], strict=True)
            ]
        table.add_row(text.format(what), *cells)
    return table
