from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.freshness import digest
from nnssl.data.labeled import copy_ground_truth, ensure_labeled, labeled_cases, outdated_cases
from tests.raw_dataset import Tiny, stored, write_image

CASES = [f"lab_{index:02d}" for index in range(6)]


def ensure(tiny: Tiny, **options: Any) -> None:
    plans_manager = PlansManager(str(tiny.plans_file))
    ensure_labeled(
        plans_manager, "3d_fullres", tiny.dataset_json, str(tiny.raw), 1, show_progress=False, **options
    )


def by_nnunet(tiny: Tiny, folder: Path) -> None:
    """What nnU-Net's own preprocessing writes."""
    plans_manager = PlansManager(str(tiny.plans_file))
    folder.mkdir()
    for case in CASES:
        images = [str(tiny.raw / "imagesTr" / f"{case}_000{channel}.nii.gz") for channel in (0, 1)]
        label = str(tiny.raw / "labelsTr" / f"{case}.nii.gz")
        preprocessor = DefaultPreprocessor(verbose=False)
        configuration = plans_manager.get_configuration("3d_fullres")
        preprocessor.run_case_save(
            str(folder / case), images, label, plans_manager, configuration, tiny.dataset_json
        )


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def redone(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {
        name.removesuffix(".b2nd")
        for name in after
        if name.endswith("b2nd") and "_seg" not in name and before.get(name) != after[name]
    }


def test_result_is_bit_identical_to_nnunet_class_locations_included(tiny: Tiny, tmp_path: Path) -> None:
    ensure(tiny)
    by_nnunet(tiny, tmp_path / "reference")
    for case in CASES:
        for suffix in (".b2nd", "_seg.b2nd"):
            assert stored(tiny.labeled / (case + suffix)) == stored(tmp_path / "reference" / (case + suffix))
        ours, theirs = (
            pickle.loads((folder / f"{case}.pkl").read_bytes())
            for folder in (tiny.labeled, tmp_path / "reference")
        )
        assert sorted(theirs["class_locations"]) == [1, 2]
        for label, locations in theirs.pop("class_locations").items():
            np.testing.assert_array_equal(ours["class_locations"][label], locations)
        assert {key: ours[key] for key in theirs} == theirs


def test_edited_and_removed_cases_are_found_without_reading_what_was_not_touched(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(tiny)
    read: list[str] = []

    def counted(file: str) -> str:
        read.append(Path(file).name)
        return digest(file)

    monkeypatch.setattr("nnssl.data.labeled.digest", counted)

    def outdated(names: list[str] = CASES, **options: Any) -> dict[str, str]:
        plans_manager = PlansManager(str(tiny.plans_file))
        target, cases = labeled_cases(plans_manager, "3d_fullres", tiny.dataset_json, str(tiny.raw))
        return outdated_cases(target, cases, names, **options)

    assert outdated() == {} and read == []
    os.utime(tiny.raw / "labelsTr" / "lab_01.nii.gz")
    assert outdated() == {} and read == ["lab_01.nii.gz"]
    assert outdated(compared=10) == {"lab_01": "source touched, content not compared"}
    write_image(tiny.raw / "labelsTr" / "lab_02.nii.gz", np.ones((10, 28, 26), np.uint8))
    (tiny.raw / "labelsTr" / "lab_03.nii.gz").unlink()
    for channel in (0, 1):
        (tiny.raw / "imagesTr" / f"lab_04_000{channel}.nii.gz").unlink()
    assert outdated() == {
        "lab_02": "source changed",
        "lab_03": "lab_03.nii.gz is gone",
        "lab_04": "no longer in imagesTr",
    }
    assert outdated(["lab_00", "lab_05"]) == {}


def test_the_raw_key_dataset_says_which_cases_there_are_whatever_its_copy_lists(tiny: Tiny) -> None:
    ensure(tiny)

    def entry(case: str) -> dict[str, Any]:
        images = [f"imagesTr/{case}_000{channel}.nii.gz" for channel in (0, 1)]
        return {"images": images, "label": f"labelsTr/{case}.nii.gz"}

    def names(dataset_json: dict[str, Any]) -> list[str]:
        plans_manager = PlansManager(str(tiny.plans_file))
        return [
            case.name for case in labeled_cases(plans_manager, "3d_fullres", dataset_json, str(tiny.raw))[1]
        ]

    copy = {**tiny.dataset_json, "dataset": {case: entry(case) for case in CASES[:4]}}
    file = tiny.raw / "dataset.json"
    file.write_text(json.dumps({**copy, "dataset": {case: entry(case) for case in CASES[1:]}}))
    assert names(copy) == names(tiny.dataset_json) == CASES[1:]
    file.write_text(json.dumps(tiny.dataset_json))
    assert names(copy) == CASES
    for damaged in ("{", "[]", json.dumps({**copy, "dataset": [1]})):
        file.write_text(damaged)
        assert names(copy) == CASES[:4]


def test_second_call_writes_nothing(tiny: Tiny) -> None:
    ensure(tiny)
    before = stamps(tiny.labeled)
    ensure(tiny)
    assert stamps(tiny.labeled) == before


def test_work_of_nnunet_itself_is_accepted_and_later_plan_changes_are_noticed(tiny: Tiny) -> None:
    by_nnunet(tiny, tiny.labeled)
    before = stamps(tiny.labeled)
    ensure(tiny)
    assert redone(before, stamps(tiny.labeled)) == set()
    tiny.edit_plan("3d_fullres", normalization_schemes=["ZScoreNormalization", "ZScoreNormalization"])
    ensure(tiny)
    assert redone(before, stamps(tiny.labeled)) == set(CASES)


def test_work_of_nnunet_for_another_spacing_is_redone(tiny: Tiny) -> None:
    by_nnunet(tiny, tiny.labeled)
    before = stamps(tiny.labeled)
    tiny.edit_plan("3d_fullres", spacing=[4.0, 0.9, 0.8])
    ensure(tiny)
    assert redone(before, stamps(tiny.labeled)) == set(CASES)


@pytest.mark.parametrize("spoil", ["newer label", "truncated", "half a pickle", "no segmentation"])
def test_only_the_stale_case_of_nnunets_work_is_redone(tiny: Tiny, spoil: str) -> None:
    by_nnunet(tiny, tiny.labeled)
    if spoil == "newer label":
        os.utime(tiny.raw / "labelsTr" / "lab_02.nii.gz", (2e9, 2e9))
    elif spoil == "no segmentation":
        (tiny.labeled / "lab_02_seg.b2nd").unlink()
    else:
        file = tiny.labeled / ("lab_02.b2nd" if spoil == "truncated" else "lab_02.pkl")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = stamps(tiny.labeled)
    ensure(tiny)
    after = stamps(tiny.labeled)
    assert redone(before, after) == {"lab_02"}
    ensure(tiny)
    assert stamps(tiny.labeled) == after


def older_label(tiny: Tiny, case: str) -> Path:
    """Another label map of the same case, with a time long before, as an archive brings it."""
    label = tiny.raw / "labelsTr" / f"{case}.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    write_image(label, np.roll(array, 3, 1))
    os.utime(label, (1e9, 1e9))
    return label


def test_an_older_label_in_the_place_of_that_which_nnunet_preprocessed_is_noticed(tiny: Tiny) -> None:
    by_nnunet(tiny, tiny.labeled)
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    older_label(tiny, "lab_02")
    before = stamps(tiny.labeled)
    ensure(tiny)
    assert redone(before, stamps(tiny.labeled)) == {"lab_02"}


def test_an_older_label_is_noticed_in_every_configuration(tiny: Tiny) -> None:
    by_nnunet(tiny, tiny.labeled)
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    older_label(tiny, "lab_02")
    os.utime(tiny.raw / "labelsTr" / "lab_03.nii.gz", (1e9, 1e9))  # another time, the same content
    before = stamps(tiny.labeled)
    # as after the preprocessing of another configuration
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    ensure(tiny)
    assert redone(before, stamps(tiny.labeled)) == {"lab_02"}
    after = stamps(tiny.labeled)
    ensure(tiny)
    assert stamps(tiny.labeled) == after


def test_changed_label_and_changed_classes_are_noticed(tiny: Tiny) -> None:
    ensure(tiny)
    before = stamps(tiny.labeled)
    label = tiny.raw / "labelsTr" / "lab_04.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    write_image(label, np.where(array == 2, 1, array).astype(np.uint8))
    ensure(tiny)
    after = stamps(tiny.labeled)
    assert redone(before, after) == {"lab_04"}
    dataset_json = {
        **tiny.dataset_json,
        "labels": {"background": 0, "both": [1, 2], "b": 2},
        "regions_class_order": [1, 2],
    }
    plans_manager = PlansManager(str(tiny.plans_file))
    ensure_labeled(plans_manager, "3d_fullres", dataset_json, str(tiny.raw), 1, show_progress=False)
    assert redone(after, stamps(tiny.labeled)) == set(CASES)
    assert sorted(pickle.loads((tiny.labeled / "lab_00.pkl").read_bytes())["class_locations"], key=str) == [
        (1, 2),
        2,
    ]


def test_cases_taken_out_of_imagestr_are_moved_aside_and_named(tiny: Tiny) -> None:
    ensure(tiny)
    lines: list[str] = []
    for channel in (0, 1):
        (tiny.raw / "imagesTr" / f"lab_05_000{channel}.nii.gz").unlink()
    ensure(tiny, log=lines.append)
    assert not list(tiny.labeled.glob("lab_05*"))
    assert len(list(tiny.labeled.glob("*.pkl"))) == 5
    aside = tiny.labeled.with_name(tiny.labeled.name + "_removed")
    assert sorted(p.name for p in aside.iterdir()) == ["lab_05.b2nd", "lab_05.pkl", "lab_05_seg.b2nd"]
    assert "lab_05" in lines[0] and str(aside) in lines[0]


@pytest.mark.parametrize(
    ("folder", "pattern", "message"),
    [
        ("imagesTr", "*", "no labeled case in .*imagesTr"),
        ("labelsTr", "lab_01*", r"missing: .*labelsTr/lab_01\.nii\.gz"),
    ],
)
def test_absent_raw_files_are_an_error_that_loses_nothing(
    tiny: Tiny, folder: str, pattern: str, message: str
) -> None:
    ensure(tiny)
    before = stamps(tiny.labeled)
    for file in (tiny.raw / folder).glob(pattern):
        file.unlink()
    with pytest.raises(ValueError, match=message):
        ensure(tiny)
    assert stamps(tiny.labeled) == before


def test_unreadable_label_is_named_and_the_preprocessed_case_stays(tiny: Tiny) -> None:
    ensure(tiny)
    before = stamps(tiny.labeled)
    (tiny.raw / "labelsTr" / "lab_01.nii.gz").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"lab_01: .*labelsTr/lab_01\.nii\.gz: cannot be read"):
        ensure(tiny)
    assert stamps(tiny.labeled) == before


def test_labels_of_another_shape_are_an_error_naming_the_case(tiny: Tiny) -> None:
    write_image(tiny.raw / "labelsTr" / "lab_01.nii.gz", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(
        ValueError, match=r"lab_01: could not be preprocessed from .*labelsTr/lab_01\.nii\.gz"
    ):
        ensure(tiny)


def test_ground_truth_is_copied_where_it_is_newer(tiny: Tiny) -> None:
    copies = tiny.preprocessed / "gt_segmentations"
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    assert sorted(file.name for file in copies.iterdir()) == [f"{case}.nii.gz" for case in CASES]
    before = stamps(copies)
    label = tiny.raw / "labelsTr" / "lab_03.nii.gz"
    write_image(label, np.ones((10, 28, 26), np.uint8))
    os.utime(label, (2e9, 2e9))
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    assert {name for name, stamp in stamps(copies).items() if before[name] != stamp} == {"lab_03.nii.gz"}
    assert (copies / "lab_03.nii.gz").read_bytes() == label.read_bytes()


def test_ground_truth_of_cases_taken_out_is_moved_aside_and_named(tiny: Tiny) -> None:
    lines: list[str] = []
    copies = tiny.preprocessed / "gt_segmentations"
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed), lines.append)
    (copies / "notes.txt").touch()
    for channel in (0, 1):
        (tiny.raw / "imagesTr" / f"lab_05_000{channel}.nii.gz").unlink()
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed), lines.append)
    assert sorted(file.name for file in copies.iterdir()) == [
        *(f"{case}.nii.gz" for case in CASES[:5]),
        "notes.txt",
    ]
    aside = tiny.preprocessed / "gt_segmentations_removed"
    assert [file.name for file in aside.iterdir()] == ["lab_05.nii.gz"]
    assert len(lines) == 1 and "lab_05" in lines[0] and str(aside) in lines[0]


