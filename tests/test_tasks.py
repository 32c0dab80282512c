"""Labels are understood as people write them, and what is none says why; a configuration makes the tasks."""

import random
import string
from typing import Any

import pytest

from facecls.data.file_names import parse_name
from facecls.data.parsing import MISSING, LabelError
from facecls.data.tasks import (
    UTKFACE,
    Age,
    Classification,
    ages,
    classifications,
    create_tasks,
)
from facecls.errors import UserError

GENDER, RACE, AGE = UTKFACE.values()
FAIRFACE = Classification(
    "race",
    ("White", "Black", "East Asian", "Indian", "Middle Eastern", "Southeast Asian", "Latino_Hispanic"),
)
NO = (MISSING, MISSING, MISSING)


# --- file names ---


@pytest.mark.parametrize(
    ("name", "age", "gender", "race"),
    [
        ("26_1_2_20170116174525125.jpg.chip.jpg", "26", "female", "asian"),
        ("0_0_0_20161219200650636.jpg", "0", "male", "white"),
        ("116_1_4_20170120134921760.png", "116", "female", "others"),
        # two faces of the dataset with odd endings that carry all labels
        ("24_0_1_20170116220224657 .jpg.chip.jpg", "24", "male", "black"),
        ("55_0_0_20170116232725357jpg.chip.jpg", "55", "male", "white"),
    ],
)
def test_a_complete_name_has_three_labels(name: str, age: str, gender: str, race: str) -> None:
    assert parse_name(name) == {"age": age, "gender": gender, "race": race}


@pytest.mark.parametrize(
    "name",
    [
        # the three files of the dataset with a field left out
        "39_1_20170116174525125.jpg.chip.jpg",
        "61_1_20170109142408075.jpg.chip.jpg",
        "61_1_20170109150557335.jpg.chip.jpg",
        "53__0_20170116184028385.jpg",
        "-1_0_0_20170116184028385.jpg",
        "26_1_2_.jpg",
        " 26_1_2_20170116174525125.jpg",
        "x26_1_2_20170116174525125.jpg",
        "26_1_2_20170116174525125.jpg\n",
        "\u0662\u0666_1_2_20170116174525125.jpg",  # Arabic digits
        f"{'9' * 5000}_1_2_20170116174525125.jpg",
        "portrait.jpg",
        "",
    ],
)
def test_a_malformed_name_says_so(name: str) -> None:
    with pytest.raises(LabelError, match=r"^malformed name$"):
        parse_name(name)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("117_0_0_20170116184028385.jpg", "age"),
        ("26_2_0_20170116184028385.jpg", "gender"),
        ("26_1_5_20170116184028385.jpg", "race"),
        ("26_1_20170116_20170116184028385.jpg", "race"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, field: str) -> None:
    with pytest.raises(LabelError, match=rf"^{field} out of range$"):
        parse_name(name)


# --- classes ---


@pytest.mark.parametrize(
    ("task", "texts", "code"),
    [
        (GENDER, ["0", "0.0", " 0 ", "male", "Male", "MALE", "m", "M", "man", "boy"], 0),
        (GENDER, ["1", "1.", "+1", "female", "Female ", "F", "Woman", "girl"], 1),
        (RACE, ["4", "others", "Other", "4.000"], 4),
        (FAIRFACE, ["2", "East Asian", "east asian", "EAST_ASIAN", "East-Asian", "east  asian"], 2),
        (FAIRFACE, ["Latino_Hispanic", "latino hispanic", "Latino/Hispanic"], 6),
        (Classification("answer", ("1", "0")), ["1"], 0),  # the name of a class comes before its code
        (RACE, ["", " ", "NA", "n/a", "nan", "None", "NULL", "<NA>", "-1", "-1.0", "Unknown", "?", "u"], MISSING),
        (RACE, ["2", "East Asian", "Southeast Asian"], 2),  # FairFace's classes are among UTKFace's
        (RACE, ["4", "Latino_Hispanic", "Middle Eastern"], 4),
        (Classification("mask", ("yes", "no", "unknown")), ["unknown"], 2),
        (Classification("beard", ("none", "full")), ["none", "None", "0"], 0),
        (Classification("beard", ("none", "full")), ["", "NA"], MISSING),
    ],
)
def test_a_class_is_its_code_or_its_name_in_any_case(task: Classification, texts: list[str], code: int) -> None:
    assert [task.parse(text) for text in texts] == [(code,)] * len(texts)


@pytest.mark.parametrize("text", ["2", "-2", "0.5", "femal", "male female", "True", "1e0", "\u0661", "inf", "0x1", "!"])
def test_what_is_no_class_is_told_with_those_that_are(text: str) -> None:
    with pytest.raises(LabelError, match=r"^gender is not 0 \(male\), 1 \(female\)$"):
        GENDER.parse(text)


