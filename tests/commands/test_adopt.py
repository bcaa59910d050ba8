"""`nnssl adopt`: what moves where, what is refused, and that a kill at any point changes nothing for good."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.commands import adopt as module
from nnssl.commands.cli import main
from nnssl.data.freshness import digest, stale_reason
from nnssl.data.inspection import inspect_files, inspect_scans_of_training
from nnssl.data.labeled import copy_ground_truth, ensure_labeled, labeled_cases
from nnssl.data.unlabeled import ensure_unlabeled
from nnssl.files import write_json
from nnssl.training.lock import own_process, started
from tests.raw_dataset import SHAPE, SPACING, Tiny, write_image

ENDING = ".nii.gz"
NEW = ["scan_00", "scan_01"]


def adopt(folder: Path, *options: str) -> int:
    return main(["adopt", "-d", "777", str(folder), "-np", "1", *options])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def corrected(tiny: Tiny, folder: Path, cases: list[str] = NEW) -> Path:
    """A label map on the grid of each scan."""
    folder.mkdir(exist_ok=True)
    for index, case in enumerate(cases):
        image = sitk.ReadImage(str(tiny.raw / "imagesUn" / f"{case}_0000{ENDING}"))
        label = np.zeros(SHAPE, np.uint8)
        label[3:6, 5:12, 5:12], label[3:6, 15:20, 8:12] = 1, 1 + (index + 1) % 2
        label[5, 15:20, 8:12] = 2
        picture = sitk.GetImageFromArray(label)
        picture.CopyInformation(image)
        sitk.WriteImage(picture, str(folder / f"{case}{ENDING}"))
    return folder


def split(tiny: Tiny) -> list[dict[str, list[str]]]:
    """Two folds, one with a hidden label."""
    cases = [f"lab_{i:02d}" for i in range(6)]
    folds = [
        {"train": cases[:3], "val": cases[4:], "unlabeled": cases[3:4]},
        {"train": cases[2:], "val": cases[:2]},
    ]
    write_json(folds, tiny.preprocessed / "splits_final.json")
    return folds


def tree(folder: Path) -> dict[str, str]:
    """All files of a folder, by content; scratch of what was interrupted does not count."""
    return {str(p.relative_to(folder)): digest(str(p)) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def preprocessed(tiny: Tiny) -> Tiny:
    """Labeled and unlabeled cases preprocessed, as a training leaves them."""
    plans = PlansManager(str(tiny.plans_file))
    options: dict[str, Any] = {"num_processes": 1, "show_progress": False}
    ensure_labeled(plans, "3d_fullres", tiny.dataset_json, str(tiny.raw), **options)
    ensure_unlabeled(plans, "3d_fullres", tiny.dataset_json, ["lab_03"], **options)
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    return tiny


def test_corrected_scans_become_labeled_cases_that_a_training_finds(
    preprocessed: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, before = preprocessed, split(preprocessed)
    folder = corrected(tiny, tmp_path / "corrected")
    plan, given = tiny.plans_file.read_bytes(), tree(folder)
    images = {p.name: digest(str(p)) for p in (tiny.raw / "imagesUn").iterdir()}
    assert adopt(folder) == 0
    assert "8 labeled cases, 2 of them new" in capsys.readouterr().out

    assert sorted(p.name for p in (tiny.raw / "imagesUn").iterdir()) == [
        f"scan_02_000{c}{ENDING}" for c in (0, 1)
    ]
    for case in NEW:
        for channel in (0, 1):
            file = f"{case}_{channel:04d}{ENDING}"
            assert digest(str(tiny.raw / "imagesTr" / file)) == images[file]
        for place in (tiny.raw / "labelsTr", tiny.preprocessed / "gt_segmentations"):
            assert digest(str(place / f"{case}{ENDING}")) == given[f"{case}{ENDING}"]
    assert tree(folder) == given and tiny.plans_file.read_bytes() == plan
    for place in (tiny.raw, tiny.preprocessed):
        assert read(place / "dataset.json")["numTraining"] == 8
    after = read(tiny.preprocessed / "splits_final.json")
    assert after[0] == {**before[0], "train": [*before[0]["train"], *NEW]}
    assert after[1] == {**before[1], "train": [*before[1]["train"], *NEW]}
    assert read(tiny.preprocessed / "splits_final.json.bak") == before

    # preprocessed as plan-and-preprocess would, and nowhere among the unlabeled ones any more
    target, cases = labeled_cases(
        PlansManager(str(tiny.plans_file)), "3d_fullres", tiny.dataset_json, str(tiny.raw)
    )
    assert len(cases) == 8 and not any(stale_reason(case, target) for case in cases)
    assert {p.name.split(".")[0].removesuffix("_seg") for p in tiny.unlabeled.iterdir()} == {
        "lab_03",
        "scan_02",
    }
    assert not (tiny.raw / "nnssl_adopt").exists() and not (tiny.preprocessed / "nnssl_adopt").exists()
    assert [f for f in inspect_files(str(tiny.raw), str(tiny.preprocessed)) if f.level == "error"] == []

    # a second time there is nothing to do, and another label is not taken
    state = tree(tmp_path)
    assert adopt(folder) == 0
    assert "nothing is left to adopt" in capsys.readouterr().out and tree(tmp_path) == state
    shutil.copy(folder / f"scan_00{ENDING}", folder / f"scan_01{ENDING}")
    assert adopt(folder) == 1
    assert "scan_01 is labeled already" in capsys.readouterr().err


def test_dry_run_changes_nothing(
    preprocessed: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split(preprocessed)
    folder = corrected(preprocessed, tmp_path / "corrected")
    before = tree(tmp_path)
    assert adopt(folder, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 cases to adopt: scan_00, scan_01" in said and "nnUNetPlans_3d_fullres: preprocessed for" in said
    assert tree(tmp_path) == before


def test_a_plan_of_another_dataset_is_refused_before_anything_is_changed(
    preprocessed: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrected(preprocessed, tmp_path / "corrected")
    plans = read(preprocessed.plans_file)
    (preprocessed.preprocessed / "Copied.json").write_text(
        json.dumps({**plans, "dataset_name": "Dataset001_A"})
    )
    before = tree(preprocessed.raw), tree(preprocessed.preprocessed)
    assert adopt(folder) == 1
    assert "Copied.json, key dataset_name: is 'Dataset001_A'" in capsys.readouterr().err
    assert (tree(preprocessed.raw), tree(preprocessed.preprocessed)) == before


def test_without_a_split_the_old_cases_are_split_as_nnunet_would_have(tiny: Tiny, tmp_path: Path) -> None:
    assert adopt(corrected(tiny, tmp_path / "corrected")) == 0
    old = [f"lab_{i:02d}" for i in range(6)]
    expected = generate_crossval_split(old, seed=12345, n_splits=5)
    for fold, plain in zip(read(tiny.preprocessed / "splits_final.json"), expected, strict=True):
        assert fold["val"] == list(plain["val"]) and fold["train"] == [*plain["train"], *NEW]


def test_the_key_dataset_lists_the_new_cases(tiny: Tiny, tmp_path: Path) -> None:
    entries = {
        f"lab_{i:02d}": {
            "images": [f"imagesTr/lab_{i:02d}_{c:04d}{ENDING}" for c in (0, 1)],
            "label": f"labelsTr/lab_{i:02d}{ENDING}",
        }
        for i in range(6)
    }
    for folder in (tiny.raw, tiny.preprocessed):
        write_json({**read(folder / "dataset.json"), "dataset": entries}, folder / "dataset.json")
    assert adopt(corrected(tiny, tmp_path / "corrected", ["scan_02"])) == 0
    found = read(tiny.raw / "dataset.json")
    assert found["dataset"]["scan_02"] == {
        "images": [f"imagesTr/scan_02_{c:04d}{ENDING}" for c in (0, 1)],
        "label": f"labelsTr/scan_02{ENDING}",
    }
    assert found["numTraining"] == 7 and len(found["dataset"]) == 7


def wrong_value(tiny: Tiny, folder: Path) -> None:
    write_image(folder / f"scan_00{ENDING}", np.full(SHAPE, 7, np.uint8))


def wrong_shape(tiny: Tiny, folder: Path) -> None:
    write_image(folder / f"scan_00{ENDING}", np.ones((4, 5, 6), np.uint8))


def off_grid(tiny: Tiny, folder: Path) -> None:
    write_image(folder / f"scan_00{ENDING}", np.ones(SHAPE, np.uint8), (3.0, 3.0, 3.0))


def one_hot(tiny: Tiny, folder: Path) -> None:
    file = str(folder / f"scan_00{ENDING}")
    label = sitk.ReadImage(file)
    layers = [sitk.Cast(label == value, sitk.sitkUInt8) for value in range(2)]
    sitk.WriteImage(sitk.JoinSeries(layers), file)


def wrong_name(tiny: Tiny, folder: Path) -> None:
    (folder / f"scan_00{ENDING}").rename(folder / f"scan_00_0000{ENDING}")


def damaged(tiny: Tiny, folder: Path) -> None:
    file = folder / f"scan_00{ENDING}"
    file.write_bytes(file.read_bytes()[:-20])


def foreign_label(tiny: Tiny, folder: Path) -> None:
    shutil.copy(tiny.raw / "labelsTr" / f"lab_00{ENDING}", tiny.raw / "labelsTr" / f"scan_00{ENDING}")


def foreign_image(tiny: Tiny, folder: Path) -> None:
    """Not listed in dataset.json, so no training case."""
    entry = {
        "images": [f"imagesTr/lab_00_{c:04d}{ENDING}" for c in (0, 1)],
        "label": f"labelsTr/lab_00{ENDING}",
    }
    content = {**read(tiny.raw / "dataset.json"), "dataset": {"lab_00": entry}, "numTraining": 1}
    write_json(content, tiny.raw / "dataset.json")
    for c in (0, 1):
        image = f"lab_01_{c:04d}{ENDING}"
        shutil.copy(tiny.raw / "imagesTr" / image, tiny.raw / "imagesTr" / image.replace("lab_01", "scan_00"))


def foreign_second_file(tiny: Tiny, folder: Path) -> None:
    for place, text in ((folder, "{}"), (tiny.raw / "labelsTr", "mine")):
        (place / "scan_00.json").write_text(text)


def another_format(tiny: Tiny, folder: Path) -> None:
    (folder / f"scan_00{ENDING}").rename(folder / "scan_00.nrrd")


def linked_folder(tiny: Tiny, folder: Path) -> None:
    (tiny.raw / "imagesUn").rename(tiny.raw.parent / "shared")
    (tiny.raw / "imagesUn").symlink_to(tiny.raw.parent / "shared")


def bad_split(tiny: Tiny, folder: Path) -> None:
    write_json([{"train": ["nobody"], "val": ["lab_00"]}], tiny.preprocessed / "splits_final.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_value, "values 7 are not declared"),
        (wrong_shape, "shape 4 x 5 x 6; expected 10 x 28 x 26"),
        (off_grid, "spacing, origin or direction are not those of the image"),
        (one_hot, f"scan_00{ENDING}: 2 channels (one-hot, RGB or layers?)"),
        (wrong_name, f"no scan of this name in imagesUn. Is scan_00{ENDING} meant"),
        (damaged, "truncated"),
        (foreign_label, "exists already, and nothing is overwritten"),
        (foreign_image, f"imagesTr/scan_00_0000{ENDING} exists already, and nothing is overwritten"),
        (foreign_second_file, "labelsTr/scan_00.json exists already, and nothing is overwritten"),
        (another_format, f"scan_00.nrrd: another file format; expected {ENDING}. Save it as scan_00{ENDING}"),
        (linked_folder, "is a link to"),
        (bad_split, "nobody: no labeled case"),
    ],
)
def test_one_wrong_file_and_nothing_is_changed(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    folder = corrected(tiny, tmp_path / "corrected")
    spoil(tiny, folder)
    before = tree(tmp_path)
    assert adopt(folder) == 1
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_predictions_that_nobody_corrected_are_not_adopted(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    folder = corrected(tiny, tmp_path / "out" / "segmentations")
    records = {
        case: {"files": [f"segmentations/{case}{ENDING}"], "digest": digest(str(folder / f"{case}{ENDING}"))}
        for case in NEW
    }
    write_json({"cases": records}, tmp_path / "out" / "pseudo_labels.json")
    assert adopt(folder) == 1
    assert "scan_00, scan_01 as predicted, not corrected" in capsys.readouterr().err
    assert adopt(folder, "--accept-unedited") == 0


@pytest.mark.parametrize("with_preprocessed", [False, True])
def test_a_kill_at_any_point_is_made_good_by_the_next_call(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_preprocessed: bool
) -> None:
    tiny = request.getfixturevalue("preprocessed" if with_preprocessed else "tiny")
    split(tiny)
    folder = corrected(tiny, tmp_path / "corrected", ["scan_00"] if with_preprocessed else NEW)
    start = {place: tree(place) for place in (tiny.raw, tiny.preprocessed)}
    saved = tmp_path / "saved"
    for place in start:
        shutil.copytree(place, saved / place.parent.name)

    class Killed(BaseException):
        pass

    steps = left = 0
    real = {name: getattr(module, name) for name in ("copy_file", "_move", "write_json", "bring_up_to_date")}

    def count(name: str) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps, left
            steps, left = steps + 1, left - 1
            if left == 0:
                raise Killed
            return real[name](*arguments, **options)

        return step

    for name in real:
        monkeypatch.setattr(module, name, count(name))
    assert adopt(folder) == 0
    total, done = steps, {place: tree(place) for place in start}
    assert total > 10 and done[tiny.raw] != start[tiny.raw]
    undecided = finished = 0
    for point in range(1, total + 1, 5 if with_preprocessed else 1):
        for place in start:
            shutil.rmtree(place)
            shutil.copytree(saved / place.parent.name, place)
        left = point
        with pytest.raises(Killed):
            adopt(folder)
        pending = [
            f for f in inspect_files(str(tiny.raw), str(tiny.preprocessed)) if "interrupted" in f.found
        ]
        if pending:
            finished += 1
        else:  # nothing has happened yet
            undecided += 1
            found = {k: v for k, v in tree(tiny.raw).items() if not k.startswith("nnssl_adopt")}
            assert found == start[tiny.raw]
        assert adopt(folder) == 0
        for place, expected in done.items():
            found = tree(place)
            if with_preprocessed:  # arrays may be stored in another order of blocks
                assert found.keys() == expected.keys()
            else:
                assert found == expected
    assert undecided and finished


def test_trainings_do_not_start_on_half_an_adoption(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = module._move

    def full_disk(source: str, destination: str) -> None:
        if "imagesTr" in destination:
            raise OSError(28, "No space left on device", destination)
        real(source, destination)

    monkeypatch.setattr(module, "_move", full_disk)
    folder = corrected(tiny, tmp_path / "corrected")
    assert adopt(folder) == 1
    assert "rerun to finish" in capsys.readouterr().err
    plans = read(tiny.plans_file)
    found = inspect_scans_of_training(
        str(tiny.raw), str(tiny.preprocessed), tiny.dataset_json, plans, "3d_fullres"
    )
    assert any("an adoption was interrupted" in f.found and f.level == "error" for f in found)
    assert adopt(folder, "--dry-run") == 1
    monkeypatch.setattr(module, "_move", real)
    assert adopt(folder) == 0
    assert "Finished the adoption that was interrupted" in capsys.readouterr().out
    assert not (tiny.raw / "imagesUn" / f"scan_00_0000{ENDING}").exists()


def test_nothing_is_adopted_while_a_training_of_the_dataset_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrected(tiny, tmp_path / "corrected")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    other = tmp_path / "results" / tiny.raw.name / "nnUNetTrainerSemi__nnUNetPlans__3d_fullres" / "fold_3"
    other.mkdir(parents=True)
    lock, parent = other / "training.lock", os.getppid()
    lives = {**own_process(), "pid": parent, "started": started(parent), "command": "nnssl train 777"}
    write_json(lives, lock)
    before = tree(tmp_path)
    for options in ((), ("--dry-run",)):
        assert adopt(folder, *options) == 1
        said = capsys.readouterr().err
        assert f"process {parent} on" in said and "fold_3/training.lock" in said and "train 777" in said
        assert tree(tmp_path) == before
    write_json({**lives, "started": "another time"}, lock)
    assert adopt(folder) == 0 and lock.exists()


def test_links_move_as_links(tiny: Tiny, tmp_path: Path) -> None:
    scan = tiny.raw / "imagesUn" / f"scan_00_0000{ENDING}"
    shared = tmp_path / "shared.nii.gz"
    scan.rename(shared)
    scan.symlink_to(shared)
    folder = corrected(tiny, tmp_path / "corrected", ["scan_00"])
    assert adopt(folder) == 0
    moved = tiny.raw / "imagesTr" / scan.name
    assert os.readlink(moved) == str(shared) and shared.is_file()
    assert sitk.ReadImage(str(moved)).GetSpacing() == pytest.approx(SPACING)


def test_a_link_into_a_folder_beside_it_still_points_there(tiny: Tiny, tmp_path: Path) -> None:
    scan = tiny.raw / "imagesUn" / f"scan_00_0000{ENDING}"
    (scan.parent / "patient").mkdir()
    scan.rename(scan.parent / "patient" / "image.nii.gz")
    scan.symlink_to("patient/image.nii.gz")
    assert adopt(corrected(tiny, tmp_path / "corrected", ["scan_00"])) == 0
    moved = tiny.raw / "imagesTr" / scan.name
    assert os.readlink(moved) == "../imagesUn/patient/image.nii.gz" and not os.path.lexists(scan)
    assert sitk.ReadImage(str(moved)).GetSpacing() == pytest.approx(SPACING)


def test_a_copy_of_the_plan_beside_it_is_not_what_new_cases_are_preprocessed_by(
    preprocessed: Tiny, tmp_path: Path
) -> None:
    copy = read(preprocessed.plans_file)
    configuration = copy["configurations"]["3d_fullres"]
    configuration["spacing"] = [2 * mm for mm in configuration["spacing"]]
    write_json(copy, preprocessed.preprocessed / "nnUNetPlans-old.json")
    assert adopt(corrected(preprocessed, tmp_path / "corrected", ["scan_00"])) == 0
    plans = PlansManager(str(preprocessed.plans_file))
    target, cases = labeled_cases(plans, "3d_fullres", preprocessed.dataset_json, str(preprocessed.raw))
    assert not [case.name for case in cases if stale_reason(case, target)]


def test_arrays_of_an_older_nnunet_are_refused_before_anything_is_changed(
    preprocessed: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrected(preprocessed, tmp_path / "corrected", ["scan_00"])
    (preprocessed.preprocessed / "nnUNetPlans_3d_fullres" / "lab_00.npz").touch()
    before = tree(tmp_path)
    assert adopt(folder) == 1
    assert "lab_00.npz of nnU-Net before 2.6" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_the_journal_is_read_from_any_working_directory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corrected(tiny, tmp_path / "corrected", ["scan_00"])
    monkeypatch.chdir(tiny.raw.parent)
    with monkeypatch.context() as m:
        m.setenv("nnUNet_raw", ".")
        m.setattr(module, "_carry_out", lambda staging: None)
        assert adopt(folder) == 0
    monkeypatch.chdir(tmp_path)
    assert adopt(folder) == 0
    assert (tiny.raw / "labelsTr" / f"scan_00{ENDING}").is_file()


def test_without_the_raw_dataset_it_is_named(
    preprocessed: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrected(preprocessed, tmp_path / "corrected", ["scan_00"])
    preprocessed.raw.rename(preprocessed.raw.with_name("elsewhere"))
    assert adopt(folder) == 1
    said = capsys.readouterr().err
    assert str(preprocessed.raw) in said and "not foreseen" not in said


def test_one_folder_for_two_variables_is_refused_before_anything_is_changed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrected(tiny, tmp_path / "corrected", ["scan_00"])
    monkeypatch.setenv("nnUNet_preprocessed", str(tiny.raw.parent))
    before = tree(tmp_path)
    assert adopt(folder) == 1
    assert "nnUNet_raw and nnUNet_preprocessed are the same folder" in capsys.readouterr().err
    assert tree(tmp_path) == before
