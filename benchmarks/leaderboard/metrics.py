"""Dice, Jaccard, 95 % Hausdorff distance and average surface distance of a label map, as the papers compute
them: `nnssl.metrics`, in voxels and in mm.

The papers' public code counts a distance of 0 for a structure that was not found, which rewards it; here it
is the diagonal of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from nnssl.metrics import overlap, surface_distances

NAMES = ("dice", "jaccard", "hd95_voxel", "asd_voxel", "hd95_mm", "asd_mm")


def score(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> list[float | None]:
    """Values of `NAMES` for two masks of one shape; `spacing` in mm, in the order of the axes."""
    if not truth.any() and not prediction.any():
        return [None] * len(NAMES)
    voxel, mm = surface_distances(prediction, truth, [(1.0,) * truth.ndim, tuple(spacing)])
    return [*overlap(prediction, truth), *voxel, *mm]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask, neighbours over faces, edges and corners; of equal ones the first."""
    labels, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    return mask if count < 2 else labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def score_case(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], labels: Sequence[int]
) -> dict[str, list[Any]]:
    """{metric: value per label}, and the same of each label's largest component under `<metric>_lcc`. Truth
    beyond `labels` is ignored."""
    table: dict[str, list[Any]] = {name + suffix: [] for suffix in ("", "_lcc") for name in NAMES}
    known = (truth <= max(labels)) & (truth >= 0)
    for label in labels:
        mask, target = (prediction == label) & known, (truth == label) & known
        for suffix, shown in (("", mask), ("_lcc", largest_component(mask))):
            for name, value in zip(NAMES, score(shown, target, spacing), strict=True):
                table[name + suffix].append(None if value is None else round(value, 5))
    return table
