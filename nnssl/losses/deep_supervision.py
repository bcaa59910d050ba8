"""nnU-Net's compound loss over all deep supervision scales, with a weight per voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nnssl.labels import LabelSpace
from nnssl.losses.pseudo_label import Compared, cross_entropy_dices


def deep_supervision_loss(
    outputs: Tensor | Sequence[Tensor],
    target: Tensor,
    labels: LabelSpace,
    mask: Tensor,
    scale_weights: Sequence[float],
) -> Tensor:
    """sum_s a_s (CE + Dice)(outputs_s; y_s, m_s), y_s and m_s the voxels of y and m nearest to those of scale
    s.

    Args:
        outputs: (B, K, S_s) per scale, finest first, or the finest alone.
        target: y (B, K, S) zeros and ones.
        labels: how logits are read.
        mask: m (B, 1, S), weight of every voxel, at least 0. An empty mask gives a differentiable 0.
        scale_weights: a_s, at least one per scale; scales of weight 0 are not evaluated.
    """
    return deep_supervision_losses(outputs, [(target, mask)], labels, scale_weights)[0]


def deep_supervision_losses(
    outputs: Tensor | Sequence[Tensor],
    parts: Sequence[tuple[Tensor, Tensor]],
    labels: LabelSpace,
    scale_weights: Sequence[float],
) -> list[Tensor]:
    """`deep_supervision_loss` of the same outputs with each (target, mask), by one collective."""
    scales = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if len(scale_weights) < len(scales):
        raise ValueError(f"{len(scales)} scales need as many weights, found {len(scale_weights)}")
    kept = [(z, a) for z, a in zip(scales, scale_weights, strict=False) if a != 0]
    compared = [Compared(z, *(_nearest(x, z) for x in part)) for part in parts for z, _ in kept]
    found = iter(cross_entropy_dices(compared, labels))
    return [sum((a * next(found) for _, a in kept), scales[0].new_zeros(()).float()) for _ in parts]


def _nearest(x: Tensor, to: Tensor) -> Tensor:
    size = to.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest-exact")
