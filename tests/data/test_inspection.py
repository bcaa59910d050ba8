from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.commands.cli import main
from nnssl.data.dataset_json import inspect_dataset_json
from nnssl.data.findings import Finding, listed, raise_errors
from nnssl.data.inspection import (
    inspect_contents,
    inspect_files,
    inspect_plans,
    inspect_preprocessed,
    inspect_scans_of_training,
    inspect_split,
    read_dataset_json,
)
from nnssl.data.labeled import copy_ground_truth, ensure_labeled, undeclared_labels
from nnssl.data.names import inspect_names
from nnssl.data.scans import FILE, Usual, label_statistics
from nnssl.data.unlabeled import ensure_unlabeled, find_unlabeled_images
from nnssl.methods.fixmatch import FixMatchConfig
from tests.place import ARCHITECTURE
from tests.raw_dataset import SHAPE, SPACING, Tiny, planned_dataset, write_case, write_image

SOUND = {
    "channel_names": {"0": "MR", "1": "CT"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 6,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return planned_dataset(tmp_path, monkeypatch)


def lines(findings: Iterable[Finding], level: str) -> list[str]:
    return [str(finding) for finding in findings if finding.level == level]


def files(tiny: Tiny) -> list[Finding]:
    return list(inspect_files(str(tiny.raw), str(tiny.preprocessed)))


def contents(tiny: Tiny, **options: Any) -> list[Finding]:
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    return list(inspect_contents(str(tiny.raw), str(tiny.preprocessed), tiny.dataset_json, plans, **options))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_sound_dataset_has_no_finding(tiny: Tiny) -> None:
    assert files(tiny) == []
    assert contents(tiny) == []


def test_every_error_stands_on_its_own_line() -> None:
    one, two = Finding("error", "a\nb", "bad", "good", "Mend it"), Finding("error", "c", "bad")
    assert str(one) == "a\\nb: bad; expected good. Mend it"
    raise_errors([Finding("warning", "x", "odd")])
    with pytest.raises(ValueError, match=r"^c: bad$"):
        raise_errors([two])
    with pytest.raises(ValueError, match=r"2 errors:\n  - a\\nb: bad.*\n  - c: bad"):
        raise_errors([one, two])
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"


# dataset.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"0": "background", "1": "a"}}, "key labels: turned round"),
        ({"labels": {"background": 0, "a": 1, "b": 3}}, "key labels: values 0, 1, 3; expected 0, 1, 2"),
        ({"labels": {"background": 1, "a": 2}}, "background is 1"),
        ({"labels": {"a": 1}}, "no background"),
        ({"labels": {"background": 0}}, "key labels: no class beside background"),
        ({"labels": {"background": 0, "ignore": 1}}, "key labels: no class beside background"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "key regions_class_order: absent"),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]},
            r"regions_class_order: is \[1\]; expected a list of 2 labels, one per region \(whole, core\)",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 7]},
            "regions_class_order: names 7",
        ),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "labels.ignore: is 1; expected one above all"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, "labels.ignore: is"),
        ({"labels": {"background": 0, "a": "1"}}, "labels.a: is '1'; expected an integer"),
        ({"labels": {"background": 0, "a": True}}, "labels.a: is True"),
        ({"labels": {"background": 0, "a": []}}, r"labels.a: is \[\]"),
        ({"labels": []}, r"key labels: is \[\]"),
        ({"labels": None}, "key labels: is None"),
        ({"channel_names": {"MR": 0}}, "key channel_names: turned round"),
        ({"channel_names": {"MR": "0", "CT": "1"}}, "key channel_names: turned round"),
        ({"channel_names": {"1": "MR", "0": "CT"}}, "key channel_names: keys 1, 0; expected 0, 1"),
        ({"channel_names": ["MR"]}, "key channel_names: is"),
        ({"channel_names": {"0": 3}}, "key channel_names: 0: 3; expected a name"),
        ({"modality": 3}, "key modality: differs from channel_names"),
        ({"numTraining": "6"}, "key numTraining: is '6'"),
        ({"numTraining": True}, "key numTraining: is True"),
        ({"file_ending": "nii.gz"}, "key file_ending: is 'nii.gz'"),
        ({"file_ending": ".dcm"}, "key file_ending: no reader for .dcm; expected one of"),
        ({"file_ending": None}, "key file_ending: is None"),
        (
            {"file_ending": ".NII.GZ"},
            "key file_ending: is .NII.GZ: SimpleITK reads such files, but",
        ),
        ({"file_ending": ".MHA", "overwrite_image_reader_writer": "SimpleITKIO"}, "key file_ending: is .MHA"),
        ({"file_ending": ".npy"}, "key file_ending: no reader for .npy"),
        ({"file_ending": ".jpg"}, "key file_ending: no reader for .jpg"),
        (
            {"file_ending": ".mhd", "overwrite_image_reader_writer": "SimpleITKIO"},
            "key file_ending: .mhd keeps its voxels in a second file",
        ),
        ({"overwrite_image_reader_writer": "NoIO"}, "overwrite_image_reader_writer: is NoIO"),
        ({"overwrite_image_reader_writer": 3}, "overwrite_image_reader_writer: is 3"),
        ({"dataset": ["a"]}, "key dataset: holds list"),
        ({"dataset": {"a": {"images": "a.nii.gz", "label": "b.nii.gz"}}}, "key dataset.a: is"),
        ({"dataset": {"a": None}}, "key dataset.a: is None"),
        (
            {"dataset": {"a": {"images": ["a.mha"], "label": "b.mha"}}},
            "b.mha, which nnU-Net copies as a.nii.gz",
        ),
        (
            {"nnssl": {"seed": 1}},
            "key nnssl: not read there; expected the key nnssl at the top of the plans file",
        ),
        ({"dataset": {"../a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, r"the case is named '\.\./a'"),
        ({"dataset": {"a_seg": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, "the case is named a_seg"),
        ({"dataset": {"a": {"images": ["../../a"], "label": "b.nii.gz"}}}, r"\.\./\.\./a leaves nnUNet_raw"),
    ],
)
def test_dataset_json_is_refused_with_key_and_expectation(change: dict[str, Any], message: str) -> None:
    errors = lines(inspect_dataset_json("/d/dataset.json", {**SOUND, **change}), "error")
    assert len(errors) == 1 and errors[0].startswith("/d/dataset.json")
    assert re.search(message, errors[0])


@pytest.mark.parametrize("key", sorted(SOUND))
def test_absent_keys_of_dataset_json_are_named(key: str) -> None:
    content = {k: v for k, v in SOUND.items() if k != key}
    (error,) = lines(inspect_dataset_json("dataset.json", content), "error")
    assert f"key {key}: absent" in error


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]},
        {"labels": {"background": 0, "a": 1, "ignore": 2}},
        {"overwrite_image_reader_writer": "NibabelIOWithReorient", "reference": "x"},
        {"dataset": {"a": {"images": ["../Dataset001_A/imagesTr/a.nii.gz", "/b"], "label": "c.nii.gz"}}},
    ],
)
def test_what_nnunet_allows_in_dataset_json_is_allowed(change: dict[str, Any]) -> None:
    assert list(inspect_dataset_json("dataset.json", {**SOUND, **change})) == []


