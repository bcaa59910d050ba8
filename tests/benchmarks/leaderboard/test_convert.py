"""The public formats, in small: each file is written as its authors lay it out, and read back from the
nnU-Net dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from benchmarks.leaderboard.convert import FORMATS, convert

XYZ = (9, 7, 5)


def volume(seed: int, shape: tuple[int, ...] = XYZ, values: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype(np.float32), generator.integers(0, values + 1, shape).astype(
        np.uint8
    )


def write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def write_lists(folder: Path, ending: str = "list") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"train.{ending}").write_text("zeta\nalpha\n", encoding="utf-8")
    (folder / f"test.{ending}").write_text("mid\n\n", encoding="utf-8")


def read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), image.GetSpacing()


def cases(folder: Path) -> dict[str, str]:
    return json.loads((folder / "cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "path", "ending", "spacing"),
    [
        ("la_h5", "2018LA_Seg_Training Set/{}/mri_norm2.h5", "list", 0.625),
        ("pancreas_h5", "Pancreas_h5/{}_norm.h5", "list", 1.0),
        ("pancreas_h5", "Pancreas_h5/{}.h5", "list", 1.0),
        ("brats19_h5", "data/{}.h5", "txt", 1.0),
    ],
)
def test_h5_volumes_keep_their_voxels_and_the_order_of_the_lists(
    tmp_path: Path, name: str, path: str, ending: str, spacing: float
) -> None:
    source = tmp_path / "source"
    write_lists(source, ending)
    written = {case: volume(k) for k, case in enumerate(("zeta", "alpha", "mid"))}
    for case, (image, label) in written.items():
        write_h5(
            source / path.format(case), image, 2 * label
        )  # BraTS has several tumour labels: any is tumour
    folder = convert(name, source, tmp_path / "raw")
    prefix = FORMATS[name].prefix
    assert folder == tmp_path / "raw" / FORMATS[name].dataset
    assert cases(folder) == {"zeta": f"{prefix}_001", "alpha": f"{prefix}_002", "mid": f"{prefix}_003"}
    for case, new in cases(folder).items():
        image, found = read(folder / "imagesTr" / f"{new}_0000.nii.gz")
        label, _ = read(folder / "labelsTr" / f"{new}.nii.gz")
        np.testing.assert_array_equal(image, written[case][0].transpose(2, 1, 0))
        np.testing.assert_array_equal(label, written[case][1].transpose(2, 1, 0))
        assert found == pytest.approx((spacing,) * 3)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["numTraining"] == 3
    assert len(content["labels"]) == 2
    assert not list((tmp_path / "raw").glob("*.partial"))


def test_acdc_volumes_keep_their_three_structures_and_slices_first(tmp_path: Path) -> None:
    (tmp_path / "train.list").write_text("patient099_frame01\npatient099_frame02\n", encoding="utf-8")
    (tmp_path / "test.list").write_text("patient001_frame01\n", encoding="utf-8")
    image, label = volume(0, (4, 8, 6), 3)
    for case in ("patient099_frame01", "patient099_frame02", "patient001_frame01"):
        write_h5(tmp_path / "data" / f"{case}.h5", image, label)
        write_h5(tmp_path / "data" / "slices" / f"{case}_slice_1.h5", image[0], label[0])
    folder = convert("acdc_h5", tmp_path, tmp_path / "raw")
    np.testing.assert_array_equal(read(folder / "labelsTr" / "ACDC_001.nii.gz")[0], label)
    labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert labels == {"background": 0, "right_ventricle": 1, "myocardium": 2, "left_ventricle": 3}


def test_challenge_nrrd_is_cropped_around_the_atrium_and_normalised(tmp_path: Path) -> None:
    write_lists(tmp_path)
    generator = np.random.default_rng(0)
    scan = generator.integers(0, 500, (90, 150, 160)).astype(np.uint8)  # z, y, x
    label = np.zeros(scan.shape, np.uint8)
    label[30:50, 20:120, 60:100] = 255
    for case in ("zeta", "alpha", "mid"):
        (tmp_path / "training" / case).mkdir(parents=True)
        for name, array in (("lgemri", scan), ("laendo", label)):
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing((0.625,) * 3)
            sitk.WriteImage(picture, str(tmp_path / "training" / case / f"{name}.nrrd"), useCompression=True)
    folder = convert("la_nrrd", tmp_path, tmp_path / "raw")
    image, spacing = read(folder / "imagesTr" / "LA_001_0000.nii.gz")
    mask, _ = read(folder / "labelsTr" / "LA_001.nii.gz")
    # 99 and 39 voxels between the ends (y, x): padded by half of what 112 lack, and by 15; cut at the border.
    # All slices stay
    z, y, x = (0, 90), (0, 119 + 6 + 15), (60 - 36 - 15, 99 + 36 + 15)
    normalised = (scan - scan.mean(dtype=np.float64)) / scan.std(dtype=np.float64)
    np.testing.assert_allclose(image, normalised[slice(*z), slice(*y), slice(*x)], atol=1e-4)
    np.testing.assert_array_equal(mask, label[slice(*z), slice(*y), slice(*x)] // 255)
    assert spacing == pytest.approx((0.625,) * 3)


def write_dicom(folder: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """A CT series, (z, y, x) from the feet up, one file per slice."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, plane in enumerate(array):
        picture = sitk.GetImageFromArray(plane[None].astype(np.int16))
        picture.SetSpacing(spacing)
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{k + 1}",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.3",
            "0020|0032": f"-100\\-90\\{-400 + k * spacing[2]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(len(array) - k),
            "0018|0050": str(spacing[2]),
        }
        for tag, value in tags.items():
            picture.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"1-{len(array) - k:03d}.dcm"))
        writer.Execute(picture)


