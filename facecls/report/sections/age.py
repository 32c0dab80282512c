"""Age: how far off ages are, and in which direction."""

import pandas as pd

from facecls.analysis import tables
from facecls.analysis.groups import MIN_FACES
from facecls.analysis.tables import tested_tasks, why_untested
from facecls.report import figures
from facecls.report.blocks import (
    Block,
    Content,
    Figure,
    Figures,
    Missing,
    Number,
    Section,
    Table,
    count,
    drawn,
    share,
    words,
    years,
)


def age(table: pd.DataFrame) -> Section:
    """How far off ages are, and in which direction."""
    if "age" not in tested_tasks(table):
        return Section("Age", [Missing(why_untested(table, "age"))])
    shown = [_density(table), _error(table), _bias(table), _cumulative(table)]
    blocks: list[Block] = []
    if "age_low" in table:
        shown.append(_coverage(table))
    else:
        blocks.append(Missing("The age head gives one number, not a distribution, so there is no interval to check."))
    return Section("Age", [Figures(shown), *blocks, _band_table(table)])


def _density(table: pd.DataFrame) -> Figure:
    errors = tables.age_errors(table)
    caption = words(
        "The dashed line is where both are equal. On average ages are predicted {} years from the true ones (mean "
        "signed error), and the median of the absolute error is {} years.",
        years("age/bias_years", float(errors["error"].mean()), sign=True),
        years("age/median_error", float(errors["error"].abs().median())),
    )
    if errors["age"].nunique() > 1:
        correlation = float(errors["age"].corr(errors["predicted"]))
        caption += words(" Their correlation is {}.", Number("age/correlation", correlation, f"{correlation:.3f}"))
    return drawn(figures.age_density(table), "age-density", "Predicted against true age", caption)


def _extremes(table: pd.DataFrame, column: str) -> list[tuple[str, float]]:
    """The bands with the smallest and the largest value, of those with enough faces if there are any."""
    bands = tables.age_by_band(table)
    enough = bands[bands["faces"] >= MIN_FACES]
    values = (enough if len(enough) else bands[bands["faces"] > 0])[column]
    return [(str(values.idxmin()), float(values.min())), (str(values.idxmax()), float(values.max()))]


def _error(table: pd.DataFrame) -> Figure:
    (best, low), (worst, high) = _extremes(table, "mae_years")
    caption = words(
        "Of the age bands, {} is best ({} years) and {} worst ({} years). Larger points stand for more faces.",
        best, years(f"band/{best}/mae_years", low), worst, years(f"band/{worst}/mae_years", high),
    )  # fmt: skip
    return drawn(figures.age_error(table), "age-error", "Mean absolute error by true age", caption)


def _bias(table: pd.DataFrame) -> Figure:
    (young, low), (old, high) = _extremes(table, "bias_years")
    caption = words(
        "From {} years at {} to {} years at {}; above 0, faces are taken for older than they are.",
        years(f"band/{young}/bias_years", low, sign=True), young, years(f"band/{old}/bias_years", high, sign=True), old,
    )  # fmt: skip
    return drawn(figures.age_bias(table), "age-bias", "Mean signed error by age band", caption)


def _cumulative(table: pd.DataFrame) -> Figure:
    shares = tables.cumulative_score(table)
    at = [share(f"cumulative/{off}", float(shares[off])) for off in (1, 5, 10, 15)]
    caption = words("{} of the ages are at most 1 year off, {} at most 5, {} at most 10 and {} at most 15.", *at)
    return drawn(figures.cumulative_score(table), "age-cumulative", "Cumulative score", caption)


def _coverage(table: pd.DataFrame) -> Figure:
    errors = tables.age_errors(table)
    (least, low), (most, high) = _extremes(table, "coverage")
    caption = words(
        "{} of the ages lie inside their 90 % interval, from {} at {} to {} at {}; intervals are {} years "
        "wide on average.",
        share("age/coverage", float(errors["covered"].mean())), share(f"band/{least}/coverage", low), least,
        share(f"band/{most}/coverage", high), most, years("age/width_years", float(errors["width"].mean())),
    )  # fmt: skip
    return drawn(figures.age_coverage(table), "age-coverage", "Coverage of the predicted interval", caption)


def _band_table(table: pd.DataFrame) -> Table:
    bands = tables.age_by_band(table)
    columns = {"mae_years": "mean abs. error", "bias_years": "mean signed error", "cs5": "within 5 years"}
    columns |= {"coverage": "in the interval", "width_years": "its width"} if "coverage" in bands else {}
    rows: list[list[Content]] = []
    for band, row in bands.iterrows():
        numbers = [
            years(f"band/{band}/{name}", row[name], sign=name == "bias_years")
            if name.endswith("_years")
            else share(f"band/{band}/{name}", row[name])
            for name in columns
        ]
        rows.append([str(band), count(f"band/{band}/faces", int(row["faces"])), *numbers])
    return Table("Age by band, in years", ["true age", "faces", *columns.values()], rows)
