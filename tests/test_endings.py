"""What ends a command from outside: a signal, another process of the run, memory or a disk that has no more room."""

import errno
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies.launchers import subprocess_script
from trained_model import save_checkpoint

from facecls import evaluate, fit
from facecls.data import datamodule
from facecls.errors import Terminated, UserError, command, is_out_of_memory, memory_for, status_of
from facecls.files import replacing
from facecls.locks import locked
from facecls.model.module import FaceModule
from facecls.model.predictor import TorchPredictor
from facecls.predict import __main__ as predict
from facecls.run import LAST_CHECKPOINT, LOCK
from facecls.training import processes
from facecls.training.processes import LostError, check_launch, together

TINY = ["--model.trunk=test_resnet", "--name=tiny", "--data.root=synthetic:60", "--data.image_size=64"]
TINY += ["--data.batch_size=8", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.limit_test_batches=0"]
TINY += ["--trainer.precision=32-true"]
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer."
ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB")
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
)
KILLED_WORKER = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
LOST_WORKER = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Signals as in a new process; Lightning ignores Ctrl-C from the first one on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _trainer(local_rank: int = 0, world_size: int = 2) -> Any:
    killed: list[int] = []
    launcher = SimpleNamespace(procs=[1], kill=killed.append, killed=killed)
    return SimpleNamespace(
        local_rank=local_rank,
        world_size=world_size,
        interrupted=False,
        strategy=SimpleNamespace(launcher=launcher),
        _signal_connector=SimpleNamespace(),
    )


def _lose_another(ended: threading.Event | None = None) -> None:
    """Does as Lightning's launcher, with a process that was killed, and waits for what comes of it."""
    subprocess_script._launch_process_observer([SimpleNamespace(poll=lambda: None), SimpleNamespace(poll=lambda: -9)])
    assert (ended or threading.Event()).wait(30), "nothing has happened"


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_EVERY", 0.01)
    monkeypatch.delenv(processes._STARTED_BY, raising=False)
    monkeypatch.setattr(subprocess_script, "_launch_process_observer", None)


