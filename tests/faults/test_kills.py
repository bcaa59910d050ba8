"""Commands that were killed at random points and are run again leave what a run that was never killed
leaves, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def kill_and_rerun(folder: Path, kills: int, seed: int, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.kills", str(folder), "--kills", str(kills)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--seed", str(seed), *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_six_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    report = kill_and_rerun(tmp_path, 6, 1, "--at-once", "plan", "export")
    assert not report["failures"] and report["kills"] >= 6
    assert set(report["by_command"]) == {"plan", "train", "validation", "export"}
    assert report["at_once"]["plan"] == [0, 0]  # they share the work


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_sixty_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    report = kill_and_rerun(tmp_path, 60, 0)
    assert not report["failures"] and report["kills"] >= 60
    assert report["at_once"]["train"] == [0, 1]  # one of the two is refused


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_runs_that_were_asked_to_end_are_resumed(tmp_path: Path) -> None:
    report = kill_and_rerun(tmp_path, 20, 2, "--sigterm")
    assert not report["failures"] and report["kills"] >= 20