def test_an_ending_that_no_reader_lists_is_a_warning() -> None:
    odd = {**SOUND, "file_ending": ".vtk", "overwrite_image_reader_writer": "SimpleITKIO"}
    (warning,) = inspect_dataset_json("dataset.json", odd)
    assert warning.level == "warning" and "no reader of nnU-Net lists .vtk" in warning.found


def test_odd_but_valid_dataset_json_is_a_warning() -> None:
    odd = {**SOUND, "region_class_order": [1], "labels": {"background": 0, "a": 1, "b": 1}}
    warnings = lines(inspect_dataset_json("dataset.json", odd), "warning")
    assert "key region_class_order: nnU-Net ignores it. Is regions_class_order meant?" in warnings[0]
    assert "a, b all have the value 1" in warnings[1]


def test_the_format_of_nnunet_v1_is_recognised() -> None:
    v1 = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "a"}, "numTraining": 6, "training": []}
    (error,) = lines(inspect_dataset_json("dataset.json", v1), "error")
    assert "format of nnU-Net v1" in error and "nnUNetv2_convert_old_nnUNet_dataset" in error


@pytest.mark.parametrize("content", ["{half", "[1]", '"text"', "[" * 100_000])
def test_dataset_json_that_is_no_object_is_one_finding(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    (error,) = lines(read_dataset_json(str(tmp_path / "dataset.json"))[0], "error")
    assert error


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(SOUND).replace('"a": 1', '"a": 1, "a": 1')
    (tmp_path / "dataset.json").write_text(text)
    (error,) = lines(read_dataset_json(str(tmp_path / "dataset.json"))[0], "error")
    assert "key a: stands twice" in error


# names


def names(tiny: Tiny, level: str) -> str:
    return "\n".join(lines(inspect_names(str(tiny.raw), tiny.dataset_json), level))


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_a_case_named_like_a_segmentation_is_refused_in_both_folders(tiny: Tiny, folder: str) -> None:
    write_case(tiny.raw / folder, "p1_seg", 1, tiny.raw / "labelsTr" if folder == "imagesTr" else None)
    assert f"{folder}/p1_seg*: the case is named p1_seg" in names(tiny, "error")


def test_files_that_nobody_takes_are_named(tiny: Tiny) -> None:
    folder = tiny.raw / "imagesUn"
    for name in ("scan_10_0000.nii", "scan_14_0000.nrrd", "scan_15_0000.NII.GZ"):
        (folder / name).write_bytes(b"")
    (folder / "patient1").mkdir()
    (folder / "scan_16_0000.nii.gz").symlink_to(tiny.raw / "absent")
    (tiny.raw / "labelsTr" / "lab_99.nii.gz").write_bytes(b"")
    warnings = names(tiny, "warning")
    for name in ("scan_10_0000.nii", "scan_14_0000.nrrd", "scan_15_0000.NII.GZ", "patient1 (folder)"):
        assert name in warnings
    assert "scan_16_0000.nii.gz (dangling link)" in warnings
    assert "labelsTr: not taken: lab_99.nii.gz" in warnings
    assert names(tiny, "error") == ""
    assert sorted(find_unlabeled_images(str(tiny.raw), tiny.dataset_json)) == [
        "scan_00",
        "scan_01",
        "scan_02",
    ]


@pytest.mark.parametrize("name", ["imagesUN", "imagesUnlabeled", "unlabeled", "imageUn", "images_un"])
def test_a_folder_of_nearly_the_right_name_is_pointed_out(tiny: Tiny, name: str) -> None:
    (tiny.raw / "imagesUn").rename(tiny.raw / "aside")
    (tiny.raw / "aside").rename(tiny.raw / name)
    (tiny.raw / "imagesTs").mkdir()
    (warning,) = lines(inspect_names(str(tiny.raw), tiny.dataset_json), "warning")
    assert warning.startswith(f"{tiny.raw / name}: a folder that is not read. Is imagesUn meant?")


def test_a_scan_to_test_on_that_is_trained_on_is_pointed_out(tiny: Tiny) -> None:
    (tiny.raw / "imagesTs").mkdir()
    for file in (tiny.raw / "imagesUn").glob("scan_01_*"):
        shutil.copy(file, tiny.raw / "imagesTs")
    warning = names(tiny, "warning")
    assert warning.startswith(f"{tiny.raw / 'imagesUn'}: scan_01: also in imagesTs. Remove them here if")


@pytest.mark.parametrize(("link", "what"), [(True, "dangling link"), (False, "a file")])
def test_imagesun_must_be_a_folder(tiny: Tiny, link: bool, what: str) -> None:
    shutil.rmtree(tiny.raw / "imagesUn")
    folder = tiny.raw / "imagesUn"
    folder.symlink_to("gone") if link else folder.write_text("")
    assert f"{folder}: {what}; expected a folder. Correct or remove it" in names(tiny, "error")
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    places = str(tiny.raw), str(tiny.preprocessed)
    findings = inspect_scans_of_training(*places, tiny.dataset_json, plans, "3d_fullres")
    assert any(what in finding.found for finding in findings)


def test_a_dataset_without_labeled_cases_or_dataset_json_says_so(tiny: Tiny) -> None:
    shutil.rmtree(tiny.raw / "imagesTr")
    assert any(
        "imagesTr: no labeled case; expected <case>_0000.nii.gz" in e for e in lines(files(tiny), "error")
    )
    (tiny.raw / "dataset.json").rename(tiny.raw / "Dataset.json")
    (error,) = lines(files(tiny), "error")
    assert error == f"{tiny.raw / 'dataset.json'}: missing. Rename Dataset.json"


def test_beside_the_right_folder_only_another_spelling_of_it_is_pointed_out(tiny: Tiny) -> None:
    for name in ("imagesUN", "imagesUn_old"):
        (tiny.raw / name).mkdir()
    (warning,) = lines(inspect_names(str(tiny.raw), tiny.dataset_json), "warning")
    assert warning.startswith(f"{tiny.raw / 'imagesUN'}: a folder that is not read. Is imagesUn meant?")


def test_missing_labels_channels_and_odd_names_are_told_together(tiny: Tiny) -> None:
    (tiny.raw / "labelsTr" / "lab_02.nii.gz").unlink()
    (tiny.raw / "imagesTr" / "lab_03_0001.nii.gz").unlink()
    (tiny.raw / "imagesTr" / "without.nii.gz").write_bytes(b"")
    (tiny.raw / "imagesUn" / "scan_00_0001.nii.gz").unlink()
    write_case(tiny.raw / "imagesUn", "lab_01", 1)
    errors = names(tiny, "error")
    assert "lab_02.nii.gz: missing (case lab_02). Add it, or move the scan into imagesUn" in errors
    assert "lab_03*: channels _0000 found; expected _0000, _0001" in errors
    assert "without.nii.gz: no channel number; expected <case>_0000.nii.gz" in errors
    assert "scan_00*: channels _0000 found" in errors
    assert "lab_01*: a labeled case in imagesTr has the same name" in errors


def test_a_patients_number_where_the_channel_should_stand_is_guessed(tiny: Tiny) -> None:
    content = {**tiny.dataset_json, "channel_names": {"0": "MR"}}
    for folder in ("imagesTr", "imagesUn"):
        for file in (tiny.raw / folder).glob("*_0001.nii.gz"):
            file.unlink()
    for number in (1, 2):
        shutil.copy(
            tiny.raw / "imagesUn" / "scan_00_0000.nii.gz", tiny.raw / "imagesUn" / f"pat_{number:04d}.nii.gz"
        )
    (error,) = lines(inspect_names(str(tiny.raw), content), "error")
    assert "pat*: channels _0001, _0002 found; expected _0000" in error
    assert "If the number is the patient's, append that of the channel (pat_0001_0000.nii.gz)" in error


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_a_name_in_the_other_unicode_form_is_pointed_out(tiny: Tiny, part: str) -> None:
    composed, taken_apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    write_case(tiny.raw / "imagesTr", composed, 9, tiny.raw / "labelsTr")
    for file in list((tiny.raw / part).glob(f"{composed}*")):
        other = file.with_name(file.name.replace(composed, taken_apart))
        file.rename(other)
        if other.name not in os.listdir(other.parent):
            pytest.skip("this file system has one form")
    error = names(tiny, "error")
    assert "the same name is there in the other Unicode form" in error
    assert f"`convmv -r -f utf8 -t utf8 --nfc --notest {tiny.raw}`" in error


@pytest.mark.parametrize("name", ["imagesTr", "imagesUn"])
def test_a_folder_that_may_not_be_read_is_the_one_finding(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = str(tiny.raw / name)
    monkeypatch.setattr("nnssl.data.names.may_read", lambda path: path != folder)
    (error,) = lines(files(tiny), "error")
    assert error.startswith(f"{folder}: permission denied") and "folders r and x" in error
    assert main(["check", "-d", "777"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if folder in line] == [f"FAIL  {error}"]
    if name == "imagesUn":
        with pytest.raises(ValueError, match="permission denied"):
            find_unlabeled_images(str(tiny.raw), tiny.dataset_json)


def test_one_case_with_a_single_channel_does_not_make_all_others_wrong(tiny: Tiny) -> None:
    (tiny.raw / "imagesTr" / "lab_00_0001.nii.gz").unlink()
    (error,) = lines(inspect_names(str(tiny.raw), tiny.dataset_json), "error")
    assert "lab_00*: channels _0000 found; expected _0000, _0001" in error


def test_all_channels_may_be_in_one_file(tiny: Tiny) -> None:
    for folder in ("imagesTr", "imagesUn"):
        for file in (tiny.raw / folder).glob("*_0001.nii.gz"):
            file.unlink()
    assert names(tiny, "error") == ""


def test_hidden_files_are_named_where_nnunet_takes_them_and_where_they_are_ignored(tiny: Tiny) -> None:
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

    left = {"imagesTr": "._lab_00_0000.nii.gz", "labelsTr": "._lab_00.nii.gz"}
    for folder, name in {**left, "imagesUn": "._scan_00_0000.nii.gz"}.items():
        (tiny.raw / folder / name).write_bytes(b"\0\x05\x16\x07")
        (tiny.raw / folder / ".DS_Store").write_bytes(b"")
    taken = get_identifiers_from_splitted_dataset_folder(str(tiny.raw / "imagesTr"), ".nii.gz")
    assert "._lab_00" in taken
    (error,) = lines(inspect_names(str(tiny.raw), tiny.dataset_json), "error")
    assert error.startswith(f"{tiny.raw / 'imagesTr'}: ._lab_00_0000.nii.gz: hidden, but nnU-Net takes")
    assert "Remove them" in error
    warnings = names(tiny, "warning").splitlines()
    assert [line.split(". Remove")[0] for line in warnings] == [
        f"{tiny.raw / 'labelsTr'}: ._lab_00.nii.gz: hidden, ignored",
        f"{tiny.raw / 'imagesUn'}: ._scan_00_0000.nii.gz: hidden, ignored",
    ]


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(("folder", "case"), [("imagesTr", "lab_01"), ("imagesUn", "scan_01")])
def test_a_name_that_is_not_utf8_is_told_and_never_read(
    tiny: Tiny, folder: str, case: str, planned: bool
) -> None:
    for file in sorted((tiny.raw / folder).glob(f"{case}_*")):
        other = os.fsencode(file).replace(case.encode(), b"M\xfcller")
        os.rename(os.fsencode(file), other)
    errors = [line for line in lines(files(tiny), "error") if "UTF-8" in line]
    assert len(errors) == 2 and all(line.isprintable() for line in errors)
    assert errors[0].startswith(f"{tiny.raw / folder}/M\\xfcller_0000.nii.gz: its name is not UTF-8")
    assert "Rename it" in errors[0]
    places = str(tiny.raw), str(tiny.preprocessed)
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8")) if planned else None
    assert list(inspect_contents(*places, tiny.dataset_json, plans)) == []


def test_number_of_labeled_cases_and_capitals_are_warned_about(tiny: Tiny) -> None:
    write_case(tiny.raw / "imagesUn", "LAB_00", 0)
    content = {**tiny.dataset_json, "numTraining": 9}
    warnings = "\n".join(lines(inspect_names(str(tiny.raw), content), "warning"))
    assert "key numTraining: is 9; expected 6" in warnings
    assert "cases LAB_00, lab_00 differ in capitals only" in warnings


def test_entries_of_the_key_dataset_are_looked_for(tiny: Tiny) -> None:
    images = [f"imagesTr/lab_00_{channel:04d}.nii.gz" for channel in (0, 1)]
    entries = {"a": {"images": images, "label": "labelsTr/lab_00.nii.gz"}}
    content = {**tiny.dataset_json, "numTraining": 2, "dataset": entries}
    assert lines(inspect_names(str(tiny.raw), content), "error") == []
    content["dataset"]["b"] = {"images": images, "label": "gone.nii.gz"}
    (error,) = lines(inspect_names(str(tiny.raw), content), "error")
    assert "gone.nii.gz: missing (case b)" in error


# TIFF


@pytest.fixture
def tiff(tiny: Tiny) -> Tiny:
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        for file in sorted((tiny.raw / folder).iterdir()):
            tifffile.imwrite(file.parent / file.name.replace(".nii.gz", ".tif"), read(file))
            file.unlink()
    content = {**tiny.dataset_json, "file_ending": ".tif"}
    for place in (tiny.raw, tiny.preprocessed):
        (place / "dataset.json").write_text(json.dumps(content))
    tiny.edit_plan(image_reader_writer="Tiff3DIO")
    return tiny


def spacing_files(tiny: Tiny) -> None:
    for folder, prefix in (("imagesTr", "lab_0"), ("imagesUn", "scan_0")):
        for index in range(6 if folder == "imagesTr" else 3):
            (tiny.raw / folder / f"{prefix}{index}.json").write_text('{"spacing": [2, 0.9, 0.8]}')


def test_tiff_without_any_spacing_file_is_a_warning(tiff: Tiny) -> None:
    assert lines(files(tiff), "error") == []
    (warning,) = lines(contents(tiff), "warning")
    assert "nnU-Net takes (1, 1, 1)" in warning


def test_tiff_with_spacing_files_is_sound(tiff: Tiny) -> None:
    spacing_files(tiff)
    assert files(tiff) + contents(tiff) == []


@pytest.mark.parametrize(
    "content", ["7.6 7.6 80", "[1, 1, 1]", '{"spacing": [1, 2]}', '{"spacing": [0, 1, 1]}']
)
def test_damaged_spacing_file_is_named_itself(tiff: Tiny, content: str) -> None:
    spacing_files(tiff)
    (tiff.raw / "imagesUn" / "scan_01.json").write_text(content)
    (error,) = lines(files(tiff), "error")
    assert "imagesUn/scan_01.json: no valid spacing file" in error


def test_absent_and_misnamed_spacing_files_are_errors_where_others_are_there(tiff: Tiny) -> None:
    spacing_files(tiff)
    folder = tiff.raw / "imagesUn"
    (folder / "scan_01.json").rename(folder / "scan_01_0000.json")
    errors = "\n".join(lines(files(tiff), "error"))
    assert "scan_01_0000.json: a spacing file that is not read; expected scan_01.json" in errors
    assert "scan_01.json: no spacing file, other cases have one" in errors


# labels


def relabel(tiny: Tiny, change: Callable[[np.ndarray], np.ndarray], case: str = "lab_02") -> Path:
    file = tiny.raw / "labelsTr" / f"{case}.nii.gz"
    write_image(file, change(read(file)))
    return file


@pytest.mark.parametrize(
    ("change", "level", "message"),
    [
        (
            lambda a: np.where(a == 2, 5, a).astype(np.uint8),
            "error",
            "values 5 are not declared; expected 0, 1, 2",
        ),
        (lambda a: (a * 0.5).astype(np.float32), "error", "values 0.5 are no whole numbers"),
        (lambda a: a * 1.0000001, "error", "values 1.00000012, 2.00000024 are no whole numbers"),
        (lambda a: np.zeros_like(a), "warning", "empty: all voxels are background"),
        (
            lambda a: np.where(a == 2, np.nan, a).astype(np.float32),
            "error",
            "NaN or infinite voxels",
        ),
        (lambda a: np.stack([a == 0, a == 1], -1).astype(np.uint8), "error", "2 channels (one-hot, RGB or"),
        (lambda a: a[1:], "error", "shape 9 x 28 x 26; expected 10 x 28 x 26, that of the image"),
    ],
)
def test_label_maps_are_compared_with_dataset_json_and_image(
    tiny: Tiny, change: Callable[[np.ndarray], np.ndarray], level: str, message: str
) -> None:
    file = relabel(tiny, change)
    (finding,) = contents(tiny)
    assert (finding.level, finding.place) == (level, str(file))
    assert message in str(finding)
    assert contents(tiny, with_labels=False) == []


def test_label_maps_that_are_all_empty_are_one_error(tiny: Tiny) -> None:
    for case in range(6):
        relabel(tiny, np.zeros_like, f"lab_0{case}")
    (finding,) = contents(tiny)
    assert finding.level == "error" and finding.place == str(tiny.raw / "labelsTr")
    assert "all 6 label maps are empty" in finding.found
    assert contents(tiny, with_labels=False) == []


def test_label_map_on_another_place_of_the_same_shape_is_a_warning(tiny: Tiny) -> None:
    file = tiny.raw / "labelsTr" / "lab_02.nii.gz"
    write_image(file, read(file), (1.6, 0.9, 2.0))
    (finding,) = contents(tiny)
    assert finding.level == "warning" and "spacing, origin or direction" in finding.found


def test_many_labels_are_all_seen() -> None:
    statistics = label_statistics(np.arange(117)[None, None], {"spacing": [1, 1, 1]})
    assert statistics["values"] == list(range(117))


def prepare(tiny: Tiny) -> None:
    ensure_labeled(
        PlansManager(str(tiny.plans_file)),
        "3d_fullres",
        tiny.dataset_json,
        str(tiny.raw),
        1,
        show_progress=False,
    )


def test_preprocessing_itself_refuses_undeclared_values(tiny: Tiny) -> None:
    relabel(tiny, lambda a: np.where(a == 2, 5, a).astype(np.uint8))
    with pytest.raises(ValueError, match=r"lab_02\.nii\.gz: values 5 are not declared; expected 0, 1, 2"):
        prepare(tiny)
    assert not (tiny.labeled / "lab_02.pkl").exists()


class Stored:
    """Label maps that nnU-Net preprocessed, as its dataset gives them."""

    def __init__(self, folder: Path, **cases: list[int]) -> None:
        self.source_folder, self.cases = str(folder), cases
        self.opened: list[str] = []

    def load_case(self, case: str) -> tuple[Any, ...]:
        self.opened.append(case)
        return None, np.array(self.cases[case]), None, {}


def test_a_training_looks_at_label_maps_that_nnunet_preprocessed_itself(tiny: Tiny) -> None:
    prepare(tiny)
    dataset = Stored(tiny.labeled, stock=[-1, 0, 2], odd=[0, 5, 1], lab_00=[9], hidden=[7])
    assert undeclared_labels(dataset, ["stock", "odd", "lab_00"], {0, 1, 2}) == {"odd": [5]}
    assert dataset.opened == ["stock", "odd"]


# scans unlike the labeled ones


def rescan(
    tiny: Tiny, change: Callable[[np.ndarray], np.ndarray], spacing: tuple[float, ...] = SPACING
) -> Path:
    file = tiny.raw / "imagesUn" / "scan_00_0000.nii.gz"
    image = change(read(file)).astype(np.float32)
    other = tiny.raw / "imagesUn" / "scan_00_0001.nii.gz"
    write_image(file, image, spacing)
    write_image(other, read(other)[: len(image)], spacing)
    return file


@pytest.mark.parametrize(
    ("change", "spacing", "reasons"),
    [
        (lambda a: a, (0.0008, 0.0009, 0.002), ["spacing", "in metres?"]),
        (lambda a: a, (8.0, 9.0, 20.0), ["spacing", "field of view"]),
        (lambda a: a[:1], SPACING, ["a single slice", "scout"]),
        (lambda a: a[:2], SPACING, ["field of view"]),
        (lambda a: np.where(a > 50, a * 10 - 1500, -1000), SPACING, ["another modality or unit?"]),
        (lambda a: np.minimum(a, 105), SPACING, ["saturated"]),
        (lambda a: (a > 130) * 1.0, SPACING, ["2 distinct values", "a label map?"]),
        (lambda a: np.where(np.arange(a.size).reshape(a.shape) == 9, 1e7, a), SPACING, ["extreme values"]),
    ],
)
def test_scans_unlike_the_labeled_ones_are_named(
    tiny: Tiny, change: Callable[[np.ndarray], np.ndarray], spacing: tuple[float, ...], reasons: list[str]
) -> None:
    file = rescan(tiny, change, spacing)
    (finding,) = contents(tiny)
    assert (finding.level, finding.place) == ("warning", str(file))
    assert all(reason in finding.found for reason in reasons), finding.found


def channel(**changes: float) -> dict[str, Any]:
    usual = {
        "min": 0.0,
        "low": 0.0,
        "median": 90.0,
        "high": 200.0,
        "max": 210.0,
        "distinct": 900,
        "at_max": 0.0,
    }
    return {"shape": [10, 20, 20], "spacing": [2.0, 1.0, 1.0], "channels": [{**usual, **changes}]}


def reorient(tiny: Tiny, axes: str, case: str = "scan_00") -> Path:
    """The same voxels at the same places, stored along other axes."""
    folder = tiny.raw / ("imagesUn" if case.startswith("scan") else "imagesTr")
    paths = [folder / f"{case}_{channel:04d}.nii.gz" for channel in (0, 1)]
    for file in paths:
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), axes), str(file))
    return paths[0]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("axes", ["RAS", "LPI"])
