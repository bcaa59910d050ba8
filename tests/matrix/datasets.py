"""Phantom datasets of every kind that nnU-Net takes: blobs in noise, a few thousand voxels each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import tifffile
from skimage import io

LABELED, UNLABELED = 5, 2
IGNORED = 2  # rows at one border that carry the ignore label, where there is one


@dataclass(frozen=True)
class Dataset:
    """What a column of the matrix trains on.

    labels   as in dataset.json
    classes  blobs in a scan, of values 1, 2, ...
    shape    voxels (z, y, x); (y, x) for pictures
    spacing  mm (z, y, x)
    """

    channels: tuple[str, ...] = ("MR",)
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "a": 1, "b": 2})
    regions_class_order: tuple[int, ...] = ()
    classes: int = 2
    shape: tuple[int, ...] = (10, 24, 24)
    spacing: tuple[float, ...] = (2.0, 1.0, 1.0)
    ending: str = ".nii.gz"

    def write(self, folder: Path) -> None:
        """imagesTr, labelsTr, imagesUn and dataset.json."""
        for part in ("imagesTr", "labelsTr", "imagesUn"):
            (folder / part).mkdir(parents=True)
        for number in range(LABELED + UNLABELED):
            labeled = number < LABELED
            name = f"lab_{number}" if labeled else f"scan_{number - LABELED}"
            images, label = self.scan(number)
            self._write_image(folder / ("imagesTr" if labeled else "imagesUn"), name, images)
            if labeled:
                self._save(folder / "labelsTr" / f"{name}{self.ending}", label)
                self._sidecar(folder / "labelsTr", name)
        content: dict[str, Any] = {
            "channel_names": {str(i): channel for i, channel in enumerate(self.channels)},
            "labels": self.labels,
            "numTraining": LABELED,
            "file_ending": self.ending,
        }
        if self.regions_class_order:
            content["regions_class_order"] = list(self.regions_class_order)
        (folder / "dataset.json").write_text(json.dumps(content))

    def scan(self, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Channels and label map."""
        rng = np.random.default_rng(seed)
        label = np.zeros(self.shape, np.uint8)
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"))
        per_row = 3 if self.classes > 3 else self.classes
        for k in range(self.classes):
            place = np.array([0.5, 0.3 + 0.35 * (k // per_row), (k % per_row + 0.7) / (per_row + 0.4)])
            centre = place[-label.ndim :] * self.shape + rng.uniform(-1, 1, label.ndim)
            radii = np.array([0.4, 0.2, 0.2])[-label.ndim :] * self.shape
            away = (grid - centre.reshape(-1, *[1] * label.ndim)) / radii.reshape(-1, *[1] * label.ndim)
            label[(away**2).sum(0) < 1] = k + 1
        images = []
        for c in range(len(self.channels)):
            image = (60 + 90 * label / self.classes + rng.normal(0, 8, self.shape)) * (1 + 0.2 * c)
            images.append(image.astype(np.uint8 if self.ending == ".png" else np.float32))
        if "ignore" in self.labels:
            label[..., :IGNORED] = self.labels["ignore"]
        return images, label

    def _write_image(self, folder: Path, name: str, images: list[np.ndarray]) -> None:
        if self.ending == ".png":
            io.imsave(folder / f"{name}_0000.png", np.stack(images, -1), check_contrast=False)
            return
        for c, image in enumerate(images):
            self._save(folder / f"{name}_{c:04d}{self.ending}", image)
        self._sidecar(folder, name)

    def _save(self, path: Path, array: np.ndarray) -> None:
        if self.ending == ".png":
            io.imsave(path, array, check_contrast=False)
        elif self.ending == ".tif":
            tifffile.imwrite(path, array)
        else:
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing(self.spacing[::-1])
            sitk.WriteImage(picture, str(path))

    def _sidecar(self, folder: Path, name: str) -> None:
        """Where TIFF has its spacing."""
        if self.ending == ".tif":
            (folder / f"{name}.json").write_text(json.dumps({"spacing": list(self.spacing)}))
