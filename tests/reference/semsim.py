"""SemSim's affinities with Python loops and explicit matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def refine(features: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """(p_i + sum_j M_ij p_j) / 2 with the matrix M in memory. features (B, D, V), probabilities (B, K, V)."""
    refined = torch.empty_like(probabilities)
    for b in range(len(features)):
        e = features[b].T
        norm = e.norm(dim=1)
        m = torch.exp(scale * (e @ e.T) / (norm[:, None] * norm[None]))
        m = m / m.sum(1, keepdim=True)
        refined[b] = (probabilities[b] + (m @ probabilities[b].T).T) / 2
    return refined


def purest(share: Tensor) -> Tensor:
    """(B, K, V) bool: voxels with at least 90 % of the class's highest share in the image."""
    member = torch.zeros_like(share, dtype=torch.bool)
    for b in range(share.shape[0]):
        for k in range(share.shape[1]):
            highest = max(share[b, k].tolist())
            for v in range(share.shape[2]):
                member[b, k, v] = highest > 0 and share[b, k, v] >= 0.9 * highest
    return member


def prototype(features: Tensor, member: Tensor, region: Tensor, r: int) -> Tensor | None:
    """Mean feature (D,) of one class of one image in region r; of the image where the region lacks it; None
    where the image does.

    features (D, V), member (V,) bool, region (V,).
    """
    for inside in (region == r, torch.ones_like(region, dtype=torch.bool)):
        voxels = [v for v in range(len(region)) if inside[v] and member[v]]
        if voxels:
            return features[:, voxels].mean(1)
    return None


def cross_image(
    e_u: Tensor, e_l: Tensor, member: Tensor, region: Tensor, temperature: float, r: float
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """p[u][v][c] and weight[u][v]. e_u (U, D, V), e_l (B, D, V), member (B, K, V), region (V,)."""
    b, k, _ = member.shape
    p: list[list[list[float]]] = []
    weight: list[list[float]] = []
    for u in range(len(e_u)):
        p.append([])
        weight.append([])
        for v in range(e_u.shape[2]):
            m: dict[tuple[int, int], float] = {}
            for j in range(b):
                for c in range(k):
                    g = prototype(e_l[j], member[j, c], region, int(region[v]))
                    if g is not None:
                        m[j, c] = float(torch.cosine_similarity(e_u[u, :, v], g, dim=0)) / temperature
            raw = []
            for c in range(k):
                known = [math.exp(m[j, c]) for j in range(b) if (j, c) in m]
                raw.append(sum(known) / len(known) if known else 0.0)
            p[u].append([x / sum(raw) for x in raw])

            voters = [j for j in range(b) if sum((j, c) in m for c in range(k)) > 1]
            soft = {}
            for j in voters:
                total = sum(math.exp(m[j, c]) for c in range(k) if (j, c) in m)
                soft[j] = {c: math.exp(m[j, c]) / total for c in range(k) if (j, c) in m}
            votes = []
            for j in voters:
                mean = {
                    c: sum(soft[i][c] for i in voters if c in soft[i]) / sum(c in soft[i] for i in voters)
                    for c in soft[j]
                }
                total = sum(mean.values())
                votes.append(
                    math.exp(-r * sum(s * math.log(s / (mean[c] / total)) for c, s in soft[j].items()))
                )
            weight[u].append(sum(votes) / len(votes) if votes else 1.0)
    return p, weight
