"""Suspects are what was planted: flipped labels, impossible ages, and duplicates of faces with other labels."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from facecls.analysis.duplicates import FINE, near_identical
from facecls.analysis.suspects import COLUMNS, DUPLICATE, DUPLICATES_DISAGREE, MODEL, label_doubt, suspects
from facecls.data.store import decode
from facecls.data.synthetic import draw_faces
from facecls.data.tasks import UTKFACE, Classification

Picture = npt.NDArray[np.uint8]
P_RACES = ("p_white", "p_black", "p_asian", "p_indian", "p_others")


def faces(**columns: Sequence[Any]) -> pd.DataFrame:
    """A table of different faces without labels and predictions, with these columns put in."""
    count = len(next(iter(columns.values())))
    table = pd.DataFrame(
        {
            "path": [f"{row}.jpg" for row in range(count)],
            "sha1": [f"{row:040x}" for row in range(count)],
            "split": "test",
            **{task: pd.array([pd.NA] * count, "Int16") for task in ("gender", "race", "age")},
        }
    )
    for name, values in columns.items():
        table[name] = pd.array(values, "Int16") if name in {"gender", "race", "age"} else values
    return table


def gender_table(count: int, flipped: float, seed: int) -> tuple[pd.DataFrame, npt.NDArray[np.bool_]]:
    """Calibrated predictions that are right for 93 % of the faces, a share of whose labels is flipped."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, count)
    seen = random.normal(np.where(truth == 1, 1.4758, -1.4758))  # the normal distribution has 93 % below 1.4758
    female = 1 / (1 + np.exp(-2 * 1.4758 * seen))
    wrong = np.zeros(count, bool)
    wrong[random.choice(count, round(flipped * count), replace=False)] = True
    table = faces(
        gender=truth ^ wrong,
        gender_predicted=(female > 0.5).astype(np.int16),
        p_male=(1 - female).astype(np.float32),
        p_female=female.astype(np.float32),
    )
    assert (table["gender_predicted"] == truth).mean() == pytest.approx(0.93, abs=0.01)
    return table, wrong


@pytest.mark.parametrize("seed", range(5))
def test_flipped_genders_come_first(seed: int) -> None:
    table, wrong = gender_table(4000, 0.03, seed)
    first = label_doubt(table, UTKFACE)["gender"].nlargest(200).index  # 5 %
    assert wrong[first].sum() >= 0.8 * wrong.sum()
    listed = suspects(table, UTKFACE)
    assert set(listed["task"]) == {"gender"}
    assert wrong[[int(path[:-4]) for path in listed["path"][:60]]].mean() > 0.7
    assert listed["score"].between(0.5, 1).all()


def test_doubt_is_the_normalised_margin_for_classes() -> None:
    table = faces(
        gender=[0, 1, None, 0],
        p_male=[0.9, 0.8, 0.7, None],
        p_female=[0.1, 0.2, 0.3, None],
        race=[4, 0, 1, 2],
        **dict(zip(P_RACES, np.array(PROBABILITIES).T, strict=True)),
    )
    doubt = label_doubt(table.set_index(pd.Index([7, 5, 3, 1])), UTKFACE)
    assert doubt.index.tolist() == [7, 5, 3, 1]
    np.testing.assert_allclose(doubt["gender"], [0.1, 0.8, np.nan, np.nan])
    np.testing.assert_allclose(doubt["race"], [(1 + 0.6 - 0.05) / 2, (1 + 0.2 - 0.4) / 2, 0.5, 0.0])
    assert doubt["age"].isna().all()


PROBABILITIES = [[0.6, 0.2, 0.1, 0.05, 0.05], [0.4, 0.2, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1, 0.0], [0, 0, 1, 0, 0]]


def test_doubt_of_age_grows_with_the_distance_from_its_interval_in_widths() -> None:
    table = faces(
        age=[30, 20, 39, 44, 60, None, 12],
        age_predicted=[30.0] * 6 + [np.nan],
        age_low=pd.array([20, 20, 20, 20, 20, 20, None], "Int16"),
        age_high=pd.array([39, 39, 39, 39, 39, 39, None], "Int16"),  # 20 years
    )
    np.testing.assert_allclose(label_doubt(table, UTKFACE)["age"], [0, 0, 0, 0.5, 21 / 26, np.nan, np.nan])
    listed = suspects(table, UTKFACE)
    assert listed[["path", "task", "label", "predicted", "reason"]].to_numpy().tolist() == [
        ["4.jpg", "age", "60", "30", "outside the interval 20 to 39"]
    ]
    assert listed["score"].item() == pytest.approx(21 / 26)


