from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.leaderboard import job, prepare, run
from benchmarks.leaderboard.__main__ import key_value, main
from benchmarks.leaderboard.job import Job
from benchmarks.leaderboard.predict import predict_in_bfloat16
from benchmarks.leaderboard.suite import Row, Suite, SuiteError, load_suite
from nnssl.files import write_json

HOLD = """import pathlib, sys, time
from benchmarks.leaderboard.prepare import lock
with lock(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)"""


def row_file(job: Job, status: str, fingerprint: str | None = None) -> None:
    job.write({**job.identity(status), "fingerprint": fingerprint or job.row.fingerprint, "dice": 0.5})


class Process:
    """submitit's job as the runner sees it: done at once, with the outcome of a stub."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.paths = type("Paths", (), {"stdout": Path("nowhere")})

    def done(self) -> bool:
        return True

    def result(self) -> str:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self, check: bool = True) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows that were submitted, in order; each is finished at once, DiffCL's process dies."""
    ran: list[str] = []

    class Executor:
        def submit(self, function: Any, suite: Suite, row: Row, work: Path, results: Path) -> Process:
            ran.append(row.name)
            if row.method == "DiffCL":
                return Process(RuntimeError("killed"))
            row_file(Job(suite, row, work, results), "finished")
            return Process("finished")

    monkeypatch.setattr(run, "executor", lambda *_: Executor())
    monkeypatch.setattr(run, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(prepare.Workspace, "prepare", lambda *_: None)
    return ran


def go(folder: Path, *only: str, minutes: float | None = None) -> int:
    return run.run_suite(
        load_suite("smoke"), folder, folder / "work", folder / "results", only, jobs=2, minutes=minutes
    )


def test_every_row_is_run_once_and_finished_ones_never_again(tmp_path: Path, stub: list[str]) -> None:
    assert go(tmp_path, "supervised", "self_training") == 0
    assert sorted(stub) == ["self_training_n1_s0", "supervised_n1_s0"]
    assert go(tmp_path, "supervised*", "self_training") == 0
    assert stub[2:] == ["supervised_all_all_s0"]


def starting() -> Suite:
    """The smoke suite with FixMatch from the supervised network, listed before it."""
    own = {"nnUNetTrainerFixMatch": {"start": "supervised"}}
    return dataclasses.replace(
        load_suite("smoke"), methods=["nnUNetTrainerFixMatch", "supervised"], method=own
    )


def test_a_row_waits_for_the_one_that_it_starts_from(tmp_path: Path, stub: list[str]) -> None:
    assert run.run_suite(starting(), tmp_path, tmp_path / "work", tmp_path / "results", jobs=4) == 0
    assert stub == ["supervised_n1_s0", "FixMatch_n1_s0"]


def test_a_row_starts_from_the_last_checkpoint_and_resumes_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = starting()
    one = Job(suite, next(r for r in suite.rows() if r.start), tmp_path, tmp_path / "results")
    source = one.source()
    assert source is not None
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(Job, "nnunet", lambda self, space, *command: commands.append(command))
    monkeypatch.setattr(prepare.Workspace, "write_plans", lambda *_: None)
    train = lambda: one.train(one.space, one.plans, one.row.settings)  # noqa: E731
    with pytest.raises(RuntimeError, match="starts from row supervised_n1_s0, which has no finished"):
        train()
    row_file(source, "finished")
    source.folder().mkdir(parents=True)
    (source.folder() / "checkpoint_final.pth").touch()
    folder = train()
    assert commands[-1][-2:] == ("-pretrained_weights", str(source.folder() / "checkpoint_final.pth"))
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").touch()
    train()
    assert commands[-1][-1] == "--c" and "-pretrained_weights" not in commands[-1]


def test_progress_names_the_epochs_of_rows_that_go_on_after_others_ended(
    tmp_path: Path, stub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = iter(range(1, 40))

    class Slow(Process):
        def done(self) -> bool:
            return next(epochs) > 30

    class Executor:
        def submit(self, function: Any, suite: Suite, row: Row, work: Path, results: Path) -> Process:
            row_file(Job(suite, row, work, results), "finished")
            return Process("finished") if row.method == "supervised" else Slow("finished")

    monkeypatch.setattr(run, "executor", lambda *_: Executor())
    monkeypatch.setattr(run, "epoch", lambda job: str(next(epochs)))
    monkeypatch.setattr(run, "QUIET_SECONDS", 0.0)
    assert go(tmp_path, "supervised", "self_training") == 0
    shown = capsys.readouterr().err
    assert sum(f"self_training_n1_s0 {k}/" in shown for k in range(31)) > 5


def test_a_process_that_dies_leaves_a_failed_row_which_the_next_run_tries_again(
    tmp_path: Path, stub: list[str]
) -> None:
    assert go(tmp_path, "DiffCL") == 1
    row = json.loads((tmp_path / "results" / "smoke" / "DiffCL_n1_s0.json").read_text(encoding="utf-8"))
    assert row["status"] == "failed"
    assert row["dice"] is None
    assert "the process ended without a result (RuntimeError)" in row["error"]
    assert go(tmp_path, "DiffCL") == 1
    assert stub == ["DiffCL_n1_s0"] * 2


def test_a_row_that_another_process_works_on_is_waited_for_and_not_run_twice(
    tmp_path: Path, stub: list[str]
) -> None:
    suite = load_suite("smoke")
    held = Job(suite, suite.rows()[0], tmp_path / "work", tmp_path / "results")
    held.lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held.lock)], cwd=prepare.ROOT, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert json.loads(held.lock.read_text(encoding="utf-8"))["pid"] == other.pid
        assert held.run() == "busy"
        assert go(tmp_path, "supervised", minutes=0.01) == 1
        assert stub == []
        other.kill()  # SIGKILL: nothing is tidied up
    assert go(tmp_path, "supervised") == 0
    assert stub == ["supervised_n1_s0"]


