"""Mixing between the samples of a batch, drawn on the device and with static shapes: CutMix (Yun et al., ICCV
2019), ClassMix (Olsson et al., WACV 2021). Masks are drawn first and applied alike to images and labels.
Histogram matching (as augmentation: Ma, STACOM 2020) takes only the intensities of another sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl.distributed import from_previous


def cutmix_mask(
    batch: int,
    size: Sequence[int],
    device: torch.device,
    probability: float = 0.5,
    volume: tuple[float, float] = (0.02, 0.4),
    stretch: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, 1, S) bool: the box of every sample in which it shows its neighbour; empty with probability 1 -
    `probability`.

    Args:
        volume: smallest and largest share of the patch that a box takes (UniMatch's range).
        stretch: range of an axis's log aspect; 0: boxes have the shape of the patch.
    """
    dim = len(size)
    draw = torch.rand((batch, 2 + 2 * dim), device=device, generator=generator)
    share = volume[0] + (volume[1] - volume[0]) * draw[:, 0]
    aspect = stretch * (draw[:, 2 : 2 + dim] - 0.5)  # log per axis, made to cancel: the volume stays
    edge = (share[:, None] ** (1 / dim) * torch.exp(aspect - aspect.mean(1, keepdim=True))).clamp_max(1.0)
    start = draw[:, 2 + dim :] * (1 - edge)
    mask = (draw[:, 1] < probability).view(batch, 1, *[1] * dim)
    for axis, n in enumerate(size):
        position = (torch.arange(n, device=device) + 0.5) / n
        inside = (position >= start[:, axis, None]) & (position < (start + edge)[:, axis, None])
        mask = mask & inside.view(batch, 1, *[n if a == axis else 1 for a in range(dim)])
    return mask


def cutmix(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, C, S) with its neighbour, the sample before it, inside each box; mask (B, 1, S) from
    `cutmix_mask`. On several ranks the first sample's neighbour is the last one of the rank before."""
    return cutmix_all((x, mask))[0]


def cutmix_all(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """`cutmix` of every (x, mask), by one exchange between ranks."""
    neighbours = from_previous(*(x for x, _ in pairs))
    return [torch.where(mask, near, x) for near, (x, mask) in zip(neighbours, pairs, strict=True)]


def both_ways(labeled: Sequence[Tensor], unlabeled: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs for pasting both ways: every labeled sample with an unlabeled one, then every unlabeled sample
    with the labeled one before its own, on several ranks through all of them. Batches of different sizes are
    cycled through.

    labeled: each (B, ...); unlabeled: each (U, ...). Returns both as (B + U, ...).
    """
    n, u = len(labeled[0]), len(unlabeled[0])
    i, j = (torch.arange(k, device=labeled[0].device) for k in (n, u))
    before = from_previous(*labeled)
    return (
        [torch.cat([x, near[j % n]]) for x, near in zip(labeled, before, strict=True)],
        [x[torch.cat([i % u, j])] for x in unlabeled],
    )


def classmix_mask(member: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, 1, S) bool: voxels in which every sample shows its neighbour: those of half of the neighbour's
    classes, drawn at random.

    Mix with `cutmix`, images and labels alike. Of an odd number of classes the larger half is pasted.

    Args:
        member: (K, B, S) bool, the (pseudo-)classes of every voxel (`LabelSpace.classes`); they may overlap.
        generator: randomness on member's device; None: torch's global one.
    """
    present = member.flatten(2).any(2).T  # (B, K)
    draw = torch.rand(present.shape, device=member.device, generator=generator).masked_fill(~present, 2.0)
    rank = draw.argsort(1).argsort(1)
    chosen = rank < (present.sum(1, keepdim=True) + 1) // 2
    pasted = (member & chosen.T.reshape(*chosen.T.shape, *[1] * (member.ndim - 2))).any(0)
    return from_previous(pasted)[0].unsqueeze(1)


def match_histograms(x: Tensor, reference: Tensor, most: int = 16_384) -> Tensor:
    """x with the intensities of the reference: every voxel takes the value at its own quantile there.

    Equal values stay equal (they share the mean of their ranks), so that a constant background, padding and
    clipped values remain constant.

    Args:
        x: (B, C, S).
        reference: (B, C, S'), each channel that of the same sample.
        most: voxels that quantiles are read off; of larger patches so many, spread over all of it.
    """
    values, wanted = (v.flatten(2).float().contiguous() for v in (x, reference))
    ordered, target = (_some(v, most).sort(-1).values for v in (values, wanted))
    first, behind = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    quantile = (first + behind).float() / (2 * ordered.shape[-1])  # of the middle of equal values
    index = (quantile * target.shape[-1]).long().clamp_max(target.shape[-1] - 1)
    return target.gather(-1, index).view_as(x).to(x.dtype)


def _some(values: Tensor, most: int) -> Tensor:
    """(..., n) -> (..., at most `most`), in steps of the golden section: even ones may fall on one plane
    of a grid."""
    n = values.shape[-1]
    if n <= most:
        return values
    place = torch.arange(most, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1
    return values[..., (place * n).long().to(values.device, non_blocking=True)]
