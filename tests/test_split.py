"""The division is reproducible, stratified, blind to the rows' order, and never parts identical images."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.model_selection import train_test_split

from facecls.data.split import SPLITS, STRATA_AGE_EDGES, assign_split, leaks, read_split_file, read_split_lists
from facecls.data.tasks import create_tasks
from facecls.errors import UserError


def made_faces(count: int, seed: int = 0, copies: float = 0.0, missing: float = 0.0) -> pd.DataFrame:
    """A table like UTKFace's: lopsided in race and age; some images copies of others, some labels missing."""
    rng = np.random.default_rng(seed)
    image = np.where(rng.random(count) < copies, rng.integers(0, max(1, count // 10), count), np.arange(count))
    faces = pd.DataFrame(
        {
            "path": [f"UTKFace/{number}.jpg" for number in range(count)],
            "age": pd.array(np.minimum(rng.gamma(2, 16, count).astype(int), 116), "Int16"),
            "gender": pd.array(rng.integers(0, 2, count), "Int16"),
            "race": pd.array(rng.choice(5, count, p=[0.42, 0.19, 0.15, 0.17, 0.07]), "Int16"),
            "sha1": [hashlib.sha1(str(number).encode()).hexdigest() for number in image],
        }
    )
    for task in ("age", "gender", "race"):
        faces.loc[rng.random(count) < missing, task] = pd.NA
    return faces


def strata(faces: pd.DataFrame) -> "pd.Series[str]":
    bands = pd.cut(faces["age"].astype("Float64"), [*STRATA_AGE_EDGES, 200], right=False).astype(str)
    return faces["gender"].astype(str) + "/" + faces["race"].astype(str) + "/" + bands


def test_the_whole_is_right_to_one_face() -> None:
    for count, val, test in [(1000, 0.1, 0.2), (997, 0.15, 0.15), (123, 0.3, 0.0), (5000, 0.0, 0.01)]:
        sizes = assign_split(made_faces(count), val, test, seed=1).value_counts()
        assert abs(sizes.get("val", 0) - val * count) < 1
        assert abs(sizes.get("test", 0) - test * count) < 1
        assert sizes.sum() == count


def test_every_stratum_and_every_group_of_people_is_right_to_a_face_or_two() -> None:
    faces = made_faces(6000, missing=0.05)
    split = assign_split(faces, val=0.1, test=0.2, seed=0)
    for groups in (strata(faces), faces["gender"], faces["gender"].astype(str) + faces["race"].astype(str)):
        counts = pd.crosstab(groups.astype(str), split)
        for part, share in (("val", 0.1), ("test", 0.2)):
            assert (counts[part] - share * counts.sum(axis=1)).abs().max() < 2


def test_shares_are_as_even_as_scikit_learn_makes_them() -> None:
    faces = made_faces(6000)
    groups = strata(faces)
    faces, groups = faces[groups.map(groups.value_counts()) > 1], groups[groups.map(groups.value_counts()) > 1]
    _, theirs = train_test_split(faces.index, test_size=0.2, stratify=groups, random_state=0)
    split = assign_split(faces, val=0.0, test=0.2, seed=0)
    difference = groups[split == "test"].value_counts().sub(groups[theirs].value_counts(), fill_value=0)
    assert difference.abs().max() <= 1
    # far more even than chance would have it
    by_chance = np.random.default_rng(0).permutation(split)
    assert stats.chi2_contingency(pd.crosstab(groups, split)).pvalue > 0.999
    assert stats.chi2_contingency(pd.crosstab(groups, by_chance)).pvalue < 0.999


def test_identical_images_stay_together_though_their_labels_differ() -> None:
    faces = made_faces(3000, copies=0.3)
    assert faces["sha1"].duplicated().sum() > 600
    assert (faces.groupby("sha1")["gender"].nunique() > 1).sum() > 100
    split = assign_split(faces, val=0.2, test=0.2, seed=5)
    assert (split.groupby(faces["sha1"]).nunique() == 1).all()
    assert leaks(faces, split) == 0
    largest = faces["sha1"].value_counts().max()
    assert (split.value_counts() - pd.Series({"train": 1800, "val": 600, "test": 600})).abs().max() <= largest


def test_a_part_never_takes_more_than_its_share_for_the_sake_of_copies() -> None:
    faces = pd.concat([made_faces(20)] * 5, ignore_index=True)
    for seed in range(10):
        sizes = assign_split(faces, val=0.12, test=0.22, seed=seed).value_counts()
        assert sizes["val"] == 10
        assert sizes["test"] == 20


def test_order_and_numbering_of_rows_do_not_matter() -> None:
    faces = made_faces(2000, copies=0.2, missing=0.1)
    split = assign_split(faces, val=0.1, test=0.1, seed=3)
    shuffled = faces.sample(frac=1, random_state=7)
    pd.testing.assert_series_equal(assign_split(shuffled, 0.1, 0.1, seed=3).sort_index(), split)
    renumbered = faces.set_index(faces.index + 5)
    assert (assign_split(renumbered, 0.1, 0.1, seed=3).to_numpy() == split.to_numpy()).all()


def test_the_same_seed_gives_the_same_division_everywhere() -> None:
    numbers = np.arange(500)
    faces = pd.DataFrame({"age": numbers % 117, "gender": numbers % 2, "race": numbers % 5})
    faces["sha1"] = [hashlib.sha1(str(number).encode()).hexdigest() for number in numbers]
    split = assign_split(faces, val=0.2, test=0.2, seed=0)
    assert split.name == "split"
    # what this gave when it was written: a change would silently move test faces into training
    assert hashlib.sha1(" ".join(split).encode()).hexdigest() == "8ffd2b278a05529a59167bdc523e4680b0221b7f"


def test_another_seed_gives_an_independent_division() -> None:
    faces = made_faces(4000)
    first, second = (assign_split(faces, val=0.0, test=0.5, seed=seed) for seed in (0, 1))
    assert stats.binomtest(int((first == second).sum()), 4000, 0.5).pvalue > 0.001


def test_every_face_has_the_same_chance_whatever_its_stratum() -> None:
    faces = made_faces(300)
    assert (strata(faces).value_counts() == 1).sum() > 5  # some are alone in theirs
    tested = sum(
        (assign_split(faces, val=0.2, test=0.2, seed=seed) == "test").to_numpy(np.int64) for seed in range(300)
    )
    pvalues = [stats.binomtest(int(times), 300, 0.2).pvalue for times in tested]
    assert min(pvalues) > 0.001 / 300


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.01, 0.01), (0.49, 0.49), (0.0, 0.05), (0.05, 0.0)])
@pytest.mark.parametrize("images", [3, 4, 10])
@pytest.mark.parametrize("copies", [1, 7])
def test_no_part_that_is_wanted_is_empty(images: int, copies: int, val: float, test: float, seed: int) -> None:
    faces = pd.concat([made_faces(images)] * copies, ignore_index=True)
    split = assign_split(faces, val, test, seed)
    assert set(split) == {"train", *(["val"] if val else []), *(["test"] if test else [])}
    assert leaks(faces, split) == 0


