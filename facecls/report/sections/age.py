"""Section about an age task: size and direction of its errors."""

import pandas as pd

from facecls.analysis import tables
from facecls.analysis.groups import MIN_FACES
from facecls.analysis.labels import label_texts
from facecls.analysis.scores import scores_of
from facecls.analysis.tables import labelled, tested_tasks
from facecls.data.tasks import Age
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
    Text,
    count,
    counted,
    figure,
    sentence,
    share,
    years,
)
from facecls.report.sections.untested import untested


def age(table: pd.DataFrame, task: Age) -> Section:
    """Size and direction of the errors of an age task.

    Args:
        table: Predictions.
        task: Task to show.
    """
    if task not in tested_tasks(table, {task.name: task}):
        return Section(task.name, task.title, [untested(table, task)])
    blocks: list[Block] = []
    if len(labelled(table, task)):
        shown = [_density(table, task), _error(table, task), _bias(table, task), _cumulative(table, task)]
        if f"{task.name}_low" in table:
            shown.append(_coverage(table, task))
        blocks += [Figures(shown), _band_table(table, task)]
    if f"{task.name}_low" not in table:
        blocks.append(
            Missing(
                f"The head of {task.title.lower()} predicts one number, not a distribution, so it has no intervals."
            )
        )
    if len(ranges := _by_range(table, task)):
        blocks += [_range_text(ranges, task), _range_table(ranges, task)]
    return Section(task.name, task.title, blocks)


def _density(table: pd.DataFrame, task: Age) -> Figure:
    errors = tables.age_errors(table, task)
    caption = sentence(
        "The dashed line marks perfect predictions. The mean signed error is {} years, the median absolute error {} "
        "years.",
        years(f"{task.name}/bias_years", float(errors["error"].mean()), sign=True),
        years(f"{task.name}/median_error", float(errors["error"].abs().median())),
    )
    if errors["age"].nunique() > 1 and errors["predicted"].nunique() > 1:
        correlation = float(errors["age"].corr(errors["predicted"]))
        caption += sentence(
            " The correlation is {}.", Number(f"{task.name}/correlation", correlation, f"{correlation:.3f}")
        )
    drawing = figures.age_density(table, task)
    return figure(drawing, f"{task.name}-density", "Predicted against true age", caption)


def _extremes(table: pd.DataFrame, task: Age, column: str) -> list[tuple[str, float]]:
    """The bands with the smallest and the largest value, among those with enough faces if there are any."""
    bands = tables.age_by_band(table, task)
    enough = bands[bands["faces"] >= MIN_FACES]
    values = (enough if len(enough) else bands[bands["faces"] > 0])[column]
    return [(str(values.idxmin()), float(values.min())), (str(values.idxmax()), float(values.max()))]


def _error(table: pd.DataFrame, task: Age) -> Figure:
    (best, low), (worst, high) = _extremes(table, task, "mae_years")
    key = f"band/{task.name}"
    caption = sentence(
        "The error is smallest at ages {} ({} years) and largest at {} ({} years). Larger points stand for more faces.",
        best, years(f"{key}/{best}/mae_years", low), worst, years(f"{key}/{worst}/mae_years", high),
    )  # fmt: skip
    return figure(figures.age_error(table, task), f"{task.name}-error", "Mean absolute error by true age", caption)


def _bias(table: pd.DataFrame, task: Age) -> Figure:
    (young, low), (old, high) = _extremes(table, task, "bias_years")
    key = f"band/{task.name}"
    caption = sentence(
        "Between {} years (at ages {}) and {} years (at {}). Above 0, the model overestimates the age.",
        years(f"{key}/{young}/bias_years", low, sign=True), young,
        years(f"{key}/{old}/bias_years", high, sign=True), old,
    )  # fmt: skip
    return figure(figures.age_bias(table, task), f"{task.name}-bias", "Mean signed error by age band", caption)


def _cumulative(table: pd.DataFrame, task: Age) -> Figure:
    shares = tables.cumulative_score(table, task)
    at = [share(f"cumulative/{task.name}/{off}", float(shares[off])) for off in (1, 5, 10, 15)]
    caption = sentence("{} of the predictions are within 1 year, {} within 5, {} within 10 and {} within 15.", *at)
    return figure(figures.cumulative_score(table, task), f"{task.name}-cumulative", "Cumulative score", caption)


def _coverage(table: pd.DataFrame, task: Age) -> Figure:
    errors = tables.age_errors(table, task)
    (least, low), (most, high) = _extremes(table, task, "coverage")
    key = f"band/{task.name}"
    caption = sentence(
        "{} of the true ages lie in their 90 % interval, between {} (at ages {}) and {} (at {}). The intervals are {} "
        "years wide on average.",
        share(f"{task.name}/coverage", float(errors["covered"].mean())),
        share(f"{key}/{least}/coverage", low), least, share(f"{key}/{most}/coverage", high), most,
        years(f"{task.name}/width_years", float(errors["width"].mean())),
    )  # fmt: skip
    drawing = figures.age_coverage(table, task)
    return figure(drawing, f"{task.name}-coverage", "Coverage of the predicted interval", caption)


def _band_table(table: pd.DataFrame, task: Age) -> Table:
    bands = tables.age_by_band(table, task)
    columns = {"mae_years": "mean absolute error", "bias_years": "mean signed error", "cs5": "within 5 years"}
    columns |= {"coverage": "in the interval", "width_years": "interval width"} if "coverage" in bands else {}
    rows: list[list[Content]] = []
    for band, row in bands.iterrows():
        key = f"band/{task.name}/{band}"
        numbers = [
            years(f"{key}/{name}", row[name], sign=name == "bias_years")
            if name.endswith("_years")
            else share(f"{key}/{name}", row[name])
            for name in columns
        ]
        rows.append([str(band), count(f"{key}/faces", int(row["faces"])), *numbers])
    return Table(f"{task.title} by band", ["true age", "faces", *columns.values()], rows)


def _by_range(table: pd.DataFrame, task: Age) -> pd.DataFrame:
    """Faces labelled with a range of ages, and how many are predicted in it, by the range's name; youngest first."""
    if task.range[0] not in table:
        return pd.DataFrame(columns=["faces", "right"])
    parts = scores_of({task.name: task})[f"{task.name}/band_accuracy"].parts(table)
    faces = pd.DataFrame(parts, columns=["faces", "right"]).assign(name=pd.Series(label_texts(table, task)))
    faces = faces.assign(first=table[task.range[0]].to_numpy(), last=table[task.range[1]].to_numpy())
    counts = faces[faces["faces"] > 0].groupby(["first", "last", "name"])[["faces", "right"]].sum()
    return counts.droplevel(["first", "last"])


def _range_text(ranges: pd.DataFrame, task: Age) -> Text:
    faces, right = ranges.sum()
    return Text(
        sentence(
            "For {} of {} labelled with a range of ages rather than an age, the predicted age lies in the range (band "
            "accuracy). The errors in years leave these faces out.",
            share(f"score/{task.name}/band_accuracy", right / faces),
            counted(f"score/{task.name}/band_accuracy/faces", int(faces), "face"),
        )
    )  # fmt: skip


def _range_table(ranges: pd.DataFrame, task: Age) -> Table:
    rows: list[list[Content]] = []
    for name, row in ranges.iterrows():
        key = f"range/{task.name}/{name}"
        right = share(f"{key}/band_accuracy", row["right"] / row["faces"])
        rows.append([str(name), count(f"{key}/faces", int(row["faces"])), right])
    return Table(f"{task.title} by labelled range", ["range", "faces", "predicted in the range"], rows)
