"""Faces are found where they were put, whatever their size and tilt, and come back as they were."""

import os
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from photos import background, put
from PIL import Image
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from facecls.data.store import decode
from facecls.data.synthetic import draw_faces
from facecls.errors import UserError
from facecls.finding.detector import Detector, Face, _tiles, _turn_back, largest
from facecls.finding.frame import UTKFACE_FRAME, Frame, align, is_framed, measure, read_frame
from facecls.finding.warp import angle_of, around, inverse, moved, sample, scale_of, similarity

Pixels = npt.NDArray[np.uint8]
_DETECT = Detector._detect
"""As it is; while tests run, what it found in a picture is remembered."""


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.fixture(scope="module")
def faces() -> list[Pixels]:
    return [decode(np.frombuffer(data, np.uint8)) for _, data in draw_faces(8, seed=2)]


@pytest.fixture(scope="module")
def frame(detector: Detector, faces: list[Pixels]) -> Frame:
    measured = measure((detector.share_of_largest(face) for face in faces), "drawn faces")
    assert measured is not None
    return measured


# --- transforms ---


def test_the_similarity_is_the_one_that_moved_the_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) * 50 + 100
    turn = Rotation.from_euler("z", 0.7).as_matrix()[:2, :2]  # SciPy's, from x towards y
    matrix = similarity(points, 2.5 * points @ turn.T + [30, -7])
    np.testing.assert_allclose(matrix[:, :2], 2.5 * turn)
    np.testing.assert_allclose(matrix[:, 2], [30, -7])
    assert angle_of(matrix) == pytest.approx(0.7)
    assert scale_of(matrix) == pytest.approx(2.5)
    np.testing.assert_allclose(moved(moved(points, matrix), inverse(matrix)), points)


def test_the_similarity_is_the_best_one() -> None:
    """No other one that SciPy's minimiser finds brings points nearer to others."""
    rng = np.random.default_rng(1)
    source, target = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))

    def off(values: npt.NDArray[np.float64]) -> float:
        a, b, x, y = values
        return float(((source @ np.array([[a, -b], [b, a]]).T + [x, y] - target) ** 2).sum())

    found = minimize(off, [1.0, 0, 0, 0]).fun
    assert ((moved(source, similarity(source, target)) - target) ** 2).sum() == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("scale", [1.7, 0.8, 0.3, 0.1])
def test_a_part_is_sampled_where_it_is(scale: float) -> None:
    """A blot keeps its place and, far below the resolution of the photo, its colour."""
    image = np.zeros((900, 1200, 3), np.uint8)
    cv2.circle(image, (700, 400), 25, (200, 100, 50), -1)
    matrix = around((650.0, 420.0), 0.4, scale, 300)
    part = sample(image, matrix, 300, cv2.BORDER_CONSTANT)
    weights = part[..., 0].astype(float)
    y, x = np.mgrid[:300, :300]
    middle = [(weights * x).sum() / weights.sum(), (weights * y).sum() / weights.sum()]
    np.testing.assert_allclose(middle, moved(np.array([[700.0, 400.0]]), matrix)[0], atol=0.35)


def test_fine_patterns_become_grey_and_not_noise() -> None:
    board = ((np.indices((1600, 1600)).sum(0) % 2) * 255).astype(np.uint8)
    part = sample(np.stack([board] * 3, 2), around((800.0, 800.0), 0.3, 0.11, 100), 100, cv2.BORDER_REFLECT_101)
    assert part.std() < 3
    assert abs(part.mean() - 127.5) < 2


# --- finding ---


def _near(found: list[Face], x: float, y: float, size: float) -> Face | None:
    middles = [(abs(face.x + face.width / 2 - x), abs(face.y + face.height / 2 - y)) for face in found]
    return next((face for face, off in zip(found, middles, strict=True) if max(off) < size / 3), None)


