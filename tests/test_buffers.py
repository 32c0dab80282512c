"""Memory that batches share: no batch is overwritten while anything refers to it, and none is lost."""

import gc
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from facecls.data.buffers import SharedBuffers
from facecls.data.datamodule import FacesDataModule


def _module(faces: Path, workers: int) -> FacesDataModule:
    data = FacesDataModule(str(faces), image_size=64, batch_size=4, num_workers=workers, seed=5)
    data.setup()
    return data


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Leaves what other tests have made out of collections, which would copy all of it in a forked process."""
    gc.freeze()
    yield
    gc.unfreeze()


def _in_a_fork(does: Callable[[], bool]) -> bool:
    """What a function says in a child of this process."""
    if not (child := os.fork()):
        os._exit(does())
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.usefixtures("_frozen")
def test_a_buffer_is_free_again_when_nothing_refers_to_its_tensor() -> None:
    buffers = SharedBuffers(2, 3, 12)

    def fill() -> bool:
        claimed = [buffers.claim(1) for _ in range(4)]
        buffers.array(4, (2, 2, 3))[:] = 7
        return claimed == [3, 4, 5, None] and buffers.claim(0) == 0

    assert _in_a_fork(fill)
    assert buffers.free() == 2
    part = buffers.tensor(4, (2, 2, 3)).permute(2, 0, 1)[0]
    gc.collect()
    assert buffers.free() == 2
    assert part.tolist() == [[7, 7], [7, 7]]
    del part
    assert buffers.free() == 3
    assert _in_a_fork(lambda: buffers.claim(1) == 4)


@pytest.mark.usefixtures("_frozen")
def test_a_forked_process_that_drops_its_copy_frees_nothing() -> None:
    buffers = SharedBuffers(1, 2, 4)
    assert _in_a_fork(lambda: buffers.claim(0) == 0 and buffers.claim(1) is None)
    kept = [buffers.tensor(0, (4,))]

    def drop() -> bool:
        kept.clear()
        gc.collect()
        return True

    assert _in_a_fork(drop)
    assert buffers.free() == 1
    kept.clear()
    assert buffers.free() == 2


def test_batches_that_are_kept_stay_as_they_are_while_others_come(faces: Path) -> None:
    wanted = list(_module(faces, 0).train_dataloader())
    kept = [(number, batch) for number, batch in enumerate(_module(faces, 2).train_dataloader()) if number % 4 < 2]
    for number, batch in kept:
        assert all(torch.equal(batch[name], wanted[number][name]) for name in batch)


def test_all_buffers_come_back_after_whole_and_after_broken_off_epochs(faces: Path) -> None:
    data = _module(faces, 2)
    loader = data.train_dataloader()
    buffers = loader.dataset.buffers
    count = buffers.free()
    wanted = list(_module(faces, 0).train_dataloader())
    for length in (16, 1, 16, 5, 16):
        for batch, other in zip(islice(loader, length), wanted, strict=False):
            assert torch.equal(batch["image"], other["image"])
    del batch
    assert buffers.free() == count
    next(iter(loader))
    assert buffers.free() < count  # the workers have made others ahead


def test_only_workers_of_the_process_that_made_them_claim_buffers() -> None:
    buffers = SharedBuffers(1, 2, 4)
    assert buffers.claim(0) is None  # this process is no worker
    assert _in_a_fork(lambda: _in_a_fork(lambda: buffers.claim(0) is None))
    assert buffers.free() == 2


def test_a_process_that_is_not_forked_does_without(faces: Path) -> None:
    data = _module(faces, 1)
    loader = data.val_dataloader()
    spawned = DataLoader(
        loader.dataset, sampler=loader.sampler, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for batch, other in zip(spawned, _module(faces, 0).val_dataloader(), strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)
