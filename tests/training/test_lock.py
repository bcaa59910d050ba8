from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnssl.files import host_id
from nnssl.training import lock as module
from nnssl.training.lock import NAME, TrainingLock, own_process, started


@pytest.fixture
def other() -> Iterator[int]:
    """Another process of this computer."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process.pid
        process.kill()


def write(folder: Path, **content: Any) -> None:
    (folder / NAME).write_text(json.dumps({**own_process(), "token": "theirs", **content}))


def lock(folder: Path) -> TrainingLock:
    return TrainingLock(str(folder))


def test_a_running_process_is_named_and_its_lock_kept(tmp_path: Path, other: int) -> None:
    write(tmp_path, pid=other, started=started(other), command="nnUNetv2_train 501 2d 0")
    with pytest.raises(
        RuntimeError, match=rf"process {other} on .* trains in this folder \(nnUNetv2_train 501"
    ):
        lock(tmp_path).acquire()
    assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["pid"] == other


@pytest.mark.parametrize(
    "left",
    [
        {"pid": 2**22 + 1},  # no such process
        {"started": "another boot 1"},  # the number was given to another process
        {"token": "x", "pid": "damaged"},
        {"space": "elsewhere", "job": ["77", 0]},  # SLURM started the job anew
    ],
)
def test_what_a_dead_process_left_is_removed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: dict[str, Any], other: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr("nnssl.training.lock.time.sleep", lambda seconds: None)
    write(tmp_path, **{"pid": other, **left})
    said: list[str] = []
    mine = lock(tmp_path)
    mine.acquire(said.append)
    assert said[0].startswith(f"Removed {tmp_path / NAME}: process ")
    assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["pid"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_training_of_the_same_process_is_over(tmp_path: Path) -> None:
    first, second = lock(tmp_path), lock(tmp_path)
    first.acquire()
    second.acquire(pytest.fail)
    first.release()
    assert (tmp_path / NAME).exists()
    second.release()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lives", [True, False])
def test_another_computer_is_given_time_for_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    write(tmp_path, space="elsewhere", host="node7")
    assert "node7" in lock(tmp_path).try_acquire()  # a validation does not wait
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    sleep = time.sleep

    def touched(seconds: float) -> None:
        sleep(seconds)
        if lives and seconds:
            os.utime(tmp_path / NAME)

    monkeypatch.setattr("nnssl.training.lock.time.sleep", touched)
    said: list[str] = []
    mine = lock(tmp_path)
    if lives:
        with pytest.raises(RuntimeError, match="on node7 trains in this folder"):
            mine.acquire(said.append)
    else:
        mine.acquire(said.append)
        mine.release()
    assert "waiting up to" in said[0]


def test_an_old_lock_of_another_computer_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, space="elsewhere", host="node7")
    os.utime(tmp_path / NAME, (0, 0))
    said: list[str] = []
    mine = lock(tmp_path)
    mine.acquire(said.append)
    assert len(said) == 1 and "node7 is gone" in said[0]
    mine.release()


def test_signs_of_life_and_a_training_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.02)
    mine = lock(tmp_path)
    mine.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    patience = time.monotonic() + 20
    while os.path.getmtime(tmp_path / NAME) == 0 and time.monotonic() < patience:
        time.sleep(0.01)
    assert os.path.getmtime(tmp_path / NAME) > 0
    (tmp_path / NAME).unlink()  # by mistake
    while not ((tmp_path / NAME).exists() and (tmp_path / NAME).read_text()) and time.monotonic() < patience:
        time.sleep(0.01)
    mine.verify()
    write(tmp_path, pid=12, host="node8")
    while not mine.lost and time.monotonic() < patience:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="process 12 on node8 took this training over"):
        mine.verify()
    mine.release()
    assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["host"] == "node8"


def test_two_processes_at_once_do_not_both_train(tmp_path: Path) -> None:
    """Ten processes find the lock of a dead one: exactly one gets it."""
    write(tmp_path, pid=2**22 + 1)
    code = (
        "import sys, time; from nnssl.training.lock import TrainingLock; lock = TrainingLock(sys.argv[1])\n"
        "try:\n lock.acquire(); print('trains', flush=True); sys.stdin.read()\n"
        "except RuntimeError: print('refused', flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    processes = [subprocess.Popen(command, **pipes) for _ in range(10)]
    said = []
    for process in processes:
        assert process.stdout
        line = process.stdout.readline()
        said += [process.stdout.readline() if line.startswith("Removed") else line]
    for process in processes:
        process.communicate()
    assert sorted(said) == ["refused\n"] * 9 + ["trains\n"]
    assert not list(tmp_path.glob("*turn"))


def test_a_killed_process_is_dead_even_before_its_parent_notices() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert started(process.pid)
        process.send_signal(signal.SIGKILL)
        patience = time.monotonic() + 10
        while started(process.pid) and time.monotonic() < patience:
            time.sleep(0.01)
        assert started(process.pid) is None
    assert host_id() == own_process()["space"]