def _check_places(found: list[Face], places: list[tuple[int, int, int]]) -> None:
    """The faces are those at the places, in their order."""
    for face, (x, y, size) in zip(found, places, strict=True):
        assert _near([face], x, y, size) is face


@pytest.mark.parametrize("kind", ["noise", "gradient", "texture"])
@pytest.mark.parametrize(("size", "angle"), [(60, 0), (60, 25), (90, -30), (200, 30), (400, -20)])
def test_a_face_in_a_photo_is_found(
    kind: str, size: int, angle: float, detector: Detector, faces: list[Pixels]
) -> None:
    photo = background(kind, 1000, 800)
    placed = put(photo, faces[0], 450, 400, size, angle)
    found = detector.find(photo)
    assert len(found) == 1
    assert _near(found, placed.x, placed.y, placed.size) is not None


@pytest.mark.parametrize("angle", [0, 20, -30, 90, 180, 270])
def test_the_points_of_a_leaning_face_are_those_of_the_upright_one(
    angle: float, detector: Detector, faces: list[Pixels]
) -> None:
    photo = background("gradient", 640, 480)
    own = detector.share_of_largest(faces[1])
    assert own is not None
    placed = put(photo, faces[1], 320, 240, 200, angle)
    (face,) = detector.find(photo)
    wanted = moved(own * faces[1].shape[0] - 0.5, placed.matrix)
    assert np.abs(face.points - wanted).max() < 0.1 * 200


def test_several_faces_come_once_each_from_left_to_right(detector: Detector, faces: list[Pixels]) -> None:
    photo = background("texture", 1200, 900)
    places = [(150, 700, 80), (400, 200, 120), (650, 500, 300), (930, 150, 70), (1080, 700, 160)]
    for face, (x, y, size) in zip(faces, places, strict=False):
        put(photo, face, x, y, size)
    found = detector.find(photo)
    _check_places(found, places)
    assert largest(found) is found[2]


@pytest.mark.parametrize("kind", ["noise", "gradient", "texture"])
def test_a_photo_without_a_face_has_none(kind: str, detector: Detector) -> None:
    assert detector.find(background(kind, 700, 500)) == []
    assert largest([]) is None


def test_a_small_face_in_a_large_photo_is_found_once(detector: Detector, faces: list[Pixels]) -> None:
    photo = background("gradient", 6000, 4000)
    places = [(1200, 1100, 80), (3520, 2000, 90), (5900, 3900, 85)]  # one across the edges of tiles, one in a corner
    for face, (x, y, size) in zip(faces, places, strict=False):
        put(photo, face, x, y, size)
    _check_places(detector.find(photo), places)


def test_a_portrait_that_fills_the_photo_is_found(detector: Detector, faces: list[Pixels]) -> None:
    for side in (64, 200, 1500):
        (face,) = detector.find(cv2.resize(faces[3], (side, side), interpolation=cv2.INTER_CUBIC))
        assert face.width > 0.4 * side


def test_a_face_cut_by_the_edge_is_found(detector: Detector, faces: list[Pixels]) -> None:
    photo = background("gradient", 800, 600)
    put(photo, faces[4], 60, 300, 200)
    assert _near(detector.find(photo), 60, 300, 200) is not None


@pytest.mark.parametrize(
    ("shape", "grey"),
    [
        *product([(32, 32), (1, 1), (20, 100), (250, 8000), (20, 8000), (8000, 20), (150, 3000)], [0, 128, 255]),
        ((300, 33000), 128),
    ],
)
def test_pictures_of_any_shape_have_no_face_of_their_own(
    shape: tuple[int, int], grey: int, detector: Detector, faces: list[Pixels]
) -> None:
    _DETECT(detector, faces[0])  # what OpenCV then holds in memory must not be found again
    assert detector.find(np.full((*shape, 3), grey, np.uint8)) == []


