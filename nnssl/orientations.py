"""Quarter turns and mirrorings of patches: drawn on the host, applied on the device, exactly invertible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """Turns, then mirrorings. Axes count from the last one, so that any leading dimensions may stand before
    them.

    turns     (quarter turns, axis, axis) per plane, in order
    mirrored  axes
    """

    turns: tuple[tuple[int, int, int], ...] = ()
    mirrored: tuple[int, ...] = ()

    def apply(self, x: Tensor) -> Tensor:
        """x (..., S); no axis changes its length where the turned planes are square."""
        for quarters, first, second in self.turns:
            x = torch.rot90(x, quarters, (first, second))
        return x.flip(self.mirrored) if self.mirrored else x

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        x = x.flip(self.mirrored) if self.mirrored else x
        for quarters, first, second in reversed(self.turns):
            x = torch.rot90(x, -quarters, (first, second))
        return x


def square_planes(
    patch_size: Sequence[int], spacing: Sequence[float], axes: Sequence[int]
) -> list[tuple[int, int]]:
    """Pairs of `axes` with as many voxels and the same spacing (within 1 %): a quarter turn keeps patch and
    anatomy in shape."""
    return [
        (a, b)
        for a, b in combinations(sorted(axes), 2)
        if patch_size[a] == patch_size[b] and math.isclose(spacing[a], spacing[b], rel_tol=0.01)
    ]


def random_orientation(
    dim: int, planes: Sequence[tuple[int, int]], mirror_axes: Sequence[int]
) -> Orientation:
    """Zero to three quarter turns in every plane, and each axis mirrored or not, all equally likely.

    Args:
        dim: number of axes of a patch.
        planes: pairs of axes, counted from the first.
        mirror_axes: axes, counted from the first.
    """
    quarters = torch.randint(4, (len(planes),)).tolist()  # on the host, whatever the device
    flips = torch.randint(2, (len(mirror_axes),)).tolist()
    return Orientation(
        tuple((q, a - dim, b - dim) for q, (a, b) in zip(quarters, planes, strict=True) if q),
        tuple(axis - dim for axis, flip in zip(mirror_axes, flips, strict=True) if flip),
    )


def apply_each(x: Tensor, orientations: Sequence[Orientation]) -> Tensor:
    """Every sample of x (B, C, S) in its own orientation."""
    return torch.stack([o.apply(sample) for o, sample in zip(orientations, x, strict=True)])