def test_without_intervals_ages_are_held_against_the_usual_errors() -> None:
    errors = np.concatenate([np.linspace(-10, 10, 99).round(), [45]])
    table = faces(age=np.full(100, 50) + errors.astype(int), age_predicted=np.full(100, 50.0))
    doubt = label_doubt(table, UTKFACE)["age"]
    assert doubt.iloc[99] > 0.8
    assert (doubt[:99] < 0.5).all()
    assert (doubt[np.abs(errors) < 9] == 0).all()
    assert suspects(table, UTKFACE)["path"].tolist() == ["99.jpg"]


def test_a_class_contradicts_from_the_confidence_that_is_usual_for_it() -> None:
    """Whites are predicted with 0.9 where they are labelled, others with 0.3, so that one half counts for them."""
    white, other, torn = [0.9, 0.05, 0.03, 0.01, 0.01], [0.6, 0.05, 0.03, 0.02, 0.3], [0.1, 0.1, 0.1, 0.15, 0.55]
    probabilities = np.array([white, white, other, [0.85, 0.05, 0.03, 0.06, 0.01], torn, [0.95, 0.0, 0.0, 0.0, 0.05]])
    table = faces(
        race=[0, 0, 4, 3, 3, 1],
        race_predicted=probabilities.argmax(1),
        split=["test", "test", "val", "val", "val", "train"],
        **dict(zip(P_RACES, probabilities.T, strict=True)),
    )
    listed = suspects(table, UTKFACE)
    assert listed[["path", "label", "predicted", "reason", "seen_in_training"]].to_numpy().tolist() == [
        ["5.jpg", "black", "white", 'predicted "white" (95 %)', True],
        ["4.jpg", "indian", "others", 'predicted "others" (55 %)', False],
    ]
    np.testing.assert_allclose(listed["score"], [0.975, 0.7])
    assert listed["other"].isna().all()


def test_equal_files_with_different_labels_are_listed_once_each() -> None:
    table = faces(
        path=["a", "b", "c", "d", "e", "f", "g"],
        sha1=["1", "1", "1", "2", "2", "3", "3"],
        gender=[0, 0, 1, 1, 1, 0, None],
        age=[30, 30, 30, 7, 8, 5, 5],
        p_male=[0.2, 0.6, 0.1, None, None, None, None],
        p_female=[0.8, 0.4, 0.9, None, None, None, None],
    )
    listed = suspects(table, UTKFACE)
    assert tuple(listed.columns) == COLUMNS
    assert listed["score"].dtype == np.float64
    assert listed["seen_in_training"].dtype == np.bool_
    of_labels, duplicates = listed[listed.kind == DUPLICATES_DISAGREE], listed[listed.kind == DUPLICATE]
    # the model doubts the label of a most, and has not seen d and e
    assert of_labels[["path", "task", "label", "other", "reason"]].to_numpy().tolist() == [
        ["a", "gender", "male", "c", 'same file, labelled "female"'],
        ["b", "gender", "male", "c", 'same file, labelled "female"'],
        ["c", "gender", "female", "a", 'same file, labelled "male"'],
        ["d", "age", "7", "e", "same file, labelled 8"],
        ["e", "age", "8", "d", "same file, labelled 7"],
    ]
    # no label contradicts that of f, since g has none
    assert duplicates[["path", "other", "reason"]].to_numpy().tolist() == [["g", "f", "same file"]]
    assert duplicates[["task", "label", "predicted"]].isna().all(axis=None)
    assert len(of_labels) + len(duplicates) == len(listed)
    assert (listed["score"] == 1).all()
    assert of_labels["predicted"].isna().all()


def test_nothing_suspect_is_an_empty_table() -> None:
    listed = suspects(
        faces(gender=[0, 1], p_male=[0.9, 0.1], p_female=[0.1, 0.9]), UTKFACE, lambda row: np.zeros((9, 9, 3), np.uint8)
    )
    assert (len(listed), tuple(listed.columns)) == (0, COLUMNS)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def shifted(image: Image.Image) -> Image.Image:
    """By a pixel to the right and down, its edge repeated."""
    return Image.fromarray(np.pad(np.asarray(image), ((1, 0), (1, 0), (0, 0)), "edge")[:-1, :-1])


