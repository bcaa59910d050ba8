"""SemSim's affinities (arXiv 2410.13486): predictions refined by similar voxels of the image, and by class
prototypes of other images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e30  # logarithm of the share of a class that does not take part; finite, so that gradients are


def refine(features: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """(p_i + sum_j M_ij p_j) / 2 with M_ij = softmax_j(scale * cos(e_i, e_j)): (B, K, S), float32.

    The sum is scaled-dot-product attention with Q = K = unit features and V = p, padded to equal width and
    contiguous, without which the fused kernels are not chosen: the matrix M (N x N for N voxels) is never in
    memory.

    Args:
        features: e, (B, D, S).
        probabilities: p, (B, K, S).
    """
    kind = probabilities.dtype if probabilities.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(kind).flatten(2).mT, dim=-1)  # (B, N, D)
        p = probabilities.to(kind).flatten(2).mT
        width = max(unit.shape[-1], p.shape[-1])
        q, v = (F.pad(x, (0, width - x.shape[-1])).contiguous()[:, None] for x in (unit, p))
        mixed = F.scaled_dot_product_attention(q, q, v, scale=scale)[:, 0, :, : p.shape[-1]]
        return ((p + mixed) / 2).mT.reshape(probabilities.shape)


def purest(share: Tensor, purity: float = 0.9) -> Tensor:
    """Voxels (B, K, V) bool that hold a class most purely: at least `purity` of its highest share in the
    image. share: (B, K, V) >= 0."""
    return (share >= purity * share.amax(-1, keepdim=True)) & (share > 0)


def prototypes(features: Tensor, member: Tensor, region: Tensor, num_regions: int) -> tuple[Tensor, Tensor]:
    """G = mean feature per (labeled image, class, region), (B, K, R, D), and whether the class is in the
    image at all, (B, K) bool.

    A class that a region lacks has the mean of the whole image there; one that the image lacks has zeros.

    Args:
        features: (B, D, V).
        member: (B, K, V) bool.
        region: (V,) int64 in 0 .. R - 1, the region of each voxel.
    """
    with torch.autocast(features.device.type, enabled=False):  # counts pass the integers of half precision
        features = _wide(features)
        within = F.one_hot(region, num_regions).to(features.dtype).mT  # (R, V)
        weight = member[:, :, None] * within  # (B, K, R, V)
        count = weight.sum(-1, keepdim=True)
        total = (weight.flatten(1, 2) @ features.mT).unflatten(1, weight.shape[1:3])
    image_count = count.sum(2, keepdim=True)
    g = torch.where(
        count > 0, total / count.clamp_min(1), total.sum(2, keepdim=True) / image_count.clamp_min(1)
    )
    return g, image_count[:, :, 0, 0] > 0


def prototype_similarity(features: Tensor, g: Tensor, region: Tensor) -> Tensor:
    """m(j, c) = cos(e, G_j^c of e's own region): (U, B, K, V).

    Args:
        features: e, (U, D, V).
        g: (B, K, R, D).
        region: (V,) in 0 .. R - 1.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit, g = F.normalize(_wide(features), dim=1), F.normalize(_wide(g), dim=-1)
        similarity = torch.einsum("udv,bkrd->ubkrv", unit, g)
    return similarity.gather(3, region.expand(*similarity.shape[:3], 1, -1))[:, :, :, 0]


def cross_image_log_probabilities(m: Tensor, known: Tensor) -> Tensor:
    """log p(c) with p(c) = mean_j exp m(j, c) / sum_c' mean_j exp m(j, c'), means over the images j that know
    the class: (U, P, C, V).

    Where every image knows every class this is the paper's sum over j. A class that nobody knows has p = 0.

    Args:
        m: (U, B, P, C, V), similarities over their temperature: of P independent problems with C classes
            each.
        known: (B, P, C) bool.
    """
    m = m.masked_fill(~known[None, ..., None], ABSENT)
    per_class = torch.logsumexp(m, dim=1) - known.sum(0).clamp_min(1).log()[..., None]
    return F.log_softmax(per_class, dim=2)


def agreement(m: Tensor, known: Tensor, r: float) -> Tensor:
    """Weight mean_j exp(-r U_j) with U_j = KL(m_j || mean_j m_j), m_j softmaxed over classes: (U, P, V) in
    (0, 1], without gradient.

    An image is compared on the classes it knows; images that know less than two say nothing. Without any
    other, the weight is 1.

    Args:
        m, known: as in `cross_image_log_probabilities`.
    """
    log_p = F.log_softmax(m.detach().masked_fill(~known[None, ..., None], ABSENT), dim=3)
    speaks = known.sum(-1, keepdim=True) > 1  # (B, P, 1)
    voter = (known & speaks)[None, ..., None]  # (1, B, P, C, 1)
    mean = (log_p.exp() * voter).sum(1) / voter.sum(1).clamp_min(1)  # (U, P, C, V)
    log_mean = torch.where(voter, mean.clamp_min(1e-30).log()[:, None], ABSENT)
    divergence = (log_p.exp() * (log_p - F.log_softmax(log_mean, dim=3))).sum(3).clamp_min(0)  # (U, B, P, V)
    weight, votes = torch.exp(-r * divergence), speaks[None]
    return torch.where(votes.any(1), (weight * votes).sum(1) / votes.sum(1).clamp_min(1), 1.0)


def cross_image_loss(log_p: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over all voxels (and problems) of mask * CE(target -> p).

    Args:
        log_p: (U, P, C, V).
        target: (U, P, C, V) zeros and ones, no gradient.
        mask: (U, P, V) >= 0: certainty times weight.
    """
    return -((target * log_p).sum(2) * mask).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
