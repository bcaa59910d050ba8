"""The whole harness on phantoms, killed twice on its way, against an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.leaderboard.prepare import ROOT
from benchmarks.leaderboard.suite import load_suite
from nnssl.demo.phantoms import write_dataset

METHODS = ("self_training", "DiffCL")
MEASURED = {
    "cpu_seconds",
    "train_seconds",
    "seconds",
    "peak_memory_mb",
    "commit",
}  # what may differ between two runs


def start(folder: Path, *only: str) -> subprocess.Popen[bytes]:
    """The runner, in a process group of its own so that it can be killed alone."""
    paths = [
        "--data",
        str(folder.parent / "data"),
        "--work",
        str(folder / "work"),
        "--results",
        str(folder / "results"),
    ]
    command = [
        sys.executable,
        "-m",
        "benchmarks.leaderboard",
        "run",
        "smoke",
        *paths,
        "--only",
        *(only or METHODS),
    ]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def wait_for(what: Callable[[], Any], runner: subprocess.Popen[bytes]) -> Any:
    end = time.monotonic() + 600
    while not (found := what()):
        assert runner.poll() is None, "the runner ended early"
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def processes(*words: str) -> list[int]:
    """Running processes whose command line has all words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:  # gone meanwhile
                continue
            if all(word in command for word in words):
                found.append(int(entry.name))
    return found


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    found = {
        p.stem: json.loads(p.read_text(encoding="utf-8"))
        for p in sorted((folder / "results" / "smoke").glob("*.json"))
    }
    return {name: {k: v for k, v in row.items() if k not in MEASURED} for name, row in found.items()}


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the jobs' processes in /proc")
def test_killing_runner_and_job_changes_no_number(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "Dataset900_Phantoms", labeled=6, unlabeled=0, test=0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert start(whole).wait(1500) == 0

    results = broken / "work" / "smoke" / "results"
    # the trainer's process, in round one of self-training, after its first checkpoint
    runner = start(broken, "self_training")
    wait_for(lambda: list(results.glob("*/*_r1__*/fold_0/checkpoint_latest.pth")), runner)
    for pid in wait_for(lambda: processes("nnssl.commands.launch", str(broken), "nnUNetv2_train"), runner):
        os.kill(pid, signal.SIGKILL)
    assert runner.wait(600) == 1
    assert (
        json.loads((broken / "results" / "smoke" / "self_training_n1_s0.json").read_text(encoding="utf-8"))[
            "status"
        ]
        == "failed"
    )

    # then the runner and the job's processes, in the training of Diff-CL; the first row is finished by then
    runner = start(broken)
    wait_for(lambda: list(results.glob("*/nnUNetTrainerDiffCL__*/fold_0/checkpoint_latest.pth")), runner)
    finished = broken / "results" / "smoke" / "self_training_n1_s0.json"
    stamp = finished.stat().st_mtime_ns
    runner.kill()
    runner.wait()
    for pid in processes("submitit", str(broken)):
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while processes("nnssl.commands.launch", str(broken)):  # they end with the job that launched them
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (broken / "results" / "smoke" / "DiffCL_n1_s0.json").exists()

    assert start(broken).wait(1500) == 0
    assert finished.stat().st_mtime_ns == stamp
    assert rows(broken) == rows(whole)
    for file in finished.parent.glob("*.json"):
        row = json.loads(file.read_text(encoding="utf-8"))
        assert row["seconds"] > row["train_seconds"] >= 0
    assert {row["status"] for row in rows(broken).values()} == {"finished"}
    assert len(rows(broken)) == len(METHODS)
    log = next((broken / "work" / "smoke" / "logs").glob("DiffCL*.log")).read_text(encoding="utf-8")
    assert log.count("nnUNetv2_train 900") == 2
    assert log.count("Epoch 0") == 1  # the second start went on

    for file in (*finished.parent.glob("*.json"), *(whole / "results" / "smoke").glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))  # processor time stands in the tables, too
        file.write_text(json.dumps({**row, **dict.fromkeys(MEASURED - {"commit"}, 1)}), encoding="utf-8")
    report = [sys.executable, "-m", "benchmarks.leaderboard", "report", "smoke", "--results"]
    for folder in (whole, broken):
        subprocess.run([*report, str(folder / "results")], cwd=ROOT, check=True, capture_output=True)
    for suffix in (".csv", ".json", "_bars.png", "_budgets.svg", "_curves.svg", "_overlay.png"):
        name = f"{load_suite('smoke').name}{suffix}"
        assert (whole / "results" / name).read_bytes() == (broken / "results" / name).read_bytes()
