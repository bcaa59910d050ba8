"""SemSim's spatial-aware fusion (SFM): windows at the same place attend to each other across encoder
scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.networks.attention import AttentionBlock


def windows_per_axis(grid: Sequence[int], wanted: int) -> tuple[int, ...]:
    """How many windows the axes of a grid are cut into: `wanted`, or fewer where windows would be narrower
    than two voxels."""
    return tuple(max(1, min(wanted, n // 2)) for n in grid)


def cut_windows(grid: Sequence[int], windows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which voxels (row-major) belong to which of W equal windows, and where each voxel is found again.

    Window w of an axis with n voxels owns those with floor(i * windows / n) = w. Windows with fewer voxels
    than others borrow neighbours, so all have M voxels and none is padded.

    Returns:
        index: (W, M) int64 voxels of each window.
        place: (V,) int64 where voxel v is owned in the flattened windows; place // M is its window.
    """
    index, window, offset = (torch.zeros(shape, dtype=torch.long) for shape in ((1, 1), (1,), (1,)))
    for n, count in zip(
        grid, windows, strict=True
    ):  # row-major: each axis refines what the axes before it gave
        length = -(-n // count)
        start = torch.tensor([min(-(-w * n // count), n - length) for w in range(count)])
        owner = torch.arange(n) * count // n
        inside = start[:, None] + torch.arange(length)  # (count, length)
        index = (index[:, None, :, None] * n + inside[:, None]).flatten(2).flatten(0, 1)
        window = (window[:, None] * count + owner).flatten()
        offset = (offset[:, None] * length + torch.arange(n) - start[owner]).flatten()
    return index, window * index.shape[1] + offset


class SpatialAwareFusion(nn.Module):
    """Features of consecutive encoder scales (B, F_s, S_s) -> e (B, D, grid), grid the finest of the scales
    within `max_tokens` voxels.

    Every scale is projected to D channels and cut into the same windows; the tokens of windows at the same
    place, of all scales, are one sequence of a transformer block; back in place, all scales are resized to
    the grid, concatenated, and merged by 1x1 convolution, normalisation and ReLU. Scales above `max_tokens`
    voxels are averaged to the grid before.

    Args:
        features: F_s of each scale, finest first.
        grids: S_s of each scale.
        width: D.
        windows: per axis, at most (two voxels of the coarsest scale at least).
        max_tokens: voxels of a scale, at most.
        heads, mlp_ratio: of the transformer block.
    """

    def __init__(
        self,
        features: Sequence[int],
        grids: Sequence[Sequence[int]],
        width: int = 128,
        windows: int = 4,
        max_tokens: int = 4096,
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        fitting = [tuple(g) for g in grids if math.prod(g) <= max_tokens] or [tuple(grids[-1])]
        self.grid = fitting[0]
        self.grids = [tuple(g) if math.prod(g) <= math.prod(self.grid) else self.grid for g in grids]
        self.windows = windows_per_axis(self.grids[-1], windows)
        self.project = nn.ModuleList(nn.Linear(f, width) for f in features)
        self.block = AttentionBlock(width, heads=heads, mlp_ratio=mlp_ratio)
        self.merge = nn.Linear(width * len(features), width, bias=False)
        self.norm = nn.GroupNorm(width, width)  # instance normalisation in any dimension
        for s, grid in enumerate(self.grids):
            index, place = cut_windows(grid, self.windows)
            self.register_buffer(f"index_{s}", index, persistent=False)
            self.register_buffer(f"place_{s}", place, persistent=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        tokens, lengths = [], []
        for s, (x, grid) in enumerate(zip(features, self.grids, strict=True)):
            if tuple(x.shape[2:]) != grid:
                x = F.interpolate(x, grid, mode="area")
            x = self.project[s](x.flatten(2).mT)  # (B, V, D)
            index = self.get_buffer(f"index_{s}")
            tokens.append(x.index_select(1, index.flatten()).unflatten(1, index.shape))  # (B, W, M_s, D)
            lengths.append(index.shape[1])
        joint = torch.cat(tokens, dim=2)
        joint = self.block(joint.flatten(0, 1)).unflatten(0, joint.shape[:2])
        maps = []
        for s, x in enumerate(joint.split(lengths, dim=2)):
            x = x.flatten(1, 2).index_select(1, self.get_buffer(f"place_{s}")).mT.unflatten(2, self.grids[s])
            maps.append(self._resize(x).flatten(2))
        merged = self.merge(torch.cat(maps, dim=1).mT).mT  # a 1x1 convolution
        return F.relu(self.norm(merged.float())).unflatten(2, self.grid)

    def _resize(self, x: Tensor) -> Tensor:
        """Linear interpolation to the grid."""
        if tuple(x.shape[2:]) == self.grid:
            return x
        return F.interpolate(x, self.grid, mode="trilinear" if len(self.grid) == 3 else "bilinear")
