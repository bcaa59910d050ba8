"""Consistency of probabilities: pure functions, optionally masked per voxel."""

from __future__ import annotations

from torch import Tensor

from nnssl.distributed import divisor
from nnssl.labels import LabelSpace


def mse_consistency(probabilities: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of probabilities over unmasked voxels and all channels (Tarvainen & Valpola,
    NeurIPS 2017, on voxels).

        L = sum_i m_i sum_k (p_ik - q_ik)^2 / (K sum_i m_i)

    Args:
        probabilities: p (B, K, S).
        target: q (B, K, S); detach it where it is a teacher's.
        mask: m (B, 1, S), zeros and ones or weights; None: everywhere. An empty mask gives a differentiable
            0.
    """
    squared = (probabilities - target).square()
    if mask is None:
        return squared.mean()
    return (squared * mask).sum() / divisor(squared.shape[1] * mask.sum())


def sharpen(logits: Tensor, temperature: float, labels: LabelSpace) -> Tensor:
    """Probabilities (B, K, S) float32 made more decided: p_k^(1/T) / sum_c p_c^(1/T), p = softmax(z); per
    region against 1 - p.

    That is softmax(z / T), or sigmoid(z / T) per region, which no small probability underflows.
    """
    return labels.probabilities(logits.float() / temperature)