def test_a_scan_stored_along_other_axes_is_named(tiny: Tiny, reader: str, axes: str) -> None:
    file = reorient(tiny, axes)
    tiny.edit_plan(image_reader_writer=reader)
    (finding,) = contents(tiny)
    assert (finding.level, finding.place) == ("warning", str(file))
    assert f"axes {axes} (labeled LPS): stored flipped or turned" in finding.found


def test_permuted_axes_are_named_and_one_labeled_case_like_them_allows_them(tiny: Tiny) -> None:
    reorient(tiny, "PIR")
    assert "axes PIR (labeled LPS)" in str(contents(tiny)[0])
    for folder, pattern in (("imagesTr", "lab_00_*"), ("labelsTr", "lab_00.*")):
        for file in (tiny.raw / folder).glob(pattern):
            sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "PIR"), str(file))
    assert contents(tiny) == []


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_a_reader_that_turns_scans_makes_axes_no_matter(tiny: Tiny, reader: str) -> None:
    reorient(tiny, "PIR")
    tiny.edit_plan(image_reader_writer=reader)
    assert contents(tiny) == []


def test_oblique_axes_point_nowhere() -> None:
    def placed(degrees: float) -> dict[str, Any]:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        direction = (c, -s, 0, s, c, 0, 0, 0, 1)
        properties = {"spacing": (1, 1, 1), "sitk_stuff": {"origin": (0, 0, 0), "direction": direction}}
        return label_statistics(np.zeros((1, 2, 2, 2)), properties)

    assert [placed(d)["axes"] for d in (0, 30, 44, 50, 90, 180)] == ["LPS", "LPS", "", "", "PRS", "RAS"]
    flat = {"spacing": (999, 1, 1), "sitk_stuff": {"origin": (0, 0), "direction": (1, 0, 0, 1)}}
    assert label_statistics(np.zeros((1, 1, 2, 2)), flat)["axes"] == ""


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize(
    ("origin", "direction"),
    [((50.0, 0.0, 0.0), np.eye(3)), ((0.0, 0.0, 0.0), np.diag([-1.0, -1.0, 1.0]))],
)
def test_channels_of_a_case_that_lie_apart_are_named(
    tiny: Tiny, reader: str, origin: tuple[float, ...], direction: np.ndarray
) -> None:
    first, second = (tiny.raw / "imagesTr" / f"lab_02_{channel:04d}.nii.gz" for channel in (0, 1))
    image = sitk.ReadImage(str(second))
    image.SetOrigin(origin)
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(second))
    tiny.edit_plan(image_reader_writer=reader)
    (finding,) = contents(tiny)
    assert (finding.level, finding.place) == ("warning", str(second))
    distance = 50 if origin[0] else 2 * np.hypot(25 * 0.8, 27 * 0.9)
    assert f"up to {distance:.3g} mm off the grid of {first.name}" in finding.found
    image.SetOrigin((0.01, 0, 0))
    image.SetDirection(np.eye(3).ravel().tolist())
    sitk.WriteImage(image, str(second))
    assert contents(tiny) == []


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_channels_that_the_reader_turns_onto_one_grid_are_sound(tiny: Tiny, reader: str) -> None:
    file = str(tiny.raw / "imagesUn" / "scan_02_0001.nii.gz")
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(file), "PIR"), file)
    tiny.edit_plan(image_reader_writer=reader)
    assert contents(tiny) == []
    image = sitk.ReadImage(file)
    image.SetOrigin((0, 0, 90))
    sitk.WriteImage(image, file)
    assert "mm off the grid of scan_02_0000.nii.gz" in str(contents(tiny)[0])


