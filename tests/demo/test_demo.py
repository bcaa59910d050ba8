from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnssl.commands.trainers import trainers_folder
from nnssl.demo import __main__ as demo
from nnssl.files import read_json

SETTINGS = {"seed": 0, "trainer": "nnUNetTrainerSemi", "epochs": 1}
FLOOR = 0.70  # mean Dice; docs/getting-started.md has what was measured


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_with_other_things_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine").write_text("data")
    for flags in ([], ["--fresh"]):
        assert demo.main(["--folder", str(tmp_path), *flags]) == 1
        assert "not empty and not a demo's folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"raw/mine": b"data"}


def test_other_settings_are_refused_until_fresh_which_removes_only_what_a_demo_wrote(tmp_path: Path) -> None:
    first = demo.Demo(tmp_path, SETTINGS)
    first.done.append("generate")
    first._save()
    (tmp_path / "raw" / "scan").touch()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a demo with .*'seed': 0.* --fresh"):
        demo.Demo(tmp_path, {**SETTINGS, "seed": 1})
    assert demo.Demo(tmp_path, SETTINGS).done == ["generate"]
    assert demo.Demo(tmp_path, {**SETTINGS, "seed": 1}, fresh=True).done == []
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not list((tmp_path / "raw").iterdir())


def test_commands_see_the_demo_folder_and_nothing_of_the_users_nnunet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", "/somewhere/results")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("UNRELATED", "kept")
    environment = demo.Demo(tmp_path, SETTINGS).environment()
    assert environment["nnUNet_results"] == str(tmp_path / "results")
    assert environment["nnUNet_extTrainer"] == trainers_folder()
    assert environment["UNRELATED"] == "kept"
    assert "nnUNet_wandb_enabled" not in environment
    assert os.environ["nnUNet_results"] == "/somewhere/results"


def test_a_failing_command_is_reported_with_its_last_lines_and_log(tmp_path: Path) -> None:
    running = demo.Demo(tmp_path, SETTINGS)
    with pytest.raises(
        RuntimeError, match=r"nnssl failed with status 2.*logs/plan\.log[\s\S]*invalid choice: 'nonsense'"
    ):
        running.commands({"plan": ["nnssl", "nonsense"]})
    assert "nonsense" in (tmp_path / "logs" / "plan.log").read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="absent_command is not installed"):
        running.commands({"plan": ["absent_command"]})


def test_finished_stages_are_skipped_and_a_failed_one_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    fails = ["train"]

    def stub(name: str) -> None:
        def stage(self: demo.Demo) -> None:
            ran.append(name)
            if name in fails:
                raise RuntimeError("interrupted")

        stage.__name__ = name
        monkeypatch.setattr(demo.Demo, name, stage)

    for name in ("generate", "plan", "shorten", "train", "report", "say"):
        stub(name)
    assert demo.main(["--folder", str(tmp_path)]) == 1
    assert ran == ["generate", "plan", "shorten", "train"]
    ran.clear()
    fails.clear()
    assert demo.main(["--folder", str(tmp_path)]) == 0
    assert ran == ["train", "report", "say"]
    ran.clear()
    assert demo.main(["--folder", str(tmp_path)]) == 0
    assert ran == ["say"]


def test_epochs_are_counted_from_the_log_of_a_resumed_run_too(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("starts\n")
    assert demo.epochs_in(log) == 0
    log.write_text("Epoch 3 (4 of 8): supervised 0.1\nEpoch 4 (5 of 8): supervised 0.1\nEpo")
    assert demo.epochs_in(log) == 5


@pytest.mark.slow
def test_the_whole_demo_runs_and_touches_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users = tmp_path / "users"
    for name in ("raw", "preprocessed", "results"):
        (users / name).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(users / name))
    monkeypatch.setattr(demo, "SCANS", {"labeled": 3, "validation": 2, "unlabeled": 2})
    monkeypatch.setattr(
        demo, "SCHEDULE", {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every": 1}
    )
    monkeypatch.setattr(demo, "FEATURES", 4)
    folder = tmp_path / "demo"
    assert demo.main(["--folder", str(folder), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Dice on 2 validation scans" in printed and str(folder / "report" / "report.html") in printed
    assert all(f"  {trainer} " in printed for trainer in (demo.BASELINE, SETTINGS["trainer"]))
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "Semi against Supervised: mean Dice" in page
    assert (folder / "report" / "report_dice.png").read_bytes().startswith(b"\x89PNG")
    plans = read_json(folder / "preprocessed" / demo.DATASET / "nnUNetPlans.json")
    assert plans["nnssl"]["num_epochs"] == 1
    assert not contents(users)
    before = contents(folder)
    assert demo.main(["--folder", str(folder), "--epochs", "1"]) == 0
    assert contents(folder) == before


@pytest.mark.nightly
@pytest.mark.parametrize("trainer", ["nnUNetTrainerSemi", "nnUNetTrainerDiffCL"])
def test_the_phantoms_are_learned(tmp_path: Path, trainer: str) -> None:
    assert demo.main(["--folder", str(tmp_path / "demo"), "--trainer", trainer]) == 0
    settings = {**SETTINGS, "trainer": trainer, "epochs": demo.EPOCHS}
    dice = demo.Demo(tmp_path / "demo", settings).dice()[trainer]
    assert sum(dice.values()) / len(dice) > FLOOR, dice
