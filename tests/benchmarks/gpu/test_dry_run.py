"""`--dry-run` in a process of its own, as a person would start it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.leaderboard.prepare import BASE_PLAN, ROOT


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "14", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def rows(work: Path) -> dict[str, dict[str, Any]]:
    return json.loads((work / "results" / "gpu.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
def test_one_trainer_on_a_planned_dataset(planned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(planned, folder)
    preprocessed = folder / "preprocessed" / "Dataset777_Tiny"
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    (preprocessed / f"{BASE_PLAN}.json").write_text(json.dumps(plans))
    cases = [f"lab_{i:02d}" for i in range(6)]
    fold = {"train": cases[:3], "unlabeled": cases[3:5], "val": cases[5:]}
    (preprocessed / "splits_final.json").write_text(json.dumps([fold]))
    (folder / "prepared.json").write_text("{}")
    where = ["--work", str(tmp_path), "--data", str(planned / "raw"), "--dataset", "Dataset777_Tiny"]
    chosen = ["--only", "machine", "smoke-float16", "steps", "mixer", "--trainers", "Semi"]
    ended = dry_run(*where, *chosen)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = rows(tmp_path)
    assert {row["status"] for row in found.values()} == {"finished"} and len(found) == 4
    smoke, steps = found["smoke, float16: Semi"], found["steps: Semi"]
    assert smoke["epoch"] == 1 and smoke["resumed"]["epoch"] == 2
    assert smoke["terms"].keys() == smoke["resumed"]["terms"].keys() and len(smoke["terms"]) > 1
    assert steps["step_seconds"] > 0 and steps["peak_resident_mib"] > 100
    assert 1 < steps["predicted_peak_mib"] < steps["peak_resident_mib"]
    assert any("conv" in operation for operation in steps["profile"])
    assert not list((folder / "results").rglob("*.pth"))  # several hundred MB each on a GPU
    text = (tmp_path / "results" / "gpu.md").read_text(encoding="utf-8")
    assert "1 of 1 finished" in text and text in ended.stdout


@pytest.mark.nightly
def test_everything(tmp_path: Path) -> None:
    ended = dry_run("--work", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = rows(tmp_path)
    assert all(row["status"] == "finished" for row in found.values())
    assert sum(name.startswith("smoke, float16: ") for name in found) == 14
    assert found["train: DiffCL_n1_s0"]["dice"] is not None
    again = dry_run("--work", str(tmp_path))
    assert again.returncode == 0 and rows(tmp_path) == found
