"""The qualitative panel: one strip per row (image, labels, prediction, error) on the same slice, and all
strips under each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib import image as pictures
from matplotlib.colors import to_rgb

from nnssl.demo.figures import ERROR, PALETTE
from nnssl.files import read_json, replacing

OPACITY = 0.6


def write_panel(raw: Path, predictions: Path, case: str, ending: str, path: Path) -> float:
    """The strip of one case as a PNG, a pixel per voxel, on the slice with most of its smallest structure;
    returns its pixels' aspect."""
    channel = sorted(read_json(raw / "dataset.json")["channel_names"])[0]
    files = (
        raw / "imagesTr" / f"{case}_{int(channel):04d}{ending}",
        raw / "labelsTr" / f"{case}{ending}",
        predictions / f"{case}{ending}",
    )
    scans = [sitk.ReadImage(str(f)) for f in files]
    image, truth, prediction = (np.array(sitk.GetArrayFromImage(s), ndmin=3) for s in scans)
    values, counts = np.unique(truth[truth > 0], return_counts=True)
    z = int((truth == values[counts.argmin()]).sum((1, 2)).argmax()) if len(values) else len(truth) // 2
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.repeat(np.clip((image[z] - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, axis=-1)
    layers = [
        grey,
        paint(grey, truth[z], PALETTE),
        paint(grey, prediction[z], PALETTE),
        paint(grey, truth[z] != prediction[z], [ERROR]),
    ]
    gap = np.ones((len(grey), 2, 3))
    strip = np.concatenate([part for layer in layers for part in (layer, gap)][:-1], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pictures.imsave(partial, np.round(255 * strip).astype(np.uint8), metadata={"Software": ""})
    spacing = scans[0].GetSpacing()
    return float(spacing[1] / spacing[0])


def paint(grey: np.ndarray, labels: np.ndarray, palette: list[str]) -> np.ndarray:
    """(H, W, 3) with the labels 1, 2, ... of (H, W) in the palette's colours over it."""
    painted = grey.copy()
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        painted[inside] = (1 - OPACITY) * grey[inside] + OPACITY * np.array(
            to_rgb(palette[(int(value) - 1) % len(palette)])
        )
    return painted
