"""Memory banks: fixed-size device buffers, saved with the method."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def push(self, embeddings: Tensor, valid: Tensor) -> None:
        """Append the valid embeddings of every class. embeddings: (K, P, E); valid: (K, P) bool, P <= R."""
        size = self.rows.shape[1]
        if embeddings.shape[1] > size:
            raise ValueError(f"at most {size} embeddings per class fit the bank at once, found {embeddings.shape[1]}")
        turn = (self.count[:, None] + valid.cumsum(1) - 1) % size  # (K, P) places of the valid ones
        scratch = size + torch.arange(valid.shape[1], device=valid.device)  # invalid ones land behind the bank and are cut off
        place = torch.where(valid, turn, scratch)
        extended = torch.cat([self.rows, self.rows.new_zeros(len(valid), valid.shape[1], self.rows.shape[2])], dim=1)
        extended.scatter_(1, place[..., None].expand_as(embeddings), embeddings.to(self.rows.dtype))
        self.rows.copy_(extended[:, :size])
        self.count += valid.sum(1)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean row (K, E) of every class and whether it has any (K,) bool; zeros where not. Detached."""
        filled = self.filled()
        total = (self.rows * filled[..., None]).sum(1)
        return (total / filled.sum(1).clamp_min(1)[:, None]).detach(), filled.any(1)

    def filled(self) -> Tensor:
        """(K, R) bool: rows in use."""
        return torch.arange(self.rows.shape[1], device=self.rows.device) < self.count[:, None]
