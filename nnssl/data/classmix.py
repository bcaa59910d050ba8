"""ClassMix between the samples of a batch (Olsson et al., WACV 2021), on the device and with static shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def classmix_mask(member: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, 1, S) bool: voxels in which every sample shows its neighbour: those of half of the neighbour's classes, drawn at random.

    Mix with `nnssl.data.cutmix.cutmix`, images and labels alike. Of an odd number of classes the larger half is pasted.

    Args:
        member: (K, B, S) bool, the (pseudo-)classes of every voxel (`LabelSpace.classes`); they may overlap.
        generator: randomness on member's device; None: torch's global one.
    """
    present = member.flatten(2).any(2).T  # (B, K)
    draw = torch.rand(present.shape, device=member.device, generator=generator).masked_fill(~present, 2.0)
    rank = draw.argsort(1).argsort(1)
    chosen = rank < (present.sum(1, keepdim=True) + 1) // 2
    pasted = (member & chosen.T.reshape(*chosen.T.shape, *[1] * (member.ndim - 2))).any(0)
    return pasted.roll(1, 0).unsqueeze(1)
