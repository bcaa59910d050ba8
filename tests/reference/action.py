"""Slow, plain versions of ACTION's losses: boolean indexing, loops over classes and queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bank_distillation(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    valid: Tensor,
    temperature_student: float,
    temperature_teacher: float,
) -> Tensor:
    losses = []
    for s, z, mask in zip(student, teacher, valid, strict=True):
        if mask.sum() < 2:
            continue
        wanted = torch.softmax(bank[mask] @ z / temperature_teacher, 0)
        found = torch.softmax(bank[mask] @ s / temperature_student, 0)
        losses.append(sum(w * torch.log(w / f) for w, f in zip(wanted, found, strict=True)))
    return torch.stack(losses).mean()


def anatomical_contrast(
    representation: Tensor,
    label: Tensor,
    mask: Tensor,
    probabilities: Tensor,
    threshold: float = 0.97,
    num_queries: int = 256,
    num_negatives: int = 512,
    temperature: float = 0.5,
) -> Tensor:
    """The published algorithm: features of all voxels and of all hard voxels are gathered per class, then
    sampled query by query.

    Args:
        representation: (B, E, S). label: (B, K, S) one-hot. mask: (B, 1, S). probabilities: (B, K, S).
    """
    features = representation.movedim(1, -1)
    everything, hard, means = [], [], []
    for k in range(label.shape[1]):
        member = (label[:, k] * mask[:, 0]).bool()
        if not member.any():
            continue
        means.append(features[member].detach().mean(0))
        everything.append(features[member])
        hard.append(features[member & (probabilities[:, k] < threshold)])
    total = 0 * representation.sum()
    if len(means) < 2:
        return total
    for k, mean in enumerate(means):
        if len(hard[k]) == 0:
            continue
        query = hard[k][torch.randint(len(hard[k]), (num_queries,))]
        with torch.no_grad():
            others = [j for j in range(len(means)) if j != k]
            chances = torch.softmax(
                F.cosine_similarity(mean[None], torch.stack([means[j] for j in others])) / temperature, 0
            )
            drawn = torch.distributions.Categorical(chances).sample((num_queries, num_negatives))
            offset, starts = 0, []
            for j in others:
                starts.append(offset)
                offset += len(everything[j])
            rows: list[Tensor] = []
            for q in range(num_queries):
                for i, j in enumerate(others):
                    rows.append(starts[i] + torch.randint(len(everything[j]), (int((drawn[q] == i).sum()),)))
            negatives = torch.cat([everything[j] for j in others])[torch.cat(rows)].view(
                num_queries, num_negatives, -1
            )
            keys = torch.cat([mean.expand(num_queries, 1, -1), negatives], 1)
        logits = F.cosine_similarity(query[:, None], keys, dim=2) / temperature
        total = total + F.cross_entropy(
            logits, torch.zeros(num_queries, dtype=torch.long, device=logits.device)
        )
    return total / len(means)
