"""The run around the loop: one at a time in a folder, stopped by signals, on several ranks."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.commands.cli import main
from nnssl.commands.trainers import trainers_folder
from nnssl.data.streams import FailedElsewhere, on_first_rank
from nnssl.interruption import Terminated
from nnssl.training.checkpoint import how_to_resume
from nnssl.training.lock import NAME, own_process, started
from nnssl.training.trainer import SemiTrainer
from tests.building import put
from tests.place import SHORT, SMALL, Place, dies_in_epoch, losses, run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TRAINER = "nnUNetTrainerMeanTeacher"


def lock_of(trainer: Any, pid: int) -> Path:
    """The lock of a training by another process."""
    file = Path(trainer.output_folder) / NAME
    file.write_text(json.dumps({**own_process(), "pid": pid, "started": started(pid), "token": "theirs"}))
    return file


def test_a_second_training_in_a_folder_is_refused(place: Place) -> None:
    trainer = place.trainer(TRAINER)
    file = lock_of(trainer, os.getppid())
    with pytest.raises(RuntimeError, match=rf"training.lock: process {os.getppid()} on .* trains in this"):
        trainer.run_training()
    assert file.exists() and not trainer.was_initialized


def test_a_validation_beside_a_training_is_not_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[bool] = []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, npz: done.append(npz))
    trainer = place.trainer(TRAINER)
    trainer.initialize()
    file = lock_of(trainer, os.getppid())
    trainer.perform_actual_validation(True)
    assert done == [True] and file.exists()
    assert f"process {os.getppid()}" in capsys.readouterr().out
    file.unlink()
    trainer.perform_actual_validation()
    assert not file.exists()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_training_with_one_line(
    place: Place, capsys: pytest.CaptureFixture[str], signal_number: int
) -> None:
    place.plan(**{**SHORT, "num_epochs": 4}, DiffCL=SMALL)
    trainer = place.trainer(TRAINER)
    begin: Callable[[], None] = trainer.on_epoch_start

    def signalled() -> None:
        if trainer.current_epoch == 2:
            os.kill(os.getpid(), signal_number)
        begin()

    trainer.on_epoch_start = signalled
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        with pytest.raises((KeyboardInterrupt, Terminated)):
            trainer.run_training()
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.splitlines()
    line = "stopped in epoch 2 of 4; rerun with --c to resume at epoch 2 (checkpoint_latest.pth)"
    assert [s for s in said if "stopped" in s] == [f"{TRAINER}: {line}"]
    assert line in Path(trainer.log_file).read_text(encoding="utf-8")
    assert not (Path(trainer.output_folder) / NAME).exists()


def test_a_stopped_validation_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", stop)
    trainer = place.trainer(TRAINER)
    trainer.initialize()
    with pytest.raises(KeyboardInterrupt):
        trainer.perform_actual_validation()
    assert "stopped in the final validation; rerun with --val to repeat it" in capsys.readouterr().err


def test_an_error_frees_the_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = place.trainer(TRAINER)
    monkeypatch.setattr(trainer, "on_train_start", lambda: {}["bug"])  # type: ignore[index]
    with pytest.raises(KeyError):
        trainer.run_training()
    assert not (Path(trainer.output_folder) / NAME).exists()


@pytest.mark.parametrize(
    ("files", "own", "disabled", "line"),
    [
        (
            ["latest", "best"],
            {"latest": 5, "best": 3},
            False,
            "with --c to resume at epoch 5 (checkpoint_lat",
        ),
        (["best"], {"best": 3}, False, "with --c to resume at epoch 3 (checkpoint_best.pth)"),
        ([], {}, False, "there is no checkpoint yet; rerun without --c to start anew"),
        ([], {}, True, "checkpointing is disabled; rerun without --c"),
        (["final", "best"], {"best": 3}, False, "final.pth, which --c would take, is of an earlier training"),
    ],
)
def test_how_to_go_on_is_what_nnunet_would_do(
    tmp_path: Path, files: list[str], own: dict[str, int], disabled: bool, line: str
) -> None:
    for name in files:
        (tmp_path / f"checkpoint_{name}.pth").touch()
    epochs = {f"checkpoint_{name}.pth": epoch for name, epoch in own.items()}
    assert line in how_to_resume(str(tmp_path), epochs, disabled)


def test_a_forgotten_c_loses_no_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Not of the training that was interrupted, nor of the second one that was."""
    place.plan(**{**SHORT, "num_epochs": 3})
    epochs = {}
    for attempt in range(3):
        trainer = place.trainer(TRAINER)
        trainer.initial_lr = 0.01 * (attempt + 1)  # to tell them apart
        trainer.on_epoch_start = dies_in_epoch(trainer, 2 - (attempt == 2))
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()
        epochs[attempt] = capsys.readouterr().out
    folder = Path(trainer.output_folder)
    assert "starts anew" not in epochs[0]
    for attempt, suffix in ((1, ".bak"), (2, ".bak1")):
        assert f"WARNING: this training starts anew, but {folder} holds checkpoints" in epochs[attempt]
        assert (
            f"checkpoint_latest.pth of the earlier training is now checkpoint_latest.pth{suffix}"
            in (epochs[attempt])
        )
    names = [f"checkpoint_{name}.pth" for name in ("best", "latest")]
    assert {p.name for p in folder.glob("checkpoint_*")} == {
        n + s for n in names for s in ("", ".bak", ".bak1")
    }
    found = [torch.load(folder / f"{names[1]}{s}", weights_only=False) for s in (".bak", ".bak1", "")]
    assert [content["current_epoch"] for content in found] == [2, 2, 1]
    first = [content["nnssl"]["history"][0]["lr"] for content in found]
    assert first == pytest.approx([0.01, 0.02, 0.03])


