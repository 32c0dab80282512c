"""Three days of training take no more memory than the first minutes: nothing grows with steps and epochs."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facecls import fit
from facecls.training.callbacks import LastCheckpoint

WORDS = ["--model.trunk=test_resnet", "--model.schedule.frozen={0: -1}", "--probe=true", "--name=tiny"]
WORDS += ["--data.root=synthetic:60", "--data.image_size=64", "--data.num_workers=0", "--data.batch_size=4"]
WORDS += ["--trainer.accelerator=cpu", "--trainer.limit_test_batches=0", "--trainer.log_every_n_steps=1"]
WORDS += ["--trainer.precision=32-true"]
COUNTED, EACH = (2, 4, 6), 12
"""The epochs after which objects are counted, and the steps of each."""


@pytest.mark.slow
def test_nothing_grows_with_steps_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    end = LastCheckpoint.on_train_epoch_end
    counts: list[tuple[int, int]] = []

    def count(callback: LastCheckpoint, trainer: Any, module: Any) -> None:
        end(callback, trainer, module)
        if trainer.current_epoch in COUNTED:
            gc.collect()
            # pandas clears its lists of weak references only once they are long
            objects = sum(not issubclass(type(each), weakref.ref) for each in gc.get_objects())
            counts.append((trainer.global_step, objects))

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", count)
    fit.main([*WORDS, f"--trainer.max_epochs={COUNTED[-1] + 1}"])
    # what grows with each step or epoch does so both times; caches fill once
    steps, objects = np.diff(counts, axis=0).min(0)
    assert steps == (COUNTED[1] - COUNTED[0]) * EACH
    assert objects < COUNTED[1] - COUNTED[0]
