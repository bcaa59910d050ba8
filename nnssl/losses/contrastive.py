"""Contrastive losses on voxel embeddings: pure functions with fixed shapes and validity masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import divisor


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    positive_valid: Tensor,
    negative_valid: Tensor,
    temperature: float,
) -> Tensor:
    """Mean InfoNCE (van den Oord et al., 2018, eq. 4) of every valid positive against the valid negatives of
    its class.

        L = mean_{k, i} -log  exp(a_k . p_ki / T) / ( exp(a_k . p_ki / T) + sum_j exp(a_k . n_kj / T) )

    Classes without a valid positive or negative do not count; if none is left the result is a differentiable
    0.

    Args:
        anchor: (K, E) unit norm.
        positive: (K, P, E) unit norm. positive_valid: (K, P) bool.
        negative: (K, M, E) unit norm. negative_valid: (K, M) bool.
        temperature: T > 0.
    """
    with torch.autocast(anchor.device.type, enabled=False):  # half precision is too coarse for small T
        anchor, positive, negative = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (anchor, positive, negative)
        )
        pull = torch.einsum("ke,kpe->kp", anchor, positive) / temperature
        push = torch.einsum("ke,kme->km", anchor, negative) / temperature
    push = push.masked_fill(~negative_valid, -torch.inf)
    usable = positive_valid & negative_valid.any(1, keepdim=True)
    # a row without negatives would give logsumexp(-inf) and a NaN gradient: it is unusable, any finite value
    # does
    rest = torch.logsumexp(torch.where(negative_valid.any(1, keepdim=True), push, 0.0), dim=1, keepdim=True)
    per_positive = F.softplus(rest - pull)
    return (per_positive * usable).sum() / divisor(usable.sum())
