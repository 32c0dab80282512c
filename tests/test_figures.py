"""What figures draw, against scikit-learn and pandas, and how they become SVG."""

import re
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from run_folders import with_spread
from simulated_predictions import predicted, simulated_labels, with_ranges
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_curve

from facecls.analysis.groups import group_table, score_groups
from facecls.data.tasks import UTKFACE, create_tasks
from facecls.report import figures, run_figures
from facecls.report import style as svg
from facecls.report.page import write_page

LINEAR = {  # Machado et al. 2009, severity 1 (doi:10.1109/TVCG.2009.113)
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
GENDER, RACE, AGE = UTKFACE["gender"], UTKFACE["race"], UTKFACE["age"]
DRAW: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "age_distribution": lambda table: run_figures.age_distribution(table, AGE),
    "class_distribution": lambda table: run_figures.class_distribution(table, RACE),
    "range_distribution": lambda table: run_figures.range_distribution(with_ranges(table), AGE),
    "confusion": lambda table: figures.confusion(table, RACE),
    "roc": lambda table: figures.roc(table, GENDER),
    "age_density": lambda table: figures.age_density(table, AGE),
    "age_error": lambda table: figures.age_error(table, AGE),
    "age_bias": lambda table: figures.age_bias(table, AGE),
    "cumulative_score": lambda table: figures.cumulative_score(table, AGE),
    "age_coverage": lambda table: figures.age_coverage(table, AGE),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    found = predicted(simulated_labels(600, 1), 1)
    return with_spread(found.assign(age_predicted=found["age_predicted"].clip(0, 116)))


def _linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _contrast(one: str, other: str) -> float:
    light = sorted(_linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (one, other))
    return float((light[1] + 0.05) / (light[0] + 0.05))


def _page_colours(tmp_path: Path) -> dict[str, list[str]]:
    text = write_page(tmp_path / "page.html", "", []).read_text().split("@media print")[0]
    return {name: re.findall(rf"--{name}: (#\w{{6}})", text) for name in ("page", "ink", "soft", "link", "wrong")}


def test_colours_can_be_seen_on_light_and_dark_pages(tmp_path: Path) -> None:
    colours = _page_colours(tmp_path)
    assert len(colours["page"]) == 2
    for background in colours["page"]:
        assert all(_contrast(colour, background) >= 3 for colour in (*svg.PALETTE, svg.GREY))
    for name in ("ink", "soft", "link", "wrong"):
        assert all(_contrast(*pair) >= 4.5 for pair in zip(colours[name], colours["page"], strict=True)), name


@pytest.mark.parametrize("kind", LINEAR)
def test_colours_are_told_apart_by_everybody(kind: str) -> None:
    seen = [np.clip(np.array(LINEAR[kind]) @ _linear(colour), 0, 1) for colour in svg.PALETTE]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    cube = [np.cbrt(to_xyz @ colour / [0.9505, 1, 1.089]) for colour in seen]
    lab = [np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]) for x, y, z in cube]
    assert min(np.linalg.norm(one - other) for one, other in combinations(lab, 2)) > 10


def _axes(figure: Figure, number: int = 0):
    return figure.axes[number]


def test_confusion_shows_every_count(table: pd.DataFrame) -> None:
    cells = confusion_matrix(table["race"].astype(int), table["race_predicted"])
    texts = [text.get_text() for text in _axes(figures.confusion(table, RACE)).texts]
    wanted = [f"{count}\n{100 * count / row.sum():.0f} %" for row in cells for count in row]
    assert texts == wanted


def test_roc_is_that_of_scikit_learn(table: pd.DataFrame) -> None:
    line = _axes(figures.roc(table, GENDER)).lines[1]
    false, true, _ = roc_curve(table["gender"].astype(int), table["p_female"], drop_intermediate=False)
    assert line.get_xdata() == pytest.approx(false)
    assert line.get_ydata() == pytest.approx(true)


def test_density_has_every_face_once(table: pd.DataFrame) -> None:
    cells = _axes(figures.age_density(table, AGE)).collections[0]
    assert cells.get_array().sum() == len(table)