def test_scans_like_one_of_the_labeled_ones_are_left_alone() -> None:
    labeled = [channel()] * 9 + [channel(low=-1000, high=1500, min=-1024, max=3000, at_max=0.2)]
    usual = Usual(labeled)
    assert usual.unlike(channel(low=-900, high=900, min=-1000, max=2000, at_max=0.5)) == []
    assert usual.unlike(channel(low=10, high=100)) == []
    assert usual.unlike({**channel(), "spacing": [3.9, 0.6, 1.5]}) == []


def test_with_few_labeled_scans_the_limits_are_wider() -> None:
    scan = {**channel(), "spacing": [6.0, 1.0, 1.0]}
    assert Usual([channel()] * 9).unlike(scan) == []
    assert "spacing 6 x 1 x 1" in Usual([channel()] * 10).unlike(scan)[0]


def test_scale_and_zero_count_where_the_plan_keeps_them() -> None:
    scan, labeled = channel(high=1500, max=1510), [channel()]
    assert Usual(labeled, ["ZScoreNormalization"]).unlike(scan) == []
    assert "intensities" in Usual(labeled, ["CTNormalization"]).unlike(scan)[0]


def test_a_constant_scan_is_an_error_and_a_constant_channel_a_warning(tiny: Tiny) -> None:
    file = rescan(tiny, np.zeros_like)
    assert any(
        "channel 0: all voxels have the same value" in line for line in lines(contents(tiny), "warning")
    )
    write_image(tiny.raw / "imagesUn" / "scan_00_0001.nii.gz", np.ones(SHAPE, np.float32))
    assert f"{file}: all voxels have the same value. Remove the scan" in lines(contents(tiny), "error")


