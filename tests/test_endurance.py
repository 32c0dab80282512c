"""Three days of training take no more memory than the first minutes: nothing grows with steps and epochs."""

import gc
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from facecls import fit
from facecls.training.callbacks import LastCheckpoint

WORDS = ["--model.trunk=test_resnet", "--model.schedule.frozen={0: -1}", "--probe=true", "--name=tiny"]
WORDS += ["--data.root=synthetic:60", "--data.image_size=64", "--data.num_workers=0", "--data.batch_size=2"]
WORDS += ["--trainer.accelerator=cpu", "--trainer.limit_test_batches=0", "--trainer.log_every_n_steps=1"]
FIRST, LAST = 5, 15
"""Epochs between which is counted; in the first ones, caches are filled."""
EACH = 24
"""Steps of an epoch."""


@pytest.mark.slow
def test_nothing_grows_with_steps_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    end, kinds, traced = LastCheckpoint.on_train_epoch_end, {}, {}

    def count(callback: LastCheckpoint, trainer: Any, module: Any) -> None:
        end(callback, trainer, module)
        if trainer.current_epoch in (FIRST, LAST):
            gc.collect()
            # pandas clears its lists of weak references only once they are long
            kept = [each for each in gc.get_objects() if not isinstance(each, weakref.ref)]
            kinds[trainer.global_step] = Counter(type(each).__name__ for each in kept)
            traced[trainer.global_step] = tracemalloc.get_traced_memory()[0]

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", count)
    tracemalloc.start()
    try:
        fit.main([*WORDS, f"--trainer.max_epochs={LAST + 1}"])
    finally:
        tracemalloc.stop()
    (first, before), (last, after) = kinds.items()
    assert last - first == (LAST - FIRST) * EACH
    grown = after - before
    assert grown.total() < 2 * (LAST - FIRST), grown.most_common(10)
    assert traced[last] - traced[first] < 100_000
