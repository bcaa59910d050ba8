"""Random and ranked choices of voxels, with static shapes: no loop over voxels, no synchronisation with the
host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_members(member: Tensor, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Per row, up to n members drawn uniformly without replacement.

    Args:
        member: (K, N) bool.
        n: how many per row.
        generator: randomness on member's device; None: torch's global one.

    Returns:
        indices (K, n') int64 into N, and valid (K, n') bool, n' = min(n, N). Invalid places (a row with fewer
        members) hold arbitrary indices.
    """
    keys = torch.rand(member.shape, device=member.device, generator=generator)
    return top_members(keys, member, n)


def top_members(score: Tensor, member: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Per row, the n members with the highest score. score: (K, N); member: (K, N) bool. Returns as
    `sample_members`."""
    values, indices = score.masked_fill(~member, -torch.inf).topk(min(n, member.shape[1]), dim=1)
    return indices, values > -torch.inf


def gather_voxels(features: Tensor, index: Tensor) -> Tensor:
    """Feature vectors (..., F) of the voxels `index` (...) of a map (B, F, S), counted sample after sample: b
    * V + v.

    Reads the sampled voxels only: no copy of the map in another layout.
    """
    voxels = features[0, 0].numel()
    return features.flatten(2)[index // voxels, :, index % voxels]


def gather_interpolated(features: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """`gather_voxels(interpolate(features, size, linear, align_corners=False), index)` without the
    interpolated map.

    Args:
        features: (B, F, S'), a map of lower resolution.
        index: (...) voxels of the map of size S, counted sample after sample.
        size: S.
    """
    low = features.shape[2:]
    if tuple(low) == tuple(size):
        return gather_voxels(features, index)
    voxels = math.prod(size)
    rest = index % voxels
    corner = (index // voxels * math.prod(low))[
        ..., None
    ]  # (..., 1), doubled with every axis: the neighbours' flat indices
    weight = torch.ones_like(corner, dtype=torch.promote_types(features.dtype, torch.float32))
    stride, stride_low = voxels, math.prod(low)
    for n, n_low in zip(size, low, strict=True):
        stride, stride_low = stride // n, stride_low // n_low
        position = ((rest // stride + 0.5) * (n_low / n) - 0.5).clamp_min(0)
        rest = rest % stride
        lower = position.long().clamp_max(n_low - 1)
        share = (position - lower).to(weight.dtype)[..., None]
        upper = (lower + 1).clamp_max(n_low - 1)
        corner = torch.cat(
            [corner + stride_low * lower[..., None], corner + stride_low * upper[..., None]], -1
        )
        weight = torch.cat([weight * (1 - share), weight * share], -1)
    return torch.einsum("...cf,...c->...f", gather_voxels(features, corner), weight.to(features.dtype))


def draw_members(member: Tensor, row: Tensor) -> Tensor:
    """For every entry of `row` (...), a uniformly drawn member of that row, with replacement: indices (...)
    into N.

    Args:
        member: (K, N) bool; rows without members give arbitrary indices.
        row: (...) int64 in 0 .. K - 1.
    """
    upto = member.flatten().cumsum(0, dtype=torch.int32)
    end = upto[member.shape[1] - 1 :: member.shape[1]]  # (K,) members in this row and those before
    count = torch.diff(end, prepend=end.new_zeros(1))
    draw = torch.rand(
        row.shape, device=member.device, dtype=torch.float32 if member.device.type == "mps" else torch.float64
    )
    place = (end - count)[row] + (draw * count[row]).int().minimum(
        (count[row] - 1).clamp_min(0)
    )  # float32 may round up to the count
    found = torch.searchsorted(upto, place + 1)  # the first voxel with that many members up to it
    return found.clamp_max(member.numel() - 1) % member.shape[1]