CHANGES = {
    "compressed": lambda image: jpeg(image, 35),
    "brighter": lambda image: image.point(lambda value: min(255, round(1.1 * value + 8))),
    "shifted": shifted,
    "smaller": lambda image: image.resize((90, 90)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "mirrored and compressed": lambda image: jpeg(ImageOps.mirror(shifted(image)), 50),
}


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    return [decode(np.frombuffer(data, np.uint8)) for _, data in draw_faces(90, seed=5)]


def test_planted_duplicates_are_found_and_different_faces_are_not(drawn: list[Picture]) -> None:
    pictures = list(drawn)
    planted = {}
    for number, (name, change) in enumerate(CHANGES.items()):
        for face in (number, number + 20, number + 40):
            planted[face, len(pictures)] = name.startswith("mirrored")
            pictures.append(np.asarray(change(Image.fromarray(drawn[face]))))
    found = near_identical(pictures.__getitem__, range(len(pictures)))
    pairs = zip(found["first"], found["second"], found["mirrored"], strict=True)
    assert {(first, second): mirrored for first, second, mirrored in pairs} == planted
    assert found["correlation"].between(FINE, 1).all()
    assert found["correlation"].is_monotonic_decreasing


def test_all_pairs_of_many_faces_are_found_and_correlate_as_scipy_says() -> None:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (1300, 32, 32), np.uint8)
    grey[:, :, :] = gaussian_filter(random.normal(0, 900, grey.shape), (0, 1.5, 1.5)).clip(-127, 127) + 128
    planted = {(0, 1299): False, (511, 512): False, (1023, 1024): True, (3, 600): True, (700, 702): False}
    for (first, second), mirrored in planted.items():
        noisy = grey[first].astype(float) + random.normal(0, 8, (32, 32))
        grey[second] = (noisy[:, ::-1] if mirrored else noisy).clip(0, 255)
    rows = np.arange(1300) + 10
    found = near_identical(lambda row: np.repeat(grey[row - 10, :, :, None], 3, 2), rows).set_index(["first", "second"])
    assert {pair: found["mirrored"][first + 10, second + 10] for pair in planted for first, second in [pair]} == planted
    assert len(found) == len(planted)
    details = grey - gaussian_filter(grey.astype(float), (0, 3, 3), mode="mirror", truncate=4)
    for (first, second), mirrored in planted.items():
        other = details[second][:, ::-1] if mirrored else details[second]
        expected = np.corrcoef(details[first].ravel(), other.ravel())[0, 1]
        assert found["correlation"][first + 10, second + 10] == pytest.approx(expected, abs=1e-4)


def test_flat_pictures_are_no_pairs() -> None:
    random = np.random.default_rng(0)
    flat = [np.full((50, 50, 3), grey, np.uint8) for grey in (0, 0, 128, 255)]
    flat += [(128 + random.integers(0, 2, (40, 40, 1))).astype(np.uint8).repeat(3, 2)] * 2  # one grey level of noise
    assert len(near_identical(flat.__getitem__, range(len(flat)))) == 0


def test_near_identical_faces_with_different_labels_are_listed(drawn: list[Picture]) -> None:
    pictures = [*drawn[:6], *(np.asarray(CHANGES[name](Image.fromarray(drawn[0]))) for name in ("grey", "mirrored"))]
    pictures += [np.asarray(CHANGES["shifted"](Image.fromarray(drawn[1]))), pictures[6]]
    table = faces(
        sha1=[*"012345678", "6"],
        split=["train", *["test"] * 9],
        gender=[0, 0, 1, 0, 1, 0, 1, 0, 0, 0],
        age=[20, 30, 40, 50, 60, 70, 20, 20, 30, 20],
    )
    without = suspects(table, UTKFACE)
    assert without[["path", "other"]].to_numpy().tolist() == [["6.jpg", "9.jpg"], ["9.jpg", "6.jpg"]]
    everything = suspects(table, UTKFACE, pictures.__getitem__)
    duplicates = everything[everything.kind == DUPLICATE]
    assert duplicates[["path", "other"]].to_numpy().tolist() == [["8.jpg", "1.jpg"]]
    assert duplicates["reason"].item().startswith("nearly the same picture (correlation ")
    listed = everything[everything.kind == DUPLICATES_DISAGREE].set_index("path")
    assert set(listed.index) == {"0.jpg", "6.jpg", "7.jpg", "9.jpg"}
    assert listed["other"].to_dict() == {"0.jpg": "6.jpg", "6.jpg": "9.jpg", "7.jpg": "6.jpg", "9.jpg": "6.jpg"}
    assert listed["reason"]["0.jpg"].startswith("nearly the same picture (correlation ")
    assert listed["reason"]["7.jpg"].startswith("nearly the same picture mirrored (correlation ")
    assert listed["reason"]["0.jpg"].endswith(', labelled "female"')
    assert listed["seen_in_training"].to_dict() == {"0.jpg": True, "6.jpg": False, "7.jpg": False, "9.jpg": False}
    assert listed["score"].is_monotonic_decreasing


