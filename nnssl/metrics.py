"""Overlap and surface distances of two masks, and intervals of paired differences.

Distances follow medpy: a surface is made of the voxels with a neighbour over a face outside of the mask;
95HD is the 95th percentile of the distances of both directions together, ASD the mean distance from the
surface of the prediction to that of the truth (not symmetric). A structure that the truth has and the
prediction lacks, or the other way round, scores Dice and Jaccard 0 and, as distance, the diagonal of the
grid; one that both lack is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

RESAMPLES, CONFIDENCE = 10_000, 95


class Distances(NamedTuple):
    """In the unit of the spacing."""

    hd95: float
    asd: float


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and Jaccard of two masks of one shape; NaN where both are empty."""
    both, either = int((prediction & truth).sum()), int((prediction | truth).sum())
    return (2 * both / (both + either), both / either) if either else (float("nan"), float("nan"))


def surface(mask: np.ndarray) -> np.ndarray:
    """Indices (N, dimensions) of the voxels of a mask with a neighbour over a face outside of it; the edge of
    the array counts as outside."""
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return np.zeros((0, mask.ndim), int)
    inner = mask[box[0]]
    edge = inner & ~ndimage.binary_erosion(inner)
    return np.argwhere(edge) + [s.start for s in box[0]]


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacings: Sequence[Sequence[float]]
) -> list[Distances]:
    """95HD and ASD of two masks of one shape in each of the spacings; NaN where both masks are empty."""
    points, targets = surface(prediction), surface(truth)
    found = []
    for spacing in spacings:
        scale = np.asarray(spacing, float)
        if not len(points) and not len(targets):
            found.append(Distances(float("nan"), float("nan")))
        elif not len(points) or not len(targets):
            diagonal = float(np.linalg.norm(truth.shape * scale))
            found.append(Distances(diagonal, diagonal))
        else:
            there = cKDTree(targets * scale).query(points * scale)[0]
            back = cKDTree(points * scale).query(targets * scale)[0]
            hd95 = np.percentile(np.concatenate([there, back]), 95)
            found.append(Distances(float(hd95), float(there.mean())))
    return found


def interval(difference: np.ndarray) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of paired differences (cases,), resampled and seeded; of
    (seeds, cases) both are resampled."""
    difference = np.atleast_2d(difference)
    seeds, cases = difference.shape
    random = np.random.default_rng(0)
    by_case = random.integers(cases, size=(RESAMPLES, 1, cases))
    by_seed = random.integers(seeds, size=(RESAMPLES, seeds, 1))
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(difference[by_seed, by_case].mean(axis=(1, 2)), [tail, 100 - tail])
    return float(low), float(high)