def test_rows_of_other_settings_unknown_trainers_and_patterns_stop_the_run_before_it_starts(
    tmp_path: Path, stub: list[str]
) -> None:
    suite = load_suite("smoke")
    row_file(Job(suite, suite.rows()[0], tmp_path / "work", tmp_path / "results"), "finished", "of before")
    with pytest.raises(SuiteError, match=r"other settings .*supervised_n1_s0\.json"):
        go(tmp_path)
    with pytest.raises(SuiteError, match=r"no row matches DifCL. Rows: supervised_n1_s0, "):
        go(tmp_path, "DifCL")
    text = (prepare.ROOT / "benchmarks" / "leaderboard" / "suites" / "smoke.toml").read_text(encoding="utf-8")
    (tmp_path / "typo.toml").write_text(
        text.replace("nnUNetTrainerDiffCL", "nnUNetTrainerDifCL"), encoding="utf-8"
    )
    with pytest.raises(
        SuiteError, match=r"no trainer nnUNetTrainerDifCL; `nnssl trainers` lists .*nnUNetTrainerDiffCL"
    ):
        run.run_suite(
            load_suite(str(tmp_path / "typo.toml")), tmp_path, tmp_path / "work", tmp_path / "results"
        )
    assert stub == []


def test_a_missing_dataset_names_the_converter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--data",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path / "results"),
        "--only",
        "supervised",
    ]
    assert main(["run", "la_official", *arguments]) == 1
    assert "Dataset511_LA is no nnU-Net raw dataset" in (error := capsys.readouterr().err)
    assert "convert la_h5" in error


def test_slurm_parameters_are_numbers_where_they_look_like_numbers() -> None:
    assert dict(map(key_value, ["mem_gb=16", "slurm_partition=gpu", "timeout_min=600"])) == {
        "mem_gb": 16,
        "slurm_partition": "gpu",
        "timeout_min": 600,
    }


