"""Groups against pandas, scikit-learn and SciPy; gaps against planted ones and a published example."""

import tracemalloc
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_predictions import FAIRFACE, predicted, simulated, simulated_labels, with_ranges, without_some_labels
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from facecls.analysis.groups import (
    MIN_FACES,
    Gap,
    axes_of,
    axes_split,
    axis_columns,
    describe,
    gaps,
    group_table,
    report_bands,
    score_groups,
    worst_groups,
)
from facecls.analysis.scores import score
from facecls.data.tasks import UTKFACE, Age, create_tasks

AXES = ["gender", "race", "age_band"]
GENDERS, RACES = ("male", "female"), ("white", "black", "asian", "indian", "others")
AGE_BANDS = ("0-9", "10-19", "20-29", "30-39", "40-59", "60+")
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
    table = pd.DataFrame({"age": pd.array([*range(117), None], "Int16")})
    axis = axes_of(table, UTKFACE)["age_band"]
    codes = axis.codes(table)
    assert axis.groups == AGE_BANDS
    assert [AGE_BANDS[code] for code in codes[:-1]] == list(BANDS)
    assert codes[-1] == len(AGE_BANDS)
    bands = report_bands(Age("age", 116))
    assert [age for first, last in bands.values() for age in range(first, last + 1)] == list(range(117))


def test_rows_are_all_faces_each_marginal_and_each_combination() -> None:
    found = group_table(score_groups(simulated(30, 0), UTKFACE))
    rows = [tuple(row) for row in found[AXES].itertuples(index=False)]
    names = (GENDERS, RACES, tuple(AGE_BANDS))
    marginals = [
        tuple("all" if other != axis else name for other in range(3)) for axis in range(3) for name in names[axis]
    ]
    assert rows == [("all", "all", "all"), *marginals, *product(*names)]