@pytest.mark.parametrize("images", [0, 1, 2])
def test_too_few_images_for_all_parts_train(images: int) -> None:
    assert list(assign_split(made_faces(images), val=0.6, test=0.3, seed=0)) == ["train"] * images


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (0.0, 1.0), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_to_train_are_refused(val: float, test: float) -> None:
    with pytest.raises(UserError, match=r"val \+ test < 1, got"):
        assign_split(made_faces(10), val, test, seed=0)


# --- divisions made elsewhere ---


FACES = pd.DataFrame({"path": ["UTKFace/a.jpg", "UTKFace/part/b.jpg", "c.jpg", "d.jpg"], "sha1": ["0", "1", "1", "2"]})


@pytest.mark.parametrize(
    "text",
    [
        "img_name,is_train\na.jpg,1\nb.jpg,0\nd.jpg,0\nz.jpg,1\n",
        ",img_name,is_train\n0,d.jpg,0\n1,b.jpg,0\n2,a.jpg,1\n",  # as pandas writes it with its index
        "\ufeffimg_name, is_train\r\nsome/folder/a.jpg, 1.0\r\nb.jpg, 0.0\r\nb.jpg, 0.0\r\nd.jpg,0\r\n",
    ],
)
def test_a_split_file_divides_the_faces_it_lists(text: str, tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text, encoding="utf-8", newline="")
    split = read_split_file(path, FACES.set_index(pd.Index([7, 8, 9, 10])))
    assert list(split.index) == [7, 8, 9, 10]
    assert list(split.dropna().items()) == [(7, "train"), (8, "holdout"), (10, "holdout")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "CSV file in .*split.csv"),
        (b"", "CSV file in .*split.csv"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "CSV file in .*split.csv"),
        (b"img_name,train\na.jpg,1\n", "columns img_name, is_train .*is_train is missing among img_name, train"),
        (b"img_name,is_train\na.jpg,1\nb.jpg,yes\n", "Expected 1 or 0 .*got 'yes'"),
        (b"img_name,is_train\na.jpg,1\nb.jpg,\n", "Expected 1 or 0 .*got ''"),
        (b"img_name,is_train\na.jpg,1\nb.jpg,NA\n", "Expected 1 or 0 .*got 'NA'"),
        (b"img_name,is_train\na.jpg,1\nx/a.jpg,0\n", "a.jpg is listed with both 1 and 0"),
        (b"img_name,is_train\nx.jpg,1\n", "none of the faces is listed"),
        (b"img_name,is_train\n", "none of the faces is listed"),
    ],
)
def test_a_split_file_that_cannot_be_meant_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_split_file(path, FACES)