def test_a_scan_that_is_labeled_too_is_found_by_its_voxels(tiny: Tiny) -> None:
    for index in (0, 1):
        image = sitk.ReadImage(str(tiny.raw / "imagesTr" / f"lab_03_{index:04d}.nii.gz"))
        sitk.WriteImage(
            image, str(tiny.raw / "imagesUn" / f"copy_{index:04d}.nii.gz"), True, compressionLevel=1
        )
    (warning,) = lines(contents(tiny), "warning")
    assert "copy_0000.nii.gz: the same image as the labeled scan lab_03 (imagesTr)" in warning


def test_a_scan_to_test_on_is_found_by_its_voxels_under_another_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tiny.raw / "imagesTs"
    tests.mkdir()
    for channel in (0, 1):
        shutil.copy(
            tiny.raw / "imagesUn" / f"scan_01_000{channel}.nii.gz", tests / f"t_1_000{channel}.nii.gz"
        )
        size = (tests / f"t_1_000{channel}.nii.gz").stat().st_size
        (tests / f"t_2_000{channel}.nii.gz").write_bytes(bytes(size))  # not ours to judge
        (tests / f"t_3_000{channel}.nii.gz").write_bytes(b"of another size")
    (warning,) = contents(tiny)
    scan = tiny.raw / "imagesUn" / "scan_01_0000.nii.gz"
    assert str(warning).startswith(f"{scan}: the same image as t_1 in imagesTs. Remove it here")
    kept = json.loads((tiny.preprocessed / FILE).read_text(encoding="utf-8"))["cases"]
    assert [key for key in kept if key.startswith("imagesTs")] == ["imagesTs/t_1"]
    for file in tests.iterdir():
        file.unlink()
    assert contents(tiny) == []


