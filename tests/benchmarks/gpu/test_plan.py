from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import MINUTES, main
from benchmarks.gpu.plan import COMPARED, DATASETS, TRAINED, pieces, suites
from benchmarks.gpu.report import SECTIONS, report
from nnssl.commands.trainers import list_trainers, trainers_folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw" / DATASETS[1]
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text("{}")
    return folder.parent


def test_every_trainer_is_in_the_plan_in_both_precisions_compiled_and_not(raw: Path) -> None:
    found = {piece.name: piece for piece in pieces(*suites(raw, None, False), False)}
    trainers = {"nnUNetTrainer", *list_trainers(trainers_folder())}
    for name in ("smoke-float16", "smoke-float16-compiled", "steps"):
        assert {task.arguments["trainer"] for task in found[name].tasks} == trainers
    for name in ("smoke-bfloat16", "smoke-bfloat16-compiled"):
        assert {task.arguments["trainer"] for task in found[name].tasks} == trainers - {"nnUNetTrainer"}
    assert {task.arguments["batch_size"] for task in found["steps-batch"].tasks} == {4, 8}
    assert list(found)[:2] == ["machine", "smoke-float16"]


@pytest.mark.parametrize("dry", [False, True])
def test_tasks_have_names_of_their_own_and_measurements_that_exist(raw: Path, dry: bool) -> None:
    every = pieces(*suites(raw, None, dry), dry)
    tasks = [task for piece in every for task in piece.tasks]
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert callable(pkgutil.resolve_name(task.kind))
        assert task.seconds <= 60 * MINUTES
        assert task.name == "machine" or task.kind.rpartition(":")[2] in SECTIONS


def test_trainings_are_those_of_the_official_suite_with_8_labels(raw: Path) -> None:
    short, official = suites(raw, None, False)
    assert [row.name for row in official.rows()] == [
        f"{method.removeprefix('nnUNetTrainer')}_n8_s0" for method in TRAINED
    ]
    assert official.iterations == 15_000 and official.device == "cuda"
    assert short.iterations < official.iterations
    assert {row.fingerprint for row in short.rows()}.isdisjoint(row.fingerprint for row in official.rows())


def test_trainers_may_be_chosen(raw: Path) -> None:
    found = pieces(*suites(raw, None, False), False, ["Semi", "nnUNetTrainerCAML"])
    tasks = {piece.name: [task.name for task in piece.tasks] for piece in found}
    assert tasks["smoke-float16"] == ["smoke, float16: Semi", "smoke, float16: CAML"]
    assert tasks["train"] == ["train: Semi_n8_s0", "train: CAML_n8_s0"]
    with pytest.raises(ValueError, match="--trainers nnUNetTrainerSemmi: no such trainer"):
        pieces(*suites(raw, None, False), False, ["Semmi"])


def test_wrong_calls_say_what_is_missing(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    for arguments, message in (
        ([], "--data is missing"),
        (["--data", str(tmp_path)], f"{tmp_path} has no {DATASETS[0]} or {DATASETS[1]}"),
        (["--data", str(raw), "--dataset", "Dataset001_X"], f"has no Dataset001_X (found: {DATASETS[1]})"),
        (
            ["--data", str(raw), "--only", "smoke"],
            "--only smoke: no such piece. Pieces: machine, smoke-float16",
        ),
        (["--data", str(raw)], "no CUDA device is available; --dry-run"),
    ):
        assert main([*where, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_list_prints_the_plan_and_what_is_done(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"rows": {"machine": {"status": "finished"}, "smoke, float16: Semi": {"status": "failed"}}}
    (tmp_path / "gpu.json").write_text(json.dumps(done))
    assert main(["--data", str(raw), "--results", str(tmp_path), "--list"]) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["machine"] == "1/1" and lines["smoke-float16"].startswith("1/")


def test_report_has_a_table_per_piece_and_failures_at_the_end(raw: Path) -> None:
    every = pieces(*suites(raw, None, False), False)
    tasks = {task.name: task for piece in every for task in piece.tasks}
    rows: dict[str, dict[str, Any]] = {name: {"status": "finished"} for name in tasks}
    rows["steps: stock nnU-Net"] = {"status": "finished", "batch_size": 2, "step_seconds": 0.1}
    rows["steps: Semi"] = {"status": "finished", "batch_size": 2, "step_seconds": 0.25, "host_reads": ["a:1"]}
    rows["smoke, float16: CAML"] = {"status": "failed", "traceback": "Traceback\nRuntimeError: planted"}
    rows["train: Semi_n8_s0"] = {"status": "unfinished", "progress": {"epoch": 3, "epochs": 20}}
    text = report(every, rows)
    assert "| Semi | finished | 2 | 250 |  | 2.5 |  |  |  | 1 |" in text
    assert "| Semi_n8_s0 | unfinished | 3 of 20 |" in text
    assert text.index("## What failed") > text.index("## train-official")
    assert "smoke, float16: CAML: failed\n\n```text\nTraceback\nRuntimeError: planted" in text
    assert set(COMPARED) <= {line.split(" | ")[0].strip("| ") for line in text.splitlines()}