CORAL = ",file,age\n3,a.jpg,0\n7,z.jpg,39\n"
"""As the CSV files of the CORAL paper are: numbers of rows, and ages counted from 21, which are not read."""


def _lists(folder: Path, **texts: str) -> dict[str, str]:
    for part, text in texts.items():
        (folder / f"{part}.csv").write_text(text)
    return {part: str(folder / f"{part}.csv") for part in texts}


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ({"train": CORAL, "test": ",file,age\n0,b.jpg,4\n1,d.jpg,4\n"}, {7: "train", 8: "test", 10: "test"}),
        ({"test": "path\nx/b.jpg\n", "train": CORAL, "val": "Image;y\nd.jpg;1\n"}, {7: "train", 8: "test", 10: "val"}),
        ({"train": CORAL}, {7: "train"}),
    ],
)
def test_tables_list_the_images_of_each_part(texts: dict[str, str], wanted: dict[int, str], tmp_path: Path) -> None:
    split = read_split_lists(_lists(tmp_path, **texts), FACES.set_index(pd.Index([7, 8, 9, 10])))
    assert list(split.index) == [7, 8, 9, 10]
    assert dict(split.dropna()) == wanted


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"test": CORAL}, "Expected tables for train, .* but got test; name them so"),
        ({"train": CORAL, "trial": CORAL}, "but got train, trial; name them so"),
        ({"train": CORAL, "test": CORAL}, "but a.jpg is listed for train and for test; correct .*test.csv"),
        ({"train": CORAL, "test": "file\nx.jpg\n"}, "file names in .*test.csv, but none of the faces is listed"),
        ({"train": "age\n3\n"}, "Expected the columns path in .*train.csv"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_split_lists(_lists(tmp_path, **texts), FACES)


def test_leaks_counts_the_faces_whose_image_is_in_two_parts() -> None:
    faces = pd.DataFrame({"sha1": ["a", "a", "b", "b", "b", "c", "c", "d"]})
    split = pd.Series(["train", "train", "train", "holdout", "train", "train", None, "holdout"])
    assert leaks(faces, split) == 3
    assert leaks(faces, pd.Series(["train"] * 8)) == 0
    assert SPLITS == ("train", "val", "test")


def test_further_labels_are_divided_evenly_and_a_range_counts_by_its_first_year() -> None:
    faces, rng = made_faces(4000), np.random.default_rng(1)
    tasks = create_tasks({"glasses": {"classes": ["without", "with"]}})
    faces["glasses"] = pd.array((rng.random(4000) < 0.1).astype(int), "Int16")
    split = assign_split(faces, val=0.1, test=0.2, seed=0, tasks=tasks)
    counts = pd.crosstab(strata(faces) + "/" + faces["glasses"].astype(str), split)
    for part, share in (("val", 0.1), ("test", 0.2)):
        assert (counts[part] - share * counts.sum(axis=1)).abs().max() < 2

    ranged = faces.assign(age_from=faces["age"] // 10 * 10, age_to=faces["age"] // 10 * 10 + 9)
    ranged["age"] = ranged["age"].mask(ranged["age"] >= 20)
    split = assign_split(ranged, val=0.1, test=0.2, seed=0, tasks=tasks)
    bands = strata(faces)[faces["age"] >= 20]
    counts = pd.crosstab(bands, split[bands.index])
    assert (counts["test"] - 0.2 * counts.sum(axis=1)).abs().max() < 3
