"""Losses against pseudo-labels: pure functions of logits and zeros-and-ones channels, optionally masked per
voxel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import divisor, mean_of_ranks, sum_together
from nnssl.labels import LabelSpace


class Compared(NamedTuple):
    """What one loss compares: logits or probabilities (B, K, S) with a target (B, K, S), where a mask (B, 1,
    S) counts."""

    prediction: Tensor
    target: Tensor
    mask: Tensor | None = None


def cross_entropy(logits: Tensor, target: Tensor, labels: LabelSpace, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over unmasked voxels; binary per region where the label space has regions.

        CE = - sum_i m_i sum_k y_ik log p_ik / sum_i m_i

    Args:
        logits: (B, K, S).
        target: (B, K, S) zeros and ones (or probabilities), no gradient.
        labels: how logits are read.
        mask: (B, 1, S), 1 where a voxel counts; None: everywhere. An empty mask gives a differentiable 0.
    """
    per_voxel = cross_entropies(logits, target, labels)
    if mask is None:
        return per_voxel.mean()
    return (per_voxel * mask).sum() / divisor(mask.sum())


def cross_entropies(logits: Tensor, target: Tensor, labels: LabelSpace) -> Tensor:
    """Of every voxel (B, 1, S), binary and averaged over regions where the label space has them; arguments as
    in `cross_entropy`."""
    logits = logits.float()
    if labels.has_regions:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)
    return -(target * F.log_softmax(logits, dim=1)).sum(1, keepdim=True)


def soft_dice_loss(
    probabilities: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    smooth: float = 1e-5,
    skip_first: bool = True,
) -> Tensor:
    """1 - mean over channels of 2 <p, m y> / (|m p| + |m y|), sums over the batch, of all ranks, and all
    voxels, weighted by the mask m (nnU-Net's "batch dice").

    Args:
        probabilities: (B, K, S).
        target: (B, K, S) zeros and ones, no gradient.
        mask: (B, 1, S), weights of at least 0, or None. An empty mask gives a differentiable 0.
        smooth: added to numerator and denominator: a channel empty in both costs nothing.
        skip_first: leave out channel 0 (background), as nnU-Net does for classes.
    """
    return soft_dice_losses([Compared(probabilities, target, mask)], smooth, skip_first)[0]


def soft_dice_losses(
    compared: Sequence[Compared], smooth: float = 1e-5, skip_first: bool = True
) -> list[Tensor]:
    """`soft_dice_loss` of each, by one collective."""
    sums = sum_together(*(_dice_sums(*each, skip_first) for each in compared))
    return [_dice_loss(s, smooth) for s in sums]


def _dice_sums(p: Tensor, target: Tensor, mask: Tensor | None, skip_first: bool) -> Tensor:
    """<p, m y>, |m p| and |m y| of every channel: (3, K)."""
    if skip_first:
        p, target = p[:, 1:], target[:, 1:]
    if mask is not None:
        target = target * mask
    axes = (0, *range(2, p.ndim))
    overlap = (p * target).sum(axes)
    if mask is not None:
        p = p * mask
    return torch.stack([overlap, p.sum(axes), target.sum(axes)])


def _dice_loss(sums: Tensor, smooth: float = 1e-5) -> Tensor:
    overlap, predicted, wanted = sums
    dice = (2 * overlap + smooth) / (predicted + wanted + smooth)
    return 1 - dice.mean()


def cross_entropy_dice(
    logits: Tensor, target: Tensor, labels: LabelSpace, mask: Tensor | None = None
) -> Tensor:
    """CE + Dice against pseudo-labels: nnU-Net's compound loss at full resolution, with a mask. Shapes as in
    `cross_entropy`."""
    return cross_entropy_dices([Compared(logits, target, mask)], labels)[0]


def cross_entropy_dices(compared: Sequence[Compared], labels: LabelSpace) -> list[Tensor]:
    """`cross_entropy_dice` of each, by one collective."""
    sums = [
        _dice_sums(labels.probabilities(z), y, m, skip_first=not labels.has_regions) for z, y, m in compared
    ]
    counts = [
        s.new_zeros(()) if c.mask is None else c.mask.sum() for s, c in zip(sums, compared, strict=True)
    ]
    shared = sum_together(*sums, *counts)
    found = []
    for (z, y, m), s, count in zip(compared, shared, shared[len(sums) :], strict=False):
        per_voxel = cross_entropies(z, y, labels)
        entropy = per_voxel.mean() if m is None else (per_voxel * m).sum() / mean_of_ranks(count.detach())
        found.append(entropy + _dice_loss(s))
    return found


def confidence_mask(probabilities: Tensor, threshold: float, labels: LabelSpace) -> Tensor:
    """(B, 1, S) float32: 1 where the prediction is certain: max_k p_k >= threshold; for regions every max(p,
    1 - p) >= threshold."""
    return (labels.confidence(probabilities) >= threshold).float()