def write_pancreas(source: Path, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """One NIH case of 1 x 1 x 2 mm: soft tissue in a body of fat, air around it; the label as NIfTI, rows
    from back to front."""
    scan = np.full((30, 70, 64), -1000, np.int16)
    scan[2:28, 5:65, 5:60] = -90
    scan[12:16, 40:46, 20:30] = 60
    label = (scan == 60).astype(np.uint8)
    write_dicom(source / "Pancreas-CT" / "PANCREAS_0007" / "study" / "series", scan, (1.0, 1.0, 2.0))
    stored = label if flipped else label[:, ::-1]
    picture = sitk.GetImageFromArray(stored)
    picture.SetSpacing((1.0, 1.0, 2.0))
    picture.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    (source / "labels").mkdir()
    sitk.WriteImage(picture, str(source / "labels" / "label0007.nii.gz"))
    (source / "train.list").write_text("image0007\n", encoding="utf-8")
    (source / "test.list").write_text("", encoding="utf-8")
    return scan, label


def test_pancreas_dicom_is_windowed_resampled_cropped_and_normalised_in_the_labels_orientation(
    tmp_path: Path,
) -> None:
    write_pancreas(tmp_path)
    folder = convert("pancreas_dicom", tmp_path, tmp_path / "raw")
    image, spacing = read(folder / "imagesTr" / "PANCREAS_001_0000.nii.gz")
    label, _ = read(folder / "labelsTr" / "PANCREAS_001.nii.gz")
    assert spacing == pytest.approx((1.0,) * 3)
    # z: 4 slices of 2 mm are 8 of 1 mm, 25 more on each side, cut at 0 (z from 24 - 25) ; y: 40 - 25 .. 45 +
    # 25, cut at 70; x: 20 - 25, cut
    assert label.sum() == 8 * 6 * 10
    assert abs(image.shape[0] - (32 + 25)) <= 1
    assert image.shape[1:] == (70 - 15, 29 + 25 + 1)
    assert image.mean() == pytest.approx(0, abs=1e-4)
    assert image.std() == pytest.approx(1, abs=1e-3)
    inside = image[label > 0]
    assert np.median(inside) == pytest.approx(image.max(), abs=1e-3)  # the pancreas is the brightest thing
    assert image.min() == pytest.approx(np.median(image[:, -1]), abs=1e-3)  # air, clipped to -125


def test_a_pancreas_label_that_lies_elsewhere_is_an_error(tmp_path: Path) -> None:
    write_pancreas(tmp_path, flipped=True)
    with pytest.raises(ValueError, match=r"image0007: the label lies on -[0-9]+ HU, a pancreas does not"):
        convert("pancreas_dicom", tmp_path, tmp_path / "raw")
    assert not (tmp_path / "raw" / "Dataset512_Pancreas").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: (s / "test.list").unlink(), "test.list not found in"),
        (lambda s: (s / "test.list").write_text("zeta\n", encoding="utf-8"), "a case stands in them twice"),
        (lambda s: (s / "data" / "mid" / "mri_norm2.h5").unlink(), "mri_norm2.h5"),
        (lambda s: (s / "other" / "mid").mkdir(parents=True), "mid is below .* more than once"),
    ],
)
def test_incomplete_sources_are_refused_and_leave_no_dataset(
    tmp_path: Path, break_it: Callable[[Path], Any], message: str
) -> None:
    source = tmp_path / "source"
    write_lists(source)
    for case in ("zeta", "alpha", "mid"):
        write_h5(source / "data" / case / "mri_norm2.h5", *volume(0))
    break_it(source)
    with pytest.raises((ValueError, OSError), match=message):
        convert("la_h5", source, tmp_path / "raw")
    assert not (tmp_path / "raw" / "Dataset511_LA").exists()


def test_wrong_contents_are_refused(tmp_path: Path) -> None:
    write_lists(tmp_path)
    image, label = volume(0)
    for case in ("zeta", "alpha", "mid"):
        write_h5(tmp_path / case / "mri_norm2.h5", image, label[:-1])
    with pytest.raises(ValueError, match=r"zeta: image \(5, 7, 9\), label \(5, 7, 8\)"):
        convert("la_h5", tmp_path, tmp_path / "raw")
    with h5py.File(tmp_path / "zeta" / "mri_norm2.h5", "w") as file:
        file["image"] = image
    with pytest.raises(ValueError, match="no dataset label; it has image"):
        convert("la_h5", tmp_path, tmp_path / "raw")
    with pytest.raises(ValueError, match="no converter 'la'; there are la_h5"):
        convert("la", tmp_path, tmp_path / "raw")


def test_a_dataset_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "raw" / "Dataset511_LA").mkdir(parents=True)
    with pytest.raises(ValueError, match="already exists"):
        convert("la_h5", tmp_path, tmp_path / "raw")