def test_sizes_and_values_are_those_of_each_groups_faces() -> None:
    table = named(without_some_labels(simulated(3000, 1), 1))
    found = group_table(score_groups(table, UTKFACE))
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
    whole = group_table(score_groups(table, UTKFACE)).iloc[0]
    for name, found in score(table, UTKFACE).items():
        assert whole[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(found[:3])


def test_intervals_of_a_group_are_those_of_scipys_bootstrap_over_its_faces() -> None:
    table = named(simulated(2500, 2))
    found = group_table(score_groups(table, UTKFACE))
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
        found = gaps(score_groups(table, UTKFACE))
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
    gap = by(gaps(score_groups(table, UTKFACE)), "gender/accuracy", "combination")
    assert gap.worse == "male, white, 30-39"
    assert 0 < gap.low <= 0.47 <= gap.high


def test_tables_without_a_gap_seldom_claim_one() -> None:
    found = [gap for seed in range(30) for gap in gaps(score_groups(simulated(1000, seed), UTKFACE))]
    for axis in ("gender", "race", "age_band", "combination"):
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
    gap = by(gaps(score_groups(table, UTKFACE)), "gender/accuracy", "gender")
    assert (gap.better, gap.worse) == ("male", "female")
    assert (gap.low, gap.high) == pytest.approx((low, high), abs=5e-5)  # Newcombe 1998, table II, method 10


def test_more_pairs_make_the_interval_wider() -> None:
    table = simulated(4000, 5)
    two = table[table.race.isin([0, 1])]
    many, one = (
        by(gaps(score_groups(table, UTKFACE)), "age/mae_years", "race"),
        by(gaps(score_groups(two, UTKFACE)), "age/mae_years", "race"),
    )
    errors = {
        race: abs(table.age_predicted - table.age)[table.race == code].to_numpy(float)
        for code, race in enumerate(RACES)
    }
    for gap, pairs in ((many, 10), (one, 1)):
        welch = stats.ttest_ind(errors[gap.worse], errors[gap.better], equal_var=False)
        low, high = welch.confidence_interval(1 - 0.05 / pairs)
        assert (gap.low, gap.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_groups_of_one_class_have_no_gap_in_macro_f1() -> None:
    axes = {(gap.score, gap.by) for gap in gaps(score_groups(simulated(2500, 6), UTKFACE))}
    assert ("race/f1_macro", "gender") in axes
    assert ("race/accuracy", "race") in axes
    assert not axes & {("race/f1_macro", "race"), ("race/f1_macro", "combination"), ("gender/f1_macro", "gender")}


def test_missing_axes_tasks_and_faces() -> None:
    table = simulated(200, 7)
    none = pd.array([pd.NA] * 200, dtype="Int16")
    found = group_table(score_groups(table.assign(race=none), UTKFACE))
    assert "race" not in found
    assert len(found) == 1 + 2 + 6 + 2 * 6
    assert not [column for column in found if column.startswith("race/")]
    assert group_table(score_groups(table.assign(race=none, age=none), UTKFACE)).gender.to_list() == [
        "all",
        "male",
        "female",
    ]
    assert group_table(score_groups(table[:1], UTKFACE)).faces.sum() == 5
    assert group_table(score_groups(table[:0], UTKFACE)).to_dict("records") == [{"faces": 0}]
    assert gaps(score_groups(table[:1], UTKFACE)) == gaps(score_groups(table[:0], UTKFACE)) == []
    assert gaps(score_groups(table.drop(columns=table.filter(like="predicted")), UTKFACE)) == []


def test_a_gap_in_words() -> None:
    gap = Gap("race/accuracy", "race", "white", "others", 0.9, 0.65, 0.25, 0.11, 0.38)
    assert describe(gap, UTKFACE) == (
        "Race accuracy by race: worst for others (65.0 %), best for white (90.0 %), a gap of 25.0 points "
        "(95 % interval 11.0 to 38.0)."
    )
    gap = Gap("age/mae_years", "combination", "male, asian, 0-9", "male, black, 60+", 3.0, 7.5, 4.5, -0.5, 9.5)
    assert describe(gap, UTKFACE) == (
        "Mean absolute error of age by combination: worst for male, black, 60+ (7.5 years), best for "
        "male, asian, 0-9 (3.0 years), a gap of 4.5 years (95 % interval -0.5 to 9.5); "
        "the interval includes 0, so the gap may be due to chance."
    )


def test_seven_races_and_a_fourth_attribute_have_groups_of_their_own() -> None:
    table = without_some_labels(simulated(1500, 8, FAIRFACE), 8, FAIRFACE)
    found = group_table(score_groups(table, FAIRFACE))
    races, bands = FAIRFACE["race"].classes, AGE_BANDS
    assert list(found.columns[:5]) == ["gender", "race", "age_band", "glasses", "faces"]
    singles = [("all", "all", "all", "all")]
    singles += [(name, "all", "all", "all") for name in GENDERS] + [("all", name, "all", "all") for name in races]
    singles += [("all", "all", name, "all") for name in bands]
    singles += [("all", "all", "all", name) for name in ("without", "with")]
    combined = [
        (*group, "all") for group in product(GENDERS, races, bands)
    ]  # not by glasses, where cells would be empty
    rows = list(found[["gender", "race", "age_band", "glasses"]].itertuples(index=False, name=None))
    assert rows == singles + combined
    for code, name in enumerate(("without", "with")):
        row = found[found.glasses == name].iloc[0]
        inside = table[table.glasses.eq(code).fillna(False)]
        assert row.faces == len(inside)
        known = inside.dropna(subset="race")
        assert row["race/accuracy"] == pytest.approx(accuracy_score(known.race.astype(int), known.race_predicted))
        hits = (known.race == known.race_predicted).to_numpy(float)
        wanted = stats.bootstrap(
            (hits,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        ends = row[["race/accuracy_low", "race/accuracy_high"]].to_list()
        assert ends == pytest.approx(list(wanted), abs=0.15 * (wanted.high - wanted.low))
        assert np.isnan(row["glasses/f1_macro"])
    whole = score(table, FAIRFACE)
    for name, interval in whole.items():
        assert found.loc[0, [name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(interval[:3])


def test_a_group_that_is_harder_by_the_fourth_attribute_is_named() -> None:
    labels = simulated_labels(3000, 9, FAIRFACE)
    worn = (labels.glasses == 1).to_numpy(bool)
    table = predicted(labels, 9, FAIRFACE, gender=np.where(worn, 0.75, 0.95))
    gap = by(gaps(score_groups(table, FAIRFACE)), "gender/accuracy", "glasses")
    assert (gap.worse, gap.better) == ("glasses with", "glasses without")
    assert 0 < gap.low <= 0.20 <= gap.high
    worst = worst_groups(group_table(score_groups(table, FAIRFACE)), FAIRFACE)
    assert list(worst) == list(FAIRFACE)
    found = worst["gender"]
    assert found[:3] == ("gender/accuracy", "glasses", "with")
    right = (table.gender == table.gender_predicted)[worn].mean()
    assert found.value == pytest.approx(right)
    assert found.low < right < found.high
    assert found.faces == worn.sum()
    some = table.assign(gender=table.gender.mask(table.index < 1000))
    labelled = worst_groups(group_table(score_groups(some, FAIRFACE)), FAIRFACE)["gender"]
    assert labelled.faces == worn[1000:].sum()


def test_the_worst_group_of_an_error_is_the_one_where_it_is_largest() -> None:
    labels = simulated_labels(2000, 10)
    old = labels.age.between(40, 59).to_numpy(bool)
    table = predicted(labels, 10, age=np.where(old, 9.0, 4.0))
    worst = worst_groups(group_table(score_groups(table, UTKFACE)), UTKFACE)
    error = abs(table.age_predicted - table.age)[old].mean()
    assert worst["age"][:4] == ("age/mae_years", "age_band", "40-59", pytest.approx(error))
    men = table[table.gender == 0].drop(columns=["race", "race_predicted"]).assign(age=30)
    assert worst_groups(group_table(score_groups(men, UTKFACE)), UTKFACE) == {}  # nobody to be worse than


def test_ranges_belong_to_the_band_that_they_lie_in() -> None:
    ranges = [(0, 2), (3, 9), (20, 29), (25, 32), (40, 49), (50, 59), (60, 69), (70, 116), (9, 10)]
    low, high = (pd.array(ends, "Int16") for ends in zip(*ranges, strict=True))
    table = pd.DataFrame({"age": pd.array([None] * len(ranges), "Int16"), "age_from": low, "age_to": high})
    axis = axes_of(table, UTKFACE)["age_band"]
    names = [(*axis.groups, "none")[code] for code in axis.codes(table)]
    assert names == ["0-9", "0-9", "20-29", "none", "40-59", "40-59", "60+", "60+", "none"]
    simulated_ranges = with_ranges(simulated(600, 11))
    by_year, by_range = (group_table(score_groups(each, UTKFACE)) for each in (simulated(600, 11), simulated_ranges))
    assert by_range.faces.to_list() == by_year.faces.to_list()  # FairFace's ranges end where the bands do
    assert "age/mae_years" not in by_range
    assert by_range["age/band_accuracy"].notna().any()


def test_combinations_stay_few_and_single_groups_in_the_order_of_the_tasks() -> None:
    tasks = create_tasks({"race": {"classes": [f"r{code}" for code in range(40)]}, "beard": {"classes": ["no", "yes"]}})
    table = without_some_labels(simulated(2000, 12, tasks), 12, tasks)
    groups = score_groups(table, tasks)
    found = group_table(groups)
    split = axes_split(found)
    assert [(split == number).sum() for number in range(4)] == [1, 2 + 40 + 6 + 2, 0, 2 * 40 * 2]
    singles = found[split == 1][axis_columns(found)]
    assert list(singles.ne("all").to_numpy().argmax(1)) == [0] * 2 + [1] * 40 + [2] * 6 + [3] * 2
    assert list(singles.age_band[singles.age_band != "all"]) == list(AGE_BANDS)
    for row in found[found.age_band != "all"].itertuples():
        inside = table[table.age.between(*report_bands(Age("age"))[row.age_band]).fillna(False)]
        assert row.faces == len(inside)
        assert found.loc[row.Index, "age/mae_years_faces"] == inside.age.notna().sum()
        assert found.loc[row.Index, "gender/accuracy_faces"] == inside.gender.notna().sum()


def test_many_classes_take_little_memory() -> None:
    tasks = create_tasks({"race": {"classes": [f"r{code}" for code in range(40)]}})
    table = simulated(1000, 13, tasks)
    tracemalloc.start()
    score_groups(table, tasks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_groups_by_yes_and_no_are_named_with_their_axis() -> None:
    tasks = create_tasks({name: {"classes": ["no", "yes"]} for name in ("beard", "eye_glasses")})
    del tasks["race"], tasks["age"]
    labels = simulated_labels(3000, 14, tasks)
    hard = (labels.gender == 0) & (labels.beard == 1) & (labels.eye_glasses == 0)
    table = predicted(labels, 14, tasks, beard=np.where(hard, 0.5, 0.97))
    gap = by(gaps(score_groups(table, tasks)), "beard/accuracy", "combination")
    assert gap.worse == "male, beard yes, eye glasses no"


def test_bands_end_at_the_highest_age() -> None:
    assert report_bands(Age("age", 116))["60+"] == (60, 116)
    assert report_bands(Age("age", 60))["60+"] == (60, 60)
    assert list(report_bands(Age("age", 59)))[-1] == "40+"
