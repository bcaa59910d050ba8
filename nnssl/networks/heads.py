"""Small heads on voxel features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor` on the way back: a head behind it learns at its full
    rate while the features before it move gently."""
    return factor * x + (1 - factor) * x.detach()


class VoxelProjector(nn.Module):
    """Two-layer MLP on feature vectors: (..., F) -> unit vectors (..., E).

    Works on gathered voxels rather than on maps: only what a loss looks at is computed.
    """

    def __init__(self, features: int, embedding: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or embedding
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(), nn.Linear(hidden, embedding))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=-1)