def test_age_figures_are_those_of_pandas(table: pd.DataFrame) -> None:
    error = (table["age_predicted"] - table["age"]).astype(float)
    by_five = error.abs().groupby(table["age"].astype(int) // 5).mean()
    points = np.asarray(_axes(figures.age_error(table, AGE)).collections[0].get_offsets())
    assert points[:, 0] == pytest.approx(5 * by_five.index.to_numpy() + 2)
    assert points[:, 1] == pytest.approx(by_five.to_numpy(), rel=1e-5)
    band = pd.cut(table["age"].astype(int), [-1, 9, 19, 29, 39, 59, 116])
    heights = [bar.get_height() for bar in _axes(figures.age_bias(table, AGE)).patches]
    assert heights == pytest.approx([*error.groupby(band, observed=False).mean()], rel=1e-5)
    inside = table["age"].between(table["age_low"], table["age_high"]).astype(float)
    heights = [bar.get_height() for bar in _axes(figures.age_coverage(table, AGE)).patches]
    assert heights == pytest.approx([*inside.groupby(band, observed=False).mean()])
    line = _axes(figures.cumulative_score(table, AGE)).lines[0]
    assert [*line.get_xdata()] == [*range(16)]
    assert [*line.get_ydata()] == pytest.approx([(error.abs() <= years).mean() for years in range(16)])


def test_reliability_is_that_of_scikit_learn(table: pd.DataFrame) -> None:
    p = table[list(RACE.probabilities)].to_numpy(float)
    before = p ** table["temperature_race"].iloc[0]
    lines = _axes(figures.reliability_diagram(table, RACE)).lines[1:]
    for line, values in zip(lines, (before / before.sum(1, keepdims=True), p), strict=True):
        right = values.argmax(1) == table["race"].to_numpy(int)
        accuracy, confidence = calibration_curve(right, values.max(1), n_bins=15)
        assert line.get_ydata() == pytest.approx(accuracy)
        assert line.get_xdata() == pytest.approx(confidence)


def test_distributions_are_shares(table: pd.DataFrame) -> None:
    faces = table.assign(split=np.where(np.arange(len(table)) % 3, "train", "val"))
    widths = [bar.get_width() for bar in _axes(run_figures.class_distribution(faces, RACE)).patches]
    wanted = [
        (faces.loc[faces["split"] == split, "race"] == code).mean() for split in ("train", "val") for code in range(5)
    ]
    assert widths == pytest.approx(wanted)
    ranges = with_ranges(faces)
    widths = [bar.get_width() for bar in _axes(run_figures.range_distribution(ranges, AGE)).patches]
    firsts = sorted(ranges["age_from"].unique())
    wanted = [
        (ranges.loc[ranges["split"] == split, "age_from"] == first).mean()
        for split in ("train", "val")
        for first in firsts
    ]
    assert widths == pytest.approx(wanted)
    stairs = _axes(run_figures.age_distribution(faces, AGE)).patches
    assert [patch.get_data().values.sum() for patch in stairs] == pytest.approx([1, 1])


def test_groups_are_drawn_with_their_intervals(table: pd.DataFrame) -> None:
    groups = group_table(score_groups(table, UTKFACE))
    axes = _axes(figures.group_scores(groups, UTKFACE, "race/accuracy"))
    shown = groups[(groups[["gender", "race", "age_band"]] != "all").sum(axis=1) <= 1]
    points = np.concatenate([container.lines[0].get_xdata() for container in axes.containers])
    assert points == pytest.approx(shown["race/accuracy"].to_numpy(), nan_ok=True)
    texts = [text.get_text() for text in _axes(figures.group_scores(groups, UTKFACE, "race/f1_macro")).texts]
    assert texts.count("one class") == 5


def test_each_axis_has_a_colour_that_all_faces_do_not_have() -> None:
    tasks = create_tasks({name: {"classes": ["no", "yes"]} for name in ("beard", "hat", "smile")})
    groups = group_table(score_groups(predicted(simulated_labels(300, 2, tasks), 2, tasks), tasks))
    axes = _axes(figures.group_scores(groups, tasks, "race/accuracy"))
    first, *others = [container.lines[0].get_color() for container in axes.containers]
    assert len(others) == 6
    assert first not in others
    assert all(one != other for one, other in pairwise(others))


@pytest.mark.parametrize("name", DRAW)
def test_svg_follows_its_page(name: str, table: pd.DataFrame) -> None:
    text = svg.to_svg(DRAW[name](table), name, 'a "label" & <more>')
    assert text.startswith("<svg viewBox=")
    assert text.endswith("</svg>")
    assert 'aria-label="a &#34;label&#34; &amp; &lt;more&gt;"' in text
    assert "currentColor" in text
    assert svg.INK not in text
    assert not re.search(r"#0{3,6}\b|#f{3,6}\b|://|font-family|DejaVu|<metadata|<style|<!--", text)
    assert "<text" in text  # letters stay letters
    ids, used = re.findall(r' id="([^"]+)"', text), re.findall(r'(?:url\(#|href="#)([^")]+)', text)
    assert {*ids} == {*used}
    other = svg.to_svg(DRAW[name](table), "other", "")
    assert not {*ids} & {*re.findall(r' id="([^"]+)"', other)}  # figures of one page do not share ids
    assert text == svg.to_svg(DRAW[name](table), name, 'a "label" & <more>')


@pytest.mark.parametrize("name", DRAW)
def test_figures_of_few_faces(name: str, table: pd.DataFrame) -> None:
    for faces in (0, 1):
        svg.to_svg(DRAW[name](table.head(faces)), name, "few")


def test_a_style_of_the_users_does_not_matter(table: pd.DataFrame) -> None:
    plain = svg.to_svg(figures.roc(table, GENDER), "roc", "roc")
    with mpl.rc_context({"font.size": 30, "text.color": "red", "lines.linewidth": 9, "axes.grid": False}):
        assert svg.to_svg(figures.roc(table, GENDER), "roc", "roc") == plain
