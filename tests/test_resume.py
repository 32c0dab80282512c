"""Runs that are resumed under other settings go on as a run that has had these settings from the start."""

import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from labelled_faces import manifest_of
from run_folders import without_drawing
from trained_model import save_checkpoint

from facecls import evaluate, fit
from facecls.data.sampler import FaceBatchSampler, resume_after, trained_batches
from facecls.data.split import earlier_parts
from facecls.data.synthetic import draw_faces
from facecls.errors import UserError
from facecls.model.module import FaceModule
from facecls.model.schedule import Schedule, learning_rate_factor, plan_course
from facecls.training import callbacks
from facecls.training.checkpoint_options import check_state

WORDS = [
    "--model.trunk=test_resnet",
    "--data.root=synthetic:72",
    "--data.image_size=64",
    "--data.num_workers=0",
    "--data.val_fraction=0.08",
    "--data.test_fraction=0.08",
    "--model.schedule.frozen={0: -1}",
    "--model.schedule.lr_milestones={2: 0.5}",
    "--probe=true",
    "--name=tiny",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_test_batches=0",
]


class Step(NamedTuple):
    """A batch of a training: its epoch and number there, the learning rate, and its faces."""

    epoch: int
    batch: int
    rate: float
    faces: tuple[int, ...]


class Recorder:
    """What a training does: each batch, and each checkpoint by epoch and number of the batch before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Step] = []
        self.saved: dict[tuple[int, int], Path] = {}
        begin, save = FaceModule.on_train_batch_start, callbacks.LastCheckpoint._save

        def on_train_batch_start(module: FaceModule, batch: dict[str, torch.Tensor], number: int) -> None:
            rate = module.optimizers().param_groups[-1]["lr"]
            self.steps.append(Step(module.current_epoch, number, rate, tuple(batch["index"].tolist())))
            begin(module, batch, number)

        def _save(callback: callbacks.LastCheckpoint, trainer: object) -> None:
            save(callback, trainer)
            if callback.path.exists():
                place = self.steps[-1].epoch, self.steps[-1].batch
                if place not in self.saved:  # the end of an epoch comes after its last but one batch
                    self.saved[place] = Path(f"{place[0]}_{place[1]}.ckpt").resolve()
                    shutil.copy(callback.path, self.saved[place])

        monkeypatch.setattr(FaceModule, "on_train_batch_start", on_train_batch_start)
        monkeypatch.setattr(callbacks.LastCheckpoint, "_save", _save)
        monkeypatch.setattr(callbacks, "SAVE_EVERY", timedelta(0))
        without_drawing(monkeypatch)

    def run(self, words: list[str]) -> list[Step]:
        self.steps.clear()
        fit.main([*WORDS, *words])
        return list(self.steps)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.chdir(tmp_path)
    return Recorder(monkeypatch)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_left_of_an_epoch_and_of_the_schedule_is_that_of_an_undisturbed_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    faces = np.arange(int(rng.integers(8, 300)))
    batch_size, accumulated, epochs = int(rng.integers(1, 40)), int(rng.integers(1, 5)), int(rng.integers(2, 6))
    ranks, epoch = int(rng.integers(1, 4)), int(rng.integers(0, epochs))
    before = int(rng.integers(1, 40)) * int(rng.integers(1, 4))  # faces in a former batch
    seen = before * int(rng.integers(0, trained_batches(len(faces), before)))
    size = batch_size * ranks
    batches = trained_batches(len(faces), size, float(rng.uniform(0.5, 1)) if rng.random() < 0.3 else 1.0) or 1

    def batches_of(start: int) -> list[np.ndarray]:
        samplers = [FaceBatchSampler(faces, batch_size, 7, epoch, start, rank, ranks) for rank in range(ranks)]
        of_ranks = [[batch.faces for batch in sampler] for sampler in samplers]
        assert len({len(own) for own in of_ranks}) == 1
        return [np.concatenate(parts) for parts in zip(*of_ranks, strict=True)][: batches - start // size]

    order = np.random.default_rng((7, epoch)).permutation(faces)
    start = resume_after(seen, len(faces), size, batches, ranks)
    whole, rest = batches_of(0), batches_of(start)
    wanted = set(np.concatenate(whole).tolist()) - set(order[:seen].tolist())
    found = np.concatenate(rest).tolist()
    assert len(found) == len(set(found))
    assert wanted <= set(found)
    assert len(found) - len(wanted) <= 2 * ranks  # as many come again at most
    assert all(np.array_equal(a, b) for a, b in zip(whole[::-1], rest[:0:-1], strict=False))
    assert len(rest[0]) >= min(size, 2 * ranks, len(faces))

    per_epoch = math.ceil(batches / accumulated)
    schedule = Schedule(warmup=float(rng.uniform(0, 0.5)), lr_milestones={1: 0.5, 3: 0.1})
    rates = {
        (number, step): learning_rate_factor(schedule, number * per_epoch + step, epochs * per_epoch, number)
        for number in range(epochs)
        for step in range(per_epoch)
    }
    first = start // size // accumulated
    course = plan_course(per_epoch, epochs, -1, epoch, first, made=int(rng.integers(0, 10_000)))
    assert course.factor(schedule, course.start) == rates[epoch, first]
    left = [rates[place] for place in sorted(rates) if place >= (epoch, first)]
    assert [course.factor(schedule, step) for step in range(course.start, course.steps)] == left


@pytest.mark.parametrize("made", [0, 7, 28, 90])
def test_where_steps_end_the_training_those_that_were_made_count(made: int) -> None:
    schedule = Schedule(warmup=0.1, lr_milestones={1: 0.5})
    course = plan_course(per_epoch=4, max_epochs=1000, max_steps=100, epoch=1, step_in_epoch=2, made=made)
    found = [course.factor(schedule, step) for step in range(course.start, course.steps)]
    assert found == [learning_rate_factor(schedule, step, 100, 1) for step in range(made, 100)]
    one = plan_course(per_epoch=4, max_epochs=2, max_steps=100, epoch=1, step_in_epoch=2, made=made)
    assert one.steps - one.start == min(2, 100 - made)


FIRST = ["--data.batch_size=4", "--trainer.max_epochs=3"]
"""15 batches an epoch."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Checkpoints of a run, by epoch and number of the batch before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("first"))
        recorder = Recorder(patch)
        recorder.run(FIRST)
        return recorder.saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "then"),
    [
        ((1, 13), ["--data.batch_size=16"]),
        ((0, 14), ["--data.batch_size=60", "--trainer.max_epochs=4"]),
        ((1, 6), ["--data.batch_size=3", "--trainer.accumulate_grad_batches=4"]),
        ((1, 5), ["--data.batch_size=8", "--trainer.limit_train_batches=0.5"]),
        ((0, 14), ["--data.batch_size=4", "--trainer.max_steps=30"]),
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_as_one_that_had_these_settings_from_the_start(
    place: tuple[int, int], then: list[str], saved: dict[tuple[int, int], Path], recorder: Recorder
) -> None:
    words = ["--trainer.max_epochs=3", *then]
    whole = recorder.run(words)
    rest = recorder.run([*words, f"--ckpt_path={saved[place]}"])
    tail = whole[-len(rest) :]
    assert [step[:2] for step in rest] == [step[:2] for step in tail]
    assert [step.rate for step in rest] == pytest.approx([step.rate for step in tail], rel=1e-9)
    assert [step.faces for step in rest[1:]] == [step.faces for step in tail[1:]]
    assert set(rest[0].faces) <= set(tail[0].faces)


def _write(folder: Path, numbers: range) -> None:
    """Puts drawn faces into a folder, in place of those that are there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (name, encoded) in enumerate(draw_faces(80, seed=21)):
        if number in numbers:
            (folder / Path(name).name).write_bytes(encoded)


def _parts(run: str) -> dict[str, str]:
    table = pd.read_parquet(f"runs/{run}/version_0/faces.parquet")
    return dict(zip(table["sha1"], table["split"], strict=True))


TINY = [word for word in WORDS if not word.startswith(("--probe", "--model.schedule", "--trainer.limit"))]
TINY += ["--data.root=faces", "--data.test_fraction=0.3", "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]


@pytest.mark.slow
def test_faces_of_the_run_keep_their_part_when_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    without_drawing(monkeypatch)
    _write(Path("faces"), range(60))
    fit.main(TINY)
    before, last = _parts("tiny"), "--ckpt_path=runs/tiny/version_0/checkpoints/last.ckpt"
    alone = "faces of the run keep their part"
    assert alone not in capsys.readouterr().out

    _write(Path("faces"), range(10, 80))
    tested = evaluate.main([last, "--accelerator=cpu"])["faces/tested"]
    said = capsys.readouterr().out
    assert re.search(rf"^50 {alone}, 20 are new \(.*\d test\), 10 are gone \(.*\)$", said, re.MULTILINE), said
    found = _parts("evaluate")
    assert {image: part for image, part in found.items() if image in before} == {
        image: part for image, part in before.items() if image in found
    }
    assert tested == list(found.values()).count("test")

    fit.main([*TINY, "--trainer.max_epochs=2", last])
    assert f"50 {alone}" in capsys.readouterr().out
    grown = _parts("tiny")
    assert {image: grown[image] for image in found} == found
    gone_from_training = {image for image, part in before.items() if part == "train"} - {*found}
    assert gone_from_training
    assert {image for image in grown if image not in found} == gone_from_training

    _write(Path("faces"), range(80))  # what has come back was trained on once
    fit.main([*TINY, "--trainer.max_epochs=3", last])
    parts = _parts("tiny")
    assert {parts[image] for image in gone_from_training} == {"train"}
    tested_images = pd.read_parquet("runs/tiny/version_0/predictions.parquet")["sha1"]
    assert not {*tested_images} & {image for table in (before, grown) for image in table if table[image] == "train"}

    shutil.copytree("faces", "elsewhere")
    capsys.readouterr()
    evaluate.main([last, "--accelerator=cpu", "--data.root=elsewhere", "--data.split=all"])
    trained = list(parts.values()).count("train")
    assert f"{trained} of 80 faces to test are images that the model was trained on" in capsys.readouterr().out


def test_a_face_is_known_by_its_image_or_its_path_and_its_copies_go_with_it() -> None:
    earlier = pd.DataFrame({"path": [*"abcd"], "sha1": [*"0123"], "split": ["val", "test", "train", None]})
    faces = pd.DataFrame({"path": [*"xbyzd"], "sha1": [*"07723"]})
    assert earlier_parts(faces, earlier).fillna("").tolist() == ["val", "test", "test", "train", ""]
    twice = pd.DataFrame({"path": [*"ab"], "sha1": [*"00"], "split": ["test", "train"]})
    assert earlier_parts(faces, twice)[0] == "train"


@pytest.mark.slow
def test_a_split_that_is_given_does_not_test_what_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faces: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    without_drawing(monkeypatch)
    rows = manifest_of(faces)
    rows.to_csv("m.csv", index=False)
    words = [*TINY, "--data.root=m.csv"]
    fit.main(words)
    last = "--ckpt_path=runs/tiny/version_0/checkpoints/last.ckpt"
    rows.loc[rows.index[rows["split"] == "train"][:2], "split"] = "test"
    rows.to_csv("m.csv", index=False)
    for command in (lambda: fit.main([*words, "--trainer.max_epochs=2", last]), lambda: evaluate.main([last])):
        with pytest.raises(UserError, match=r"training faces of the run to stay in train, .* has 2 of them elsewhere"):
            command()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.test_fraction=0"], r"faces in the test part of synthetic:72, but .*trainer\.limit_test_batches to 0"),
        (["--data.val_fraction=0"], r"faces in the val part of synthetic:72, but .*trainer\.limit_val_batches to 0"),
        (["--trainer.limit_test_batches=0.001"], r"trainer\.limit_test_batches to leave one of \d batches, but 0\.001"),
        (["--trainer.limit_val_batches=0.001"], r"trainer\.limit_val_batches to leave"),
        (["--trainer.limit_train_batches=0"], r"trainer\.limit_train_batches to leave"),
        (["--trainer.check_val_every_n_epoch=5"], r"trainer\.check_val_every_n_epoch of at most .*, 1, but got 5"),
        (["--trainer.val_check_interval=500"], r"trainer\.val_check_interval of at most 7"),
        (["--trainer.max_epochs=0"], r"something to train"),
        (["--trainer.max_epochs=-1"], r"an end of training"),
        (["--trainer.accumulate_grad_batches=0"], r"accumulate_grad_batches of 1 or more"),
        (["--model.feature_norm=true", "--data.batch_size=1"], r"batches of 2 faces or more .* but they have 1; "),
        (["--trainer.precision=16-true"], r"precision 32-true, .* but got 16-true"),
        (["--model.hidden=[-1]"], r"model\.hidden as sizes of 1 or more"),
        (["--model.optimizer=torch.optim.LBFGS"], r"parameter groups, but: LBFGS"),
        (["--model.optimizer=torch.optim.SparseAdam"], r"parameter groups, but: SparseAdam"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=-1"], r"Invalid learning rate: -1"),
        (["--trainer.gradient_clip_val=-1"], r"gradient_clip_val of 0 or more, but got -1"),
        (["--trainer.gradient_clip_val=.nan"], r"gradient_clip_val of 0 or more, but got nan"),
        (["--trainer.devices={}"], r"options that the trainer takes, but: `devices`"),
        (["--trainer.max_time={a: 1}"], r"options that the trainer takes, but: 'a' is an invalid keyword"),
        (["--model.schedule.lr_milestones={0: -0.1}"], r"factors of 0 or more"),
        (["--model.schedule.lr_milestones={0: .nan}"], r"factors of 0 or more"),
        (["--model.age_sigma=.nan"], r"model\.age_sigma above 0"),
        (["--model.age_sigma=.inf"], r"model\.age_sigma above 0"),
        (["--model.task_weights={age: .nan}"], r"model\.task_weights of 0 or more"),
        (["--model.task_weights={age: .inf}"], r"model\.task_weights of 0 or more"),
        (["--model.class_weights={gender: [1, .nan]}"], r"model\.class_weights\.gender above 0"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_to_the_end_is_not_begun(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FaceModule, "training_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(UserError, match=said):
        fit.main([*TINY, "--data.root=synthetic:72", "--trainer.limit_train_batches=7", "--data.batch_size=4", *words])


def test_every_task_has_labels_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faces: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = manifest_of(faces)
    for part, columns, said in (
        ("train", ["age"], r"Expected labels of age in m\.csv, but no training face has one"),
        ("val", ["race"], r"Expected labels of race in the validation part of m\.csv.*model\.tasks to \[gender, age\]"),
        ("test", ["gender", "race", "age"], r"Expected labels of gender, race, age in m\.csv, but no face to test"),
    ):
        table = rows.copy()
        table.loc[table["split"] == part, columns] = ""
        table.to_csv("m.csv", index=False)
        with pytest.raises(UserError, match=said):
            fit.main([*TINY, "--data.root=m.csv"])
    save_checkpoint(Path("best.ckpt"))
    with pytest.raises(UserError, match=r"Expected labels of gender, race, age in m\.csv, but no face to test"):
        evaluate.main(["--ckpt_path=best.ckpt", "--accelerator=cpu", "--data.image_size=64", "--data.root=m.csv"])


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--trainer.limit_test_batches=0"], ["--data.test_fraction=0"]])
def test_without_a_test_nothing_is_reported_as_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--data.root=synthetic:72", "--trainer.limit_test_batches=0"]
    assert fit.main([*TINY, *own, *words]) == {}
    assert "checkpoints/best.ckpt is not tested" in capsys.readouterr().out
    run = Path("runs/tiny/version_0")
    assert not {path.name for path in run.iterdir()} & {"predictions.parquet", "metrics.json", "report.html"}
    best = f"--ckpt_path={run / 'checkpoints/best.ckpt'}"
    without_drawing(monkeypatch)
    assert "test/loss" in evaluate.main([best, "--accelerator=cpu", "--data.split=val"])
    (run / "metrics.json").write_text("{}")  # of a test before the run is resumed
    last = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    torch.save({**state, "lr_schedulers": {}}, run / "checkpoints/other.ckpt")
    with pytest.raises(UserError, match="lr_schedulers"):
        fit.main([*TINY, *own, *words, f"--ckpt_path={run / 'checkpoints/other.ckpt'}", "--trainer.max_epochs=2"])
    assert (run / "metrics.json").exists()  # nothing has changed
    assert fit.main([*TINY, *own, *words, last, "--trainer.max_epochs=2"]) == {}
    assert "results of the run before it was resumed are now called earlier_metrics.json\n" in capsys.readouterr().out
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ckpt_path=README.md"], r"Expected a checkpoint of facecls\.fit, but could not read README\.md"),
        (["--model.tasks=[age]"], r"tasks of \S+ to resume it \(gender; race; age\), but got age; set"),
        (["--model.trunk=resnet18"], r"\(model\.trunk test_resnet\), but got model\.trunk resnet18"),
        (
            ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
            r"class_path torch\.optim\.AdamW\), but got",
        ),
        (["--model.optimizer=torch.optim.AdamW", "--model.optimizer.amsgrad=true"], r"amsgrad False\), but got"),
        (["--trainer.max_epochs=2"], r"trainer\.max_epochs of 3 or more, .* but got 2"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_what_differs_from_the_run_is_named(
    words: list[str], said: str, saved: dict[tuple[int, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# Not a checkpoint\n")
    with pytest.raises(UserError, match=said):
        fit.main([*WORDS, "--data.batch_size=4", f"--ckpt_path={saved[2, 14]}", *words])


def test_weights_alone_are_not_resumed(
    saved: dict[tuple[int, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(saved[0, 14], weights_only=True)
    del content["optimizer_states"]
    torch.save(content, "weights.ckpt")
    with pytest.raises(UserError, match=r"Expected a checkpoint to resume such as .* without optimizer_states;"):
        fit.main([*WORDS, *FIRST, "--ckpt_path=weights.ckpt"])


@pytest.mark.parametrize(
    "name", ["callbacks", "epoch", "FacesDataModule", "global_step", "loops", "lr_schedulers", "optimizer_states"]
)
def test_a_state_of_another_kind_is_named(name: str, saved: dict[tuple[int, int], Path]) -> None:
    content = torch.load(saved[0, 14], weights_only=True)
    check_state(content)
    kept = content.pop(name)
    with pytest.raises(UserError, match=f"got one without {name};"):
        check_state(content)
    others = [None, "text", [], {}, 7, [None], [kept, kept], {"a": None}]
    likely = {int: [7], dict: [{}] + [{"a": None}] * (name in ("loops", "FacesDataModule")), list: []}[type(kept)]
    for other in others:
        if other not in likely:
            with pytest.raises(UserError, match=f"in this one {name}.* is not what a run leaves"):
                check_state(content | {name: other})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loops", lambda _: {}),
        ("FacesDataModule", lambda _: {"epoch": "x", "faces": None}),
        ("optimizer_states", lambda states: [{**states[0], "param_groups": []}]),
        ("optimizer_states", lambda states: [{**states[0], "state": {key: [] for key in states[0]["state"]}}]),
        ("current_model_state", lambda _: [1, 2]),
        ("averaging_state", lambda _: None),
        ("callbacks", lambda states: {key: dict.fromkeys(state, "x") for key, state in states.items()}),
        ("datamodule_hyper_parameters", lambda _: ["root"]),
        ("hyper_parameters", lambda _: None),
        ("state_dict", lambda weights: list(weights)),
    ],
)
def test_a_state_that_can_t_be_restored_is_a_line(
    name: str,
    change: Callable[[Any], Any],
    saved: dict[tuple[int, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(saved[0, 14], weights_only=True)
    torch.save(content | {name: change(content[name])}, "other.ckpt")
    with pytest.raises(UserError, match=r"^Expected a checkpoint (to resume|of facecls\.fit)[^\n]*$"):
        fit.main([*WORDS, *FIRST, "--ckpt_path=other.ckpt"])


def test_a_finished_run_says_that_nothing_is_left_and_is_tested(
    saved: dict[tuple[int, int], Path],
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(saved[2, 14].parent)  # where its best epoch is
    folder, nothing_left = Path("runs/tiny/version_0"), "nothing is left to train: 3 of 3 epochs are done"
    metrics, earlier = folder / "metrics.json", folder / "earlier_metrics.json"
    metrics.write_text("{}")  # of a test before
    words = [*FIRST, f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"]
    assert not recorder.run(words)
    assert nothing_left in capsys.readouterr().out.splitlines()
    assert metrics.read_text() == "{}"
    assert not recorder.run([*words, "--trainer.limit_test_batches=1.0"])
    assert nothing_left in capsys.readouterr().out.splitlines()
    assert earlier.read_text() == "{}"
    assert "test/loss" in metrics.read_text()


@pytest.mark.slow
def test_a_checkpoint_of_an_epoch_that_was_being_validated_goes_on_with_the_next(
    saved: dict[tuple[int, int], Path], recorder: Recorder
) -> None:
    first = recorder.run([*FIRST, "--trainer.max_epochs=1"])
    best = "--ckpt_path=runs/tiny/version_0/checkpoints/best.ckpt"
    rest = recorder.run(["--data.batch_size=16", "--trainer.max_epochs=3", best])
    assert [step[:2] for step in rest] == [(epoch, batch) for epoch in (1, 2) for batch in range(3)]
    assert len(first) == 15


@pytest.mark.slow
def test_gradients_that_were_being_accumulated_are_computed_again(recorder: Recorder) -> None:
    words = ["--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4"]
    recorder.run(words)
    whole = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    rest = recorder.run([*words, f"--ckpt_path={recorder.saved[1, 6]}"])
    assert rest[0][:2] == (1, 4)
    resumed = torch.load("runs/tiny/version_1/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [(FaceModule, "training_step"), (torch.optim.AdamW, "step"), (callbacks.ExponentialAverage, "__call__")],
    ids=lambda place: ".".join([place[0].__name__, place[1]]),
)
def test_a_run_stopped_within_a_batch_ends_as_one_that_was_not(
    place: tuple[type, str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorms take each batch once, weights each step, and their average each weight."""
    words = ["--probe=false", "--model.schedule.frozen={0: 0}", "--data.batch_size=8", "--trainer.max_epochs=2"]
    recorder.run(words)
    whole = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    plain, before = getattr(*place), signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(*args: Any, **options: Any) -> Any:
        result = plain(*args, **options)
        if len(recorder.steps) == 10:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(*place, stopped)
        try:
            with pytest.raises(SystemExit) as caught:
                recorder.run(words)
        finally:
            signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert caught.value.code == 130
    assert len(recorder.steps) == 10
    last = "runs/tiny/version_1/checkpoints/last.ckpt"
    assert len(recorder.run([*words, f"--ckpt_path={last}"])) == 4
    resumed = torch.load(last, weights_only=True)
    for state in ("state_dict", "current_model_state"):
        for name, tensor in whole[state].items():
            assert torch.equal(resumed[state][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Gloo connectFullMesh failed", "a fault"])
def test_an_error_in_a_batch_in_which_a_signal_waits_is_told(
    text: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process is lost: the watcher's signal comes first, and the error of the connection after it."""
    plain, before = FaceModule.training_step, signal.signal(signal.SIGINT, signal.default_int_handler)

    def failing(*args: Any) -> torch.Tensor:
        if len(recorder.steps) == 3:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError(text)
        return plain(*args)

    monkeypatch.setattr(FaceModule, "training_step", failing)
    monkeypatch.setattr(callbacks, "is_lost", lambda error: "Gloo" in str(error))
    monkeypatch.setattr(callbacks, "SAVE_EVERY", timedelta(days=1))
    try:
        with pytest.raises(RuntimeError, match=text):
            recorder.run(["--data.batch_size=8", "--trainer.max_epochs=1"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert Path("runs/tiny/version_0/checkpoints/last.ckpt").exists() == ("Gloo" in text)
