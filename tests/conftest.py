"""What several test files share: drawn faces on disk."""

import os
from pathlib import Path

import pytest
import torch

from facecls.data.synthetic import write_faces

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests must say the same on every machine


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # two test processes share the cores already


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 drawn faces with UTKFace's file names, and 5 that are malformed."""
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, 80, seed=7, malformed=5)
    return folder