# --- ages ---


@pytest.mark.parametrize(
    ("texts", "label"),
    [
        (["26", "26.0", " 26 ", "+26", "26.", "26-26"], (26, MISSING, MISSING)),
        (["0", "0.0"], (0, MISSING, MISSING)),
        (["116", "116+"], (116, MISSING, MISSING)),
        (["20-29", "20 - 29", "20\N{EN DASH}29", "20 to 29", "(20, 29)", "20s"], (MISSING, 20, 29)),
        (["0-2", "< 3", "less than 3", "under 3", "Below 3"], (MISSING, 0, 2)),
        (["more than 70", "More Than 70", "70+", "70 +", ">70", ">= 70", "over 70", "70 and over"], (MISSING, 70, 116)),
        (["100-120"], (MISSING, 100, 116)),
        (["", "NA", "nan", "None"], NO),
    ],
)
def test_an_age_is_years_or_a_range_of_them(texts: list[str], label: tuple[int, ...]) -> None:
    assert [AGE.parse(text) for text in texts] == [label] * len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "117",
        "-2",
        "-0.5",
        "26.5.5",
        "inf",
        "1e1",
        "29-20",
        "20-",
        "-29",
        "120-130",
        "more than 120",
        "0x10",
        "<0",
        "old",
        "20-29-39",
    ],
)
def test_invalid_ages_are_rejected(text: str) -> None:
    with pytest.raises(LabelError, match=r"^age is not a whole number of years from 0 to 116 or a range of them$"):
        AGE.parse(text)


def _texts(rng: random.Random, pieces: list[str], count: int) -> list[str]:
    alphabet = pieces + list(string.printable) + ["\u00bd", "\u0664", "\u2013", "\ufeff", "\0", "9" * 40]
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 6))) for _ in range(count)]


def test_whatever_stands_there_is_a_label_none_or_told() -> None:
    rng = random.Random(0)
    understood = 0
    for text in _texts(rng, ["20", "7", "116", "-", " to ", "+", "more than ", "s", "(", ", "], 20_000):
        try:
            year, low, high = AGE.parse(text)
        except LabelError:
            continue
        understood += 1
        assert (
            ((year, low, high) == NO)
            or (0 <= year <= 116 and low == high == MISSING)
            or (year == MISSING and 0 <= low < high <= 116)
        )
    assert understood > 300
    for text in _texts(rng, ["east", "asian", "White", " ", "_", "1", "6", ".0", "7"], 20_000):
        try:
            (code,) = FAIRFACE.parse(text)
        except LabelError:
            continue
        assert code == MISSING or FAIRFACE.parse(FAIRFACE.text(code)) == (code,)


def test_every_range_and_every_class_is_understood_in_any_format() -> None:
    rng = random.Random(1)
    for _ in range(2_000):
        low, high = sorted(rng.sample(range(117), 2))
        form = rng.choice(["{}-{}", " {} - {} ", "{} to {}", "({}, {})", "{}\N{EN DASH}{}", "{:02d}-{:03d}"])
        assert AGE.parse(form.format(low, high)) == (MISSING, low, high)
        code = rng.randrange(len(FAIRFACE.classes))
        words = FAIRFACE.classes[code].replace("_", " ").split()
        text = rng.choice(["_", " ", "-", "/", "  "]).join(words)
        text = "".join(rng.choice([each.lower(), each.upper()]) for each in text)
        assert FAIRFACE.parse(text) == (code,)


# --- tasks ---


def test_those_of_utkface_and_what_follows_from_them() -> None:
    assert list(UTKFACE) == ["gender", "race", "age"]
    assert classifications(UTKFACE.values()) == [GENDER, RACE]
    assert ages(UTKFACE.values()) == [AGE]
    assert GENDER.columns == ("gender",)
    assert AGE.columns == ("age", "age_from", "age_to")
    assert [GENDER.text(1), RACE.text(2), AGE.text(30.6)] == ["female", "asian", "31"]
    assert [GENDER.is_wrong(0, 1), GENDER.is_wrong(1, 1)] == [True, False]
    assert [AGE.is_wrong(24, 30.5), AGE.is_wrong(25, 30.5), AGE.is_wrong(37, 30.5)] == [True, False, True]
    assert GENDER.prediction_columns == {"gender": "str", "p_male": "float32", "p_female": "float32"}
    assert AGE.prediction_columns == {"age": "float32", "age_low": "Int16", "age_high": "Int16"}
    assert FAIRFACE.probabilities[2:7:4] == ("p_east_asian", "p_latino_hispanic")