def test_a_preprocessed_folder_on_another_disk_is_filled_and_tidied(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, replace = tmp_path / "disk", os.replace
    (disk / "cases").mkdir(parents=True)
    tiny.labeled.symlink_to(disk / "cases")

    def on_one_disk(source: Any, path: Any) -> None:
        there = [Path(p).resolve().is_relative_to(disk) for p in (source, path)]
        if there[0] != there[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        replace(source, path)

    monkeypatch.setattr(os, "replace", on_one_disk)
    ensure(tiny)
    assert len(list((disk / "cases").iterdir())) == 18
    for channel in (0, 1):
        (tiny.raw / "imagesTr" / f"lab_05_000{channel}.nii.gz").unlink()
    ensure(tiny)
    assert len(list((disk / "cases").iterdir())) == 15
    aside = tiny.labeled.with_name(tiny.labeled.name + "_removed")
    assert sorted(p.name for p in aside.iterdir()) == ["lab_05.b2nd", "lab_05.pkl", "lab_05_seg.b2nd"]


def test_ground_truth_is_copied_where_an_older_file_took_its_place(tiny: Tiny) -> None:
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    label = tiny.raw / "labelsTr" / "lab_03.nii.gz"
    write_image(label, np.ones((10, 28, 26), np.uint8))
    os.utime(label, (1e9, 1e9))
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    assert (tiny.preprocessed / "gt_segmentations" / "lab_03.nii.gz").read_bytes() == label.read_bytes()
