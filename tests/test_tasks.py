"""A UTKFace file name gives all three labels, or says why not."""

import doctest

import pytest

from facecls.data import tasks as labels
from facecls.data.tasks import CLASSES, EXPECTED, HIGHEST, LabelError, Labels, parse_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("26_1_2_20170116174525125.jpg.chip.jpg", Labels(26, 1, 2)),
        ("0_0_0_20161219200650636.jpg", Labels(0, 0, 0)),
        ("116_1_4_20170120134921760.png", Labels(116, 1, 4)),
        # two faces of the dataset with odd endings that carry all labels
        ("24_0_1_20170116220224657 .jpg.chip.jpg", Labels(24, 0, 1)),
        ("55_0_0_20170116232725357jpg.chip.jpg", Labels(55, 0, 0)),
    ],
)
def test_a_complete_name_gives_its_labels(name: str, expected: Labels) -> None:
    assert parse_name(name) == expected


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


def test_highest_and_expected_values_follow_the_names() -> None:
    assert HIGHEST == {"gender": 1, "race": 4, "age": 116}
    assert CLASSES["gender"][1] == "female"
    assert EXPECTED["gender"] == "0 (male), 1 (female)"
    assert EXPECTED["race"] == "0 (white), 1 (black), 2 (asian), 3 (indian), 4 (others)"


def test_examples_run() -> None:
    assert doctest.testmod(labels) == (0, 1)
