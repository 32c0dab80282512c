"""Drawn faces: the same from the same seed, well named, and with labels that can be read off the picture."""

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from facecls.data.file_names import parse_name
from facecls.data.parsing import LabelError
from facecls.data.synthetic import GENDERS, MAX_AGE, RACES, draw_faces, wears_glasses, write_faces


def _digest(count, seed, size=200):
    digest = hashlib.sha256()
    for name, encoded in draw_faces(count, seed, size):
        digest.update(name.encode() + encoded)
    return digest.hexdigest()


def _codes(name):
    """Age, gender and race, as UTKFace's names have them."""
    parse_name(name)  # raises if it is none
    return [int(code) for code in name.split("_")[:3]]


def _decode(encoded):
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture(scope="module")
def faces():
    """Names' labels (N, 3) and images (N, 200, 200, 3) of 700 faces."""
    drawn = list(draw_faces(700, seed=3))
    return np.array([_codes(name) for name, _ in drawn]), np.stack([_decode(encoded) for _, encoded in drawn])


def test_same_seed_draws_the_same_faces_in_another_process():
    command = (
        "import hashlib; from facecls.data.synthetic import draw_faces; d = hashlib.sha256();"
        "[d.update(n.encode() + e) for n, e in draw_faces(5, 11)]; print(d.hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == _digest(5, 11)


def test_seeds_differ_and_no_two_faces_are_alike():
    first, second = ([encoded for _, encoded in draw_faces(30, seed)] for seed in (0, 1))
    assert len(set(first + second)) == 60


def test_a_face_does_not_depend_on_how_many_are_drawn():
    assert list(draw_faces(7, seed=2))[:3] == list(draw_faces(3, seed=2))


def test_names_are_unique_and_those_of_utkface():
    names = [name for name, _ in draw_faces(200, seed=0)]
    assert len({name.split("_")[3] for name in names}) == 200  # whatever the labels
    assert all(len(name.split("_")[3]) == 17 + len(".jpg.chip.jpg") for name in names)
    assert all(name.endswith(".jpg.chip.jpg") for name in names)


@pytest.mark.parametrize("size", [64, 200])
def test_pictures_are_square_jpegs_of_the_size(size):
    for _, encoded in draw_faces(3, seed=0, size=size):
        assert encoded[:3] == b"\xff\xd8\xff"
        assert _decode(encoded).shape == (size, size, 3)


def test_every_class_and_the_whole_range_of_ages_occur(faces):
    ages, genders, races = faces[0].T
    assert np.bincount(genders, minlength=len(GENDERS)).min() > 300
    assert np.bincount(races, minlength=len(RACES)).min() > 110
    assert ages.min() == 0
    assert ages.max() >= MAX_AGE - 3
    assert all(np.mean((ages >= low) & (ages < high)) > 0.05 for low, high in pairwise([0, 3, 15, 30, 45, 70, 117]))


def _features(images):
    """Gives the brightness and colour of a coarse grid of patches, and how rough each patch is (wrinkles)."""
    grid = {"dsize": (12, 12), "interpolation": cv2.INTER_AREA}
    colours = np.stack([cv2.resize(image, **grid) for image in images]) / 255
    edges = np.stack([cv2.resize(np.abs(cv2.Laplacian(image, cv2.CV_32F, ksize=3)), **grid) for image in images]) / 50
    return np.concatenate([colours, edges], axis=3).reshape(len(images), -1)


def _estimate_age():
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9)))


@pytest.fixture
def one_thread():
    """Keeps the linear algebra to one thread: on busy processors several wait for each other, for minutes."""
    with threadpool_limits(1):
        yield


@pytest.mark.usefixtures("one_thread")
def test_labels_can_be_read_off_the_picture_by_linear_models(faces):
    labels, images = faces
    ages, genders, races = labels.T
    features = _features(images)
    train, test = slice(0, 500), slice(500, None)

    for codes in (genders, races):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        assert classifier.fit(features[train], codes[train]).score(features[test], codes[test]) > 0.9

    error = np.abs(_estimate_age().fit(features[train], ages[train]).predict(features[test]) - ages[test]).mean()
    blind = np.abs(np.median(ages[train]) - ages[test]).mean()
    assert error < 0.35 * blind
    assert error < 8


