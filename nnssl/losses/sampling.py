"""Random and ranked choices of voxels, with static shapes: no loop over voxels, no synchronisation with the host."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_members(member: Tensor, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Per row, up to n members drawn uniformly without replacement.

    Args:
        member: (K, N) bool.
        n: how many per row.
        generator: randomness on member's device; None: torch's global one.

    Returns:
        indices (K, n') int64 into N, and valid (K, n') bool, n' = min(n, N). Invalid places (a row with fewer members) hold arbitrary
        indices.
    """
    keys = torch.rand(member.shape, device=member.device, generator=generator)
    return top_members(keys, member, n)


def top_members(score: Tensor, member: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Per row, the n members with the highest score. score: (K, N); member: (K, N) bool. Returns as `sample_members`."""
    values, indices = score.masked_fill(~member, -torch.inf).topk(min(n, member.shape[1]), dim=1)
    return indices, values > -torch.inf


def gather_voxels(features: Tensor, index: Tensor) -> Tensor:
    """Feature vectors (..., F) of the voxels `index` (...) of a map (B, F, S), counted sample after sample: b * V + v.

    Reads the sampled voxels only: no copy of the map in another layout.
    """
    voxels = features[0, 0].numel()
    return features.flatten(2)[index // voxels, :, index % voxels]