def test_kinds_follow_each_other_and_duplicates_of_duplicates_are_listed_once() -> None:
    table = faces(
        path=["a", "b", "c", "d", "e", "f"],
        sha1=["1", "1", "1", "2", "2", "3"],
        gender=[0, 0, 0, 0, 1, 1],
        gender_predicted=[0, 0, 0, 0, 1, 0],
        p_male=[0.8, 0.8, 0.8, 0.8, 0.2, 0.9],
        p_female=[0.2, 0.2, 0.2, 0.2, 0.8, 0.1],
    )
    assert suspects(table, UTKFACE)[["kind", "path", "other"]].fillna("-").to_numpy().tolist() == [
        [MODEL, "f", "-"],
        [DUPLICATES_DISAGREE, "d", "e"],
        [DUPLICATES_DISAGREE, "e", "d"],
        [DUPLICATE, "b", "a"],
        [DUPLICATE, "c", "a"],
    ]
    untrusted = suspects(table, UTKFACE, trusted=["race", "age"])
    assert untrusted["kind"].tolist() == [DUPLICATES_DISAGREE, DUPLICATES_DISAGREE, DUPLICATE, DUPLICATE]


def test_ranges_are_doubted_from_their_nearer_end_and_contradict_only_what_they_exclude() -> None:
    table = faces(
        sha1=["1", "1", "1", "2", "2", "3", "4"],
        age=[25, None, None, None, None, None, None],
        age_from=[None, 20, 30, 20, 25, 40, 60],
        age_to=[None, 29, 39, 29, 32, 49, 116],
        age_predicted=[25.0, 25.0, 25.0, 25.0, 25.0, 30.0, 30.0],
        age_low=[20, 20, 20, 20, 20, 20, 20],
        age_high=[39, 39, 39, 39, 39, 39, 39],  # 20 years
    )
    np.testing.assert_allclose(label_doubt(table, UTKFACE)["age"], [0, 0, 0, 0, 0, 1 / 6, 21 / 26])
    listed = suspects(table, UTKFACE)
    assert listed[["kind", "path", "label", "reason"]].fillna("-").to_numpy().tolist() == [
        [MODEL, "6.jpg", "60+", "outside the interval 20 to 39"],
        [DUPLICATES_DISAGREE, "0.jpg", "25", "same file, labelled 30-39"],
        [DUPLICATES_DISAGREE, "1.jpg", "20-29", "same file, labelled 30-39"],
        [DUPLICATES_DISAGREE, "2.jpg", "30-39", "same file, labelled 20-29"],
        [DUPLICATE, "4.jpg", "-", "same file"],  # 20-29 and 25-32 can both be right
    ]


def test_flipped_labels_of_a_fourth_attribute_come_first() -> None:
    table, wrong = gender_table(4000, 0.03, 9)
    names = {"gender": "glasses", "gender_predicted": "glasses_predicted"}
    names |= {"p_male": "p_glasses_without", "p_female": "p_glasses_with"}
    table = table.drop(columns=["race", "age"]).rename(columns=names)
    tasks = {"glasses": Classification("glasses", ("without", "with"))}
    first = label_doubt(table, tasks)["glasses"].nlargest(200).index
    assert wrong[first].sum() >= 0.8 * wrong.sum()
    listed = suspects(table, tasks)
    assert set(listed["task"]) == {"glasses"}
    assert set(listed["label"]) == {"without", "with"}
    assert wrong[[int(path[:-4]) for path in listed["path"][:60]]].mean() > 0.7
