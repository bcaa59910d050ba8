"""Slow, plain versions of ACTION's losses: boolean indexing, loops over classes and queries. Beside them the
anatomical contrast with negatives from all voxels, without loops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.losses.anatomical import class_chances, draw_classes
from nnssl.sampling import draw_members, gather_voxels


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


def exact_anatomical_contrast(
    embeddings: Tensor,
    member: Tensor,
    hard: Tensor,
    num_queries: int = 256,
    num_negatives: int = 512,
    temperature: float = 0.5,
) -> Tensor:
    """`nnssl.losses.anatomical.anatomical_contrast` on a map (B, E, S), but every query draws its negatives
    from all voxels of a class, and class means are those of all voxels. Embeddings in float32."""
    asked, num_classes = member & hard, len(member)
    queries = draw_members(
        asked, torch.arange(num_classes, device=member.device)[:, None].expand(-1, num_queries)
    )
    q = F.normalize(gather_voxels(embeddings, queries), dim=2)
    present = member.any(1)
    rows = embeddings.detach().movedim(1, -1).flatten(0, -2)  # a copy: so many are read faster from it
    means = member.to(rows.dtype) @ rows / member.sum(1, keepdim=True).clamp_min(1)
    center = F.normalize(means, dim=1)
    chances = class_chances(center, present, temperature)
    drawn = draw_classes(chances, num_queries * num_negatives)
    index = draw_members(member, drawn).view(-1, num_negatives)
    push = _ExactSimilarities.apply(q.flatten(0, 1), rows, index).unflatten(0, q.shape[:2])
    pull = torch.einsum("kqe,ke->kq", q, center)
    per_query = F.softplus(torch.logsumexp(push / temperature, dim=2) - pull / temperature)
    counted = asked.any(1) & (present.sum() >= 2)
    return (per_query.mean(1) * counted).sum() / present.sum().clamp_min(1)


class _ExactSimilarities(torch.autograd.Function):
    """(P, M) cosines of unit queries (P, E) with `rows[index]`, index (P, M), without gradient into the rows.

    Rows are read a few queries at a time, in the backward pass again: all of them at once would be the
        largest tensor of the step.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        products, lengths = [], []
        for x, i in zip(q.split(8), index.split(8), strict=True):
            keys = rows.index_select(0, i.flatten()).view(*i.shape, -1)
            products.append((keys @ x[..., None])[..., 0])
            lengths.append(torch.linalg.vector_norm(keys, dim=2))
        length = torch.cat(lengths).clamp_min(1e-12)
        ctx.save_for_backward(rows, index, length)
        return torch.cat(products) / length

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, index, length = ctx.saved_tensors
        return (
            F.embedding_bag(index, rows, per_sample_weights=grad / length, mode="sum"),
            None,
            None,
        )  # weighted sums of rows