@pytest.mark.usefixtures("_soon")
def test_a_process_that_another_one_has_left_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trainer = _trainer()
    with pytest.raises(SystemExit) as ended, command("facecls.fit"), together(trainer):
        _lose_another()
    assert ended.value.code == 2
    assert re.fullmatch(
        r"facecls\.fit: error: Expected all processes [^\n]* has ended [^\n]*\n", capsys.readouterr().err
    )
    assert trainer.strategy.launcher.killed == [signal.SIGKILL]


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_process_that_can_t_be_interrupted_ends_all_the_same(
    local_rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a call of NCCL, which waits for the others; those that another one has started ignore SIGTERM."""
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), ended.set()))
    for name in ("_PATIENCE", "_PATIENCE_OF_OTHERS"):
        monkeypatch.setattr(processes, name, 0.01)
    monkeypatch.setenv(processes._STARTED_BY, "1")  # no parent of this one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = _trainer(local_rank)

    def run() -> None:
        with together(trainer):
            if local_rank == 0:
                _lose_another(ended)
            assert ended.wait(30)
            raise RuntimeError(GLOO)

    with pytest.raises(LostError):
        run()
    assert statuses == [2]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("_soon")
def test_what_ends_processes_keeps_its_reason() -> None:
    def lightning(stop: BaseException) -> None:
        try:
            raise stop
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does

    for stop in (KeyboardInterrupt(), Terminated()):
        with pytest.raises(type(stop)) as caught, together(_trainer()):
            lightning(stop)
        assert caught.value is stop
    for error in (UserError("no space"), OSError(errno.ENOSPC, "no space"), KeyError("x"), SystemExit(3)):
        trainer = _trainer()
        with pytest.raises(type(error)) as found, together(trainer):
            raise error
        assert found.value is error
        assert trainer.strategy.launcher.killed == [signal.SIGKILL]
    before = threading.active_count()
    with together(_trainer(world_size=1)):
        assert threading.active_count() == before
    trainer = _trainer()
    with together(trainer):
        pass
    assert not trainer.strategy.launcher.killed


SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "faces"}
SRUN = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
TORCHRUN["TORCHELASTIC_RUN_ID"] = "x"


@pytest.mark.parametrize(
    ("create", "environment", "devices", "nodes", "said"),
    [
        (LightningEnvironment, {}, 2, 1, None),
        (LightningEnvironment, {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, 1, None),
        (TorchElasticEnvironment, TORCHRUN, 2, 1, None),
        (TorchElasticEnvironment, TORCHRUN, 1, 2, None),
        (TorchElasticEnvironment, TORCHRUN, 4, 1, "to be the 2 processes that were started, but got 4 x 1"),
        (SLURMEnvironment, SRUN, 2, 1, None),
        (SLURMEnvironment, SRUN, 1, 1, "to be the 2 processes that were started, but got 1 x 1"),
        (SLURMEnvironment, SRUN, 1, 2, "You set `devices=1` in Lightning, but the number of tasks per node"),
        (SLURMEnvironment, {**SRUN, "SLURM_NNODES": "2"}, 2, 1, "You set `num_nodes=1`"),
        # a batch script without srun: the others would never come
        (
            SLURMEnvironment,
            {**SRUN, "SLURM_STEP_ID": None},
            2,
            1,
            "to be the 1 processes that were started, but got 2 x 1",
        ),
        # by hand, where Lightning would start two more for each
        (LightningEnvironment, {"RANK": "0", "WORLD_SIZE": "2"}, 2, 1, "but Lightning knows of neither"),
    ],
)
def test_processes_and_options_that_contradict_each_other_are_a_line(
    create: Callable[[], Any],
    environment: dict[str, str | None],
    devices: int,
    nodes: int,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    strategy = SimpleNamespace(cluster_environment=create())
    trainer: Any = SimpleNamespace(num_devices=devices, num_nodes=nodes, strategy=strategy)
    if said is None:
        check_launch(trainer)
    else:
        with pytest.raises(UserError, match=said):
            check_launch(trainer)


def test_tasks_of_slurm_that_lightning_does_not_take_are_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="Use `--ntasks-per-node=2` instead"):
        fit.main(TINY)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ON_GPU, r"a batch of 8 faces, but the GPU has run out of it; try --data\.batch_size 4\."),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU has run out of it"),
        (ON_CPU, r"a batch of 8 faces, but the machine has run out of it; try --data\.batch_size 4\."),
        (MemoryError(), r"the machine has run out of it; try --data\.batch_size 4\."),
        (KILLED_WORKER, r"one was killed, .* lower --data\.num_workers or --data\.batch_size \(now 8\)"),
        (LOST_WORKER, r"one was killed, .* lower --data\.num_workers or --data\.batch_size \(now 8\)"),
    ],
    ids=["cuda", "cudnn", "cpu", "python", "worker killed", "worker lost"],
)
@pytest.mark.parametrize("place", ["fit", "evaluate", "predict"])
def test_memory_that_runs_out_says_which_batch_to_try(
    place: str, error: Exception, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    for owner, name in ((FaceModule, "_shared_step"), (TorchPredictor, "estimate")):
        monkeypatch.setattr(owner, name, fail)
    faces = ["--data.root=synthetic:60", "--data.image_size=64", "--data.batch_size=8", "--data.num_workers=0"]
    main: Callable[[list[str]], object] = {"fit": fit.main, "evaluate": evaluate.main, "predict": predict.main}[place]
    words = {
        "fit": [*TINY, "--trainer.limit_train_batches=1"],
        "evaluate": [f"--ckpt_path={model}", *faces, "--accelerator=cpu"],
        "predict": [str(model), "synthetic:3", "--faces=whole", "--out=a.csv", "--batch_size=8"],
    }[place]
    expected = said.replace(r"--data\.batch_size", "--batch_size") if place == "predict" else said
    with pytest.raises(UserError, match=expected):
        main(words)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "best.ckpt")


def test_other_errors_are_no_lack_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (UserError("out of memory"), OSError("out of memory"), KeyError("x"), RuntimeError("shapes")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), memory_for("--batch_size", 8):
            raise error
    with pytest.raises(UserError, match="take smaller images or a smaller model"), memory_for("--batch_size", 1):
        raise MemoryError
    with pytest.raises(UserError, match="the machine has run out"), memory_for("--batch_size", 8):
        torch.empty(2**60, dtype=torch.uint8)  # what torch really says
    with pytest.raises(UserError, match="the machine has run out"), memory_for("--batch_size", 8):
        np.empty(2**60, np.uint8)
    with pytest.raises(SystemExit) as ended, command("facecls.export"):
        raise ON_CPU
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("facecls.export: error: Expected more memory")


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def run() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(30)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while it saves, another one is ignored

    with pytest.raises(SystemExit) as ended, command("facecls.crop"):
        run()
    assert ended.value.code == 128 + 15
    assert capsys.readouterr().err == "facecls.crop: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with command("facecls.crop"):
        os.kill(os.getpid(), signal.SIGTERM)  # whoever started it wants it ignored
    assert status_of(KeyboardInterrupt()) == 130


def test_sigterm_saves_the_state_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    step = FaceModule.training_step

    def terminated(module: FaceModule, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, number)

    monkeypatch.setattr(FaceModule, "training_step", terminated)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    words = [*TINY, "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        fit.main(words)
    assert ended.value.code == 143
    run = Path("runs/tiny/version_0")
    assert f"--ckpt_path {run / LAST_CHECKPOINT}" in capsys.readouterr().out
    # the batch in which it comes is finished
    assert torch.load(run / LAST_CHECKPOINT, weights_only=True)["global_step"] == 3
    assert not (run / LOCK).exists()
    monkeypatch.setattr(FaceModule, "training_step", step)
    fit.main([*words, f"--ckpt_path={run / LAST_CHECKPOINT}"])
    assert torch.load(run / LAST_CHECKPOINT, weights_only=True)["epoch"] == 0


def _worker() -> None:
    datamodule._start_worker(0)
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)


def test_a_worker_that_sigterm_ends_is_no_error_to_its_parent() -> None:
    worker = get_context("fork").Process(target=_worker)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0


def test_a_full_disk_for_the_curves_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("facecls.training.saving.write_checkpoint", lambda *_: None)  # larger than the curves
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = [*TINY, "--trainer.max_epochs=50", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SystemExit) as ended, command("facecls.fit"):
            fit.main([*words, "--trainer.limit_train_batches=4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"facecls\.fit: error: Can't [^\n]*File too large[^\n]*\n", said), said


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_storage_without_locks_is_written_and_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = os.open

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_EXCL:
            refuse()
        return opened(path, flags, *args, **options)

    real = Path.open

    def open_path(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return refuse() if "x" in mode else real(path, mode, *args, **options)

    for owner, name, call in (
        (os, "open", open_),
        (Path, "open", open_path),
        (os, "fsync", refuse),
        (os, "chmod", refuse),
        (Path, "chmod", refuse),
        (os, "link", refuse),
    ):
        monkeypatch.setattr(owner, name, call)
    with locked(tmp_path / "run.lock", "the run"), replacing(tmp_path / "a") as part:
        part.write_text("text")
    assert (tmp_path / "a").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    said = capsys.readouterr().err
    assert (
        said
        == f"{tmp_path} can't keep two processes apart ({os.strerror(number)}): start no other that writes the run\n"
    )


def test_a_lock_that_can_t_be_removed_does_not_end_a_run_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch, locked(tmp_path / "run.lock", "the run"):
        patch.setattr(Path, "unlink", refuse)
    assert (tmp_path / "run.lock").exists()
