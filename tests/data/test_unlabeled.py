from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data import preprocess
from nnssl.data.freshness import preprocessing_fingerprint
from nnssl.data.unlabeled import ensure_unlabeled, find_unlabeled_images, unlabeled_folder
from tests.raw_dataset import Tiny, content, stored, write_case, write_image

SCANS = ["scan_00", "scan_01", "scan_02"]


def ensure(
    tiny: Tiny,
    hidden: tuple[str, ...] = (),
    processes: int = 1,
    configuration: str = "3d_fullres",
    **options: Any,
) -> list[str]:
    plans_manager = PlansManager(str(tiny.plans_file))
    return ensure_unlabeled(
        plans_manager, configuration, tiny.dataset_json, hidden, processes, show_progress=False, **options
    )


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def redone(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Cases whose image was written anew."""
    return {
        name.removesuffix(".b2nd")
        for name in after
        if name.endswith("b2nd") and "_seg" not in name and before.get(name) != after[name]
    }


def properties(tiny: Tiny, case: str) -> dict[str, Any]:
    return pickle.loads((tiny.unlabeled / f"{case}.pkl").read_bytes())


def test_unlabeled_folder_is_a_sibling() -> None:
    assert unlabeled_folder("/a/nnUNetPlans_2d") == "/a/nnUNetPlans_2d_unlabeled"
    assert unlabeled_folder("/a/nnUNetPlans_2d/") == "/a/nnUNetPlans_2d_unlabeled"


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_result_is_bit_identical_to_nnunet_preprocessing_of_the_same_image(
    tiny: Tiny, tmp_path: Path, configuration: str
) -> None:
    assert ensure(tiny, hidden=("lab_02",), configuration=configuration) == ["lab_02", *SCANS]
    plans_manager = PlansManager(str(tiny.plans_file))
    reference = tmp_path / "reference"
    reference.mkdir()
    for case, folder in [("lab_02", "imagesTr"), *((scan, "imagesUn") for scan in SCANS)]:
        images = [str(tiny.raw / folder / f"{case}_000{channel}.nii.gz") for channel in (0, 1)]
        DefaultPreprocessor(verbose=False).run_case_save(
            str(reference / case),
            images,
            None,
            plans_manager,
            plans_manager.get_configuration(configuration),
            tiny.dataset_json,
        )
        ours = tiny.preprocessed / f"nnUNetPlans_{configuration}_unlabeled"
        for suffix, dtype in ((".b2nd", np.float32), ("_seg.b2nd", np.int16)):
            assert stored(ours / (case + suffix)) == stored(reference / (case + suffix))
            assert blosc2.open(str(ours / (case + suffix)), mode="r").dtype == dtype
        ours_properties, expected = (
            pickle.loads((where / f"{case}.pkl").read_bytes()) for where in (ours, reference)
        )
        record = ours_properties.pop("nnssl")
        assert ours_properties.pop("class_locations") == {}
        assert ours_properties == expected
        assert record["origin"] == folder


def test_labeled_folder_and_scratch_folders_stay_absent(tiny: Tiny) -> None:
    before = {path.name for path in tiny.preprocessed.iterdir()}
    ensure(tiny)
    assert {path.name for path in tiny.preprocessed.iterdir()} - before == {tiny.unlabeled.name}


def test_second_call_writes_nothing(tiny: Tiny) -> None:
    names = ensure(tiny)
    before = stamps(tiny.unlabeled)
    assert ensure(tiny) == names
    assert stamps(tiny.unlabeled) == before


def damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["remove", "truncate"])
@pytest.mark.parametrize("file", ["scan_01.b2nd", "scan_01_seg.b2nd", "scan_01.pkl"])
def test_only_a_half_written_case_is_redone(tiny: Tiny, file: str, how: str) -> None:
    ensure(tiny)
    expected = stored(tiny.unlabeled / "scan_01.b2nd")
    damage(tiny.unlabeled / file, how)
    before = stamps(tiny.unlabeled)
    ensure(tiny)
    assert redone(before, stamps(tiny.unlabeled)) == {"scan_01"}
    assert stored(tiny.unlabeled / "scan_01.b2nd") == expected


def test_crash_before_the_properties_are_in_place_leaves_a_case_that_is_redone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = preprocess.move

    def crash(source: str, destination: str) -> None:
        if destination.endswith("scan_02.pkl"):
            raise KeyboardInterrupt
        move(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "move", crash)
        with pytest.raises(KeyboardInterrupt):
            ensure(tiny)
    assert not (tiny.unlabeled / "scan_02.pkl").exists()
    assert not list(tiny.preprocessed.rglob(".nnssl-*"))
    assert ensure(tiny) == SCANS
    assert properties(tiny, "scan_02")["class_locations"] == {}


def test_scratch_of_a_killed_run_is_removed_after_a_day_but_not_before(tiny: Tiny) -> None:
    old, young = (tiny.preprocessed / f".nnssl-00000000-1-0000000{which}" for which in (0, 1))
    among_cases = tiny.unlabeled / old.name
    for folder in (old, young, among_cases):
        folder.mkdir(parents=True)
    for folder in (old, among_cases):
        os.utime(folder, (0, 0))
    ensure(tiny)
    assert not old.exists() and not among_cases.exists()
    assert young.exists()


def test_changed_source_is_redone_and_a_touched_one_is_not(tiny: Tiny) -> None:
    ensure(tiny)
    before = stamps(tiny.unlabeled)
    os.utime(tiny.raw / "imagesUn" / "scan_00_0000.nii.gz", (1, 1))
    source = tiny.raw / "imagesUn" / "scan_02_0001.nii.gz"
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(source)))
    write_image(source, image + 1)
    ensure(tiny)
    assert redone(before, stamps(tiny.unlabeled)) == {"scan_02"}
    record = properties(tiny, "scan_00")["nnssl"]["sources"][0]
    assert record["mtime_ns"] == 10**9  # so that the content is not hashed at every start


@pytest.mark.parametrize(
    ("configuration", "change"),
    [
        ("3d_fullres", {"patch_size": [8, 16, 16], "batch_size": 7}),
        ("3d_fullres", {"architecture": {}}),
        ("3d_fullres", {"spacing": [2, 0.9, 0.8]}),  # the same numbers, 2 instead of 2.0
        (None, {"nnssl": {"num_epochs": 3}}),
        ("2d", {"spacing": [1.0, 1.0]}),
    ],
)
def test_plan_changes_that_do_not_touch_voxels_redo_nothing(
    tiny: Tiny, configuration: str | None, change: dict[str, Any]
) -> None:
    ensure(tiny)
    before = stamps(tiny.unlabeled)
    tiny.edit_plan(configuration, **change)
    ensure(tiny)
    assert stamps(tiny.unlabeled) == before


def test_changed_spacing_redoes_every_case(tiny: Tiny) -> None:
    ensure(tiny)
    before, shape = stamps(tiny.unlabeled), blosc2.open(str(tiny.unlabeled / "scan_00.b2nd"), mode="r").shape
    tiny.edit_plan("3d_fullres", spacing=[4.0, 0.9, 0.8])
    ensure(tiny)
    assert redone(before, stamps(tiny.unlabeled)) == set(SCANS)
    assert blosc2.open(str(tiny.unlabeled / "scan_00.b2nd"), mode="r").shape[1] == shape[1] // 2


@pytest.mark.parametrize(
    ("configuration", "change"),
    [
        ("3d_fullres", {"spacing": [2.0, 0.9, 0.7]}),
        ("3d_fullres", {"normalization_schemes": ["ZScoreNormalization", "ZScoreNormalization"]}),
        ("3d_fullres", {"use_mask_for_norm": [True, False]}),
        ("3d_fullres", {"preprocessor_name": "Other"}),
        ("3d_fullres", {"resampling_fn_data_kwargs": {"order": 1}}),
        ("3d_fullres", {"resampling_fn_seg": "no_resampling"}),
        (None, {"transpose_forward": [1, 0, 2]}),
        (None, {"image_reader_writer": "NibabelIO"}),
        (None, {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}}),
    ],
)
def test_every_key_that_decides_voxels_changes_the_fingerprint(
    tiny: Tiny, configuration: str | None, change: dict[str, Any]
) -> None:
    before = preprocessing_fingerprint(PlansManager(str(tiny.plans_file)), "3d_fullres")
    tiny.edit_plan(configuration, **change)
    assert preprocessing_fingerprint(PlansManager(str(tiny.plans_file)), "3d_fullres") != before


def test_labels_of_hidden_cases_are_never_opened(tiny: Tiny) -> None:
    ensure(tiny, hidden=("lab_03",))
    before = content(tiny.unlabeled)
    shutil.rmtree(tiny.unlabeled)
    (tiny.raw / "labelsTr" / "lab_03.nii.gz").write_bytes(b"no image")
    tiny.labeled.mkdir()
    for suffix in (".pkl", ".b2nd", "_seg.b2nd"):
        (tiny.labeled / f"lab_03{suffix}").write_bytes(b"nothing")
    assert ensure(tiny, hidden=("lab_03",)) == ["lab_03", *SCANS]
    assert content(tiny.unlabeled) == before


def test_cases_of_other_folds_stay_but_are_not_returned(tiny: Tiny) -> None:
    assert ensure(tiny, hidden=("lab_00",)) == ["lab_00", *SCANS]
    assert ensure(tiny, hidden=("lab_01",)) == ["lab_01", *SCANS]
    assert (tiny.unlabeled / "lab_00.pkl").exists()


def test_case_that_moves_from_imagestr_to_imagesun_is_known_as_a_scan_from_then_on(tiny: Tiny) -> None:
    ensure(tiny, hidden=("lab_02",))
    for channel in (0, 1):
        (tiny.raw / "imagesTr" / f"lab_02_000{channel}.nii.gz").rename(
            tiny.raw / "imagesUn" / f"lab_02_000{channel}.nii.gz"
        )
    assert ensure(tiny) == ["lab_02", *SCANS]
    shutil.rmtree(tiny.raw)
    assert ensure(tiny) == ["lab_02", *SCANS]


def test_without_any_unlabeled_case_the_list_is_empty_and_nothing_is_written(tiny: Tiny) -> None:
    shutil.rmtree(tiny.raw / "imagesUn")
    assert ensure(tiny) == []
    assert not tiny.unlabeled.exists()


@pytest.mark.parametrize("absent", ["variable", "dataset", "imagesUn"])
def test_complete_preprocessed_scans_serve_where_raw_images_are_absent(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    hidden = () if absent == "imagesUn" else ("lab_01",)
    names = ensure(tiny, hidden)
    before = stamps(tiny.unlabeled)
    if absent == "variable":
        monkeypatch.delenv("nnUNet_raw")
    shutil.rmtree(tiny.raw / "imagesUn" if absent == "imagesUn" else tiny.raw)
    assert ensure(tiny, hidden) == names
    assert stamps(tiny.unlabeled) == before


def test_stale_scans_without_raw_images_are_an_error_that_keeps_them(tiny: Tiny) -> None:
    ensure(tiny)
    shutil.rmtree(tiny.raw)
    before = stamps(tiny.unlabeled)
    tiny.edit_plan("3d_fullres", spacing=[4.0, 0.9, 0.8])
    with pytest.raises(
        ValueError, match=r"3 unlabeled cases .* scan_00 \(preprocessed with other settings\).*nnUNet_raw"
    ):
        ensure(tiny)
    with pytest.raises(ValueError, match=r"lab_00 \(not preprocessed\)"):
        ensure(tiny, hidden=("lab_00",))
    assert stamps(tiny.unlabeled) == before


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep < 1 else -int(keep)])


def with_voxel(path: Path, value: float) -> None:
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array[4, 5, 6] = value
    write_image(path, array, image.GetSpacing())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: truncate(path, 0.5), "truncated"),
        (lambda path: truncate(path, 4), "truncated"),  # only the checksum at the end is cut off
        (
            lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40])),
            "truncated, .* bytes are there",
        ),
        (lambda path: path.write_bytes(b"no image at all"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"no image at all" * 100)), "cannot be read"),
        (lambda path: path.write_bytes(b""), r"truncated or damaged \(the file is empty"),
        (lambda path: with_voxel(path, np.nan), "NaN or infinite"),
        (lambda path: with_voxel(path, np.inf), "NaN or infinite"),
        (
            lambda path: write_image(path, np.ones((3, 4, 5), np.float32)),
            "sizes or spacings of these files differ",
        ),
        (
            lambda path: write_image(path, np.ones((2, 10, 28, 26), np.float32), (1, 1, 1, 1)),
            "channel|differ|cannot be read",
        ),
    ],
)
def test_unusable_scan_is_named_and_the_others_are_done(tiny: Tiny, spoil: Any, message: str) -> None:
    guilty = tiny.raw / "imagesUn" / "scan_01_0001.nii.gz"
    spoil(guilty)
    with pytest.raises(ValueError, match=rf"1 of 3 cases(.|\n)*{guilty}.*{message}(.|\n)*rerun"):
        ensure(tiny)
    assert {file.name for file in tiny.unlabeled.iterdir()} == {
        f"{case}{end}" for case in SCANS[::2] for end in (".b2nd", "_seg.b2nd", ".pkl")
    }


def test_unusable_new_version_of_a_scan_leaves_the_preprocessed_one(tiny: Tiny) -> None:
    ensure(tiny)
    before = stamps(tiny.unlabeled)
    truncate(tiny.raw / "imagesUn" / "scan_01_0000.nii.gz", 0.5)
    with pytest.raises(ValueError, match="scan_01_0000"):
        ensure(tiny)
    assert stamps(tiny.unlabeled) == before


@pytest.mark.slow
def test_several_processes_give_the_same_files_and_the_same_errors(tiny: Tiny) -> None:
    write_case(tiny.raw / "imagesUn", "scan_03", 3)
    truncate(tiny.raw / "imagesUn" / "scan_03_0000.nii.gz", 0.5)
    with pytest.raises(ValueError, match=r"1 of 4 cases(.|\n)*scan_03_0000.nii.gz: truncated"):
        ensure(tiny, processes=2)
    parallel = content(tiny.unlabeled)
    shutil.rmtree(tiny.unlabeled)
    (tiny.raw / "imagesUn" / "scan_03_0000.nii.gz").unlink()
    (tiny.raw / "imagesUn" / "scan_03_0001.nii.gz").unlink()
    ensure(tiny)
    assert content(tiny.unlabeled) == parallel


def test_missing_channel_is_refused_before_any_work(tiny: Tiny) -> None:
    (tiny.raw / "imagesUn" / "scan_02_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"scan_02\*: channels _0000 found; expected _0000, _0001"):
        ensure(tiny)
    assert not tiny.unlabeled.exists()


def test_surplus_channel_is_refused(tiny: Tiny) -> None:
    shutil.copy(tiny.raw / "imagesUn" / "scan_02_0001.nii.gz", tiny.raw / "imagesUn" / "scan_02_0002.nii.gz")
    with pytest.raises(ValueError, match=r"scan_02\*: channels _0000, _0001, _0002 found"):
        ensure(tiny)


def test_names_that_nnunet_cannot_use_are_refused(tiny: Tiny) -> None:
    folder = tiny.raw / "imagesUn"
    (folder / "other.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"other\.nii\.gz: no channel number"):
        find_unlabeled_images(str(tiny.raw), tiny.dataset_json)
    (folder / "other.nii.gz").unlink()
    write_case(folder, "scan_seg", 1)
    with pytest.raises(ValueError, match="end in _seg"):
        find_unlabeled_images(str(tiny.raw), tiny.dataset_json)


def test_wrong_file_ending_is_an_error_and_not_an_empty_list(tiny: Tiny) -> None:
    shutil.rmtree(tiny.raw / "imagesUn")
    (tiny.raw / "imagesUn").mkdir()
    (tiny.raw / "imagesUn" / ".DS_Store").write_bytes(b"")
    assert find_unlabeled_images(str(tiny.raw), tiny.dataset_json) == {}
    (tiny.raw / "imagesUn" / "scan_00_0000.nrrd").write_bytes(b"")
    with pytest.raises(ValueError, match=r"scan_00_0000\.nrrd; expected names like <case>_0000\.nii\.gz"):
        find_unlabeled_images(str(tiny.raw), tiny.dataset_json)


def test_name_of_a_labeled_case_is_refused(tiny: Tiny) -> None:
    write_case(tiny.raw / "imagesUn", "lab_04", 4)
    with pytest.raises(ValueError, match=r"lab_04\*: a labeled case in imagesTr has the same name"):
        ensure(tiny)


def test_scan_that_is_still_preprocessed_as_labeled_is_refused(tiny: Tiny) -> None:
    tiny.labeled.mkdir()
    (tiny.labeled / "scan_00.pkl").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"scan_00: in imagesUn, but still among the labeled cases .* plan-and-preprocess"
    ):
        ensure(tiny)


def test_scan_that_is_preprocessed_as_both_is_refused_where_the_raw_data_are_absent(tiny: Tiny) -> None:
    ensure(tiny)
    tiny.labeled.mkdir()
    (tiny.labeled / "scan_00.pkl").write_bytes(b"")
    shutil.rmtree(tiny.raw)
    with pytest.raises(
        ValueError, match=r"scan_00: preprocessed without label in .*_unlabeled and with label"
    ):
        ensure(tiny)


def test_all_channels_in_one_file_as_in_imagestr_are_accepted(tmp_path: Path) -> None:
    for folder in ("imagesTr", "imagesUn"):
        (tmp_path / folder).mkdir()
    (tmp_path / "imagesTr" / "a_0000.png").write_bytes(b"")
    (tmp_path / "imagesUn" / "b_0000.png").write_bytes(b"")
    dataset_json = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    assert find_unlabeled_images(str(tmp_path), dataset_json) == {
        "b": [str(tmp_path / "imagesUn" / "b_0000.png")]
    }


def test_images_listed_in_dataset_json_are_found_for_hidden_cases(tiny: Tiny) -> None:
    ensure(tiny, hidden=("lab_01",))
    expected = stored(tiny.unlabeled / "lab_01.b2nd")
    shutil.rmtree(tiny.unlabeled)
    (tiny.raw / "imagesTr").rename(tiny.raw / "elsewhere")
    dataset_json = tiny.dataset_json
    entry = {
        "images": [f"elsewhere/lab_01_000{channel}.nii.gz" for channel in (0, 1)],
        "label": "labelsTr/lab_01.nii.gz",
    }
    (tiny.preprocessed / "dataset.json").write_text(
        json.dumps({**dataset_json, "dataset": {"lab_01": entry}})
    )
    assert ensure(tiny, hidden=("lab_01",)) == ["lab_01", *SCANS]
    assert stored(tiny.unlabeled / "lab_01.b2nd") == expected
