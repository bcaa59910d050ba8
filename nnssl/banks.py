"""Memory banks: fixed-size device buffers, saved with the method. On several ranks every bank receives the
rows of all of them, so that all have the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl.distributed import Gatherer, world_size
from nnssl.sampling import sample_members


def push_rows(rows: Tensor, count: Tensor, embeddings: Tensor, valid: Tensor) -> None:
    """Write the valid embeddings of every class over its oldest rows, in place, views included.

    rows: (K, R, E); count: (K,) rows ever written; embeddings: (K, P, E); valid: (K, P) bool, P <= R.
    """
    size = rows.shape[1]
    if embeddings.shape[1] > size:
        raise ValueError(
            f"at most {size} embeddings per class fit the bank at once, found {embeddings.shape[1]}"
        )
    turn = (count[:, None] + valid.cumsum(1) - 1) % size  # (K, P) places of the valid ones
    scratch = size + torch.arange(
        valid.shape[1], device=valid.device
    )  # invalid ones land behind the bank and are cut off
    place = torch.where(valid, turn, scratch)
    extended = torch.cat([rows, rows.new_zeros(len(valid), valid.shape[1], rows.shape[2])], dim=1)
    extended.scatter_(1, place[..., None].expand_as(embeddings), embeddings.to(rows.dtype))
    rows.copy_(extended[:, :size])
    count += valid.sum(1)


class ClassBank(nn.Module):
    """The last R embeddings of every class, first in first out.

    rows    (K, R, E) float32
    count   (K,) int64, how many rows were ever written; min(count, R) are filled

    Writing has static shapes and never synchronises with the host.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, num_classes: int, size: int, embedding: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, size, embedding))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.long))
        self.gather = Gatherer()

    @torch.no_grad()
    def push(self, embeddings: Tensor, valid: Tensor) -> None:
        """Append the valid embeddings of every class. embeddings: (K, P, E); valid: (K, P) bool, P <= R."""
        embeddings, valid = (x.movedim(0, 1) for x in self.gather(embeddings.movedim(1, 0), valid.T))
        size = self.rows.shape[1] if world_size() > 1 else embeddings.shape[1]
        push_rows(self.rows, self.count, embeddings[:, -size:], valid[:, -size:])

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean row (K, E) of every class and whether it has any (K,) bool; zeros where not. Detached."""
        filled = self.filled()
        total = (self.rows * filled[..., None]).sum(1)
        return (total / filled.sum(1).clamp_min(1)[:, None]).detach(), filled.any(1)

    def filled(self) -> Tensor:
        """(K, R) bool: rows in use."""
        return torch.arange(self.rows.shape[1], device=self.rows.device) < self.count[:, None]


class CaseBank(nn.Module):
    """The last R embeddings of every class in every labeled case, first in first out.

    rows    (K, N, R, E) float32
    count   (K, N) int64, how many rows were ever written; min(count, R) are filled

    Writing touches the rows of the written cases only; shapes are static and nothing synchronises with the
    host.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, num_classes: int, num_cases: int, size: int, embedding: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, num_cases, size, embedding))
        self.register_buffer("count", torch.zeros(num_classes, num_cases, dtype=torch.long))
        self.gather = Gatherer()

    @torch.no_grad()
    def push(self, cases: Sequence[int], embeddings: Tensor, valid: Tensor) -> None:
        """Append the valid embeddings of every sample to its case. cases: at most B indices, a case may come
        twice; embeddings: (K, B, P, E); valid: (K, B, P) bool, P <= R. Samples without a case are left
        out."""
        if world_size() == 1:
            for b, case in enumerate(cases):
                push_rows(self.rows[:, case], self.count[:, case], embeddings[:, b], valid[:, b])
            return
        mine = torch.tensor(cases).to(self.rows.device, non_blocking=True)
        of_all, embeddings, valid = self.gather(
            mine, *(x.movedim(1, 0)[: len(cases)] for x in (embeddings, valid))
        )
        for b in range(len(of_all)):  # their cases are known on the device only
            place = of_all[b : b + 1]
            rows, count = self.rows.index_select(1, place), self.count.index_select(1, place)
            push_rows(rows[:, 0], count[:, 0], embeddings[b], valid[b])
            self.rows.index_copy_(1, place, rows)
            self.count.index_copy_(1, place, count)

    @torch.no_grad()
    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Per class n rows drawn over all cases without replacement: (K, n', E), n' = min(n, N R), and which
        are filled (K, n') bool."""
        index, valid = sample_members(self.filled().flatten(1), n)
        rows = self.rows.flatten(1, 2)
        return torch.gather(rows, 1, index[..., None].expand(-1, -1, rows.shape[2])), valid

    def filled(self) -> Tensor:
        """(K, N, R) bool: rows in use."""
        return torch.arange(self.rows.shape[2], device=self.rows.device) < self.count[..., None]


class EmbeddingBank(nn.Module):
    """The last R embeddings of whatever cases, first in first out; every row remembers its case.

    embeddings    (R, E) float32
    cases         (R,) int64, see `case_numbers`
    count         () int64, how many rows were ever written; min(count, R) are filled
    """

    embeddings: Tensor
    cases: Tensor
    count: Tensor

    def __init__(self, size: int, embedding: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, embedding))
        self.register_buffer("cases", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.gather = Gatherer()

    @torch.no_grad()
    def push(self, embeddings: Tensor, cases: Tensor) -> None:
        """Append embeddings (P, E) of cases (P,); of more than R the last R stay."""
        embeddings, cases = self.gather(embeddings, cases)
        size = len(self.embeddings)
        embeddings, cases, left_out = embeddings[-size:], cases[-size:], max(len(cases) - size, 0)
        place = (self.count + left_out + torch.arange(len(cases), device=cases.device)) % size
        self.embeddings.index_copy_(0, place, embeddings.to(self.embeddings.dtype))
        self.cases.index_copy_(0, place, cases)
        self.count += left_out + len(cases)

    def others(self, cases: Tensor) -> Tensor:
        """(N, R) bool: for each of `cases` (N,), the rows in use that are of another case."""
        return self.filled & (cases[:, None] != self.cases)

    @property
    def filled(self) -> Tensor:
        """(R,) bool: the rows in use."""
        return torch.arange(len(self.cases), device=self.cases.device) < self.count

    def mean(self) -> Tensor:
        """(E,) mean of the rows in use; 0 without any."""
        used = self.filled.to(self.embeddings.dtype)
        return used @ self.embeddings / used.sum().clamp_min(1)


def case_numbers(names: Sequence[str], device: torch.device) -> Tensor:
    """(len(names),) int64: a number for every case name, the same in every run and process."""
    return torch.tensor([zlib.crc32(name.encode()) for name in names], dtype=torch.long).to(
        device, non_blocking=True
    )
