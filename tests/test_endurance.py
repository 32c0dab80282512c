"""Three days of training take no more memory than the first minutes: nothing grows with steps and epochs."""

import gc
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from facecls import fit
from facecls.training.callbacks import LastCheckpoint

WORDS = ["--model.trunk=test_resnet", "--model.schedule.frozen={0: -1}", "--probe=true", "--name=tiny"]
WORDS += ["--data.root=synthetic:60", "--data.image_size=64", "--data.num_workers=0", "--data.batch_size=8"]
WORDS += ["--trainer.accelerator=cpu", "--trainer.limit_test_batches=0", "--trainer.log_every_n_steps=1"]
FIRST, LAST = 5, 15
"""Epochs between which is counted; in the first ones, caches are filled."""
EACH = 6
"""Steps of an epoch."""


@pytest.mark.slow
def test_nothing_grows_with_steps_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    end, kinds, traced = LastCheckpoint.on_train_epoch_end, {}, {}

    def count(callback: LastCheckpoint, trainer: object, module: object) -> None:
        end(callback, trainer, module)
        epoch = trainer.current_epoch  # type: ignore[attr-defined]
        if epoch in (FIRST, LAST):
            gc.collect()
            kinds[epoch] = Counter(type(each).__name__ for each in gc.get_objects())
            traced[epoch] = tracemalloc.get_traced_memory()[0] if epoch == LAST else 0
            if epoch == FIRST:
                tracemalloc.start()

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", count)
    try:
        fit.main([*WORDS, f"--trainer.max_epochs={LAST + 1}"])
    finally:
        tracemalloc.stop()
    steps = (LAST - FIRST) * EACH
    grown = kinds[LAST] - kinds[FIRST]
    assert grown.total() < steps, grown.most_common(10)
    assert traced[LAST] < 1000 * steps
