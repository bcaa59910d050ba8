from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from nnssl.commands import train
from nnssl.commands.cli import main
from nnssl.commands.trainers import trainers_folder
from nnssl.training.arguments import add_arguments
from nnssl.training.lookup import check_numbers, known_trainers, meant, trainer_paths
from tests.raw_dataset import Tiny, write_case

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["train", "777", "3d_fullres", "0", "-tr", "nnUNetTrainerMeanTeacher", "-device", "cpu"]


@pytest.fixture
def trains(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Folders that look preprocessed; no test may get as far as the training."""
    monkeypatch.setenv("nnUNet_extTrainer", "")
    monkeypatch.setattr("nnssl.commands.train._train", lambda args: pytest.fail("the training began"))
    tiny.labeled.mkdir()
    (tiny.labeled / "lab_00.pkl").touch()
    return tiny


def told(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 1) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("nnssl train: error: ")
    return captured.err


def changed(position: int, value: str) -> list[str]:
    return [*TRAIN[:position], value, *TRAIN[position + 1 :]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (changed(1, "778"), "no dataset 778 in nnUNet_raw="),
        (changed(1, "Dataset777_Tinny"), "Did you mean Dataset777_Tiny?"),
        (changed(2, "3d_fulres"), "Did you mean 3d_fullres?"),
        (changed(3, "5"), "fold 5: nnU-Net's own split has 0 to 4"),
        (changed(3, "one"), "fold one: expected a number or all"),
        (changed(5, "DifCL"), "Did you mean nnUNetTrainerDiffCL?"),
        (changed(5, "nnUNetTrainerMeanTeachr"), "Did you mean nnUNetTrainerMeanTeacher?"),
        (changed(7, "gpu"), "-device gpu: expected cuda, cpu or mps"),
        (
            [*TRAIN, "-p", "nnUNetPlannerResEncM"],
            "-p nnUNetPlannerResEncM is a planner, expected the name of",
        ),
        ([*TRAIN, "-p", "nnUNetPlan"], "Did you mean nnUNetPlans?"),
        ([*TRAIN, "--c", "--val"], "--c and --val exclude each other"),
        ([*TRAIN, "--c", "-pretrained_weights", "a.pth"], "--c and -pretrained_weights exclude each other"),
        ([*TRAIN, "-pretrained_weights", "a.pth"], "-pretrained_weights a.pth: no such file"),
        ([*TRAIN, "--val_best", "--disable_checkpointing"], "--val_best needs a checkpoint"),
        ([*TRAIN, "-num_gpus", "2"], "-num_gpus 2 needs -device cuda"),
        ([*TRAIN, "--val"], "--val: no checkpoint_final.pth in "),
        (changed(2, "2d"), "2d is not preprocessed: nothing in "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_the_remedy(
    trains: Tiny, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in told(capsys, arguments)
    assert not any((trains.preprocessed.parents[1] / "results").iterdir())


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named(
    trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.delenv(variable)
    assert f"{variable} is not set: export {variable}=" in told(capsys, TRAIN)


def test_a_home_folder_that_the_shell_did_not_expand_is_told(
    trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trains.raw)
    monkeypatch.setenv("nnUNet_results", "~/results")
    monkeypatch.setenv("HOME", str(trains.raw))
    assert "nnUNet_results=~/results: " in (said := told(capsys, TRAIN))
    assert f"export nnUNet_results={trains.raw / 'results'}" in said and not (trains.raw / "~").exists()


def test_a_variable_that_names_a_file_is_told(
    trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_results", str(trains.plans_file))
    assert f"nnUNet_results={trains.plans_file}: a file, expected a folder" in told(capsys, TRAIN)


@pytest.mark.parametrize(("variable", "value"), [("nnUNet_n_proc_DA", "two"), ("nnUNet_def_n_proc", "0")])
def test_a_variable_that_is_no_number_is_named(
    trains: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert f"{variable}={value}: expected a whole number" in told(capsys, TRAIN)
    monkeypatch.setenv(variable, "3")
    check_numbers()


def test_a_dataset_that_was_not_planned_is_sent_to_planning(
    trains: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    trains.plans_file.unlink()
    message = told(capsys, TRAIN)
    assert "Dataset777_Tiny is not planned" in message
    assert "Run nnssl plan-and-preprocess -d 777 -c 3d_fullres" in message


def test_a_fold_that_the_split_lacks_is_refused(trains: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "-d", "777", "--labeled", "1", "--val", "lab_05", "--first"]) == 0
    capsys.readouterr()
    assert "splits_final.json has 0 alone" in told(capsys, changed(3, "1"))


def test_no_gpu_is_told_with_another_device(
    trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "Use -device " in told(capsys, changed(7, "cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "-num_gpus 2: PyTorch finds 1" in told(capsys, [*changed(7, "cuda"), "-num_gpus", "2"])


def test_the_dataset_is_inspected_first_and_other_folds_do_not_matter(
    trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [f"lab_0{index}" for index in range(6)]
    folds = [{"train": cases[:5], "val": cases[5:]}, {"train": ["unknown"], "val": cases[:1]}]
    (trains.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    assert "fold 1, key train: unknown: no labeled case" in told(capsys, changed(3, "1"))
    begun: list[str] = []
    monkeypatch.setattr("nnssl.commands.train._train", lambda args: begun.append(args.fold))
    assert main(TRAIN) == 0
    assert main(changed(3, "all")) == 0
    assert main(changed(3, "00")) == 0
    assert begun == ["0", "all", "0"]
    write_case(trains.raw / "imagesUn", "lab_01", 1)
    capsys.readouterr()
    assert "lab_01" in told(capsys, TRAIN)


def test_a_bug_keeps_its_traceback(trains: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl.commands.train._train", lambda args: vars(args)["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(TRAIN)


def test_traceback_may_follow_the_options(trains: Tiny) -> None:
    with pytest.raises(ValueError, match="no such trainer"):
        main([*changed(5, "DifCL"), "--traceback"])


def test_our_trainers_are_found_beside_those_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("class nnUNetTrainerMine:\n    pass\n")
    (tmp_path / "broken.py").write_text("class nnUNetTrainerBroken(:\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), "/no/such/folder"]))
    assert trainer_paths() == [trainers_folder(), str(tmp_path)]
    assert {"nnUNetTrainerMine", "nnUNetTrainerDiffCL", "nnUNetTrainer_5epochs"} <= set(known_trainers())
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder() + os.sep)
    assert trainer_paths() == [trainers_folder() + os.sep]


def test_names_far_from_all_are_answered_with_a_list() -> None:
    assert meant("xyz", ["b", "a"]) == "There are a, b."
    assert meant("xyz", []) == "There are none."
    assert meant("q", [f"name{i:02d}" for i in range(23)]).endswith("name19 and 3 more.")


@pytest.mark.slow
def test_the_stock_command_tells_a_mistake_in_one_line_too(trains: Tiny) -> None:
    script = os.path.join(sysconfig.get_path("scripts"), "nnUNetv2_train")
    environment = {**os.environ, "nnUNet_extTrainer": trainers_folder(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", script, *changed(2, "3d_fulres")[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.startswith("nnUNetv2_train: error: 3d_fulres: no configuration of ")
    assert done.stderr.endswith("Did you mean 3d_fullres?\n") and done.stderr.count("\n") == 1


class TestStockCommand:
    """What is left of nnU-Net's errors in the process of nnUNetv2_train."""

    def tell(self, error: BaseException, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
        from nnssl.training import boundary

        monkeypatch.setattr(sys, "argv", ["/usr/bin/nnUNetv2_train", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        boundary.watch()
        assert sys.excepthook is boundary._tell
        sys.excepthook(type(error), error, error.__traceback__)

    def test_the_mistake_is_found_in_the_arguments(
        self, trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.tell(KeyError("whatever"), monkeypatch, changed(5, "nnUNetTrainerDifCL")[1:])
        assert "Did you mean nnUNetTrainerDiffCL" in capsys.readouterr().err

    def test_a_bug_keeps_its_traceback(
        self, trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.tell(KeyError("whatever"), monkeypatch, TRAIN[1:])
        assert "KeyError: 'whatever'" in capsys.readouterr().err

    def test_a_damaged_dataset_json_is_named(
        self, trains: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = trains.preprocessed / "dataset.json"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        self.tell(ValueError("whatever"), monkeypatch, TRAIN[1:])
        assert capsys.readouterr().err.startswith(f"nnUNetv2_train: error: {file}: not valid JSON")

    def test_what_nnunet_lets_pass_is_refused(self, trains: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        from nnssl.training.boundary import check_command

        def check(*arguments: str, command: str = "nnUNetv2_train") -> None:
            monkeypatch.setattr(sys, "argv", [command, *arguments])
            check_command()

        check(*TRAIN[1:])
        check(*changed(3, "all")[1:])
        shutil.copy(trains.plans_file, trains.preprocessed / "Mine.json")
        with pytest.raises(ValueError, match=r"Mine.json, key plans_name: is 'nnUNetPlans'.*mixed up"):
            check(*TRAIN[1:], "-p", "Mine", "--c")
        with pytest.raises(ValueError, match="fold 7: nnU-Net's own split has 0 to 4"):
            check(*changed(3, "7")[1:])
        check(*changed(3, "7")[1:], command="other")
        folds = [{"train": ["lab_00"], "val": ["lab_01"]}] * 8
        (trains.preprocessed / "splits_final.json").write_text(json.dumps(folds))
        check(*changed(3, "7")[1:])
        (trains.preprocessed / "splits_final.json").write_text("3")  # what the trainer tells
        check(*TRAIN[1:])
        monkeypatch.setenv("nnUNet_n_proc_DA", "two")
        with pytest.raises(ValueError, match="nnUNet_n_proc_DA=two: expected a whole number"):
            check(*TRAIN[1:])

    @pytest.mark.parametrize(("command", "variable"), [("nnUNetv2_predict", ""), ("nnUNetv2_train", "1")])
    def test_other_commands_are_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, command: str, variable: str
    ) -> None:
        from nnssl.training import boundary

        monkeypatch.setattr(sys, "argv", [command])
        monkeypatch.setenv("NNSSL_TRACEBACK", variable)
        hook: Any = sys.excepthook
        boundary.watch()
        assert sys.excepthook is hook


@pytest.mark.parametrize("val", [True, False])
def test_validation_alone_is_of_the_trained_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: bool
) -> None:
    """Whatever the training started from, which the command still says when it is repeated with --val."""
    done: list[str] = []

    class Stub:
        output_folder = str(tmp_path)

        def print_to_log_file(self, *_: Any, **__: Any) -> None: ...

        def run_training(self) -> None:
            done.append("train")

        def perform_actual_validation(self, npz: bool) -> None:
            done.append("validate")

    run = "nnunetv2.run.run_training"
    monkeypatch.setattr(f"{run}.get_trainer_from_args", lambda *_: Stub())
    monkeypatch.setattr(f"{run}.maybe_load_checkpoint", lambda *_: done.append("own weights"))
    monkeypatch.setattr("nnssl.commands.train.load_weights", lambda *_: done.append("source's weights"))
    arguments = [*TRAIN[1:], "-pretrained_weights", "a.pth", *["--val"] * val]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    train._train(parser.parse_args(arguments))
    ran = ["validate"] if val else ["source's weights", "train", "validate"]
    assert done == ["own weights", *ran]


def test_what_a_killed_preprocessing_left_is_not_taken_for_cases(
    trains: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    (trains.preprocessed / "nnUNetPlans_2d" / ".nnssl-00000000-1-0123abcd").mkdir(parents=True)
    assert "2d is not preprocessed: nothing in " in told(capsys, changed(2, "2d"))
