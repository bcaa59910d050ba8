"""Which axes may be mirrored, read off the labels: classes that always lie on the same side of each other are
told apart by position, and a mirrored image would teach the opposite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

MOST_CASES = 50  # of a fold that are looked at
LARGEST_OFFSET, SAME_SIDE = 1.0, 0.95


@dataclass(frozen=True)
class Offset:
    """Where one class lies from another along an axis of the patch.

    classes  the two label values
    axis     of the patch
    mean     over the cases: difference of the centroids, in standard deviations of the foreground
    same     share of the cases in which it has the more frequent sign
    cases    that have both classes
    """

    classes: tuple[int, int]
    axis: int
    mean: float
    same: float
    cases: int

    @property
    def harmful(self) -> bool:
        """Whether mirroring would swap the classes. One case alone shows no rule."""
        return self.cases > 1 and abs(self.mean) > LARGEST_OFFSET and self.same >= SAME_SIDE

    def __str__(self) -> str:
        a, b = self.classes
        return (
            f"axis {self.axis}: class {b} lies {self.mean:+.2f} sd from class {a}, on the same side in "
            f"{100 * self.same:.0f} % of {self.cases} cases"
        )


def class_offsets(segmentations: Iterable[np.ndarray], labels: Sequence[int], dim: int) -> list[Offset]:
    """All pairs of classes along all axes.

    Args:
        segmentations: label maps of whole cases, (D, H, W).
        labels: the foreground's label values; others (ignore, -1 outside the body) do not count.
        dim: axes of a patch; a 2D patch has the last two of a volume.
    """
    pairs = list(combinations(labels, 2))
    rows = [_case_offsets(s, labels, pairs, dim) for s in segmentations] if pairs else []
    offsets = []
    for p, classes in enumerate(pairs):
        for axis in range(dim):
            values = np.array([row[p, axis] for row in rows])
            values = values[np.isfinite(values)]
            if len(values):
                above = float((values > 0).mean())
                offsets.append(
                    Offset(classes, axis, float(values.mean()), max(above, 1 - above), len(values))
                )
    return offsets


def _case_offsets(
    segmentation: np.ndarray, labels: Sequence[int], pairs: Sequence[tuple[int, int]], dim: int
) -> np.ndarray:
    """(pairs, axes); NaN where a class is absent or the foreground has no extent."""
    axes = range(segmentation.ndim - dim, segmentation.ndim)
    profiles = {label: _profiles(segmentation == label, axes) for label in labels}
    centroids, rows = {label: [_mean(p) for p in found] for label, found in profiles.items()}, []
    spread = [_spread(np.sum([profiles[label][i] for label in labels], axis=0)) for i in range(dim)]
    for a, b in pairs:
        rows.append(
            [(centroids[b][i] - centroids[a][i]) / spread[i] if spread[i] > 0 else np.nan for i in range(dim)]
        )
    return np.array(rows)


def _profiles(mask: np.ndarray, axes: Iterable[int]) -> list[np.ndarray]:
    """Voxels of the mask per position along each axis."""
    return [mask.sum(tuple(a for a in range(mask.ndim) if a != axis)).astype(float) for axis in axes]


def _mean(profile: np.ndarray) -> float:
    total = profile.sum()
    return float(profile @ np.arange(len(profile)) / total) if total else float("nan")


def _spread(profile: np.ndarray) -> float:
    """Standard deviation of the position; 0 without any voxel."""
    total = profile.sum()
    if not total:
        return 0.0
    position = np.arange(len(profile))
    return float(np.sqrt(profile @ (position - _mean(profile)) ** 2 / total))


def offsets_of(dataset: Any, cases: Sequence[str], label_manager: Any, dim: int) -> list[Offset]:
    """`class_offsets` of preprocessed cases, at most fifty of them, evenly spread in name order.

    Args:
        dataset: nnU-Net's, of the preprocessed labeled cases.
        cases: the labeled training cases of a fold; no other is read.
        label_manager: nnU-Net's, of the plan.
        dim: axes of a patch.
    """
    names = sorted(cases)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, MOST_CASES).round().astype(int))]
    labels = [int(label) for label in label_manager.foreground_labels]
    return class_offsets((np.asarray(dataset.load_case(c)[1][0]) for c in chosen), labels, dim)


def allowed_axes(offsets: Iterable[Offset], dim: int) -> tuple[int, ...]:
    """Axes along which no pair of classes would be swapped."""
    harmful = {offset.axis for offset in offsets if offset.harmful}
    return tuple(axis for axis in range(dim) if axis not in harmful)


def worst(offsets: Iterable[Offset]) -> list[Offset]:
    """Per axis the pair of classes that speaks most against mirroring."""
    found: dict[int, Offset] = {}
    for o in offsets:
        known = found.get(o.axis)
        if known is None or (o.harmful, abs(o.mean)) > (known.harmful, abs(known.mean)):
            found[o.axis] = o
    return [found[axis] for axis in sorted(found)]
