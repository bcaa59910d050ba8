"""Losses against pseudo-labels: pure functions of logits and zeros-and-ones channels, optionally masked per
voxel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import divisor, sum_over_ranks
from nnssl.labels import LabelSpace


def cross_entropy(logits: Tensor, target: Tensor, labels: LabelSpace, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over unmasked voxels; binary per region where the label space has regions.

        CE = - sum_i m_i sum_k y_ik log p_ik / sum_i m_i

    Args:
        logits: (B, K, S).
        target: (B, K, S) zeros and ones (or probabilities), no gradient.
        labels: how logits are read.
        mask: (B, 1, S), 1 where a voxel counts; None: everywhere. An empty mask gives a differentiable 0.
    """
    logits = logits.float()
    if labels.has_regions:
        per_voxel = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)
    else:
        per_voxel = -(target * F.log_softmax(logits, dim=1)).sum(1, keepdim=True)
    if mask is None:
        return per_voxel.mean()
    return (per_voxel * mask).sum() / divisor(mask.sum())


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
    if skip_first:
        probabilities, target = probabilities[:, 1:], target[:, 1:]
    if mask is not None:
        target = target * mask
    axes = (0, *range(2, probabilities.ndim))
    overlap = (probabilities * target).sum(axes)
    if mask is not None:
        probabilities = probabilities * mask
    overlap, predicted, wanted = sum_over_ranks(
        torch.stack([overlap, probabilities.sum(axes), target.sum(axes)])
    )
    dice = (2 * overlap + smooth) / (predicted + wanted + smooth)
    return 1 - dice.mean()


def cross_entropy_dice(
    logits: Tensor, target: Tensor, labels: LabelSpace, mask: Tensor | None = None
) -> Tensor:
    """CE + Dice against pseudo-labels: nnU-Net's compound loss at full resolution, with a mask. Shapes as in
    `cross_entropy`."""
    dice = soft_dice_loss(labels.probabilities(logits), target, mask, skip_first=not labels.has_regions)
    return cross_entropy(logits, target, labels, mask) + dice


def confidence_mask(probabilities: Tensor, threshold: float, labels: LabelSpace) -> Tensor:
    """(B, 1, S) float32: 1 where the prediction is certain: max_k p_k >= threshold; for regions every max(p,
    1 - p) >= threshold."""
    if labels.has_regions:
        certain = torch.maximum(probabilities, 1 - probabilities).amin(1, keepdim=True)
    else:
        certain = probabilities.amax(1, keepdim=True)
    return (certain >= threshold).float()