def test_a_finished_training_that_goes_on_resumes_where_it_was_stopped(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(run(place.trainer(TRAINER)).output_folder)
    final = (folder / "checkpoint_final.pth").read_bytes()
    place.plan(**{**SHORT, "num_epochs": 5})
    longer = place.trainer(TRAINER, resume=True)
    maybe_load_checkpoint(longer, True, False)
    longer.on_epoch_start = dies_in_epoch(longer, 4)
    with pytest.raises(KeyboardInterrupt):
        longer.run_training()
    said = capsys.readouterr()
    assert "checkpoint_final.pth, of fewer epochs, is now checkpoint_final.pth.bak" in said.out
    assert "rerun with --c to resume at epoch 4 (checkpoint_latest.pth)" in said.err
    assert (folder / "checkpoint_final.pth.bak").read_bytes() == final
    resumed = place.trainer(TRAINER, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 4
    run(resumed)
    assert torch.load(folder / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 5


@pytest.mark.nightly
def test_until_the_first_checkpoint_a_forgotten_c_changes_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.plan(**{**SHORT, "num_epochs": 3})
    first = place.trainer(TRAINER)
    first.on_epoch_start = dies_in_epoch(first, 2)
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    folder = Path(first.output_folder)
    before = {p.name: p.read_bytes() for p in folder.glob("checkpoint_*")}
    second = place.trainer(TRAINER)
    second.on_epoch_start = dies_in_epoch(second, 0)
    with pytest.raises(KeyboardInterrupt):
        second.run_training()
    assert {p.name: p.read_bytes() for p in folder.glob("checkpoint_*")} == before
    without = place.trainer(TRAINER)
    without.disable_checkpointing = True
    without.run_training()
    assert {p.name: p.read_bytes() for p in folder.glob("checkpoint_*")} == before
    assert "They are kept: this one writes none" in capsys.readouterr().out
    resumed = place.trainer(TRAINER, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    resumed.run_training()
    assert {p.name for p in folder.glob("checkpoint_*")} == {"checkpoint_final.pth", "checkpoint_best.pth"}


def ended(group: int, deadline: float) -> bool:
    """Whether no process of the group is left before the deadline."""
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.nightly
def test_ctrl_c_ends_the_stock_command_and_its_workers(place: Place) -> None:
    """The terminal sends SIGINT to all processes of the command: one line, nothing is left behind; while it
    ran, another training was refused."""
    place.plan(**{**SHORT, "num_epochs": 1000}, DiffCL=SMALL)
    script = os.path.join(sysconfig.get_path("scripts"), "nnUNetv2_train")
    command = [sys.executable, "-W", "ignore", script, "777", "3d_fullres", "0", "-tr", TRAINER]
    environment = {
        **os.environ,
        "nnUNet_extTrainer": trainers_folder(),
        "PYTHONPATH": str(ROOT),
        "nnUNet_n_proc_DA": "1",
    }
    errors = place.results.parent / "errors"
    with (
        open(errors, "w") as stderr,
        subprocess.Popen(
            [*command, "-device", "cpu"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            # a caller in the background ignores it, and so would the command
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        fold = place.results / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
        deadline = time.monotonic() + 600
        while not (fold / "losses.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text(encoding="utf-8")
            time.sleep(0.1)
        with pytest.raises(RuntimeError, match=f"process {process.pid} on"):
            place.trainer(TRAINER).run_training()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == -signal.SIGINT  # 130 in a shell
    lines = errors.read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if line and "it/s" not in line]  # no progress bars
    assert len(said) == 1 and "stopped in epoch" in said[0] and "rerun with --c" in said[0], lines
    assert not (fold / NAME).exists()
    assert ended(process.pid, deadline), "worker processes are left"


# several ranks


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def forked_children_learn() -> bool:
    """Not in a process whose autograd has started threads, as some tests before this one may have done."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.ones(1, requires_grad=True).sum().backward()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def forks(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that fork ranks which train: where children cannot, the test runs in a process of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if forked_children_learn():
            test(*args, **kwargs)
            return
        node = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", node],
            cwd=Path(__file__).parents[2],
            env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "nnUNet_"))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def as_rank(rank: int, number: int, port: str, act: Callable[[], Any], results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    results.put((rank, act()))


def on_ranks(number: int, act: Callable[[], Any]) -> list[Any]:
    """What so many forked processes, placed as torchrun places them, return."""
    context: Any = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=as_rank, args=(rank, number, port, act, results)) for rank in range(number)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < number:
        try:
            found |= [results.get(timeout=5)]
        except queue.Empty:
            assert all(process.exitcode in (None, 0) for process in ranks), "a rank failed"
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(number)]


@forks
def test_two_ranks_train_together_on_cpu(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them, but for the final validation."""
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, npz: None)
    weights: list[float] = []
    begin = nnUNetTrainer.on_train_end

    def end(self: Any) -> None:
        weights.extend(float(p.double().sum()) for p in self.network.parameters())
        begin(self)

    monkeypatch.setattr(nnUNetTrainer, "on_train_end", end)
    command = ["train", "777", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu"]
    first, second = on_ranks(2, lambda: (main(command), weights))
    assert first[0] == second[0] == 0
    assert first[1] == second[1] and any(first[1])
    fold = place.results / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists() and not (fold / NAME).exists()
    assert [row["epoch"] for row in losses(place.trainer(TRAINER))] == [0, 1]


def test_what_fails_on_rank_0_ends_all_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    def act() -> str:
        dist.init_process_group("gloo")

        def fail() -> None:
            raise ValueError("told once")

        try:
            on_first_rank(lambda: None)
            on_first_rank(fail)
        except FailedElsewhere as error:
            return f"relayed: {error}"
        except ValueError as error:
            return str(error)
        return "nothing"

    first, second = on_ranks(2, act)
    assert first == "told once"
    assert second == "relayed: rank 0: ValueError('told once')"


def test_more_ranks_than_samples_are_refused_in_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = ["train", "777", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu"]
    assert main(command) == 1
    assert "3 processes share a batch of 2" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(command) == 1
    assert capsys.readouterr().err == ""  # told by the first process of this computer


def torchrun(place: Place, *launches: Sequence[str]) -> None:
    """`nnssl train` to its end, under torchrun started with each of these options, all at once."""
    command = ["-m", "nnssl.commands.cli", "train", "777", "3d_fullres", "0", "-tr", TRAINER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    logs = [place.results.parent / f"node_{i}" for i in range(len(launches))]
    with contextlib.ExitStack() as stack:
        nodes = []
        for options, log in zip(launches, logs, strict=True):
            launcher = [sys.executable, "-m", "torch.distributed.run", *options, *command, "-device", "cpu"]
            out = stack.enter_context(open(log, "w"))
            nodes.append(
                stack.enter_context(subprocess.Popen(launcher, env=environment, stdout=out, stderr=out))
            )
        try:
            for node, log in zip(nodes, logs, strict=True):
                assert node.wait(900) == 0, log.read_text(encoding="utf-8")[-3000:]
        finally:
            for node in nodes:
                node.terminate()  # which ends its ranks
    fold = place.results / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists() and not (fold / NAME).exists()
    assert (fold / "validation" / "summary.json").exists()
    assert [row["epoch"] for row in losses(place.trainer(TRAINER))] == [0, 1]


@pytest.mark.nightly
def test_torchrun_trains_and_validates_on_two_ranks(place: Place) -> None:
    torchrun(place, ["--standalone", "--nproc_per_node", "2"])


@pytest.mark.nightly
def test_torchrun_trains_and_validates_on_two_nodes(place: Place) -> None:
    """A launcher per node, both on this computer."""
    meeting = f"localhost:{free_port()}"
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7", "--rdzv_backend", "c10d"]
    torchrun(place, *[[*nodes, "--rdzv_endpoint", meeting]] * 2)


def train_until(trainer: str, epoch: int | None) -> dict[str, Any]:
    """`nnssl train` until before this epoch, as if interrupted there, or to the end of the training; what the
    method's state was in the beginning and in the end. For a process of its own."""
    states: dict[str, Any] = {}
    begin, go_on = SemiTrainer.on_train_start, SemiTrainer.on_epoch_start

    def state(self: SemiTrainer) -> dict[str, Any]:
        return {k: np.array(v) for k, v in self.method.state_dict().items()}

    def on_train_start(self: SemiTrainer) -> None:
        begin(self)
        states["start"] = state(self)

    def on_epoch_start(self: SemiTrainer) -> None:
        if self.current_epoch == epoch:
            states["end"] = state(self)
            raise KeyboardInterrupt
        go_on(self)

    def perform_actual_validation(self: SemiTrainer, save_probabilities: bool) -> None:
        states["end"] = state(self)

    put(
        SemiTrainer,
        on_train_start=on_train_start,
        on_epoch_start=on_epoch_start,
        perform_actual_validation=perform_actual_validation,
    )
    resume = ["--c"] if epoch != 1 else []
    assert main(["train", "777", "3d_fullres", "0", "-tr", trainer, "-device", "cpu", *resume]) == (
        130 if epoch else 0
    )
    return states


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["DiffCL", "CAML", "ACTION", "Semi", "FilterMatch"])
@forks
def test_a_training_moves_to_two_ranks_and_back_with_its_banks(place: Place, name: str) -> None:
    small = {
        "DiffCL": SMALL,
        "CAML": {"embedding": 8, "rows": 16, "queries": 64},
        "FilterMatch": {"filter_every": 1.0},  # no choice among the scans in so short a training
        "Semi": {"threshold": 0.9, "adaptive_thresholds": True},  # what its buffers are for
    }
    place.plan(**{**SHORT, "num_epochs": 3, **small})
    trainer = f"nnUNetTrainer{name}"
    first, *both, last = (
        state
        for epoch, number in ((1, 1), (2, 2), (None, 1))
        for state in on_ranks(number, partial(train_until, trainer, epoch))
    )
    for before, after in [*((first, rank) for rank in both), *((rank, last) for rank in both)]:
        for key, value in before["end"].items():
            np.testing.assert_array_equal(after["start"][key], value, err_msg=key)
    kept = [
        key
        for key in first["end"]
        if key.split(".")[0] in ("bank", "distillation_global", "observed", "seen")
    ]
    assert kept and any((last["end"][key] != first["end"][key]).any() for key in kept)
    fold = place.results / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists()
    assert [row["epoch"] for row in losses(place.trainer(trainer))] == [0, 1, 2]


LAUNCHER = """
import sys
from nnssl.commands import cli, train
if __name__ == "__main__":  # what -num_gpus does, on CPU
    train.check_names = lambda args: ("Dataset777_Tiny", {})
    train._inspect = train.check_data = lambda *args: None
    command = ["train", "777", "3d_fullres", sys.argv[1], "-tr", "nnUNetTrainerMeanTeacher", "-device", "cpu"]
    sys.exit(cli.main([*command, "-num_gpus", "2"]))
"""


@pytest.mark.nightly
def test_an_error_of_the_ranks_of_num_gpus_is_one_line(place: Place) -> None:
    (place.results.parent / "launch.py").write_text(LAUNCHER)
    command = [sys.executable, "-W", "ignore", str(place.results.parent / "launch.py"), "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Choose fold 0" in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_ranks_of_num_gpus_end_with_their_launcher(place: Place, number: int, status: int) -> None:
    place.plan(**{**SHORT, "num_epochs": 1000}, DiffCL=SMALL)
    (place.results.parent / "launch.py").write_text(LAUNCHER)
    command = [sys.executable, "-W", "ignore", str(place.results.parent / "launch.py"), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    errors, deadline = place.results.parent / "errors", time.monotonic() + 600
    with open(errors, "w") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
    fold = place.results / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
    while not (fold / "losses.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline, errors.read_text(encoding="utf-8")
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(300) == status
    assert ended(process.pid, deadline), "a rank is left"
    lines = errors.read_text(encoding="utf-8").splitlines()
    assert ["stopped in epoch" in line for line in lines if line and "it/s" not in line] == [True], lines
    assert not (fold / NAME).exists()