def test_a_face_in_a_panorama_is_found_and_cut_out(detector: Detector, faces: list[Pixels], frame: Frame) -> None:
    photo = background("gradient", 33_000, 900)
    put(photo[:, 20_000:22_000], faces[1], 1000, 450, 160)
    (face,) = detector.find(photo)
    assert abs(face.x + face.width / 2 - 21_000) < 40
    aligned = align(photo, face, frame, 100)
    near = photo[:, 20_500:21_500]
    moved_face = face._replace(x=face.x - 20_500, points=face.points - (20_500, 0))
    np.testing.assert_array_equal(aligned, align(near, moved_face, frame, 100))


@pytest.mark.parametrize("place", [(-20, -30), (850, 700), (400, -60), (-60, 300)])
def test_what_is_cut_out_does_not_depend_on_the_part_that_is_looked_at(place: tuple[int, int]) -> None:
    """The reflection at the edges is the one that OpenCV makes of the whole picture."""
    image = background("texture", 900, 750, seed=3)
    matrix = around((float(place[0]), float(place[1])), 0.5, 0.8, 120)
    wanted = cv2.warpAffine(image, matrix, (120, 120), borderMode=cv2.BORDER_REFLECT_101)
    difference = np.abs(sample(image, matrix, 120, cv2.BORDER_REFLECT_101).astype(int) - wanted)
    assert difference.max() <= 8  # OpenCV rounds places to a 32nd of a pixel
    assert difference.mean() < 0.5


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_box_of_a_turned_picture_is_turned_back(turns: int) -> None:
    image = np.zeros((20, 30), np.uint8)
    image[2:5, 3:9] = 1
    y, x = np.nonzero(np.rot90(image, turns))
    box = (float(x.min()), float(y.min()), float(np.ptp(x)) + 1, float(np.ptp(y)) + 1)
    points = np.stack([x, y], 1)[[0, 3, 7, 9, 17]].astype(float)
    back = _turn_back(Face(*box, 1.0, points), turns, image.shape)
    assert back[:4] == (3, 2, 6, 3)
    assert all(image[int(y), int(x)] for x, y in back.points)


@pytest.mark.parametrize("width", [959, 960, 1680, 2400, 5000])
@pytest.mark.parametrize("scale", [1.0, 4 / 3])
def test_tiles_cover_a_photo_and_know_where_it_goes_on(width: int, scale: float) -> None:
    image = np.zeros((40, width, 3), np.uint8)
    tiles = list(_tiles(image, scale))
    covered = np.zeros(width, bool)
    for tile in tiles:
        left, right = tile.x / scale, tile.x / scale + tile.pixels.shape[1] / scale
        assert tile.goes_on == (left > 0.5, False, right < width - 0.5, False)
        assert tile.pixels.shape[1] <= 1281
        covered[round(left) : round(right)] = True
    assert covered.all()


def test_the_smallest_face_is_an_option(faces: list[Pixels]) -> None:
    photo = background("gradient", 1000, 800)
    put(photo, faces[5], 500, 400, 30)
    assert _near(Detector(smallest=20).find(photo), 500, 400, 30) is not None
    assert Detector(smallest=200).find(photo) == []
    with pytest.raises(UserError, match="at least 8 pixels, but got 7"):
        Detector(smallest=7)


def test_the_threshold_is_an_option(faces: list[Pixels]) -> None:
    photo = background("gradient", 1000, 800)
    put(photo, faces[5], 500, 400, 100)
    (face,) = Detector().find(photo)
    assert Detector(threshold=min(0.99, face.score + 0.02)).find(photo) == []
    with pytest.raises(UserError, match="between 0 and 1, but got 1"):
        Detector(threshold=1.0)


