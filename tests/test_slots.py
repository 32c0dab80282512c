"""Memory that batches share: no batch is overwritten while anything refers to it, and none is lost."""

import gc
import os
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from facecls.data.buffers import Slots
from facecls.data.datamodule import FacesDataModule


def _module(faces: Path, workers: int) -> FacesDataModule:
    data = FacesDataModule(str(faces), image_size=64, batch_size=4, num_workers=workers, seed=5)
    data.setup()
    return data


def _free(slots: Slots) -> int:
    free = []
    while (slot := slots.lend()) is not None:
        free.append(slot)
    for slot in free:
        slots.tensor(slot, (1,))  # is dropped at once
    return len(free)


def test_a_slot_is_free_again_when_nothing_refers_to_its_tensor() -> None:
    slots = Slots(3, 12)
    assert sorted(slots.lend() for _ in range(3)) == [0, 1, 2]
    assert slots.lend() is None
    slots.array(1, (2, 2, 3))[:] = 7
    part = slots.tensor(1, (2, 2, 3)).permute(2, 0, 1)[0]
    gc.collect()
    assert slots.lend() is None
    assert part.tolist() == [[7, 7], [7, 7]]
    del part
    assert slots.lend() == 1


def test_batches_that_are_kept_stay_as_they_are_while_others_come(faces: Path) -> None:
    wanted = list(_module(faces, 0).train_dataloader())
    kept = [(number, batch) for number, batch in enumerate(_module(faces, 2).train_dataloader()) if number % 4 < 2]
    for number, batch in kept:
        assert all(torch.equal(batch[name], wanted[number][name]) for name in batch)


def test_all_slots_come_back_after_whole_and_after_broken_off_epochs(faces: Path) -> None:
    data = _module(faces, 2)
    loader = data.train_dataloader()
    slots = loader.sampler.slots
    count = _free(slots)
    wanted = list(_module(faces, 0).train_dataloader())
    for length in (16, 1, 16, 5, 16):
        for batch, other in zip(islice(loader, length), wanted, strict=False):
            assert torch.equal(batch["image"], other["image"])
    del batch
    assert _free(slots) == count
    next(iter(loader))
    assert _free(slots) <= count - 4  # as many as two workers make ahead are lent


def test_another_process_does_not_lend_them() -> None:
    slots = Slots(2, 4)
    if not (child := os.fork()):
        os._exit(slots.lend() is None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert slots.lend() is not None


def test_a_process_that_is_not_forked_does_without(faces: Path) -> None:
    data = _module(faces, 1)
    loader = data.val_dataloader()
    spawned = DataLoader(
        loader.dataset, sampler=loader.sampler, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for batch, other in zip(spawned, _module(faces, 0).val_dataloader(), strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)
