"""Anatomical contrast (ACTION, after ReCo of Liu et al., ICLR 2022): hard voxels against class means, with
class-aware negatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.sampling import draw_members, gather_voxels

Embed = Callable[[Tensor], Tensor]


def anatomical_contrast(
    embed: Embed,
    member: Tensor,
    hard: Tensor,
    *,
    num_queries: int = 256,
    num_negatives: int = 512,
    temperature: float = 0.5,
    num_candidates: int = 4096,
    rows: Tensor | None = None,
) -> Tensor:
    """Mean over present classes k, then over Q hard queries i of class k, of

        -log( exp(cos(q_ki, c_k) / T) / ( exp(cos(q_ki, c_k) / T) + sum_{n=1}^M exp(cos(q_ki, e_n) / T) ) )

    c_k: class mean. Queries are drawn with replacement, and so are the M negatives e_n of every query: a
    class j != k with probability softmax_j(cos(c_k, c_j) / T), then a voxel of j. Keys carry no gradient. A
    present class without hard voxels adds 0; fewer than two present classes give a differentiable 0.

    Args:
        embed: voxel indices (...) -> embeddings (..., E), differentiable.
        member: (K, N) bool, the voxels of every class; a voxel has at most one.
        hard: (K, N) bool; queries are drawn from `member & hard`.
        num_queries: Q. num_negatives: M. temperature: T, of both softmaxes.
        num_candidates: random voxels per class. Means are theirs, and the queries of a class draw from as
            many negatives, themselves drawn from them as above, so that one matrix product has all
            similarities: every query's negatives have the stated distribution, but two queries may share
                some.
        rows: (N, E), all embeddings without gradient, where they are at hand: then every query draws from all
            voxels, and means are those of all voxels.
    """
    num_classes, asked = len(member), member & hard
    classes = torch.arange(num_classes, device=member.device)[:, None]
    q = embed(draw_members(asked, classes.expand(-1, num_queries)))
    present = member.any(1)
    if rows is None:
        with torch.no_grad():
            keys = _full(embed(draw_members(member, classes.expand(-1, num_candidates))))
    with torch.autocast(q.device.type, enabled=False):
        rows = None if rows is None else _full(rows)
        means = (
            keys.mean(1)
            if rows is None
            else member.to(rows.dtype) @ rows / member.sum(1, keepdim=True).clamp_min(1)
        )
        center = F.normalize(means, dim=1)
        chances = class_chances(center, present, temperature)
        q = F.normalize(_full(q), dim=2)
        pull = torch.einsum("kqe,ke->kq", q, center)
        if rows is None:
            push = _shared_similarities(q, F.normalize(keys, dim=2), chances, num_negatives)
        else:
            index = draw_members(member, _draw_classes(chances, num_queries * num_negatives)).view(
                -1, num_negatives
            )
            push = _ExactSimilarities.apply(q.flatten(0, 1), rows, index).unflatten(0, q.shape[:2])
        per_query = F.softplus(torch.logsumexp(push / temperature, dim=2) - pull / temperature)
        counted = asked.any(1) & (present.sum() >= 2)
        return (per_query.mean(1) * counted).sum() / present.sum().clamp_min(1)


def class_chances(center: Tensor, present: Tensor, temperature: float) -> Tensor:
    """(K, K): probability that a query of class k draws a negative of class j, softmax_j(c_k . c_j / T) over
    present j != k.

    Args:
        center: (K, E) unit norm. present: (K,) bool. Rows without any other present class are uniform; they
            must not be used.
    """
    allowed = present & ~torch.eye(len(center), dtype=torch.bool, device=center.device)
    return torch.softmax(
        (center @ center.T / temperature).masked_fill(~allowed, torch.finfo(center.dtype).min), dim=1
    )


def _draw_classes(chances: Tensor, n: int) -> Tensor:
    """n classes (K, n) drawn from every row of `chances`."""
    edges = chances.cumsum(1)
    edges = edges / edges[:, -1:]  # the last edge is exactly 1, so that no draw falls behind it
    return torch.searchsorted(
        edges, torch.rand((len(chances), n), device=chances.device, dtype=chances.dtype), right=True
    )


def _shared_similarities(q: Tensor, keys: Tensor, chances: Tensor, n: int) -> Tensor:
    """(K, Q, n) cosines of every query with random ones of C negatives, drawn for its class from the keys (K,
    C, E) of all classes."""
    size = keys.shape[1]
    other = _draw_classes(chances, size)
    drawn = other * size + torch.randint(size, other.shape, device=q.device)
    candidates = keys.flatten(0, 1).index_select(0, drawn.flatten()).view_as(keys)
    return (q @ candidates.mT).gather(2, torch.randint(size, (*q.shape[:2], n), device=q.device))


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, index, length = ctx.saved_tensors
        return (
            F.embedding_bag(index, rows, per_sample_weights=grad / length, mode="sum"),
            None,
            None,
        )  # weighted sums of rows


def dense_anatomical_contrast(
    embeddings: Tensor, member: Tensor, hard: Tensor, negatives: str = "shared", **options: Any
) -> Tensor:
    """`anatomical_contrast` on a map of embeddings (B, E, S). member, hard: (K, B V) bool.

    negatives: "shared", from random candidates of every class; or "exact", from all voxels.
    """
    if negatives not in ("shared", "exact"):
        raise ValueError(f'negatives must be "shared" or "exact", found {negatives!r}')
    rows = (
        embeddings.detach().movedim(1, -1).flatten(0, -2) if negatives == "exact" else None
    )  # a copy: so many are read faster from it
    return anatomical_contrast(partial(gather_voxels, embeddings), member, hard, rows=rows, **options)


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