def test_another_file_must_be_a_detector(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for name, content in (("none.onnx", None), ("pipe.onnx", None), ("text.onnx", b"hello")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"Expected a YuNet that OpenCV reads in .*{name}"):
            Detector(tmp_path / name)


# --- the frame ---


def test_the_frame_is_the_median_and_keeps_what_is_off() -> None:
    rng = np.random.default_rng(0)
    shares = [UTKFACE_FRAME.points + rng.normal(0, 0.02, (5, 2)) for _ in range(400)]
    measured = measure([None, *shares], "x")
    assert measured is not None
    np.testing.assert_allclose(measured.points, np.median(shares, axis=0))
    # of the distance from the middle of a normal distribution in the plane, 95 % is below 2.448 standard deviations
    np.testing.assert_allclose(measured.spread, 0.02 * 2.448, rtol=0.1)
    assert read_frame({"face_frame": measured.options()})[1] is False
    read, _ = read_frame({"face_frame": measured.options()})
    assert read is not None
    np.testing.assert_allclose(read.points, measured.points, atol=1e-5)
    assert read.source == "x"


@pytest.mark.parametrize("found", [[], [None] * 3, [None, None, UTKFACE_FRAME.points], [None] * 100 + [0] * 500])
def test_there_is_no_frame_where_few_faces_are_found(found: list[npt.NDArray[np.float64] | None]) -> None:
    assert measure(iter(found), "x") is None


def test_what_older_files_do_not_say_is_assumed() -> None:
    assert read_frame({}) == (UTKFACE_FRAME, True)
    assert read_frame({"face_frame": None}) == (None, False)
    for wrong in ({"points": [[1, 2]], "spread": [1] * 5}, {"points": [[0, float("nan")]] * 5, "spread": [1] * 5}):
        with pytest.raises(ValueError, match="not five points"):
            read_frame({"face_frame": {"source": "x", **wrong}})


@pytest.mark.parametrize(("size", "angle"), [(80, 0), (150, 30), (400, -20), (250, 90), (120, 180)])
def test_a_face_of_a_photo_is_brought_to_lie_as_the_face_itself(
    size: int, angle: float, detector: Detector, faces: list[Pixels], frame: Frame
) -> None:
    for number in (0, 3, 6):
        photo = background("gradient", 1000, 800)
        placed = put(photo, faces[number], 500, 400, size, angle)
        (found,) = detector.find(photo)
        upright = largest(detector.find(faces[number]))
        assert upright is not None
        side = faces[number].shape[0]
        # a drawing has no exact points, so that they differ a little from one size to another
        into_photo = np.vstack([placed.matrix, [0, 0, 1]])
        wanted = similarity(upright.points, frame.points * 100 - 0.5)
        got = (np.vstack([similarity(found.points, frame.points * 100 - 0.5), [0, 0, 1]]) @ into_photo)[:2]
        assert scale_of(got) == pytest.approx(scale_of(wanted), rel=0.15)
        assert abs(angle_of(got) - angle_of(wanted)) < np.deg2rad(15)
        middle = np.array([[side / 2, side / 2]])
        assert np.abs(moved(middle, got) - moved(middle, wanted)).max() < 8
        assert align(photo, found, frame, 100).shape == (100, 100, 3)


def test_an_aligned_picture_is_known_and_another_is_not(detector: Detector, faces: list[Pixels], frame: Frame) -> None:
    for face in faces:
        (found,) = detector.find(face)
        assert is_framed(found, face, frame)
        wider = cv2.copyMakeBorder(face, 60, 60, 60, 60, cv2.BORDER_REFLECT)
        loose = largest(detector.find(wider))
        assert loose is None or not is_framed(loose, wider, frame)
        tall = np.vstack([face, face[-30:]])
        assert not is_framed(found, tall, frame)


def test_beyond_the_edge_lies_the_reflection(detector: Detector, faces: list[Pixels], frame: Frame) -> None:
    image = np.asarray(Image.fromarray(faces[2]).crop((20, 20, 200, 200)))
    found = largest(detector.find(image))
    assert found is not None
    aligned = align(image, found, frame, 100)
    assert (aligned.reshape(-1, 3).max(1) > 0).mean() > 0.99  # no black corners
