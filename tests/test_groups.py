"""Groups against pandas, scikit-learn and SciPy; gaps against planted ones and a published example."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_predictions import predicted, simulated, simulated_labels, without_some_labels
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.analysis.groups import AGE_BANDS, MIN_FACES, Gap, age_bands, describe, gaps, group_table
from facecls.analysis.scores import score
from facecls.data.tasks import GENDERS, RACES

AXES = ["gender", "race", "age_band"]
BANDS = pd.cut(pd.Series(range(117)), [-1, 9, 19, 29, 39, 59, 200], labels=list(AGE_BANDS)).astype(str)


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The predictions with the names of their groups; NaN without a label."""
    return table.assign(
        gender_name=table.gender.map(dict(enumerate(GENDERS)), na_action="ignore"),
        race_name=table.race.map(dict(enumerate(RACES)), na_action="ignore"),
        age_band_name=table.age.map(BANDS.to_dict(), na_action="ignore"),
    )


def members(table: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """The faces of a row of ``group_table``."""
    inside = np.ones(len(table), bool)
    for axis in AXES:
        if row[axis] != "all":
            inside &= (table[f"{axis}_name"] == row[axis]).fillna(False).to_numpy(bool)
    return table[inside]


def by(found: list[Gap], score: str, axis: str) -> Gap:
    (gap,) = [gap for gap in found if gap.score == score and gap.by == axis]
    return gap


def test_bands_are_those_of_pandas_cut() -> None:
    ages = np.append(np.arange(117.0), np.nan)
    assert [list(AGE_BANDS)[code] for code in age_bands(ages)[:-1]] == list(BANDS)
    assert age_bands(ages)[-1] == len(AGE_BANDS)
    assert [age for first, last in AGE_BANDS.values() for age in range(first, last + 1)] == list(range(117))


def test_rows_are_all_faces_each_marginal_and_each_combination() -> None:
    found = group_table(simulated(30, 0))
    rows = [tuple(row) for row in found[AXES].itertuples(index=False)]
    names = (GENDERS, RACES, tuple(AGE_BANDS))
    marginals = [
        tuple("all" if other != axis else name for other in range(3)) for axis in range(3) for name in names[axis]
    ]
    assert rows == [("all", "all", "all"), *marginals, *product(*names)]


def test_sizes_and_values_are_those_of_each_groups_faces() -> None:
    table = named(without_some_labels(simulated(3000, 1), 1))
    found = group_table(table)
    for _, row in found.iterrows():
        inside = members(table, row)
        assert row.faces == len(inside)
        for task in ("gender", "race", "age"):
            known = inside.dropna(subset=task)
            shown = len(known) >= MIN_FACES
            truth, guess = known[task].to_numpy(float), known[f"{task}_predicted"].to_numpy(float)
            wanted = {}
            if task == "age":
                wanted["age/mae_years"] = mean_absolute_error(truth, guess) if shown else np.nan
                wanted["age/cs5"] = np.mean(abs(truth - guess) <= 5) if shown else np.nan
            else:
                wanted[f"{task}/accuracy"] = accuracy_score(truth, guess) if shown else np.nan
                mixed = shown and row[task] == "all"  # F1 over the classes says nothing of a single one
                wanted[f"{task}/f1_macro"] = f1_score(truth, guess, average="macro") if mixed else np.nan
            for name, value in wanted.items():
                assert row[name] == pytest.approx(value, nan_ok=True)
                ends = row[[f"{name}_low", f"{name}_high"]].to_numpy(float)
                assert np.isnan(ends).all() if np.isnan(value) else ends[0] <= value <= ends[1]
    assert found["race/accuracy"].isna().any()
    assert found["race/accuracy"].iloc[14:].notna().any()


def test_all_faces_have_the_interval_of_the_scores() -> None:
    table = simulated(300, seed=4)
    whole = group_table(table).iloc[0]
    for name, found in score(table).items():
        assert whole[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(found[:3])


def test_intervals_of_a_group_are_those_of_scipys_bootstrap_over_its_faces() -> None:
    table = named(simulated(2500, 2))
    found = group_table(table)
    for row in (0, 2, 5, 10):
        errors = members(table, found.loc[row]).eval("age_predicted - age").abs().to_numpy(float)
        wanted = stats.bootstrap(
            (errors,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(1)
        )
        low, high = wanted.confidence_interval
        ends = found.loc[row, ["age/mae_years_low", "age/mae_years_high"]].to_list()
        # a group's size varies too over the resampled faces; on the mean of its errors that has next to no effect
        assert ends == pytest.approx([low, high], abs=0.15 * (high - low))


def test_a_harder_group_is_found_and_named_and_its_gap_covered() -> None:
    covered = []
    for seed in range(25):
        labels = simulated_labels(2500, seed)
        old, black = labels.age.between(40, 59).to_numpy(bool), (labels.race == 1).to_numpy(bool)
        women = (labels.gender == 1).to_numpy(bool)
        table = predicted(
            labels,
            seed,
            gender=np.where(women, 0.80, 0.95),
            race=np.where(black, 0.60, 0.85),
            age=np.where(old, 9.0, 5.0),
        )
        found = gaps(table)
        planted = (
            (by(found, "gender/accuracy", "gender"), "female", 0.15),
            (by(found, "race/accuracy", "race"), "black", 0.25),
            (by(found, "age/mae_years", "age_band"), "40-59", 4.0),
        )
        for gap, name, difference in planted:
            assert gap.worse == name
            assert gap.low > 0
            covered.append(gap.low <= difference <= gap.high)
    assert np.mean(covered) >= 0.93


def test_one_harder_combination_is_found_among_sixty() -> None:
    labels = simulated_labels(5000, 3)
    hard = named(labels).eval("gender == 0 and race == 0 and age_band_name == '30-39'").to_numpy(bool)
    table = predicted(labels, 3, gender=np.where(hard, 0.5, 0.97))
    gap = by(gaps(table), "gender/accuracy", "group")
    assert gap.worse == "male, white, 30-39"
    assert 0 < gap.low <= 0.47 <= gap.high


def test_tables_without_a_gap_seldom_claim_one() -> None:
    found = [gap for seed in range(30) for gap in gaps(simulated(1000, seed))]
    for axis in ("gender", "race", "age_band", "group"):
        # scores of a task go up and down together, so one of each task is counted
        claims = [
            g.low > 0
            for g in found
            if g.by == axis and g.score in ("gender/accuracy", "race/accuracy", "age/mae_years")
        ]
        assert len(claims) == 90
        assert stats.binomtest(sum(claims), len(claims), 0.05, alternative="greater").pvalue > 0.01, axis


@pytest.mark.parametrize(
    ("right", "of", "low", "high"), [((56, 48), (70, 80), 0.0524, 0.3339), ((5, 0), (56, 29), -0.0381, 0.1926)]
)
def test_two_groups_have_newcombes_published_interval(
    right: tuple[int, int], of: tuple[int, int], low: float, high: float
) -> None:
    gender = np.repeat([0, 1], of)
    hits = np.concatenate([np.arange(size) < number for number, size in zip(right, of, strict=True)])
    table = simulated_labels(sum(of), 0).assign(gender=pd.array(gender, dtype="Int16"))
    table["gender_predicted"] = np.where(hits, gender, 1 - gender)
    gap = by(gaps(table), "gender/accuracy", "gender")
    assert (gap.better, gap.worse) == ("male", "female")
    assert (gap.low, gap.high) == pytest.approx((low, high), abs=5e-5)  # Newcombe 1998, table II, method 10


def test_more_pairs_make_the_interval_wider() -> None:
    table = simulated(4000, 5)
    two = table[table.race.isin([0, 1])]
    many, one = by(gaps(table), "age/mae_years", "race"), by(gaps(two), "age/mae_years", "race")
    errors = {
        race: abs(table.age_predicted - table.age)[table.race == code].to_numpy(float)
        for code, race in enumerate(RACES)
    }
    for gap, pairs in ((many, 10), (one, 1)):
        welch = stats.ttest_ind(errors[gap.worse], errors[gap.better], equal_var=False)
        low, high = welch.confidence_interval(1 - 0.05 / pairs)
        assert (gap.low, gap.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_groups_of_one_class_have_no_gap_in_macro_f1() -> None:
    axes = {(gap.score, gap.by) for gap in gaps(simulated(2500, 6))}
    assert ("race/f1_macro", "gender") in axes
    assert ("race/accuracy", "race") in axes
    assert not axes & {("race/f1_macro", "race"), ("race/f1_macro", "group"), ("gender/f1_macro", "gender")}


def test_missing_axes_tasks_and_faces() -> None:
    table = simulated(200, 7)
    none = pd.array([pd.NA] * 200, dtype="Int16")
    found = group_table(table.assign(race=none))
    assert set(found.race) == {"all"}
    assert len(found) == 1 + 2 + 6 + 2 * 6
    assert not [column for column in found if column.startswith("race/")]
    assert group_table(table.assign(race=none, age=none)).gender.to_list() == ["all", "male", "female"]
    assert group_table(table[:1]).faces.sum() == 5
    assert group_table(table[:0])[[*AXES, "faces"]].to_numpy().tolist() == [["all", "all", "all", 0]]
    assert gaps(table[:1]) == gaps(table[:0]) == gaps(table.drop(columns=table.filter(like="predicted"))) == []


def test_a_gap_in_words() -> None:
    gap = Gap("race/accuracy", "race", "white", "others", 0.9, 0.65, 0.25, 0.11, 0.38)
    assert describe(gap) == (
        "Race accuracy by race: worst for others (65.0 %), best for white (90.0 %), a gap of 25.0 points "
        "(95 % interval 11.0 to 38.0)."
    )
    gap = Gap("age/mae_years", "group", "male, asian, 0-9", "male, black, 60+", 3.0, 7.5, 4.5, -0.5, 9.5)
    assert describe(gap) == (
        "Mean absolute error of age by combination: worst for male, black, 60+ (7.5 years), best for "
        "male, asian, 0-9 (3.0 years), a gap of 4.5 years (95 % interval -0.5 to 9.5); "
        "the interval includes 0, so the gap may be chance."
    )
