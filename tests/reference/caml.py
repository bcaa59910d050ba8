"""CAML as it is written down and as its public implementation computes it. Slow, for comparison only."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def omni_correlation(
    query_v: Tensor, query_a: Tensor, rows: Tensor, query_valid: Tensor, row_valid: Tensor, temperature: float
) -> float:
    """Voxel after voxel, row after row, in Python's floats. Shapes as in nnssl.losses.correlation."""
    kept = [r for r, valid in zip(rows.tolist(), row_valid.tolist(), strict=True) if valid]
    losses = []
    for v, a, valid in zip(query_v.tolist(), query_a.tolist(), query_valid.tolist(), strict=True):
        if not (valid and kept):
            continue
        e_v, e_a = (
            [math.exp(sum(x * y for x, y in zip(q, r, strict=True)) / temperature) for r in kept]
            for q in (v, a)
        )
        losses.append(-sum(j / sum(e_a) * math.log(i / sum(e_v)) for i, j in zip(e_v, e_a, strict=True)))
    return sum(losses) / len(losses) if losses else 0.0


class PublicOmniCorrelation(nn.Module):
    """The omni-correlation consistency with the cost of the public implementation: batch-normalised heads on
    every voxel (labeled ones with a graph that nobody uses, unlabeled ones where the networks agree), full
    sorts, a bank of numpy arrays that keeps all right voxels of every case's last patch and is read as a
    whole in every step, log(x + 1e-8) in the loss. Softmax over classes only. Not inherited: the missing
    permutation of one labeled feature map.

    batch_norm: False leaves the normalisation of the heads out.
    """

    def __init__(
        self,
        features: int,
        embedding: int,
        classes: int,
        rows: int,
        queries: int,
        temperature: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()

        def mlp(inputs: int) -> nn.Sequential:
            norm = nn.BatchNorm1d(embedding) if batch_norm else nn.Identity()
            return nn.Sequential(
                nn.Linear(inputs, embedding), norm, nn.ReLU(), nn.Linear(embedding, embedding)
            )

        self.projectors = nn.ModuleList(mlp(features) for _ in "va")
        self.predictors = nn.ModuleList(mlp(embedding) for _ in "va")
        self.classes, self.rows, self.queries, self.temperature = classes, rows, queries, temperature
        self.bank: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # case -> embeddings (n, E), classes (n,)

    def forward(
        self, features: Sequence[Tensor], logits: Sequence[Tensor], label: Tensor, cases: Sequence[str]
    ) -> Tensor:
        """L_o of one step. features, logits: of v and of a, (B + U, F, S) and (B + U, K, S); label: (B,
        S)."""
        n = len(label)
        probabilities = [F.softmax(z, dim=1) for z in logits]
        certainty, called = zip(*(p.max(dim=1) for p in probabilities), strict=True)
        self.remember(
            [f[:n] for f in features], (called[0][:n] == label) & (called[1][:n] == label), label, cases
        )
        rows = self.draw()

        agreed = called[0][n:] == called[1][n:]
        called_there, certainty_there = called[0][n:][agreed], certainty[0][n:][agreed]
        correlations = []
        for f, projector, predictor in zip(features, self.projectors, self.predictors, strict=True):
            q = predictor(projector(f[n:].movedim(1, -1)[agreed]))
            per_class = []
            for k in range(self.classes):
                mine = called_there == k
                order = certainty_there[mine].sort(descending=True).indices[: self.queries]
                chosen = q[mine][order]
                if len(chosen) > 1 and rows:
                    dots = torch.cat([chosen @ r.to(chosen.device).T for r in rows], dim=1)
                    per_class.append(F.softmax(dots / self.temperature, dim=1))
            correlations.append(per_class)
        if not all(correlations):
            return logits[0].new_zeros(())
        c_v, c_a = (torch.cat(c) for c in correlations)
        return -(c_a * torch.log(c_v + 1e-8)).sum() / len(c_a)

    def remember(
        self, features: Sequence[Tensor], right: Tensor, label: Tensor, cases: Sequence[str]
    ) -> None:
        self.eval()
        projected = [
            p(f.movedim(1, -1).reshape(-1, f.shape[1]))
            for p, f in zip(self.projectors, features, strict=True)
        ]
        self.train()
        mean = ((projected[0] + projected[1]) / 2).view(*label.shape, -1)
        for b, case in enumerate(cases):
            self.bank[case] = mean[b][right[b]].detach().cpu().numpy(), label[b][right[b]].cpu().numpy()

    def draw(self) -> list[Tensor]:
        """So many rows per class, classes with fewer left out."""
        embeddings, labels = (np.concatenate(parts) for parts in zip(*self.bank.values(), strict=True))
        drawn = []
        for k in range(self.classes):
            mine = embeddings[labels == k]
            if len(mine) >= self.rows:
                drawn.append(torch.from_numpy(mine[random.sample(range(len(mine)), self.rows)]))
        return drawn