@pytest.mark.usefixtures("one_thread")
def test_age_shows_over_the_whole_range(faces):
    """Among children, adults and the old alone the picture still tells age: no cue is used up early."""
    ages, images = faces[0][:, 0], faces[1]
    features = _features(images)
    for low, high in ((0, 20), (20, 60), (50, MAX_AGE)):
        chosen = np.flatnonzero((ages >= low) & (ages <= high))
        train, test = chosen[::2], chosen[1::2]
        estimate = _estimate_age().fit(features[train], ages[train])
        assert np.corrcoef(estimate.predict(features[test]), ages[test])[0, 1] > 0.75


GLASSED = 400


@pytest.fixture(scope="module")
def glassed():
    """Who wears glasses (N,), and images (N, 200, 200, 3) with and without glasses of the same faces."""
    worn = np.array([wears_glasses(3, index) for index in range(GLASSED)])
    pairs = [
        [_decode(encoded) for _, encoded in draw_faces(GLASSED, seed=3, glasses=glasses)] for glasses in (True, False)
    ]
    return worn, *map(np.stack, pairs)


def test_faces_without_glasses_are_the_same_to_the_byte_and_names_too():
    drawn = list(zip(draw_faces(60, 8), draw_faces(60, 8, glasses=True), strict=True))
    assert all(plain[0] == other[0] for plain, other in drawn)
    same = [plain[1] == other[1] for plain, other in drawn]
    assert same == [not wears_glasses(8, index) for index in range(60)]
    # what version 0.1 drew
    assert _digest(50, 11) == "af937aad668c0b00c50f0992f8039b542e4a63593508bef5859433fc99099110"


def test_glasses_change_what_is_around_the_eyes_and_nothing_else(glassed):
    worn, images, plain = glassed
    changed = np.abs(images.astype(int) - plain).max(3)[worn] > 40  # JPEG spreads small changes
    share = changed.mean((1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.15
    rows = np.flatnonzero(changed.any((0, 2)))
    assert rows.min() > 50  # below the top of the head and above the mouth
    assert rows.max() < 150


def test_glasses_are_as_frequent_in_every_group(faces):
    worn = np.array([wears_glasses(3, index) for index in range(700)])
    ages, genders, races = faces[0].T
    assert abs(worn.mean() - 0.5) < 0.06
    for group in (genders == 0, genders == 1, ages < 15, ages > 60, *(races == code for code in range(5))):
        assert abs(worn[group].mean() - 0.5) < 0.15
    other = [wears_glasses(4, index) for index in range(700)]
    assert 0.4 < np.mean(worn == other) < 0.6


@pytest.mark.usefixtures("one_thread")
def test_glasses_can_be_read_off_the_picture(glassed):
    worn, images, _ = glassed
    features = _features(images)
    train, test = slice(0, 300), slice(300, None)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    assert classifier.fit(features[train], worn[train]).score(features[test], worn[test]) > 0.9


def test_written_faces_are_those_drawn(tmp_path: Path):
    write_faces(tmp_path / "new" / "folder", 4, seed=5)
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == dict(draw_faces(4, seed=5))


def test_malformed_names_come_on_top_in_every_kind(tmp_path: Path):
    write_faces(tmp_path, 5, seed=0, malformed=8)
    reasons = []
    for path in tmp_path.iterdir():
        assert _decode(path.read_bytes()).shape == (200, 200, 3)
        try:
            parse_name(path.name)
        except LabelError as error:
            reasons.append(str(error))
    assert len(list(tmp_path.iterdir())) == 13
    assert sorted(reasons) == ["age out of range", "gender out of range"] + ["malformed name"] * 5 + [
        "race out of range"
    ]