def test_unreadable_files_are_named(tiny: Tiny) -> None:
    file = tiny.raw / "imagesUn" / "scan_01_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    (error,) = lines(contents(tiny), "error")
    assert error.startswith(f"{file}: truncated")


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: b"x" * 4096])
def test_without_a_plan_a_broken_first_image_is_one_finding_among_others(
    tiny: Tiny, capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    file = tiny.raw / "imagesTr" / "lab_00_0000.nii.gz"
    file.write_bytes(damage(file.read_bytes()))
    label = relabel(tiny, lambda a: np.where(a == 2, 5, a).astype(np.uint8))
    places = str(tiny.raw), str(tiny.preprocessed)
    first, second = lines(inspect_contents(*places, tiny.dataset_json), "error")
    assert first.startswith(f"{file}: ") and second.startswith(f"{label}: values 5 are not declared")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_without_a_plan_and_without_any_sound_image_each_is_named(tiny: Tiny) -> None:
    images = sorted([*(tiny.raw / "imagesTr").iterdir(), *(tiny.raw / "imagesUn").iterdir()])
    for file in images:
        file.write_bytes(b"")
    errors = lines(inspect_contents(str(tiny.raw), str(tiny.preprocessed), tiny.dataset_json), "error")
    assert len(errors) == 9 and all("the file is empty" in error for error in errors)


# extreme values


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.where(a > 120, a, np.finfo(np.float32).min),
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 900, 1e25, a),
    ],
)
def test_marks_for_no_data_are_refused_by_inspection_and_preprocessing(
    tiny: Tiny, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    rescan(tiny, change)
    (error,) = lines(contents(tiny), "error")
    assert "scan_00_0000.nii.gz" in error and "a mark for no data?" in error
    plans_manager = PlansManager(str(tiny.plans_file))
    with pytest.raises(ValueError, match=r"scan_00_0000\.nii\.gz.*a mark for no data"):
        ensure_unlabeled(plans_manager, "3d_fullres", tiny.dataset_json, (), 1, show_progress=False)
    assert not (tiny.unlabeled / "scan_00.pkl").exists()
    assert (tiny.unlabeled / "scan_01.pkl").exists()


@pytest.mark.parametrize(("stored", "message"), [(0.0, "constant"), (np.nan, "NaN or infinite values")])
def test_what_normalisation_makes_useless_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, stored: float, message: str
) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    monkeypatch.setattr(DefaultPreprocessor, "_normalize", lambda self, data, *_: np.full_like(data, stored))
    with pytest.raises(ValueError, match=rf"scan_00_0000\.nii\.gz.*: {message} after normalisation"):
        ensure_unlabeled(
            PlansManager(str(tiny.plans_file)), "3d_fullres", tiny.dataset_json, (), 1, show_progress=False
        )
    assert not list(tiny.unlabeled.glob("*.pkl"))


@pytest.mark.parametrize("factor", [1000, 0.001])
def test_a_scan_that_resampling_would_blow_up_or_lose_is_refused_by_name(tiny: Tiny, factor: float) -> None:
    rescan(tiny, lambda a: a, tuple(factor * s for s in SPACING))
    with pytest.raises(ValueError, match=r"scan_00_0000\.nii\.gz.*: spacing .* mm: resampled it would have"):
        ensure_unlabeled(
            PlansManager(str(tiny.plans_file)), "3d_fullres", tiny.dataset_json, (), 1, show_progress=False
        )
    assert sorted(file.stem for file in tiny.unlabeled.glob("*.pkl")) == ["scan_01", "scan_02"]


SCHEMES = ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_every_normalisation_makes_of_an_empty_or_huge_scan_is_refused_by_name(
    tiny: Tiny, scheme: str
) -> None:
    tiny.edit_plan("3d_fullres", normalization_schemes=[f"{scheme}Normalization"] * 2)
    folder = tiny.raw / "imagesUn"
    kept = read(folder / "scan_01_0000.nii.gz")
    for channel in ("0000", "0001"):
        write_image(folder / f"scan_00_{channel}.nii.gz", np.where(kept > 0, 7, 0).astype(np.float32))
        write_image(folder / f"scan_01_{channel}.nii.gz", (kept / kept.max() * 200).astype(np.float32))
        write_image(folder / f"scan_02_{channel}.nii.gz", ((kept + 1000) * 1e30).astype(np.float32))
    plans_manager = PlansManager(str(tiny.plans_file))
    with pytest.raises(ValueError) as error:
        ensure_unlabeled(plans_manager, "3d_fullres", tiny.dataset_json, (), 1, show_progress=False)
    assert "scan_00_0000.nii.gz" in str(error.value) and "constant after normalisation" in str(error.value)
    stored = {file.stem for file in tiny.unlabeled.glob("*.pkl")}
    refused = {
        case for case in ("scan_00", "scan_01", "scan_02") if f"{case}_0000.nii.gz" in str(error.value)
    }
    assert stored | refused == {"scan_00", "scan_01", "scan_02"} and not stored & refused
    assert ("scan_02" in stored) == (scheme in ("No", "RescaleTo01"))
    for case in stored:
        array = blosc2.open(str(tiny.unlabeled / f"{case}.b2nd"))[:]
        assert np.isfinite(array).all() and array.min() < array.max()


# kept statistics


def test_what_has_not_changed_is_not_read_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rescan(tiny, lambda a: a - 150)
    first = contents(tiny)
    assert first
    kept = json.loads((tiny.preprocessed / FILE).read_text(encoding="utf-8"))["cases"]
    assert len(kept) == 6 + 6 + 3
    with monkeypatch.context() as patch:
        patch.setattr("nnssl.data.scans._measure", None)
        assert contents(tiny) == first
    contents(tiny, with_labels=False)
    (tiny.raw / "imagesUn" / "scan_02_0000.nii.gz").unlink()
    (tiny.raw / "imagesUn" / "scan_02_0001.nii.gz").unlink()
    rescan(tiny, lambda a: a + 150)
    assert contents(tiny) == []
    kept = json.loads((tiny.preprocessed / FILE).read_text(encoding="utf-8"))["cases"]
    assert len(kept) == 6 + 6 + 2


@pytest.mark.parametrize(
    "content", ["{half", "[]", '{"format": 1, "cases": {}}', '{"format": 2, "cases": 3}']
)
def test_damaged_statistics_are_measured_anew(tiny: Tiny, content: str) -> None:
    (tiny.preprocessed / FILE).write_text(content)
    assert contents(tiny) == []
    assert json.loads((tiny.preprocessed / FILE).read_text(encoding="utf-8"))["cases"]


# plan, split, old files, training