def test_a_configuration_adds_and_replaces() -> None:
    options: dict[str, dict[str, Any] | None] = {
        "glasses": {"classes": ["without", "with"]},
        "race": {"classes": list(FAIRFACE.classes)},
        "gender": None,
        "age": {"highest": 90},
        "height": {"highest": 250},
    }
    tasks = create_tasks(options)
    assert list(tasks) == ["gender", "race", "age", "glasses", "height"]
    assert tasks == {
        "gender": GENDER,
        "race": FAIRFACE,
        "age": Age("age", 90),
        "glasses": Classification("glasses", ("without", "with")),
        "height": Age("height", 250),
    }
    assert tasks["glasses"].probabilities == ("p_glasses_without", "p_glasses_with")  # type: ignore[union-attr]
    assert create_tasks({name: task.options for name, task in tasks.items()}) == tasks
    assert create_tasks({}) == UTKFACE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"glasses": None}, "classes or a highest age for data.tasks.glasses, but got nothing"),
        ({"glasses": {}}, "either classes or highest"),
        ({"glasses": {"classes": ["a", "b"], "highest": 3}}, "either classes or highest"),
        ({"glasses": {"values": ["a", "b"]}}, "but got values"),
        ({"glasses": {"classes": ["with"]}}, "two classes or more"),
        ({"glasses": {"classes": "with"}}, "two classes or more"),
        ({"glasses": {"classes": [False, True]}}, "put it in quotes"),
        ({"glasses": {"classes": ["?", "with"]}}, "words as classes"),
        ({"glasses": {"classes": ["With", "with"]}}, "different classes"),
        ({"Glasses": {"classes": ["a", "b"]}}, "name in lower case"),
        ({"2nd": {"classes": ["a", "b"]}}, "name in lower case"),
        ({"path": {"classes": ["a", "b"]}}, "not one of"),
        ({"age": {"highest": 0}}, "from 1 to 999 years, but got 0"),
        ({"age": {"highest": True}}, "but got True"),
        ({"age": {"highest": 90.5}}, "but got 90.5"),
        ({"age_low": {"classes": ["a", "b"]}}, "age and age_low would both have age_low"),
        ({"race": {"classes": ["Male", "x"]}}, "gender and race would both have p_male"),
        ({"age_distribution": {"classes": ["a", "b"]}}, "would both have age_distribution"),
        ({"gender_predicted": {"classes": ["a", "b"]}}, "would both have gender_predicted"),
        ({"temperature_race": {"classes": ["a", "b"]}}, "would both have temperature_race"),
        ({"age_band": {"classes": ["a", "b"]}}, "would both have age_band"),
        ({"age_low_raw": {"classes": ["a", "b"]}}, "would both have age_low_raw"),
        ({"faces": {"classes": ["a", "b"]}}, "not one of"),
        ({"summary": {"highest": 5}}, "not one of"),
        ({False: {"classes": ["a", "b"]}}, "but got False"),
        ({"mask": {"classes": ["none", "all"]}}, "no class called 'all'"),
        ({"size": {"classes": ["1", "01"]}}, "different classes"),
    ],
)
def test_invalid_task_options_are_rejected(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        create_tasks(options)


@pytest.mark.parametrize(
    ("classes", "texts"),
    [
        (("1", "2", "3"), {"1": 0, "1.0": 0, "3": 2, "0": None, "-1": MISSING, "4": None}),
        (("0-2", "3-9", "10-19"), {"3-9": 1, " 10 - 19 ": 2, "3": None, "0": None, "2": None}),
        (("no", "yes"), {"no": 0, "YES": 1, "0": 0, "1.0": 1, "-1": MISSING, "2": None, "": MISSING}),
        (("none", "some"), {"none": 0, "nan": MISSING, "1": 1}),
    ],
)
def test_a_number_is_a_code_only_where_no_class_is_called_by_one(
    classes: tuple[str, ...], texts: dict[str, int | None]
) -> None:
    task = Classification("kind", classes)
    for text, code in texts.items():
        if code is None:
            with pytest.raises(LabelError):
                task.parse(text)
        else:
            assert task.parse(text) == (code,), text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("26 years", (26, MISSING, MISSING)),
        ("26.9", (26, MISSING, MISSING)),  # as birthdays are counted
        ("26,9", (26, MISSING, MISSING)),
        ("0.4 years", (0, MISSING, MISSING)),
        ("-1", (MISSING, MISSING, MISSING)),
        ("?", (MISSING, MISSING, MISSING)),
        ("20-29 years old", (MISSING, 20, 29)),
        ("70 or more", (MISSING, 70, 116)),
        ("(25, 32)", (MISSING, 25, 32)),
    ],
)
def test_more_ways_to_write_ages(text: str, wanted: tuple[int, ...]) -> None:
    assert AGE.parse(text) == wanted


@pytest.mark.parametrize("text", ["1,5,5", "9" * 5000 + "+", "-3", "29-20", "(25"])
def test_what_looks_like_an_age_but_is_none(text: str) -> None:
    with pytest.raises(LabelError):
        AGE.parse(text)
