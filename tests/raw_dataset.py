"""Tiny nnU-Net raw datasets: two channels (one normalised by z-score, one like CT), anisotropic spacing, a
zero border that is cropped."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

SPACING = (0.8, 0.9, 2.0)  # x, y, z
SHAPE = (10, 28, 26)  # z, y, x


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def write_case(
    folder: Path,
    name: str,
    seed: int,
    label_folder: Path | None = None,
    classes: int = 2,
    num_channels: int = 2,
    spacing: tuple[float, ...] = SPACING,
) -> None:
    """A blob per class on noise."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    label = np.zeros(SHAPE, np.uint8)
    for index in range(classes):
        center = np.array([4 + index, 9 + 9 * index, 12]) + generator.uniform(-1, 1, 3)
        distance = ((grid - center[:, None, None, None]) / np.array([2.5, 5, 5])[:, None, None, None]) ** 2
        label[distance.sum(0) < 1] = index + 1
    for channel in range(num_channels):
        image = (100 + 60 * label + generator.normal(0, 10, SHAPE)).astype(np.float32) * (channel + 1)
        image[:, :2] = image[:, :, -3:] = 0
        write_image(folder / f"{name}_{channel:04d}.nii.gz", image, spacing)
    if label_folder is not None:
        write_image(label_folder / f"{name}.nii.gz", label, spacing)


def write_dataset(root: Path, name: str = "Dataset777_Tiny", labeled: int = 6, unlabeled: int = 3) -> Path:
    """`root`/`name` with imagesTr, labelsTr, imagesUn: cases lab_00..., scan_00...; returns its path."""
    folder = root / name
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(labeled):
        write_case(folder / "imagesTr", f"lab_{index:02d}", index, folder / "labelsTr")
    for index in range(unlabeled):
        write_case(
            folder / "imagesUn",
            f"scan_{index:02d}",
            100 + index,
            spacing=(1.1, 0.7, 1.5) if index == 1 else SPACING,
        )
    content = {
        "channel_names": {"0": "MR", "1": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": labeled,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def stored(path: Path) -> tuple[Any, ...]:
    """What a .b2nd file holds and how; the bytes on disk may differ in the order in which blosc2's threads
    wrote the blocks."""
    array = blosc2.open(str(path), mode="r")
    return (
        array[:].tobytes(),
        array.dtype,
        array.shape,
        array.chunks,
        array.blocks,
        array.cparams.filters,
        array.cparams.codec,
    )


def content(folder: Path) -> dict[str, Any]:
    """Everything in a folder of preprocessed cases."""
    return {
        file.name: stored(file) if file.suffix == ".b2nd" else file.read_bytes() for file in folder.iterdir()
    }


@dataclass(frozen=True)
class Tiny:
    """A planned dataset of one test, nothing preprocessed yet; the nnUNet_* variables point at it."""

    raw: Path
    preprocessed: Path

    dataset_id = 777

    @property
    def plans_file(self) -> Path:
        return self.preprocessed / "nnUNetPlans.json"

    @property
    def labeled(self) -> Path:
        return self.preprocessed / "nnUNetPlans_3d_fullres"

    @property
    def unlabeled(self) -> Path:
        return self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"

    @property
    def dataset_json(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / "dataset.json").read_text(encoding="utf-8"))

    def edit_plan(self, configuration: str | None = None, **changes: Any) -> None:
        plans = json.loads(self.plans_file.read_text(encoding="utf-8"))
        (plans if configuration is None else plans["configurations"][configuration]).update(changes)
        self.plans_file.write_text(json.dumps(plans, indent=4))


def plans(spacing: tuple[float, float, float] = (2.0, 0.9, 0.8)) -> dict[str, Any]:
    """A plans file like nnU-Net's, with the keys that preprocessing reads."""
    resampling: dict[str, Any] = {}
    for which, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        resampling[f"resampling_fn_{which}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{which}_kwargs"] = {
            "is_seg": is_seg,
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
    configurations = {}
    for name, dimensions in (("2d", 2), ("3d_fullres", 3)):
        configurations[name] = {
            "data_identifier": f"nnUNetPlans_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [10, 28, 24][-dimensions:],
            "spacing": list(spacing[-dimensions:]),
            "normalization_schemes": ["ZScoreNormalization", "CTNormalization"],
            "use_mask_for_norm": [False, False],
            **resampling,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet"
            },
            "batch_dice": False,
        }
    intensities = {"mean": 380.0, "std": 60.0, "percentile_00_5": 270.0, "percentile_99_5": 480.0}
    return {
        "dataset_name": "Dataset777_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities, "1": intensities},
        "configurations": configurations,
    }


def planned_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A dataset with a plan, nothing preprocessed, and the environment that points at it."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))
    tiny = Tiny(write_dataset(folder / "raw"), folder / "preprocessed" / "Dataset777_Tiny")
    tiny.preprocessed.mkdir()
    tiny.plans_file.write_text(json.dumps(plans(), indent=4))
    shutil.copy(tiny.raw / "dataset.json", tiny.preprocessed)
    return tiny
