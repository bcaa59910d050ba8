"""Output folders as trainings leave them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

DATASET = "Dataset778_Blobs"
LABELS = {"background": 0, "large, round": 1, "small": 2}
CASES = ("case_a", "case_b", "case_c", "case_d")
SPACING = (2.0, 1.0, 1.5)  # z, y, x
EPOCHS = 3


def truth(case: str) -> np.ndarray:
    labels = np.zeros((10, 16, 14), np.uint8)
    shift = CASES.index(case)
    labels[2:8, 2 + shift : 9 + shift, 3:11] = 1
    if case != "case_d":  # a case without the small structure
        labels[4:6, 5:8, 11:13] = 2
    return labels


def write(array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


class Results:
    """nnUNet_raw, nnUNet_preprocessed and nnUNet_results below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = {
            "labels": LABELS,
            "channel_names": {"0": "MR"},
            "numTraining": len(CASES),
            "file_ending": ".nii.gz",
        }
        for case in CASES:
            labels = truth(case)
            noise = np.random.default_rng(0).random(labels.shape)
            write((50 * labels + 20 * noise).astype(np.float32), self.image(case))
            write(labels, folder / "preprocessed" / DATASET / "gt_segmentations" / f"{case}.nii.gz")
            write(labels, folder / "raw" / DATASET / "labelsTr" / f"{case}.nii.gz")

    def image(self, case: str) -> Path:
        return self.folder / "raw" / DATASET / "imagesTr" / f"{case}_0000.nii.gz"

    def fold(self, trainer: str, fold: int | str = 0) -> Path:
        return self.folder / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / f"fold_{fold}"

    def begin(
        self, trainer: str, terms: tuple[str, ...] = ("supervised", "pseudo"), fold: int | str = 0
    ) -> Path:
        """A training of `EPOCHS` epochs that is not at its end: record and losses."""
        folder = self.fold(trainer, fold)
        folder.mkdir(parents=True)
        (folder.parent / "dataset.json").write_text(json.dumps(self.content))
        record = {
            "trainer": trainer,
            "classes": ["large, round", "small"],
            "num_epochs": 2 * EPOCHS,
            "meaning": {"supervised": "What the labels say.", "pseudo": "What the teacher says."},
            "config": {"": {"num_epochs": 2 * EPOCHS, "seed": None}, "Own": {"threshold": 0.9}},
            "changed": ["num_epochs"],
            "device": "cpu",
            "precision": "float32",
            "peak_memory": 3 * 2**29,
            "logging": self.logging(),
        }
        (folder / "training.json").write_text(json.dumps(record))
        columns = [f"{kind}/{term}" for kind in ("loss", "weight") for term in terms]
        values = {column: 0.5 for column in columns}
        if "pseudo" in terms:
            values |= {'"accepted/large, round"': 0.075, '"called/large, round"': 0.1}
            values |= {"accepted/small": 0.0, "called/small": 0.0}
        lines = [",".join(["epoch", "lr", *values])]
        lines += [",".join(map(str, [e, 0.01, *values.values()])) for e in range(EPOCHS)]
        (folder / "losses.csv").write_text("\n".join(lines) + "\n")
        return folder

    @staticmethod
    def logging() -> dict[str, Any]:
        return {
            "train_losses": [0.5, 0.4, 0.3],
            "val_losses": [0.6, 0.5, 0.45],
            "dice_per_class_or_region": [[0.1, None], [0.5, 0.2], [0.7, 0.4]],
            "epoch_start_timestamps": [0.0, 10.0, 20.0],
            "epoch_end_timestamps": [8.0, 18.0, 28.0],
        }

    def finish(self, folder: Path, seed: int, cases: tuple[str, ...] = CASES) -> None:
        """The end of a training: a checkpoint, and predictions that are off by a few voxels."""
        torch.save({"logging": self.logging()}, folder / "checkpoint_final.pth")
        record = json.loads((folder / "training.json").read_text())
        (folder / "training.json").write_text(json.dumps(record | {"num_epochs": EPOCHS}))
        generator = np.random.default_rng(seed)
        for case in cases:
            labels = truth(case)
            labels = np.roll(labels, int(generator.integers(3)), axis=int(generator.integers(1, 3)))
            labels[labels == 2] = 2 * (seed != 3)  # one that never finds the small structure
            write(labels, folder / "validation" / f"{case}.nii.gz")
        (folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')
