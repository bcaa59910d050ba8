from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.demo.phantoms import FIELD_OF_VIEW_MM, LABELS, Phantom, make_phantom, smooth_field, write_dataset

COARSE = (6.0, 5.0, 5.0)


def phantom(seed: int = 0, spacing: tuple[float, float, float] = COARSE) -> Phantom:
    return make_phantom(np.random.default_rng(seed), spacing)


def pixels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize("spacing", [COARSE, (3.6, 2.6, 2.6)])
def test_both_structures_are_in_every_scan_and_the_lesion_is_the_smaller_brighter_one(
    spacing: tuple[float, float, float],
) -> None:
    for seed in range(5):
        scan = phantom(seed, spacing)
        assert scan.image.shape == scan.labels.shape
        assert set(np.unique(scan.labels)) == set(LABELS.values())
        organ, lesion = (scan.image[scan.labels == LABELS[name]] for name in ("organ", "lesion"))
        assert len(lesion) < len(organ)
        assert lesion.mean() > organ.mean() > scan.image[scan.labels == 0].mean()


def test_lesion_touches_or_lies_in_the_organ() -> None:
    scan = phantom()
    lesion = np.argwhere(scan.labels == LABELS["lesion"])
    neighbours = (lesion[:, None] + np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])).reshape(
        -1, 3
    )
    inside = neighbours[((neighbours >= 0) & (neighbours < scan.labels.shape)).all(1)]
    assert (scan.labels[tuple(inside.T)] == LABELS["organ"]).any()


def test_intensity_alone_does_not_separate_the_structures() -> None:
    """Distractors, bias field and noise: the best threshold on intensity finds neither structure well."""
    scan = phantom(1, (3.6, 2.6, 2.6))
    for wanted in (scan.labels > 0, scan.labels == LABELS["lesion"]):
        found = [scan.image > t for t in np.percentile(scan.image, np.arange(50, 100, 0.5))]
        assert max(2 * (f & wanted).sum() / (f.sum() + wanted.sum()) for f in found) < 0.85


def test_grid_covers_the_field_of_view_in_mm() -> None:
    scan = phantom()
    extent = np.array(scan.image.shape) * scan.spacing
    np.testing.assert_allclose(extent, FIELD_OF_VIEW_MM, rtol=0.15)
    np.testing.assert_allclose(scan.spacing, COARSE, rtol=0.05 + 1e-6)


def test_a_seed_repeats_a_scan_and_another_seed_draws_another() -> None:
    np.testing.assert_array_equal(phantom(3).image, phantom(3).image)
    assert phantom(3).image.shape != phantom(4).image.shape or (phantom(3).image != phantom(4).image).any()


def test_smooth_field_has_unit_spread_and_is_smooth() -> None:
    field = smooth_field(np.random.default_rng(0), (20, 30, 40), 4)
    assert field.shape == (20, 30, 40)
    assert field.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(field, axis=2)).mean() < 0.2  # white noise: 1.1


def test_dataset_is_what_nnunet_expects(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset900_Phantoms", labeled=2, unlabeled=3, test=1, spacing=COARSE)
    files = {part.name: sorted(f.name for f in part.iterdir()) for part in folder.iterdir() if part.is_dir()}
    assert files == {
        "imagesTr": ["train_001_0000.nii.gz", "train_002_0000.nii.gz"],
        "labelsTr": ["train_001.nii.gz", "train_002.nii.gz"],
        "imagesUn": ["unlabeled_001_0000.nii.gz", "unlabeled_002_0000.nii.gz", "unlabeled_003_0000.nii.gz"],
        "imagesTs": ["test_001_0000.nii.gz"],
        "labelsTs": ["test_001.nii.gz"],
    }
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["numTraining"] == 2
    assert content["labels"] == {"background": 0, "organ": 1, "lesion": 2}
    image, labels = (
        sitk.ReadImage(str(folder / p))
        for p in ("imagesTr/train_001_0000.nii.gz", "labelsTr/train_001.nii.gz")
    )
    assert image.GetSize() == labels.GetSize()
    assert image.GetSpacing() == labels.GetSpacing()
    assert image.GetSpacing()[2] > image.GetSpacing()[0]  # slices are thicker than pixels


def test_more_cases_leave_the_earlier_ones_as_they_were(tmp_path: Path) -> None:
    few = write_dataset(tmp_path / "few", labeled=1, unlabeled=1, test=0, seed=5, spacing=COARSE)
    many = write_dataset(tmp_path / "many", labeled=2, unlabeled=2, test=1, seed=5, spacing=COARSE)
    for name in (
        "imagesTr/train_001_0000.nii.gz",
        "labelsTr/train_001.nii.gz",
        "imagesUn/unlabeled_001_0000.nii.gz",
    ):
        np.testing.assert_array_equal(pixels(few / name), pixels(many / name))
    train, unlabeled = (
        pixels(few / "imagesTr/train_001_0000.nii.gz"),
        pixels(few / "imagesUn/unlabeled_001_0000.nii.gz"),
    )
    assert train.shape != unlabeled.shape or (train != unlabeled).any()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("data")
    with pytest.raises(ValueError, match=r"mine already exists: choose another folder"):
        write_dataset(tmp_path / "mine", labeled=1, unlabeled=0, test=0)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, -1, 0), (1, 0, -1)])
def test_impossible_counts_are_refused_before_anything_is_written(
    tmp_path: Path, counts: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match="expected labeled >= 1 and no negative count"):
        write_dataset(tmp_path / "new", *counts)
    assert not list(tmp_path.iterdir())
