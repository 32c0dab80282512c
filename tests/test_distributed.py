"""Several devices: two processes train, test and predict as one does."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from plain_networks import write_small_trunk
from run_folders import without_drawing
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from trained_model import save_checkpoint

from facecls import evaluate, fit
from facecls.data.datamodule import FacesDataModule
from facecls.data.sampler import FaceBatchSampler
from facecls.data.split import assign_split
from facecls.data.synthetic import write_faces
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.events import read_scalars
from facecls.predict import __main__ as predict
from facecls.predict.outputs import journal_of
from facecls.ranks import Rank, launched
from facecls.training import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OPTIONS = ["--tta none", "--faces all", "--threshold 0.6", "--every 1"]
"""What the journal of a prediction with the usual options says of them."""
FACES = 121
"""Of which 37 are tested and 13 validate, so that neither part divides by two."""
WORDS = [
    "--data.root=m.csv",
    "--data.image_size=64",
    "--data.num_workers=0",
    "--data.train_transform={class_path: facecls.data.transforms.EvalTransform, init_args: {size: 64}}",
    "--model.trunk=test_resnet",
    "--model.dropout=0",
    "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}",
    "--model.task_weights={age: 0.05}",
    "--model.class_weights={race: [1, 2, 1, 3, 2]}",
    "--model.schedule={frozen: {0: -1, 1: 2, 2: 0}, batchnorm: frozen, layer_decay: 0.9, warmup: 0, decay: constant}",
    "--ema=0.9",
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]
"""What does not depend on how a batch is cut: no augmentation, no dropout, no statistics of the batch, no bfloat16."""
FOREVER = ["--trainer.max_epochs=1000"]


def _start(
    program: str, words: Sequence[str], folder: Path, first: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program.split(), *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=first,
    )


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _started_by(process: int) -> list[int]:
    """The processes that Lightning started for other devices."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in children if b"LOCAL_RANK=1" in Path(f"/proc/{each}/environ").read_bytes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn faces and a manifest of them, in which labels are missing."""
    folder = tmp_path_factory.mktemp("runs")
    write_faces(folder / "faces", FACES, seed=7)
    faces = read_table(str(folder / "faces"), 1, UTKFACE).faces
    faces["split"] = assign_split(faces, 0.11, 0.3, 1, UTKFACE)
    draws = np.random.default_rng(3).random((FACES, 3))
    for task, share, draw in zip(UTKFACE, (0.2, 0.3, 0.6), draws.T, strict=True):
        faces.loc[draw < share, task] = pd.NA
    faces["path"] = "faces/" + faces["path"]
    faces[["path", "split", *UTKFACE]].to_csv(folder / "m.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """Two processes are started by Lightning and stopped by Ctrl-C; gives the first last.ckpt that they had left."""
    words = [*WORDS, "--name=two", "--data.batch_size=8", "--trainer.devices=2", *FOREVER]
    # a shell may have started the tests in the background, where Ctrl-C is ignored, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = _start("-m facecls.fit", words, folder)
    signal.signal(signal.SIGINT, before)
    last = folder / "runs/two/version_0/checkpoints/last.ckpt"
    _wait_for(last, process)
    first = Path(shutil.copy(last, last.with_name("first.ckpt")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    out, err = process.communicate(timeout=240)  # until the last of them has closed its output
    assert process.returncode == 130, out + err
    assert "--ckpt_path runs/two/version_0/checkpoints/last.ckpt" in out
    assert out.count("random weights") == 1  # only the first process speaks
    assert "Traceback" not in err
    assert torch.load(last, weights_only=True)["global_step"] > 0
    assert not list(last.parent.glob(".*"))
    return first


@pytest.fixture(scope="module")
def runs(folder: Path, stopped: Path) -> Path:
    """A folder with runs: ``one`` of a process with 16 faces a batch, ``two`` of two with 8, as far as each other.

    The two go on from where they were stopped, within an epoch, this time started by torchrun.
    """
    epochs = f"--trainer.max_epochs={torch.load(stopped, weights_only=True)['epoch'] + 3}"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m facecls.fit"
    two = [*WORDS, "--name=two", "--data.batch_size=8", "--trainer.devices=2", f"--ckpt_path={stopped}"]
    process = _start(torchrun, [*two, epochs], folder)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert out.count("faces tested") == out.count("random weights") == 1
    stopped.rename(folder / "stopped.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without_drawing(patch)
        fit.main([*WORDS, "--name=one", "--data.batch_size=16", epochs])
    return folder


@pytest.mark.parametrize(
    ("who", "number", "status"),
    [("main", signal.SIGKILL, -signal.SIGKILL), ("other", signal.SIGKILL, 2), ("all", signal.SIGTERM, 143)],
    ids=["first killed", "second killed", "terminated"],
)
def test_processes_end_together_and_the_run_goes_on(
    who: str, number: int, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"--name=ended_{who}"
    words = [*WORDS, name, "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0"]
    process = _start("-m facecls.fit", [*words, "--data.batch_size=8", "--trainer.devices=2", *FOREVER], folder)
    run = folder / f"runs/ended_{who}/version_0"
    last = run / "checkpoints/last.ckpt"
    _wait_for(last, process)
    (other,) = _started_by(process.pid)
    if who == "all":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if who == "main" else other, number)
    out, err = process.communicate(timeout=60)  # until the last of them has closed its output
    assert process.returncode == status, out + err
    ended = r"facecls(\.fit)?: error: Expected all processes of the run to answer, but another one has ended [^\n]*\n"
    assert re.fullmatch("" if who == "all" else ended, err), err
    assert not (run / "run.lock").exists() or who == "main"
    if who == "other":
        return  # what the first process saved is no other than after SIGTERM
    monkeypatch.chdir(folder)
    without_drawing(monkeypatch)
    epochs = torch.load(last, weights_only=True)["epoch"] + 1
    fit.main([*words, "--data.batch_size=16", f"--trainer.max_epochs={epochs}", f"--ckpt_path={last}"])
    assert torch.load(last, weights_only=True)["epoch"] == epochs - 1


def test_two_processes_end_on_a_full_disk(folder: Path) -> None:
    words = [*WORDS, "--name=full", "--data.batch_size=8", "--trainer.devices=2", *FOREVER]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    process = _start("-m facecls.fit", words, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard)))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, out + err
    assert re.fullmatch(r"facecls\.fit: error: Can't write runs/full/\S+\.ckpt: .*File too large[^\n]*\n", err), err
    assert not list((folder / "runs/full").rglob("*.ckpt")) + list((folder / "runs/full").rglob(".*"))
    assert not (folder / "runs/full/version_0/run.lock").exists()


def _predictions(runs: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(runs / "runs" / name / "version_0/predictions.parquet")


def test_two_processes_learn_the_weights_that_one_learns(runs: Path) -> None:
    one, two = (
        torch.load(runs / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert one["global_step"] == two["global_step"] == (one["epoch"] + 1) * (71 // 16)
    for part in ("state_dict", "current_model_state"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")


def test_one_process_goes_on_with_what_two_began(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    without_drawing(monkeypatch)
    one = torch.load("runs/one/version_0/checkpoints/last.ckpt", weights_only=True)
    words = ["--name=on", "--data.batch_size=16", f"--trainer.max_epochs={one['epoch'] + 1}"]
    fit.main([*WORDS, *words, "--ckpt_path=stopped.ckpt"])
    on = torch.load("runs/on/version_0/checkpoints/last.ckpt", weights_only=True)
    assert on["global_step"] == one["global_step"]
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(on["state_dict"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_learn_a_converted_graph_as_one_does(folder: Path) -> None:
    weights = write_small_trunk(folder / "trunk.safetensors")
    graph = [*WORDS, "--model.trunk=graph", f"--model.weights={weights}", "--trainer.max_epochs=2"]
    graph += ["--trainer.limit_test_batches=0"]
    two = [*graph, "--name=graph_two", "--data.batch_size=8", "--trainer.devices=2"]
    script = folder / "facecls"  # as pip installs it; the second process is started in the same way
    script.write_text("import sys\nfrom facecls.__main__ import main\nsys.exit(main())\n")
    process = _start(f"{script} fit", two, folder)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without_drawing(patch)
        fit.main([*graph, "--name=graph_one", "--data.batch_size=16"])
    one, other = (
        torch.load(folder / f"runs/graph_{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_leave_what_one_leaves(runs: Path) -> None:
    kept = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "tfevents" not in path.name}
        for folder in (runs / "runs/one", runs / "runs/two")
    ]
    assert kept[1] - kept[0] == {"version_0/model_card.md", "version_0/report.html", "version_0/suspects.csv"}
    assert kept[0] <= kept[1]
    one, two = (read_scalars(runs / "runs" / name / "version_0") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, curve in one.items():
        if name.startswith("train/"):
            curve = curve.iloc[-1:]  # after a resume, that of the rest of the epoch
        # the two may have gone further before they were stopped
        pd.testing.assert_series_equal(two[name].loc[curve.index], curve, rtol=1e-4, atol=1e-5, obj=name)


def test_each_face_is_tested_once(runs: Path) -> None:
    one, two = _predictions(runs, "one"), _predictions(runs, "two")
    assert len(two) == 37
    manifest = pd.read_csv(runs / "m.csv")
    assert two["path"].tolist() == manifest.loc[manifest["split"] == "test", "path"].tolist()
    pd.testing.assert_frame_equal(two, one, rtol=1e-3, atol=1e-5)


def _recomputed(table: pd.DataFrame) -> dict[str, float]:
    wanted = {}
    for task in ("gender", "race"):
        known = table[table[task].notna()]
        truth, guess = known[task].astype(int), known[f"{task}_predicted"]
        wanted[f"{task}/accuracy"] = accuracy_score(truth, guess)
        wanted[f"{task}/f1_macro"] = f1_score(truth, guess, average="macro", labels=sorted({*truth, *guess}))
    known = table[table["age"].notna()]
    wanted["age/mae_years"] = mean_absolute_error(known["age"].astype(int), known["age_predicted"])
    wanted["age/cs5"] = ((known["age"] - known["age_predicted"]).abs() <= 5).mean()
    return wanted


def test_metrics_are_those_of_all_faces(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    found = pd.read_json("runs/two/version_0/metrics.json", typ="series")
    assert found["faces/tested"] == 37
    assert found["device"].startswith("2 x cpu")
    tested = _predictions(runs, "two")
    assert {task: found[f"test/{task}/faces"] for task in UTKFACE} == {
        task: tested[task].notna().sum() for task in UTKFACE
    }
    wanted = _recomputed(tested)
    assert {name: found[f"test/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)

    best = "runs/two/version_0/checkpoints/best.ckpt"
    without_drawing(monkeypatch)
    evaluate.main([f"--ckpt_path={best}", "--data.split=val", "--accelerator=cpu", "--precision=32-true"])
    wanted = _recomputed(_predictions(runs, "evaluate"))
    curves = read_scalars(Path("runs/two/version_0"))
    step = curves["val/loss"].loc[: found["steps"]].idxmin()
    assert {name: curves[f"val/{name}"][step] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_an_error_ends_the_other_processes_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def fail(cli: cli.FaceCLI) -> None:
        cli.trainer.strategy.launcher.procs = [waiting]
        raise UserError("Expected more space on the disk.")

    monkeypatch.setattr(fit, "train", fail)
    words = [word for word in WORDS if "data.root" not in word]
    with pytest.raises(UserError, match="more space"):
        fit.main([*words, "--data.root=synthetic:60", "--trainer.devices=2"])
    assert waiting.wait(timeout=30) == -signal.SIGKILL


def test_a_part_with_fewer_faces_than_devices_is_refused() -> None:
    data = FacesDataModule("synthetic:60", image_size=64)
    data.setup()
    data.trainer = SimpleNamespace(global_rank=0, world_size=61)  # type: ignore[assignment]
    with pytest.raises(UserError, match="Expected a face for each of 61 devices in each part, but one part has 6"):
        data.test_dataloader()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", [None, 5])
def test_processes_cut_the_batches_of_one(ranks: int, seed: int | None) -> None:
    rows = np.arange(100, 147)
    whole = list(FaceBatchSampler(rows, 4 * ranks, seed))
    parts = [list(FaceBatchSampler(rows, 4, seed, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for number, plan in enumerate(whole):
        cut = [part[number] for part in parts if number < len(part)]
        assert sorted(np.concatenate([each.faces for each in cut])) == sorted(plan.faces)
        if seed is not None:
            assert len({each.seed for each in cut}) == ranks  # each draws for itself
    if seed is not None:
        assert {len(part) for part in parts} == {len(whole)}
    else:
        assert sorted(np.concatenate([each.faces for part in parts for each in part])) == rows.tolist()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Rank(3, 4, 1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, Rank(1, 2, 1)),
        # a task of srun
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "5",
            },
            Rank(5, 8, 0),
        ),
        # torchrun, started by srun once a node
        (
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            Rank(9, 16, 1),
        ),
        # a batch script without srun, an interactive shell with one task, and one within an allocation of four
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Rank(0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Rank(0, 1, 0)),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "4294967290",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            Rank(0, 1, 0),
        ),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Rank(0, 1, 0)),  # what Lightning says to those that it starts
    ],
)
def test_torchrun_and_slurm_say_which_process_this_is(environment: dict[str, str], wanted: Rank) -> None:
    assert launched(environment) == wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "best.ckpt"))


def _predict(rank: int, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    return predict.main(words)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_processes_predict_each_input_once(
    ending: str, model: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").symlink_to(faces)
    Path("out").mkdir()
    Path("out/a.jpg").write_bytes(next(faces.glob("*.jpg")).read_bytes())
    words = [model, "in", "out", "--out", f"out/all.{ending}", "--grid", "out/grid.png", "--batch_size", "8"]
    read = pd.read_csv if ending == "csv" else pd.read_parquet
    shards = []
    for rank in range(3):
        _predict(rank, words, monkeypatch)
        shards.append(read(f"out/all.rank{rank}of3.{ending}"))
        assert Path(f"out/grid.rank{rank}of3.png").exists()
    assert all(len(shard) > 10 for shard in shards)
    found = pd.concat(shards).sort_values("path", ignore_index=True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    predict.main([model, "in", "out/a.jpg", "--out", f"alone.{ending}"])
    alone = read(f"alone.{ending}").sort_values("path", ignore_index=True)
    pd.testing.assert_frame_equal(found, alone, rtol=1e-4, atol=1e-6)


def test_a_process_resumes_its_own_shard(
    model: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [model, str(faces), "--out", "all.csv"]
    for rank in range(3):
        _predict(rank, words, monkeypatch)
    shard = Path("all.rank1of3.csv")
    whole = pd.read_csv(shard)
    before = {rank: Path(f"all.rank{rank}of3.csv").read_bytes() for rank in (0, 2)}
    shard.unlink()
    rows = [json.dumps(row) for row in whole[:9].astype(object).where(whole[:9].notna(), None).to_dict("records")]
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    header = json.dumps({"model": digest, "options": OPTIONS, "columns": list(whole)})
    journal_of(shard).write_text("".join(f"{row}\n" for row in [header, *rows]) + '{"path": "cut')
    with pytest.raises(UserError, match=r"all\.rank1of3\.csv\.journal\.jsonl exists; continue with --resume"):
        _predict(1, words, monkeypatch)
    for rank in range(3):
        _predict(rank, [*words, "--resume"], monkeypatch)
    pd.testing.assert_frame_equal(pd.read_csv(shard), whole, rtol=1e-4)
    assert {rank: Path(f"all.rank{rank}of3.csv").read_bytes() for rank in (0, 2)} == before
    assert sorted(path.name for path in Path().iterdir()) == [f"all.rank{rank}of3.csv" for rank in range(3)]


def test_a_process_without_inputs_leaves_an_empty_shard(
    model: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = str(next(faces.glob("*.jpg")))
    for rank in range(3):
        _predict(rank, [model, one, "--out", "all.parquet"], monkeypatch)
    shards = [pd.read_parquet(f"all.rank{rank}of3.parquet") for rank in range(3)]
    assert sorted(len(shard) for shard in shards) == [0, 0, 1]
    assert len({tuple(shard.columns) for shard in shards}) == 1
    assert not journal_of(Path("all.rank0of3.parquet")).exists()


@pytest.mark.parametrize("words", [["in.jpg"], ["-", "--out", "out.csv"]])
def test_processes_can_not_share_standard_input_and_output(
    words: list[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="Expected --out and no - with 3 processes"):
        _predict(0, [model, *words], monkeypatch)


def test_fewer_devices_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [word for word in WORDS if "data.root" not in word]
    with pytest.raises(UserError, match=r"to be the 2 processes that were started, but got 1 x 1"):
        fit.main([*words, "--data.root=synthetic:60"])
