from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnssl
from nnssl.commands.cli import main
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.unlabeled import ensure_unlabeled
from tests.place import lean_nnunet
from tests.raw_dataset import Tiny, write_case, write_dataset


def preprocess(*options: str) -> int:
    return main(["plan-and-preprocess", "-d", "777", "-np", "1", "-npfp", "1", "--no_pbar", *options])


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


# trainers


def test_trainers_lists_every_file_with_the_first_line_of_its_docstring(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trainers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(file.stem for file in Path(trainers_folder()).glob("nnUNetTrainer*.py"))
    assert [line.split()[0] for line in lines] == files
    assert all(len(line.split()) > 3 for line in lines)
    assert any("2503.09408" in line for line in lines if line.startswith("nnUNetTrainerDiffCL "))


def test_trainers_reads_files_without_importing_them(tmp_path: Path) -> None:
    (tmp_path / "nnUNetTrainerX.py").write_text(
        'raise SystemExit\nclass Other:\n    "o"\nclass nnUNetTrainerX:\n    """X (paper).\n\n    more"""\n'
    )
    (tmp_path / "helper.py").write_text("class helper:\n    'no'\n")
    assert list_trainers(str(tmp_path)) == {"nnUNetTrainerX": "X (paper)."}


def test_nobody_who_reads_on_is_no_error() -> None:
    command = [sys.executable, "-m", "nnssl.commands.cli", "trainers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == b""


def test_path_prints_nothing_but_the_folder_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from nnssl.commands.cli import main; main(['trainers', '--path']); "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(nnssl.__path__[0]).parent)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert Path(result.stdout.removesuffix("\n")).samefile(trainers_folder())
    assert (Path(trainers_folder()) / "nnUNetTrainerDiffCL.py").is_file()


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["split", "-d", "1"], ["split", "-d", "1", "--labeled", "1", "--first", "--seed", "1"]],
)
def test_wrong_usage_exits_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2


