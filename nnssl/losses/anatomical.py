"""Anatomical contrast (ACTION, after ReCo of Liu et al., ICLR 2022): hard voxels against class means, with
class-aware negatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import sum_over_ranks, world_size
from nnssl.sampling import draw_members

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
    """
    num_classes, asked = len(member), member & hard
    classes = torch.arange(num_classes, device=member.device)[:, None]
    q = embed(draw_members(asked, classes.expand(-1, num_queries)))
    present = member.any(1)
    with torch.no_grad():
        keys = _full(embed(draw_members(member, classes.expand(-1, num_candidates))))
    with torch.autocast(q.device.type, enabled=False):
        # class means of all ranks; negatives come from the rank's own voxels
        here = torch.stack([present, asked.any(1)]).to(keys.dtype)
        shared = sum_over_ranks(torch.cat([keys.mean(1) * here[0, :, None], here.T], 1))
        center, ranks = F.normalize(shared[:, :-2] / shared[:, -2:-1].clamp_min(1), dim=1), shared[:, -2:]
        chances = class_chances(center, present, temperature)
        q = F.normalize(_full(q), dim=2)
        pull = torch.einsum("kqe,ke->kq", q, center)
        push = _shared_similarities(q, F.normalize(keys, dim=2), chances, num_negatives)
        per_query = F.softplus(torch.logsumexp(push / temperature, dim=2) - pull / temperature)
        counted = asked.any(1) & (present.sum() >= 2)
        share = world_size() / ranks[:, 1].clamp_min(1)  # of this rank in the mean over a class's queries
        return (per_query.mean(1) * share * counted).sum() / (ranks[:, 0] > 0).sum().clamp_min(1)


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


def draw_classes(chances: Tensor, n: int) -> Tensor:
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
    other = draw_classes(chances, size)
    drawn = other * size + torch.randint(size, other.shape, device=q.device)
    candidates = keys.flatten(0, 1).index_select(0, drawn.flatten()).view_as(keys)
    return (q @ candidates.mT).gather(2, torch.randint(size, (*q.shape[:2], n), device=q.device))


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
