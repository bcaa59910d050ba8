"""Small heads on voxel features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor` on the way back: a head behind it learns at its full
    rate while the features before it move gently."""
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def in_float32(layers: nn.Module, x: Tensor) -> Tensor:
    """layers(x) without autocast, in float32 at least: embeddings differ by less than half precision tells
    apart, and unnormalised ones may leave the range of float16."""
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = layers(x.to(torch.promote_types(x.dtype, torch.float32)))
    return y


class VoxelProjector(nn.Module):
    """Two-layer MLP on feature vectors: (..., F) -> unit vectors (..., E), float32 under autocast too.

    Works on gathered voxels rather than on maps: only what a loss looks at is computed.
    """

    def __init__(self, features: int, embedding: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or embedding
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(), nn.Linear(hidden, embedding))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(in_float32(self.layers, x), dim=-1)