def test_a_dataset_may_be_given_by_its_name(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "-d", "Dataset777_Tiny", "--labeled", "2"]) == 0
    assert f"{tiny.preprocessed / 'splits_final.json'}:" in capsys.readouterr().out
    for name in ("Dataset777_Tinny", "Tiny"):
        with pytest.raises(SystemExit):
            main(["split", "-d", name, "--labeled", "2"])
        assert f"argument -d: no dataset {name} in nnUNet_raw=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (["advise"], "nnUNet_preprocessed"),
        (["pilot"], "nnUNet_results"),
        (["report", "-c", "2d", "-tr", "nnUNetTrainerSemi", "-o", "out"], "nnUNet_results"),
        (["export", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerSemi", "-o", "out"], "nnUNet_results"),
        (["pseudo-label", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerSemi", "-o", "out"], "nnUNet_raw"),
        (["adopt", "corrected"], "nnUNet_raw"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_every_command_says_which_variable_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    assert main([*arguments, "-d", "777"]) == 1
    assert f"{variable} is not set: export {variable}=" in error(capsys)


@pytest.mark.parametrize("command", ["export", "pseudo-label", "report", "pilot"])
@pytest.mark.usefixtures("tiny")
def test_an_output_that_is_a_file_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "out").touch()
    model = {"pilot": [], "report": ["-c", "2d", "-tr", "nnUNetTrainerSemi"]}
    options = model.get(command, ["-c", "2d", "-tr", "nnUNetTrainerSemi", "-f", "0"])
    assert main([command, "-d", "777", *options, "-o", str(tmp_path / "out")]) == 1
    assert f"-o {tmp_path / 'out'}: is no folder" in error(capsys)


@pytest.mark.usefixtures("tiny")
def test_a_device_that_is_not_there_is_told_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "out"
    model = ["-c", "2d", "-tr", "nnUNetTrainerSemi", "-f", "0", "-o", str(output)]
    for command in (["advise"], ["pilot"], ["pseudo-label", *model]):
        assert main([*command, "-d", "777", "-device", "cuda"]) == 1
        assert "-device cuda: PyTorch" in error(capsys)
    assert not output.exists()


# plan-and-preprocess


@pytest.mark.slow
def test_planning_from_nothing_then_replanning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # set for trainings; nnU-Net's planner fails with it
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    tiny = Tiny(write_dataset(tmp_path / "raw"), tmp_path / "preprocessed" / "Dataset777_Tiny")
    assert preprocess("-c", "3d_fullres", "3d_lowres", "--verify_dataset_integrity") == 0
    assert "Configuration 3d_lowres is not in the plan and was skipped" in capsys.readouterr().out
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    assert sorted(file.stem for file in tiny.labeled.glob("*.pkl")) == [f"lab_0{index}" for index in range(6)]
    assert sorted(file.stem for file in tiny.unlabeled.glob("*.pkl")) == ["scan_00", "scan_01", "scan_02"]
    assert len(list((tiny.preprocessed / "gt_segmentations").iterdir())) == 6

    configurations = {**plans["configurations"], "mine": {"inherits_from": "3d_fullres", "batch_size": 3}}
    edited = {**plans, "nnssl": {"num_epochs": 3}, "configurations": configurations}
    edited["configurations"]["3d_fullres"]["patch_size"] = [8, 16, 16]
    tiny.plans_file.write_text(json.dumps(edited))
    before = stamps(tiny.preprocessed)
    assert preprocess("-c", "3d_fullres", "-overwrite_target_spacing", "3", "3", "3") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "existing plan" in line)
    assert str(tiny.plans_file) in line
    assert "ignored: -overwrite_target_spacing" in line
    assert stamps(tiny.preprocessed) == before

    del edited["configurations"]["3d_fullres"]["spacing"]
    tiny.plans_file.write_text(json.dumps(edited))
    assert preprocess("-c", "3d_fullres") == 1
    assert "configurations.3d_fullres.spacing: absent" in capsys.readouterr().err
    assert preprocess("-c", "3d_fullres", "--replan", "-overwrite_target_spacing", "3", "1.8", "1.8") == 0
    assert json.loads(Path(f"{tiny.plans_file}.bak").read_text(encoding="utf-8")) == edited
    replanned = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    assert replanned["nnssl"] == {"num_epochs": 3}
    assert replanned["configurations"]["3d_fullres"]["spacing"] == [3, 1.8, 1.8]
    assert replanned["configurations"]["3d_fullres"]["patch_size"] != [8, 16, 16]
    assert "mine" in replanned["configurations"]
    after = stamps(tiny.preprocessed)
    assert all(before[file] != after[file] for file in after if file.endswith(".b2nd"))


@pytest.mark.slow
def test_replanning_takes_a_new_fingerprint_where_a_case_changed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lean_nnunet(monkeypatch)
    file = tiny.preprocessed / "dataset_fingerprint.json"

    def replan() -> str:
        assert preprocess("--replan", "--no_pp", "-npfp", "1") == 0
        return capsys.readouterr().out

    assert "Fingerprint extraction ..." in replan()
    content, said = file.read_bytes(), replan()
    assert f"Using {file}, since which no case has changed" in said and "Fingerprint" not in said
    assert file.read_bytes() == content

    for name in ("imagesTr/lab_02_0000", "imagesTr/lab_02_0001", "labelsTr/lab_02"):
        path = tiny.raw / f"{name}.nii.gz"
        image = sitk.ReadImage(str(path))
        image.SetSpacing((3.0, 3.0, 7.0))
        sitk.WriteImage(image, str(path))
    said = replan()
    assert f"{file} is extracted anew: " in said and "lab_02_0000.nii.gz" in said
    assert [7, 3, 3] in json.loads(file.read_text(encoding="utf-8"))["spacings"]

    for path in (*tiny.raw.glob("imagesTr/lab_03*"), *tiny.raw.glob("labelsTr/lab_03*")):
        path.unlink()
    assert f"{file} is extracted anew: it is of 6 cases, the dataset has 5." in replan()
    file.write_text("{half")
    assert "it cannot be used" in replan()
    assert len(json.loads(file.read_text(encoding="utf-8"))["spacings"]) == 5


def test_existing_plan_preprocesses_labeled_and_unlabeled_once(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.plans_file.read_bytes()
    assert preprocess("-p", "nnUNetPlans") == 0
    assert {folder.name for folder in tiny.preprocessed.iterdir() if folder.is_dir()} == {
        "gt_segmentations",
        *(f"nnUNetPlans_{name}" for name in ("2d", "2d_unlabeled", "3d_fullres", "3d_fullres_unlabeled")),
    }
    before = stamps(tiny.preprocessed)
    assert preprocess() == 0
    assert "Using the existing plan" in capsys.readouterr().out
    assert stamps(tiny.preprocessed) == before
    assert tiny.plans_file.read_bytes() == content


def test_configurations_that_share_data_are_preprocessed_once(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres"}
    tiny.plans_file.write_text(json.dumps(plans))
    assert preprocess("-c", "3d_fullres", "3d_cascade_fullres") == 0
    assert capsys.readouterr().out.count("6 cases into") == 1


def test_hidden_cases_of_a_split_are_preprocessed_too(tiny: Tiny) -> None:
    assert main(["split", "-d", "777", "--labeled", "1", "--val", "lab_05", "--first"]) == 0
    assert preprocess("-c", "3d_fullres") == 0
    expected = [f"lab_0{index}" for index in range(1, 5)] + [f"scan_0{index}" for index in range(3)]
    assert sorted(file.stem for file in tiny.unlabeled.glob("*.pkl")) == expected


@pytest.mark.parametrize("folder_stays", [True, False])
def test_scans_taken_out_or_labeled_are_set_aside_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder_stays: bool
) -> None:
    """Else they would be used again where the raw data are absent."""
    message = "preprocessed scans that are neither in imagesUn nor hidden by a split to"
    assert main(["split", "-d", "777", "--labeled", "1", "--val", "lab_05", "--first"]) == 0
    assert preprocess("-c", "3d_fullres") == 0
    for channel in (0, 1):
        name = f"scan_01_000{channel}.nii.gz"
        (tiny.raw / "imagesUn" / name).rename(tiny.raw / "imagesTr" / name)
        (tiny.raw / "imagesUn" / f"scan_02_000{channel}.nii.gz").unlink()
    shutil.copy(tiny.raw / "labelsTr" / "lab_00.nii.gz", tiny.raw / "labelsTr" / "scan_01.nii.gz")
    if not folder_stays:
        shutil.rmtree(tiny.raw / "imagesUn")
    gone = ["scan_01", "scan_02"] if folder_stays else ["scan_01"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("nnssl.commands.plan_and_preprocess.inspect_contents", lambda *_, **__: [])
        assert preprocess("-c", "3d_fullres") == 0
    said = capsys.readouterr().out
    aside = f"{tiny.unlabeled}_removed"
    assert f"Moved {len(gone)} {message} {aside}: {', '.join(gone)}\n" in said
    assert {file.name.split(".")[0] for file in Path(aside).glob("*.pkl")} == set(gone)
    left = {f"lab_0{index}" for index in range(1, 5)} | {"scan_00", "scan_01", "scan_02"} - set(gone)
    assert {file.stem for file in tiny.unlabeled.glob("*.pkl")} == left
    assert len(list(tiny.unlabeled.iterdir())) == 3 * len(left)
    (tiny.preprocessed / "splits_final.json").unlink()  # what it hid may be in use by a training
    assert preprocess("-c", "3d_fullres") == 0
    assert "Moved" not in capsys.readouterr().out
    assert {file.stem for file in tiny.unlabeled.glob("*.pkl")} == left
    shutil.rmtree(tiny.raw)  # a cluster
    plans = PlansManager(str(tiny.plans_file))
    assert ensure_unlabeled(plans, "3d_fullres", tiny.dataset_json) == sorted(
        name for name in left if name.startswith("scan")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-p", "nnUNetOther"],
            r"-p nnUNetOther: .*nnUNetOther\.json does not exist\. Plans here: nnUNetPlans;",
        ),
        (["-c", "3d_fulres"], "-c 3d_fulres: the plan has 2d, 3d_fullres"),
        (
            ["-p", "nnUNetPlannerResEncM"],
            "plan with -pl nnUNetPlannerResEncM, then -p nnUNetResEncUNetMPlans",
        ),
        (["-np", "1", "2"], "-np: 2 numbers for 3 configurations"),
        (["-pl", "NoPlanner"], "-pl NoPlanner: nnU-Net has no such class"),
        (["--replan", "-preprocessor_name", "No"], "-preprocessor_name No: nnU-Net has no such class"),
        (
            ["--replan", "-overwrite_target_spacing", "0", "1", "1"],
            "-overwrite_target_spacing 0.0 1.0 1.0: exp",
        ),
        (["--replan", "-gpu_memory_target", "-3"], "-gpu_memory_target -3: expected GB above 0"),
        (["-overwrite_plans_name", "a/b"], "-overwrite_plans_name a/b: expected a plain name"),
        (["-overwrite_plans_name", "a__b"], "-overwrite_plans_name a__b: expected a plain name"),
        (["-overwrite_plans_name", "Mine.json"], "-overwrite_plans_name Mine.json: expected a plain name"),
        (["-np", "0"], "-np 0: expected 1 or more processes"),
        (["-d", "777", "778"], "no dataset 778 in"),
    ],
)
def test_options_that_name_nothing_are_errors(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = stamps(tiny.preprocessed)
    assert preprocess(*options) == 1
    assert re.search(message, error(capsys))
    assert stamps(tiny.preprocessed) == before


def test_plan_of_another_dataset_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.edit_plan(dataset_name="Dataset001_Other")
    train = ["train", "777", "3d_fullres", "0", "-tr", "nnUNetTrainerMeanTeacher", "-device", "cpu"]
    for command in (["plan-and-preprocess", "-d", "777"], train):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "key dataset_name: is 'Dataset001_Other', whose data" in said
        assert "expected 'Dataset777_Tiny'. Remove the file, and take" in said
    assert checked(capsys, "-d", "777")[0] == 1


def test_a_plan_for_another_number_of_channels_is_refused_before_any_case(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("2d", "3d_fullres"):
        tiny.edit_plan(name, normalization_schemes=["ZScoreNormalization"])
    assert preprocess() == 1
    told = error(capsys)
    assert "2d, 3d_fullres: 1 channel; expected 2 (channel_names in dataset.json)" in told
    assert "--replan" in told and "IndexError" not in told
    assert not tiny.labeled.exists()


def test_a_name_that_cannot_be_printed_does_not_stop_check(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sorted((tiny.raw / "imagesUn").glob("scan_01_*")):
        os.rename(file, os.fsencode(file).replace(b"scan_01", b"M\xfcller"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["check", "-d", "777"]) == 1
    sys.stdout.flush()
    lines = written.getvalue().decode().splitlines()
    assert any(line.startswith("FAIL") and r"M\xfcller_0001.nii.gz: its name" in line for line in lines)


def test_changed_dataset_json_is_taken_over_unless_it_needs_a_new_plan(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((tiny.raw / "dataset.json").read_text(encoding="utf-8"))
    (tiny.raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 60}))
    assert preprocess("--no_pp") == 0
    assert tiny.dataset_json["numTraining"] == 60
    (tiny.raw / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT", "1": "CT"}}))
    assert preprocess("--no_pp") == 1
    assert "channel_names" in error(capsys)
    assert tiny.dataset_json["channel_names"] == content["channel_names"]


def test_damaged_plan_or_dataset_json_is_named_and_kept(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tiny.plans_file, tiny.raw / "dataset.json"):
        file.write_text("{half")
        assert preprocess() == 1
        assert f"{file}: not valid JSON" in error(capsys)
        assert file.read_text(encoding="utf-8") == "{half"


def test_replanning_against_a_differing_split_of_the_raw_dataset_is_refused(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", "-d", "777", "--labeled", "1", "--first"]) == 0
    (tiny.raw / "splits_final.json").write_text('[{"train": ["lab_03"], "val": ["lab_04"]}]')
    before = stamps(tiny.preprocessed)
    assert preprocess("--replan") == 1
    assert "splits_final.json differ" in error(capsys)
    assert stamps(tiny.preprocessed) == before


def test_a_split_that_the_raw_dataset_brings_after_planning_is_copied_or_told(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    source, copy = tiny.raw / "splits_final.json", tiny.preprocessed / "splits_final.json"
    content = '[{"train": ["lab_00", "lab_03"], "val": ["lab_04"]}]'
    source.write_text("{half")
    assert preprocess("--no_pp") == 1
    assert f"{source}: not valid JSON" in error(capsys) and not copy.exists()
    source.write_text(content)
    assert preprocess("--no_pp") == 0
    assert f"The split {source} was copied to {copy}." in capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == content
    assert preprocess("--no_pp") == 0
    said = capsys.readouterr().out
    assert "was copied" not in said and "differ" not in said
    assert main(["split", "-d", "777", "--labeled", "1", "--first"]) == 0
    kept = copy.read_bytes()
    capsys.readouterr()
    assert preprocess("--no_pp") == 0
    assert f"WARNING: {source} and {copy} differ, and trainings use the latter" in capsys.readouterr().out
    assert copy.read_bytes() == kept


def test_bad_names_in_imagesun_are_refused_before_the_labeled_part_is_touched(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tiny.raw / "imagesUn", "lab_01", 1)
    assert preprocess() == 1
    assert "lab_01*: a labeled case in imagesTr has the same name" in error(capsys)
    assert not tiny.labeled.exists()


def test_no_scans_at_all_is_said_and_the_labeled_part_done(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny.raw / "imagesUn")
    assert preprocess("-c", "2d") == 0
    assert "There are no unlabeled scans yet" in capsys.readouterr().out


def test_scans_that_are_there_as_preprocessed_ones_alone_are_not_said_to_be_absent(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess("-c", "3d_fullres") == 0
    shutil.rmtree(tiny.raw / "imagesUn")
    capsys.readouterr()
    assert preprocess("-c", "3d_fullres") == 0
    said = capsys.readouterr().out
    assert "3 unlabeled scans are there as preprocessed cases alone" in said
    assert "There are no unlabeled scans" not in said


@pytest.mark.parametrize("position", [0, 1, 3])
def test_traceback_may_stand_anywhere(tiny: Tiny, position: int) -> None:
    (tiny.raw / "dataset.json").write_text("{half")
    arguments = ["plan-and-preprocess", "-d", "777"]
    arguments.insert(position, "--traceback")
    with pytest.raises(ValueError, match=r"dataset\.json"):
        main(arguments)


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyError("labels"), 1, "error: KeyError: 'labels'. This was not foreseen; --traceback shows"),
        (AssertionError(), 1, "error: AssertionError: "),
        (ValueError("no raise of ours"), 1, "error: ValueError: no raise of ours. This was not foreseen"),
        (KeyboardInterrupt(), 130, "interrupted. Rerun to resume."),
    ],
)
def test_no_error_leaves_the_command_as_a_traceback(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("nnssl.commands.split.make_splits", fail)
    assert main(["split", "-d", "777", "--labeled", "1"]) == status
    said = error(capsys)
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("command", [["split", "--labeled", "1"], ["plan-and-preprocess"], ["check"]])
@pytest.mark.parametrize(
    "content",
    [
        {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "a"}, "numTraining": 6, "training": []},
        {"channel_names": {"MR": 0}, "labels": {"background": 0}, "numTraining": 6, "file_ending": ".nii.gz"},
        {"labels": {"background": 0, "whole": [1, 2], "core": 2}},
        [],
    ],
)
def test_every_command_refuses_a_wrong_dataset_json_by_name(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], command: list[str], content: object
) -> None:
    before = stamps(tiny.preprocessed)
    (tiny.raw / "dataset.json").write_text(json.dumps(content))
    assert main([*command, "-d", "777"]) == 1
    captured = capsys.readouterr()
    assert "dataset.json" in captured.out + captured.err
    assert stamps(tiny.preprocessed) == before


def test_wrong_values_in_labels_are_refused_before_anything_is_preprocessed(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tiny.raw / "imagesTr", "lab_02", 2, tiny.raw / "labelsTr", classes=3)
    write_case(tiny.raw / "imagesTr", "lab_04", 4, tiny.raw / "labelsTr", classes=3)
    assert preprocess("-c", "3d_fullres") == 1
    said = error(capsys)
    assert "2 errors:" in said
    assert all(f"{case}.nii.gz: values 3 are not declared" in said for case in ("lab_02", "lab_04"))
    assert not tiny.labeled.exists()


# split


def splits(tiny: Tiny) -> list[dict[str, list[str]]]:
    return json.loads((tiny.preprocessed / "splits_final.json").read_text(encoding="utf-8"))


def test_split_writes_five_folds_and_backs_up_the_old_file(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", "-d", "777", "--labeled", "2", "--first"]) == 0
    first = splits(tiny)
    assert [len(fold["train"]) for fold in first] == [2] * 5
    assert all(
        sorted(fold["train"] + fold["val"] + fold["unlabeled"]) == [f"lab_0{i}" for i in range(6)]
        for fold in first
    )
    assert "fold 4: 2 labeled, 3 unlabeled, 1 validation" in capsys.readouterr().out
    assert main(["split", "-d", "777", "--labeled", "1", "--unlabeled", "2", "--seed", "3"]) == 0
    assert [len(fold["unlabeled"]) for fold in splits(tiny)] == [2] * 5
    assert "splits_final.json.bak" in capsys.readouterr().out
    assert json.loads((tiny.preprocessed / "splits_final.json.bak").read_text(encoding="utf-8")) == first


@pytest.mark.parametrize(
    "content", ["lab_05\nlab_04\n\n", '["lab_05", "lab_04"]', '\ufeff["lab_05", "lab_04"]', None]
)
def test_val_takes_names_a_list_of_lines_or_json(tiny: Tiny, tmp_path: Path, content: str | None) -> None:
    values = ["lab_05", "lab_04"]
    if content is not None:
        (tmp_path / "val.txt").write_text(content, encoding="utf-8")
        values = [str(tmp_path / "val.txt")]
    assert main(["split", "-d", "777", "--labeled", "1", "--first", "--val", *values]) == 0
    assert splits(tiny) == [
        {"train": ["lab_00"], "val": ["lab_04", "lab_05"], "unlabeled": ["lab_01", "lab_02", "lab_03"]}
    ]


@pytest.mark.parametrize("content", ["[1, 2]", "[", '{"val": []}'])
def test_val_file_without_a_list_of_names_is_an_error(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "val.json").write_text(content)
    assert main(["split", "-d", "777", "--labeled", "1", "--val", str(tmp_path / "val.json")]) == 1
    assert "val.json" in error(capsys)
    assert not (tiny.preprocessed / "splits_final.json").exists()


def test_impossible_split_keeps_the_existing_file(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    main(["split", "-d", "777", "--labeled", "1"])
    before = stamps(tiny.preprocessed)
    assert main(["split", "-d", "777", "--labeled", "9"]) == 1
    assert "--labeled 9: fold 0 has 4 training cases" in error(capsys)
    assert main(["split", "-d", "778", "--labeled", "1"]) == 1
    assert "778" in error(capsys)
    assert stamps(tiny.preprocessed) == before


def test_few_cases_are_left_out_one_by_one(tiny: Tiny) -> None:
    for index in range(3, 6):
        (tiny.raw / "labelsTr" / f"lab_0{index}.nii.gz").unlink()
        for channel in (0, 1):
            (tiny.raw / "imagesTr" / f"lab_0{index}_000{channel}.nii.gz").unlink()
    assert main(["split", "-d", "777", "--labeled", "2"]) == 0
    folds = splits(tiny)
    assert sorted(fold["val"] for fold in folds) == [["lab_00"], ["lab_01"], ["lab_02"]]
    assert all(sorted(fold["train"] + fold["val"]) == ["lab_00", "lab_01", "lab_02"] for fold in folds)
    assert all(fold["unlabeled"] == [] for fold in folds)


# check


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, list[str]]]:
    status = main(["check", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert all(line[:4].strip() in ("ok", "warn", "FAIL") for line in lines)
    return status, {
        level: [line[6:] for line in lines if line.startswith(level)] for level in ("ok", "warn", "FAIL")
    }


@pytest.fixture
def trainers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())


@pytest.mark.usefixtures("trainers_set")
def test_check_is_content_with_a_preprocessed_dataset(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    main(["split", "-d", "777", "--labeled", "1", "--val", "lab_05", "--first"])
    assert preprocess("-c", "3d_fullres") == 0
    capsys.readouterr()
    before = stamps(tiny.preprocessed)
    status, lines = checked(capsys, "-d", "777", "-c", "3d_fullres")
    assert (status, lines["FAIL"]) == (0, [])
    for text in (
        "Dataset777_Tiny: 2 channel(s), 6 labeled cases, 3 scans in imagesUn",
        "3d_fullres: 6 labeled cases preprocessed",
        "3d_fullres: 7 unlabeled cases preprocessed (4 of them with hidden labels)",
        "3d_fullres: fold 0: 1 train, 1 val, 4 unlabeled",
    ):
        assert text in lines["ok"]
    assert stamps(tiny.preprocessed) == before


@pytest.mark.usefixtures("trainers_set")
def test_check_warns_where_mirroring_looks_harmful(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The two classes lie side by side along the middle axis of the volumes."""
    assert preprocess("-c", "3d_fullres") == 0
    capsys.readouterr()
    found = [line for line in checked(capsys, "-d", "777")[1]["warn"] if "mirroring looks harmful" in line]
    assert len(found) == 1 and "axis 1: class 2 lies +" in found[0]
    assert '"nnssl": {"mirror_axes": "auto"} in the plans file, here [0, 2]' in found[0]


@pytest.mark.parametrize("value", [None, "", "elsewhere"])
def test_check_gives_the_export_line_for_the_trainers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    else:
        monkeypatch.setenv("nnUNet_extTrainer", value)
    status, lines = checked(capsys)
    assert status == 1
    assert any(line.endswith(f"export nnUNet_extTrainer='{trainers_folder()}'") for line in lines["FAIL"])


def test_check_accepts_the_trainers_folder_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), trainers_folder()]))
    assert not any("nnUNet_extTrainer" in line for line in checked(capsys)[1]["FAIL"])


@pytest.mark.usefixtures("trainers_set")
def test_check_names_unset_and_absent_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("nnUNet_results", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "absent"))
    status, lines = checked(capsys)
    assert status == 1
    assert any("nnUNet_raw is not set" in line for line in lines["warn"])
    assert any(f"mkdir -p '{tmp_path / 'absent'}'" in line for line in lines["FAIL"])
    assert any("nnUNet_results is not set" in line for line in lines["FAIL"])


@pytest.mark.usefixtures("trainers_set")
@pytest.mark.parametrize("folder", ["", "absent"])
def test_check_writes_nothing_where_there_is_no_folder_of_preprocessed_data(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    monkeypatch.chdir(tiny.raw.parent.parent)
    monkeypatch.setenv("nnUNet_preprocessed", folder)
    before = sorted(Path().rglob("*"))
    assert checked(capsys, "-d", "777")[0] == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("trainers_set")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nnssl": None}, '"nnssl" in the plans file must be a JSON object'),
        ({"configurations": {"2d": {"inherits_from": "3d"}}}, "key configurations.2d.inherits_from: is '3d'"),
        ({"label_manager": "Manager"}, "key label_manager: is 'Manager'"),
    ],
)
def test_check_goes_on_after_a_wrong_plan(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    tiny.edit_plan(**changes)
    status, lines = checked(capsys, "-d", "777")
    assert status == 1 and any(message in line for line in lines["FAIL"])
    assert any("6 labeled cases, 3 scans in imagesUn" in line for line in lines["ok"])


@pytest.mark.usefixtures("trainers_set")
def test_check_names_a_trainer_that_is_meant(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = checked(capsys, "-d", "777", "-c", "3d_fullres", "-tr", "Semi")
    assert any("-tr Semi: no such trainer. Did you mean nnUNetTrainerSemi" in line for line in lines["FAIL"])


@pytest.mark.usefixtures("trainers_set")
def test_check_warns_of_another_package_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nnssl").mkdir()
    (tmp_path / "nnssl" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(str(tmp_path / "nnssl") in line for line in checked(capsys)[1]["warn"])


@pytest.mark.usefixtures("trainers_set")
def test_check_finds_what_would_stop_a_training(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert any("nothing is preprocessed" in line for line in checked(capsys, "-d", "777")[1]["FAIL"])
    assert preprocess("-c", "3d_fullres") == 0
    (tiny.labeled / "lab_03_seg.b2nd").unlink()
    (tiny.unlabeled / "scan_01.pkl").unlink()
    shutil.copy(tiny.labeled / "lab_01.b2nd", tiny.labeled / "gone.b2nd")
    folds = [
        {"train": ["lab_00"], "val": ["x"], "unlabeled": ["lab_01"]},
        {"train": ["lab_00"], "val": [], "unlabeled": ["lab_02"]},
    ]
    (tiny.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    capsys.readouterr()
    status, lines = checked(capsys, "-d", "777", "-c", "3d_fullres")
    assert status == 1
    for text in ("1 of 6 labeled cases are missing or stale (incomplete)", "key val: x is no case"):
        assert any(text in line for line in lines["FAIL"]), text
    assert any("1 preprocessed cases are not in imagesTr (gone)" in line for line in lines["warn"])


@pytest.mark.usefixtures("trainers_set")
def test_check_tells_a_scan_without_label_from_one_that_was_taken_out(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess("-c", "3d_fullres") == 0
    (label,) = (tiny.raw / "labelsTr").glob("lab_02.*")
    label.unlink()
    capsys.readouterr()
    _, lines = checked(capsys, "-d", "777", "-c", "3d_fullres")
    assert any("lab_02.nii.gz: missing (case lab_02)" in line for line in lines["FAIL"])
    assert not any("not in imagesTr" in line for level in lines.values() for line in level)
    for folder in ("imagesTr", "labelsTr"):
        for file in (tiny.raw / folder).iterdir():
            file.unlink()
    _, lines = checked(capsys, "-d", "777", "-c", "3d_fullres")
    assert any(
        "imagesTr is empty; the 6 preprocessed cases are used as they are" in line for line in lines["warn"]
    )
    assert not any("imagesTr" in line for line in lines["FAIL"])


@pytest.mark.usefixtures("trainers_set")
def test_check_counts_unlabeled_cases_to_be_preprocessed_and_names_absent_classes(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tiny.raw / "imagesTr", "lab_00", 0, tiny.raw / "labelsTr", classes=1)
    main(["split", "-d", "777", "--labeled", "1", "--val", "lab_05", "--first"])
    assert preprocess("-c", "3d_fullres") == 0
    (tiny.unlabeled / "scan_01.pkl").unlink()
    capsys.readouterr()
    status, lines = checked(capsys, "-d", "777")
    assert status == 1
    assert any("1 of 7 unlabeled cases are missing or stale" in line for line in lines["warn"])
    assert any("no labeled case has class [2]" in line for line in lines["FAIL"])


@pytest.mark.usefixtures("trainers_set")
def test_check_reports_a_dataset_that_is_not_there_or_has_no_plan(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any("-d: no dataset 778 in" in line for line in checked(capsys, "-d", "778")[1]["FAIL"])
    assert any(
        "no plan" in line and "nnUNetOther.json" in line
        for line in checked(capsys, "-d", "777", "-p", "nnUNetOther")[1]["FAIL"]
    )
    copy = tiny.preprocessed / "dataset.json"
    kept = copy.read_bytes()
    copy.unlink()
    (line,) = checked(capsys, "-d", "777")[1]["FAIL"]
    assert line.startswith(f"{copy}: missing; expected nnU-Net's copy of dataset.json beside its plan. Run")
    copy.write_bytes(kept)
    tiny.edit_plan(plans_name="small")
    tiny.plans_file.rename(tiny.preprocessed / "small.json")
    assert any(
        "no plan" in line and "(found: small)" in line for line in checked(capsys, "-d", "777")[1]["FAIL"]
    )
    (tiny.preprocessed / "small.json").unlink()
    status, lines = checked(capsys, "-d", "777")
    assert status == 0 and any("not planned yet. Next: nnssl plan-and-pre" in line for line in lines["warn"])
    (tiny.raw / "imagesUn" / "scan_00_0001.nii.gz").unlink()
    assert any("scan_00*: channels _0000 found" in line for line in checked(capsys, "-d", "777")[1]["FAIL"])


@pytest.mark.usefixtures("trainers_set")
def test_check_prints_all_findings_as_json_and_the_gravest_last(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.raw / "imagesUn" / "left.nii").write_bytes(b"")
    (tiny.raw / "labelsTr" / "lab_01.nii.gz").unlink()
    assert main(["check", "-d", "777", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    levels = [finding["level"] for finding in content["findings"]]
    assert (levels.count("error"), levels.count("warning")) == (content["errors"], content["warnings"])
    assert content["environment"]["versions"]["nnssl"] == nnssl.__version__
    for level, place in (("error", "lab_01.nii.gz"), ("warning", "imagesUn")):
        assert any(f["level"] == level and f["place"].endswith(place) for f in content["findings"])
    main(["check", "-d", "777"])
    prefixes = [line[:4].strip() for line in capsys.readouterr().out.splitlines()]
    assert prefixes == sorted(prefixes, key=["ok", "warn", "FAIL"].index)