def test_folds_are_one_per_budget_and_one_with_all_labels() -> None:
    suite = load_suite("la_cpu")
    cases = [f"LA_{k:03d}" for k in range(1, 81)]
    two, four, every = prepare.folds(suite, cases)
    assert two["train"] == cases[:2]
    assert four["train"] == cases[:4]
    assert every["train"] == cases[:60]
    assert every["unlabeled"] == []
    assert two["unlabeled"] == cases[2:60]
    assert two["val"] == four["val"] == every["val"] == cases[60:]
    with pytest.raises(SuiteError, match=r"budgets .2, 4.: .* has 2 cases beside the 20"):
        prepare.folds(suite, cases[:22])


def test_a_suite_may_use_a_stretch_of_the_cases_only() -> None:
    suite = dataclasses.replace(load_suite("la_cpu"), cases=["LA_021", "LA_060"])
    cases = [f"LA_{k:03d}" for k in range(1, 81)]
    two, *_ = prepare.folds(suite, cases)
    assert two == {"train": cases[20:22], "unlabeled": cases[22:40], "val": cases[40:60]}
    with pytest.raises(SuiteError, match="no case LA_021 in Dataset501_LeftAtrium"):
        prepare.folds(suite, cases[30:])


def plans() -> dict[str, Any]:
    network = {"features_per_stage": [32, 64, 128], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    return {
        "configurations": {
            "3d_fullres": {
                "batch_size": 2,
                "patch_size": [20, 40, 40],
                "architecture": {"arch_kwargs": network},
            }
        }
    }


def test_plan_edits_divide_features_and_refuse_a_patch_that_does_not_fit(tmp_path: Path) -> None:
    edited = prepare.edit_plan(plans(), load_suite("smoke"))["configurations"]["3d_fullres"]
    assert edited["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16]
    assert edited["patch_size"] == [16, 32, 32]
    text = (prepare.ROOT / "benchmarks" / "leaderboard" / "suites" / "smoke.toml").read_text(encoding="utf-8")
    (tmp_path / "odd.toml").write_text(text.replace("[16, 32, 32]", "[15, 32, 32]"), encoding="utf-8")
    with pytest.raises(SuiteError, match=r"patch_size \[15, 32, 32\] must be multiples of \[2, 4, 4\]"):
        prepare.edit_plan(plans(), load_suite(str(tmp_path / "odd.toml")))


def test_a_work_folder_that_was_planned_at_another_spacing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "data" / "Dataset900_Phantoms"
    (source / "labelsTr").mkdir(parents=True)
    (source / "dataset.json").write_text('{"file_ending": ".nii.gz"}', encoding="utf-8")
    suite = dataclasses.replace(
        load_suite("smoke"), validation=1, budgets=[1], plan={"spacing": [2.0, 2.0, 2.0]}
    )
    for name in "abc":
        (source / "labelsTr" / f"{name}.nii.gz").touch()

    def plan(space: prepare.Workspace, *_: Any) -> None:
        write_json(plans(), space.preprocessed / f"{prepare.BASE_PLAN}.json")

    monkeypatch.setattr(prepare.Workspace, "nnssl", plan)
    for _ in range(2):
        prepare.Workspace(tmp_path / "work", suite).prepare(tmp_path / "data", 1)
    for other in ({"spacing": [2.5, 2.5, 2.5]}, {}):
        changed = dataclasses.replace(suite, plan=other)
        with pytest.raises(SuiteError, match=r"planned with \[plan\] spacing \[2.0, 2.0, 2.0\]"):
            prepare.Workspace(tmp_path / "work", changed).prepare(tmp_path / "data", 1)


def test_usage_survives_a_kill_in_the_middle_of_its_line(tmp_path: Path) -> None:
    assert job.usage(tmp_path / "none.jsonl") == []
    (tmp_path / "cut.jsonl").write_text('{"peak_memory_mb": 7}\n{"peak_mem', encoding="utf-8")
    assert job.usage(tmp_path / "cut.jsonl") == [{"peak_memory_mb": 7}]


def test_peaks_are_maxima_and_times_are_sums() -> None:
    used = [
        {"peak_memory_mb": 7, "cpu_seconds": 3},
        {"peak_memory_mb": 5, "cpu_seconds": 4},
        {"cpu_seconds": 1},
    ]
    assert job.summary(used) == {"peak_memory_mb": 7, "cpu_seconds": 8}


def test_self_training_halves_the_steps_and_draws_half_of_each_batch_from_the_labeled_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 labeled cases, 20 unlabeled: each labeled case stands four times in the list of round two."""
    suite = load_suite("hippocampus_bf16")
    row = next(r for r in suite.rows() if r.name == "self_training_n5_s0")
    one = Job(suite, row, tmp_path, tmp_path / "results")
    space, names = one.space, [f"h_{k:02d}" for k in range(28)]
    for part in ("imagesTr", "labelsTr"):
        (space.raw / part).mkdir(parents=True)
        for name in names:
            (space.raw / part / f"{name}{'_0000' * (part == 'imagesTr')}.nii.gz").write_text(
                f"{part} of {name}", encoding="utf-8"
            )
    (space.raw / "dataset.json").write_text('{"file_ending": ".nii.gz", "numTraining": 28}', encoding="utf-8")
    space.preprocessed.mkdir(parents=True)
    split = {"train": names[:5], "val": names[25:], "unlabeled": names[5:25]}
    (space.preprocessed / "splits_final.json").write_text(json.dumps([split]), encoding="utf-8")
    for name in ("nnUNetPlansBase", f"{one.plans}_r1", "dataset_fingerprint"):
        (space.preprocessed / f"{name}.json").write_text(json.dumps(plans()), encoding="utf-8")
    one.log.parent.mkdir()
    trained: list[tuple[Any, ...]] = []

    def train(
        space: Any, plans: str, settings: Any, fold: int | None = None, batch_size: int | None = None
    ) -> Path:
        trained.append((settings["num_epochs"], fold, batch_size))
        return tmp_path

    def predict(space: Any, entry: str, *command: str) -> None:
        assert (
            entry == "benchmarks.leaderboard.predict:predict_in_bfloat16"
        )  # this suite trains on a CPU in bfloat16
        source, target = (Path(command[command.index(flag) + 1]) for flag in ("-i", "-o"))
        assert sorted(p.name for p in source.iterdir()) == [f"{n}_0000.nii.gz" for n in split["unlabeled"]]
        target.mkdir()
        for name in split["unlabeled"]:
            (target / f"{name}.nii.gz").write_text(f"pseudo-label of {name}", encoding="utf-8")

    monkeypatch.setattr(one, "train", train)
    monkeypatch.setattr(one, "nnunet", predict)
    monkeypatch.setattr(prepare.Workspace, "preprocess", lambda *_: None)
    one.self_training()
    assert trained == [(one.epochs // 2, None, None), (one.epochs - one.epochs // 2, 0, 4)]
    second = tmp_path / suite.name / "self_training" / one.plans
    labels = {
        p.name[:4]: p.read_text(encoding="utf-8")
        for p in (second / "raw" / suite.dataset / "labelsTr").iterdir()
    }
    assert labels == {
        n: f"pseudo-label of {n}" if n in split["unlabeled"] else f"labelsTr of {n}" for n in names
    }
    train_list = json.loads(
        (second / "preprocessed" / suite.dataset / "splits_final.json").read_text(encoding="utf-8")
    )[0]["train"]
    assert {n: train_list.count(n) for n in set(train_list)} == {
        **dict.fromkeys(split["unlabeled"], 1),
        **dict.fromkeys(split["train"], 4),
    }
    one.self_training()  # again, as after a kill in round two: nothing is predicted or prepared anew
    assert len(trained) == 4


def test_a_prediction_in_bfloat16_is_nnunets_own_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []
    network = torch.nn.Conv3d(1, 2, 3)
    monkeypatch.setattr(
        "nnunetv2.inference.predict_from_raw_data.predict_entry_point",
        lambda: found.append(network(torch.zeros(1, 1, 4, 4, 4)).dtype),
    )
    predict_in_bfloat16()
    assert found == [torch.bfloat16]


def test_the_seconds_of_a_row_leave_out_the_time_between_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of 10 s by an earlier process, an hour of pause, an epoch of 20 s in the 50 s since this
    process began."""
    one = Job(load_suite("smoke"), load_suite("smoke").rows()[0], tmp_path, tmp_path / "results")
    starts, ends = [1000.0, 1012.0, 4605.0], [1010.0, 1022.0, 4625.0]
    log = {
        "epoch_start_timestamps": starts,
        "epoch_end_timestamps": ends,
        "train_losses": [1.0] * 3,
        "val_losses": [1.0] * 3,
    }
    checkpoint = {"logging": {**log, "mean_fg_dice": [0.5] * 3}, "nnssl": {"config": {}}}
    (tmp_path / "fold_0").mkdir()
    torch.save(checkpoint, tmp_path / "fold_0" / "checkpoint_final.pth")
    plan = plans()
    network = plan["configurations"]["3d_fullres"]["architecture"] | {"network_class_name": "a.PlainConvUNet"}
    plan["configurations"]["3d_fullres"] |= {
        "architecture": network,
        "spacing": [1, 1, 1],
        "normalization_schemes": ["ZScore"],
    }
    (tmp_path / "plans.json").write_text(json.dumps(plan), encoding="utf-8")
    monkeypatch.setattr(time, "time", lambda: 4650.0)
    for _ in range(2):
        one.note_commit()
    row = one.provenance(tmp_path / "fold_0", 4600.0)
    assert (row["train_seconds"], row["seconds"]) == (40, 70)
    head = subprocess.run(
        ["git", "-C", str(prepare.ROOT), "rev-parse", "HEAD"], capture_output=True, encoding="utf-8"
    ).stdout.strip()
    assert row["commit"].rstrip("+") == head


def test_rows_of_a_suite_that_asks_for_gradients_say_what_each_term_does(tmp_path: Path) -> None:
    suite = load_suite("smoke")
    rows = {row.name: row for row in suite.rows()}
    quiet = dataclasses.replace(rows["DiffCL_n1_s0"], settings={"num_epochs": 1})
    one, off = (Job(suite, r, tmp_path, tmp_path / "results") for r in (rows["DiffCL_n1_s0"], quiet))
    names = "loss/supervised,loss/pseudo,gradient/supervised,gradient/pseudo,weight/supervised,weight/pseudo"
    (tmp_path / "losses.csv").write_text(f"epoch,{names}\n0,1.5,3,3,1,1,0.5\n", encoding="utf-8")
    table = one.terms(tmp_path)["terms"]
    assert table["pseudo"] == {"value": [3.0] * 5, "weight": [0.5] * 5, "gradient": [0.3333] * 5}
    assert off.terms(tmp_path) == {}
    (tmp_path / "losses.csv").write_text(
        "epoch,loss/supervised,weight/supervised\n0,1.5,1\n", encoding="utf-8"
    )
    assert one.terms(tmp_path) == {}


def test_a_failing_command_is_a_failed_row_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite("smoke")
    one = Job(suite, suite.rows()[0], tmp_path, tmp_path / "results")
    one.log.parent.mkdir(parents=True)
    one.space.preprocessed.mkdir(parents=True)
    monkeypatch.setattr(prepare.Workspace, "write_plans", lambda *_: None)
    monkeypatch.setattr(
        job, "TRAIN", ("json:loads", "nnUNetv2_train")
    )  # a function that does not take these arguments
    assert one.run() == "failed"
    row = json.loads(one.result.read_text(encoding="utf-8"))
    assert row["status"] == "failed"
    assert row["error"].startswith("RuntimeError: nnUNetv2_train failed with status 1")
    assert any("TypeError" in line for line in row["log"])
