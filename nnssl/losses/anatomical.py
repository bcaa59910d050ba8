"""Anatomical contrast (ACTION, after ReCo of Liu et al., ICLR 2022): hard voxels against class means, with class-aware negatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.losses.sampling import draw_members, gather_voxels, sample_members

Embed = Callable[[Tensor], Tensor]


def anatomical_contrast(
    embed: Embed,
    member: Tensor,
    hard: Tensor,
    *,
    num_queries: int = 256,
    num_negatives: int = 512,
    temperature: float = 0.5,
    negatives: str = "shared",
    num_candidates: int = 4096,
    means: Tensor | None = None,
) -> Tensor:
    """Mean over present classes k, then over up to Q hard queries i of class k, of

        -log( exp(cos(q_ki, c_k) / T) / ( exp(cos(q_ki, c_k) / T) + sum_{n=1}^M exp(cos(q_ki, e_n) / T) ) )

    c_k: class mean. The M negatives e_n of every query are drawn with replacement: a class j != k with probability
    softmax_j(cos(c_k, c_j) / T), then a voxel of j. Keys carry no gradient. A present class without hard voxels adds 0; fewer than two
    present classes give a differentiable 0.

    Args:
        embed: voxel indices (...) -> embeddings (..., E), differentiable.
        member: (K, N) bool, the voxels of every class; a voxel has at most one.
        hard: (K, N) bool; queries are drawn from `member & hard`.
        num_queries: Q. num_negatives: M. temperature: T, of both softmaxes.
        negatives: "shared": all queries draw from the same random candidates of a class, so that one matrix product has all
            similarities; every single negative has the distribution above, but those of two queries may coincide. "exact": every
            query draws from all voxels of a class.
        num_candidates: random voxels per class, for shared negatives and for means.
        means: (K, E) class means where they are known; None: the means of the candidates.
    """
    if negatives not in ("shared", "exact"):
        raise ValueError(f'negatives must be "shared" or "exact", found {negatives!r}')
    present = member.any(1)
    query, asked = sample_members(member & hard, num_queries)
    candidate, usable = sample_members(member, num_candidates)  # usable ones come first
    q = embed(query)
    keys = q.new_zeros(0)
    if negatives == "shared" or means is None:
        with torch.no_grad():
            keys = _full(embed(candidate))
    with torch.autocast(q.device.type, enabled=False):
        if means is None:
            means = (keys * usable[..., None]).sum(1) / usable.sum(1, keepdim=True).clamp_min(1)
        center = F.normalize(_full(means), dim=-1)
        other = _draw_classes(class_chances(center, present, temperature), query.shape[1], num_negatives)
        q = F.normalize(_full(q), dim=-1)
        pull = torch.einsum("kqe,ke->kq", q, center)
        if negatives == "shared":
            push = _shared_similarities(q, F.normalize(keys, dim=-1), usable, other)
        else:
            push = _exact_similarities(q, embed, member, other)
        per_query = F.softplus(torch.logsumexp(push / temperature, dim=2) - pull / temperature)
        per_class = (per_query * asked).sum(1) / asked.sum(1).clamp_min(1)
        present = present & (present.sum() >= 2)
        return (per_class * present).sum() / present.sum().clamp_min(1)


def class_chances(center: Tensor, present: Tensor, temperature: float) -> Tensor:
    """(K, K): probability that a query of class k draws a negative of class j, softmax_j(c_k . c_j / T) over present j != k.

    Args:
        center: (K, E) unit norm. present: (K,) bool. Rows without any other present class are uniform; they must not be used.
    """
    allowed = present & ~torch.eye(len(center), dtype=torch.bool, device=center.device)
    return torch.softmax((center @ center.T / temperature).masked_fill(~allowed, torch.finfo(center.dtype).min), dim=1)


def _draw_classes(chances: Tensor, queries: int, n: int) -> Tensor:
    """Classes (K, Q, n) drawn from the rows of `chances`."""
    edges = chances.cumsum(1)
    edges = edges / edges[:, -1:]  # the last edge is exactly 1, so that no draw falls behind it
    draw = torch.rand((len(chances), queries * n), device=chances.device, dtype=chances.dtype)
    return torch.searchsorted(edges, draw, right=True).view(len(chances), queries, n)


def _shared_similarities(q: Tensor, keys: Tensor, usable: Tensor, other: Tensor) -> Tensor:
    """(K, Q, M) cosines of every query with a random usable candidate of each drawn class. keys: (K, C, E), usable first."""
    count = usable.sum(1)
    place = (torch.rand(other.shape, device=q.device) * count[other]).long()
    column = other * keys.shape[1] + place.clamp_max(keys.shape[1] - 1)
    similarity = (q.flatten(0, 1) @ keys.flatten(0, 1).T).unflatten(0, q.shape[:2])
    return similarity.gather(2, column)


def _exact_similarities(q: Tensor, embed: Embed, member: Tensor, other: Tensor) -> Tensor:
    """(K, Q, M) cosines of every query with a random voxel of each drawn class."""
    with torch.no_grad():
        keys = _full(embed(draw_members(member, other)))
        length = torch.linalg.vector_norm(keys, dim=-1).clamp_min(1e-12)
    return torch.einsum("kqe,kqme->kqm", q, keys) / length


def dense_anatomical_contrast(embeddings: Tensor, member: Tensor, hard: Tensor, **options: object) -> Tensor:
    """`anatomical_contrast` on a map of embeddings (B, E, S), exact class means included. member, hard: (K, B * V) bool."""
    with torch.no_grad():
        by_sample = member.unflatten(1, (len(embeddings), -1)).to(embeddings.dtype)  # (K, B, V)
        sums = torch.einsum("kbv,bev->ke", by_sample, embeddings.flatten(2))
        means = sums / member.sum(1, keepdim=True).clamp_min(1)
    return anatomical_contrast(partial(gather_voxels, embeddings), member, hard, means=means, **options)  # type: ignore[arg-type]


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
