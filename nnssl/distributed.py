"""What the ranks of a run share. Without several processes every function returns what it was given.

All of it is collective: every rank calls it as often, in the same order and with tensors of the same shapes
(but for the rows of a `Gatherer`). Nothing waits for the device but the first call of each `Gatherer`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over all ranks, with gradient: under DDP, which averages over ranks, a loss of the sum has the
    gradient of one process with the whole batch."""
    if world_size() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)
    return total


def sum_together(*tensors: Tensor) -> list[Tensor]:
    """`sum_over_ranks` of each, by one collective. All of one dtype."""
    if world_size() == 1:
        return list(tensors)
    total = sum_over_ranks(torch.cat([x.flatten() for x in tensors]))
    parts = total.split([x.numel() for x in tensors])
    return [part.view_as(x) for x, part in zip(tensors, parts, strict=True)]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def divisor(count: Tensor, least: float = 1.0) -> Tensor:
    """What a rank divides its sum by, so that the mean over ranks is the sum of all over the count of all:
    count, at least `least`; on several ranks its mean over them. No gradient."""
    return mean_of_ranks(sum_over_ranks(count.detach()), least)


def mean_of_ranks(total: Tensor, least: float = 1.0) -> Tensor:
    """`divisor` of a count whose sum over ranks is known."""
    return total.clamp_min(least) / world_size()


def from_previous(*tensors: Tensor) -> list[Tensor]:
    """Each (B, ...) moved on by one sample through all ranks, as x.roll(1, 0) through one batch, by one
    exchange. No gradient."""
    if world_size() == 1:
        return [x.roll(1, 0) for x in tensors]
    rank, size = dist.get_rank(), world_size()
    rows = [_as_bytes(x[-1:]) for x in tensors]
    last = torch.cat(rows)
    arriving = torch.empty_like(last)
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, last, (rank + 1) % size),
            dist.P2POp(dist.irecv, arriving, (rank - 1) % size),
        ]
    ):
        work.wait()
    parts = arriving.split([len(row) for row in rows])
    return [
        torch.cat([part.clone().view(x.dtype).view_as(x[-1:]), x[:-1]])
        for x, part in zip(tensors, parts, strict=True)
    ]


class Gatherer:
    """Rows (N, ...) of all ranks in their order, by one collective. Ranks may have different numbers of rows,
    the same in every call: batches are divided unevenly."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (N, ...), of any dtypes -> (N of all ranks, ...), without gradient."""
        if world_size() == 1:
            return tensors
        n = self._size(tensors[0])
        rows = [_as_bytes(x.detach()).view(n, -1) for x in tensors]
        widths = [r.shape[1] for r in rows]
        mine = torch.zeros(max(self.sizes), sum(widths), dtype=torch.uint8, device=tensors[0].device)
        mine[:n] = torch.cat(rows, 1)
        everything = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(everything, mine)
        joint = torch.cat([x[:k] for x, k in zip(everything, self.sizes, strict=True)])
        return tuple(
            part.contiguous().flatten().view(x.dtype).view(len(joint), *x.shape[1:])
            for part, x in zip(joint.split(widths, 1), tensors, strict=True)
        )

    def with_gradient(self, x: Tensor) -> Tensor:
        """x (N, ...) -> (N of all ranks, ...); gradient as in `sum_over_ranks`."""
        if world_size() == 1:
            return x
        n, before = self._size(x), sum(self.sizes[: dist.get_rank()])
        ends = [x.new_zeros((k, *x.shape[1:])) for k in (before, sum(self.sizes) - before - n)]
        return sum_over_ranks(torch.cat([ends[0], x, ends[1]]))

    def _size(self, x: Tensor) -> int:
        """N of this rank; in the first call `sizes` of all."""
        rank = dist.get_rank()
        if not self.sizes:
            counts = torch.zeros(world_size(), dtype=torch.long, device=x.device)
            counts[rank] = len(x)
            dist.all_reduce(counts)
            self.sizes = counts.tolist()
        if self.sizes[rank] != len(x):
            raise RuntimeError(
                f"rank {rank} gathers {len(x)} rows, but {self.sizes[rank]} in its first step: every step of "
                "a run needs the same batch size"
            )
        return len(x)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)