@pytest.mark.parametrize(
    ("change", "level", "message"),
    [
        ({"nnssl": {"num_epoch": 3}}, "error", "num_epoch"),
        ({"nnssl": []}, "error", "key nnssl"),
        ({"nnssl": {"FixMatch": {"no_such": 1}}}, "error", "no_such"),
        ({"nnssl": {"FixMach": {}}}, "error", "did you mean FixMatch?"),
        ({"nnssl": {"MyMethod": {}}}, "warning", "key nnssl.MyMethod: no method of this library"),
        ({"num_epochs": 1}, "error", 'key num_epochs: not read there; expected "nnssl": {"num_epochs": ...}'),
        ({"fixmatch": {}}, "error", 'key fixmatch: not read there; expected "nnssl": {"FixMatch": ...}'),
        ({"nnSSL": {}}, "error", "key nnSSL: not read there; expected the key nnssl at the top"),
        ({"configurations": []}, "error", "key configurations: is []"),
        ({"configurations": {"2d": None}}, "error", "key configurations.2d: is None"),
        ({"configurations": {"2d": {"inherits_from": "2d"}}}, "error", "configurations.2d.inherits_from: is"),
        (
            {"configurations": {"2d": {}}},
            "error",
            "configurations.2d.architecture, batch_size, data_identifier, normalization_schemes, patch_size, "
            "preprocessor_name, spacing, use_mask_for_norm: absent",
        ),
        ({"transpose_forward": [0, 1]}, "error", "key transpose_forward: is [0, 1]"),
        ({"image_reader_writer": "NoIO"}, "error", "key image_reader_writer: is 'NoIO'"),
        ({"image_reader_writer": 3}, "error", "key image_reader_writer"),
        ({"label_manager": "Manager"}, "error", "key label_manager: is 'Manager'"),
        (
            {"foreground_intensity_properties_per_channel": {"1": {}}},
            "error",
            "key foreground_intensity_properties_per_channel: channel 0 absent; expected an entry for every",
        ),
    ],
)
def test_the_plan_and_its_section_are_checked(
    tiny: Tiny, change: dict[str, Any], level: str, message: str
) -> None:
    tiny.edit_plan(**change)
    (finding,) = inspect_plans(str(tiny.plans_file), {"FixMatch": FixMatchConfig})
    assert finding.level == level and message in str(finding)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "normalization_schemes",
            ["ZScoreNormalization", "Zscore"],
            "names 'Zscore', which nnU-Net does not",
        ),
        ("normalization_schemes", ["CTNormalization", 3], "names 3, which"),
        (
            "preprocessor_name",
            "Foo",
            "expected a name in nnunetv2.preprocessing, such as DefaultPreprocessor",
        ),
        ("resampling_fn_data", "foo", "such as resample_data_or_seg_to_shape"),
        ("resampling_fn_probabilities", "foo", "names 'foo'"),
    ],
)
@pytest.mark.parametrize("inherits", [False, True])
def test_a_name_in_the_plan_that_nnunet_does_not_have_is_told_by_its_key(
    tiny: Tiny, key: str, value: Any, message: str, inherits: bool
) -> None:
    tiny.edit_plan("3d_fullres", architecture=ARCHITECTURE)
    own = json.loads(tiny.plans_file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    edited = {"inherits_from": "3d_fullres", key: value} if inherits else {**own, key: value}
    tiny.edit_plan(configurations={"3d_fullres": own, "mine": edited})
    (finding,) = inspect_plans(str(tiny.plans_file), {})
    assert finding.place == f"{tiny.plans_file}, key configurations.mine.{key}"
    assert message in str(finding)


@pytest.mark.parametrize("key", ["nnssl", "num_epochs", "FixMatch"])
def test_keys_of_the_section_in_a_configuration_are_errors(tiny: Tiny, key: str) -> None:
    plan = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    plan["configurations"]["3d_fullres"][key] = {}
    tiny.plans_file.write_text(json.dumps(plan), encoding="utf-8")
    (finding,) = inspect_plans(str(tiny.plans_file), {"FixMatch": FixMatchConfig})
    assert finding.level == "error" and f"configurations.3d_fullres.{key}: not read there" in str(finding)


def test_a_section_that_stands_twice_in_the_plan_is_an_error(tiny: Tiny) -> None:
    text = tiny.plans_file.read_text(encoding="utf-8").rstrip()
    tiny.plans_file.write_text(text.removesuffix("}") + ', "nnssl": {}, "nnssl": {}}', encoding="utf-8")
    (finding,) = inspect_plans(str(tiny.plans_file), {})
    assert finding.level == "error" and "key nnssl: stands twice" in str(finding)


def test_a_copied_plan_that_kept_its_name_is_an_error_where_both_would_share_results(tiny: Tiny) -> None:
    copy = tiny.preprocessed / "Mine.json"
    shutil.copy(tiny.plans_file, copy)
    (finding,) = inspect_plans(str(copy), {})
    assert finding.level == "error" and f"{copy}, key plans_name: is 'nnUNetPlans', after which" in str(
        finding
    )
    assert "trainings of nnUNetPlans.json would be mixed up" in str(finding) and "'Mine'" in str(finding)
    tiny.plans_file.unlink()
    (finding,) = inspect_plans(str(copy), {})
    assert finding.level == "warning"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": [9, 28, 30]},
            "is [9, 28, 30]; expected multiples of [2, 4, 4], by which the network",
        ),
        ({"patch_size": [9, 28, 30]}, "Take [8, 28, 28], for example"),
        ({"patch_size": [28, 24]}, "is [28, 24]; expected 3 whole numbers above 0"),
        ({"patch_size": [10.0, 28, 24]}, "expected 3 whole numbers above 0"),
        ({"batch_size": 2.5}, ".batch_size: is 2.5; expected a whole number above 0"),
        ({"batch_size": 0}, ".batch_size: is 0"),
        ({"spacing": [0, 0.9, 0.8]}, ".spacing: is [0, 0.9, 0.8]; expected mm along each axis"),
        ({"patch_size": [8, 28, 28], "batch_size": 1}, ""),
    ],
)
@pytest.mark.parametrize("inherits", [False, True])
def test_sizes_that_no_training_could_use_are_errors(
    tiny: Tiny, changes: dict[str, Any], message: str, inherits: bool
) -> None:
    tiny.edit_plan("3d_fullres", architecture=ARCHITECTURE)
    own = json.loads(tiny.plans_file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    edited = {"inherits_from": "3d_fullres", **changes} if inherits else {**own, **changes}
    tiny.edit_plan(configurations={"3d_fullres": own, "mine": edited})
    findings = list(inspect_plans(str(tiny.plans_file), {}))
    assert len(findings) == (message != "")
    assert all(message in str(finding) and "configurations.mine." in str(finding) for finding in findings)


def test_a_plan_for_another_number_of_channels_is_an_error_unless_it_is_made_anew(tiny: Tiny) -> None:
    for name in ("2d", "3d_fullres"):
        tiny.edit_plan(name, normalization_schemes=["ZScoreNormalization"])
    (error,) = lines(files(tiny), "error")
    assert error.startswith(f"{tiny.plans_file}, key normalization_schemes of 2d, 3d_fullres: 1 channel;")
    assert "expected 2 (channel_names in dataset.json)" in error and "--replan --clean" in error
    assert list(inspect_files(str(tiny.raw), str(tiny.preprocessed), planning=True)) == []


@pytest.mark.parametrize(
    ("change", "key", "options"),
    [
        ({"labels": {"background": 0, "liver": 1, "b": 2}}, "labels", ""),
        ({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}, "labels", ""),
        ({"channel_names": {"0": "CT", "1": "CT"}}, "channel_names", " --replan --clean"),
    ],
)
def test_an_edit_of_dataset_json_after_planning_is_an_error_until_it_is_taken_over(
    tiny: Tiny, change: dict[str, Any], key: str, options: str
) -> None:
    assert lines(files(tiny), "error") == []
    content = json.loads((tiny.raw / "dataset.json").read_text(encoding="utf-8"))
    (tiny.raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 60, **change}))
    (error,) = lines(files(tiny), "error")
    assert f"dataset.json, key {key}: is {change[key]!r}, and {content[key]!r} in the copy" in error
    assert f"Run `nnssl plan-and-preprocess -d 777{options}`" in error
    if not options:
        assert main(["plan-and-preprocess", "-d", "777", "--no_pp"]) == 0
        assert lines(files(tiny), "error") == []


