"""Dice, Jaccard, 95 % Hausdorff distance and average surface distance of a label map, as the papers compute
them: medpy's definitions.

ASD is medpy's `asd`, from the surface of the prediction to that of the truth (not symmetric). A structure
that the truth has and the prediction lacks, or the other way round, scores Dice and Jaccard 0 and, as
distance, the diagonal of the grid (the papers' public code counts 0 there, which rewards it); one that both
lack is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from medpy.metric import binary
from scipy import ndimage

NAMES = ("dice", "jaccard", "hd95_voxel", "asd_voxel", "hd95_mm", "asd_mm")


def score(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> list[float | None]:
    """Values of `NAMES` for two masks of one shape; `spacing` in mm, in the order of the axes."""
    if not truth.any() and not prediction.any():
        return [None] * len(NAMES)
    if not truth.any() or not prediction.any():
        voxel, mm = (float(np.linalg.norm(np.multiply(truth.shape, s))) for s in (1.0, spacing))
        return [0.0, 0.0, voxel, voxel, mm, mm]
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[
        0
    ]  # distances are the same there, and faster
    p, t = (np.pad(mask[box], 1) for mask in (prediction, truth))
    values = [binary.dc(p, t), binary.jc(p, t)]
    for s in (None, tuple(spacing)):
        values += [binary.hd95(p, t, s), binary.asd(p, t, s)]
    return [float(v) for v in values]


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
