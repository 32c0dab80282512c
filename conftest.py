"""What the tests and the examples in docstrings share: one thread each, no GPU, drawn faces on disk."""

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from facecls.data.store import decode
from facecls.data.synthetic import draw_faces, write_faces
from facecls.finding.detector import Detector, Face

collect_ignore_glob = ["tests/keras_*.py"]  # no tests; to look for examples would import TensorFlow, beside torch
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")
"""Variables by which libraries learn how many threads they may use."""
_DETECT = Detector._detect


def _is_bench(config: pytest.Config) -> bool:
    return config.option.markexpr == "bench"  # type: ignore[no-any-return]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the benchmarks."""
    parser.addoption("--bench_json", type=Path, default=Path(__file__).parent / "benchmarks.json")
    parser.addoption("--bench_data", default="synthetic:2000", help="what data.root takes, absolute")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPU, since the tests must say the same on every machine, and leaves processes one thread each.

    Two processes of pytest share the cores already. The benchmarks use all there is.
    """
    if not _is_bench(config):
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", **dict.fromkeys(_THREADS, "1")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that no process is left with one of them when the others have finished.

    xdist's own order is by the number of tests, where files with a few long ones come last.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread(request: pytest.FixtureRequest) -> None:
    if not _is_bench(request.config):
        torch.set_num_threads(1)  # two test processes share the cores already


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """What tests write need not survive a power cut, for which commands wait after each file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _found_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nearly all runs and predictions are of the same drawn faces, in which the detector finds the same each time."""
    if _is_bench(request.config):  # which measures the detector
        yield
        return
    found: dict[tuple[Path, float, tuple[int, ...], bytes], list[Face]] = {}

    def detect(self: Detector, image: npt.NDArray[np.uint8]) -> list[Face]:
        key = (self.file, self.threshold, image.shape, hashlib.sha1(image.tobytes()).digest())
        if key not in found:
            found[key] = _DETECT(self, image)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "_detect", detect)
        yield


@pytest.fixture(autouse=True, scope="session")
def _drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for the drawing itself; tests that import ``draw_faces`` call the function itself."""
    if _is_bench(request.config):
        yield
        return

    @cache
    def drawn(*args: Any, **options: Any) -> list[tuple[str, bytes]]:
        return list(draw_faces(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facecls.data.synthetic.draw_faces", lambda *args, **options: iter(drawn(*args, **options)))
        yield


@pytest.fixture(autouse=True)
def _in_examples(request: pytest.FixtureRequest) -> None:
    """Examples in docstrings that load ``best.ckpt`` run in a folder with that model and a ``face.jpg``."""
    if isinstance(request.node, pytest.DoctestItem) and "best.ckpt" in str(request.node.dtest.docstring):
        from trained_model import save_checkpoint

        folder = request.getfixturevalue("tmp_path")
        save_checkpoint(folder / "best.ckpt")
        write_faces(folder, 1, seed=7)
        next(folder.glob("*.jpg")).rename(folder / "face.jpg")
        request.getfixturevalue("monkeypatch").chdir(folder)


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 drawn faces with UTKFace's file names, and 5 that are malformed."""
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, 80, seed=7, malformed=5)
    return folder


@pytest.fixture(scope="session")
def portraits() -> list[npt.NDArray[np.uint8]]:
    """12 drawn faces, each as RGB pixels (200, 200, 3)."""
    return [decode(np.frombuffer(data, np.uint8)) for _, data in draw_faces(12, seed=3)]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures of a page empty."""
    from run_folders import without_rendering

    without_rendering(monkeypatch)