def test_another_reader_than_that_of_the_plan_is_an_error_unless_it_is_planned_anew(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    def overwrite(reader: str) -> list[str]:
        content = {**tiny.dataset_json, "overwrite_image_reader_writer": reader}
        (tiny.raw / "dataset.json").write_text(json.dumps(content))
        return lines(files(tiny), "error")

    assert overwrite("None") == overwrite("SimpleITKIO") == []
    (error,) = overwrite("NibabelIO")
    assert f"{tiny.plans_file}, key image_reader_writer: is 'SimpleITKIO'" in error
    assert "expected 'NibabelIO' (overwrite_image_reader_writer in dataset.json)" in error
    assert main(["plan-and-preprocess", "-d", "777", "--no_pp"]) == 1
    assert "--replan --clean" in capsys.readouterr().err
    assert main(["plan-and-preprocess", "-d", "777", "--no_pp", "--replan", "--clean", "-npfp", "1"]) == 0
    assert tiny.dataset_json["overwrite_image_reader_writer"] == "NibabelIO"
    assert lines(files(tiny), "error") == []


CASES = [f"c{index}" for index in range(6)]
GOOD = {"train": CASES[:4], "val": CASES[4:5], "unlabeled": CASES[5:]}


@pytest.mark.parametrize(
    ("fold", "level", "message"),
    [
        ({**GOOD, "train": []}, "error", "key train: empty"),
        ({**GOOD, "val": []}, "error", "key val: empty"),
        ({**GOOD, "val": "c4"}, "error", "key val: is 'c4'; expected a list"),
        ({**GOOD, "val": [4]}, "error", "key val: is [4]"),
        ({"train": CASES[:4]}, "error", "key val: absent"),
        ({**GOOD, "unlabeled": None}, "error", "key unlabeled: is None"),
        ({**GOOD, "val": ["x"]}, "error", "key val: x: no labeled case"),
        ({**GOOD, "unlabeled": ["c0"]}, "error", "c0 in unlabeled and in train"),
        ({**GOOD, "val": ["c0"]}, "warning", "c0 in train and in val"),
        ({**GOOD, "val": ["c4", "c4"]}, "warning", "key val: c4 twice"),
        ({**GOOD, "unlabelled": ["c0"]}, "warning", "key unlabelled: not read. Is unlabeled meant?"),
        ([], "error", "fold 1: is list"),
    ],
)
def test_splits_are_checked_fold_by_fold(tmp_path: Path, fold: Any, level: str, message: str) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([GOOD, fold]))
    (finding,) = inspect_split(str(file), CASES)
    assert finding.level == level and "fold 1" in finding.place and message in str(finding)
    assert list(inspect_split(str(file), CASES, only=0)) == []


def test_labeled_cases_of_no_fold_are_named(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([GOOD]))
    (finding,) = inspect_split(str(file), [*CASES, "new_1", "new_2"])
    assert finding.level == "warning" and "new_1, new_2: labeled, and in no fold" in str(finding)
    assert list(inspect_split(str(file), [*CASES, "new_1"], only=0)) == []


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3"])
def test_a_split_that_is_no_list_of_folds_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits_final.json").write_text(content)
    assert len(lines(inspect_split(str(tmp_path / "splits_final.json"), CASES), "error")) == 1


def test_few_labeled_cases_need_a_split_or_fold_all(tmp_path: Path) -> None:
    file = str(tmp_path / "splits_final.json")
    (error,) = inspect_split(file, CASES[:3])
    assert error.level == "error"
    for text in ("3 labeled cases are too few", "nnssl split -d ID --labeled 2", "--val", "fold all"):
        assert text in str(error)
    assert [f.level for f in inspect_split(file, CASES[:3], planning=True)] == ["warning"]
    assert list(inspect_split(file, CASES[:5])) == []


def test_arrays_of_an_older_nnunet_are_set_aside_and_never_mixed(tiny: Tiny) -> None:
    prepare(tiny)
    assert list(inspect_preprocessed(str(tiny.labeled))) == []
    (tiny.labeled / ".DS_Store").touch()
    (error,) = lines(inspect_preprocessed(str(tiny.labeled)), "error")
    assert ".DS_Store among the preprocessed cases" in error
    (tiny.labeled / ".DS_Store").unlink()
    for case in ("lab_00", "lab_01"):
        arrays = {
            key: blosc2.open(str(tiny.labeled / f"{case}{s}.b2nd"))[:]
            for key, s in (("data", ""), ("seg", "_seg"))
        }
        np.savez_compressed(tiny.labeled / f"{case}.npz", **arrays)
        np.save(tiny.labeled / f"{case}.npy", arrays["data"])
        np.save(tiny.labeled / f"{case}_seg.npy", arrays["seg"])
        for suffix in (".b2nd", "_seg.b2nd"):
            (tiny.labeled / f"{case}{suffix}").unlink()
    (error,) = lines(inspect_preprocessed(str(tiny.labeled)), "error")
    assert "6 files of an nnU-Net before 2.6 (lab_00.npy, ...) among newer ones" in error
    prepare(tiny)
    assert {file.suffix for file in tiny.labeled.iterdir()} == {".b2nd", ".pkl"}
    aside = tiny.labeled.parent / f"{tiny.labeled.name}_before_2.6"
    assert sorted(file.name for file in aside.glob("lab_00*")) == [
        *("lab_00.npy", "lab_00.npz", "lab_00.pkl", "lab_00_seg.npy")
    ]
    assert list(inspect_preprocessed(str(tiny.labeled))) == []


def test_hidden_files_among_preprocessed_cases_are_named_and_no_cases(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tiny)
    copy_ground_truth(str(tiny.raw), tiny.dataset_json, str(tiny.preprocessed))
    for file in [file for file in tiny.preprocessed.rglob("*") if file.is_file()]:
        file.with_name("._" + file.name).write_bytes(b"\0\5\26\7Mac OS X")
    (error,) = lines(inspect_preprocessed(str(tiny.labeled)), "error")
    assert "._lab_00.b2nd, ._lab_00.pkl, ._lab_00_seg.b2nd" in error and "find -name '._*' -delete" in error
    monkeypatch.delenv("nnUNet_raw")
    assert main(["split", "-d", "777", "--labeled", "2"]) == 0
    assert "._" not in (tiny.preprocessed / "splits_final.json").read_text(encoding="utf-8")
    assert files(tiny) == []
    capsys.readouterr()
    assert main(["check", "-d", "777", "-c", "3d_fullres"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "._" in line]
    assert len(told) == 1 and str(tiny.labeled) in told[0]


def test_a_training_inspects_scans_and_opens_no_label_map(tiny: Tiny) -> None:
    shutil.rmtree(tiny.raw / "labelsTr")
    file = tiny.raw / "imagesTr" / "lab_00_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    scan = rescan(tiny, lambda a: a - 150)
    (tiny.raw / "imagesUn" / "left.nii").write_bytes(b"")
    plans = json.loads(tiny.plans_file.read_text(encoding="utf-8"))
    findings = list(
        inspect_scans_of_training(
            str(tiny.raw), str(tiny.preprocessed), tiny.dataset_json, plans, "3d_fullres"
        )
    )
    assert {finding.level for finding in findings} == {"warning"}
    text = "\n".join(map(str, findings))
    for expected in (f"{file}: truncated", f"{scan}: unlike the labeled scans", "left.nii"):
        assert expected in text


def test_without_raw_data_a_training_inspects_nothing(tiny: Tiny) -> None:
    absent = os.path.join(str(tiny.raw), "absent")
    assert list(inspect_scans_of_training(absent, str(tiny.preprocessed), tiny.dataset_json, {}, "2d")) == []
