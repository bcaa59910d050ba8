"""Transformer pieces on voxel tokens: the block, and CAML's attention across the samples of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# tokens up to which CPUs attend faster in float32 than in bfloat16, whose backward goes block by block
SHORT = 1024


class AttentionBlock(nn.Module):
    """Pre-norm transformer block on tokens (N, L, E) -> (N, L, E); every sequence attends within itself, in
    any order of its tokens.

        x <- x + W_o MSA(LayerNorm x)
        x <- x + W_2 GELU(W_1 LayerNorm x)

    W_o and W_2 start at zero: a fresh block is the identity, and the network around it starts as it was.
    Attention is fused (scaled_dot_product_attention): no L x L matrix is kept.

    Args:
        dim: E, a multiple of heads.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP / E.
    """

    def __init__(self, dim: int, heads: int = 4, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide the width {dim}, found {heads}")
        hidden = round(mlp_ratio * dim)
        if hidden < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden unit, found {mlp_ratio}")
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        first, last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.mlp = nn.Sequential(first, nn.GELU(), last)
        for layer in (self.out, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, width = tokens.shape
        qkv = self.qkv(self.norm_attention(tokens)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, L, E / heads)
        with torch.autocast(q.device.type, enabled=False):
            if q.device.type == "cpu" and q.dtype == torch.bfloat16 and length <= SHORT:
                q, k, v = q.float(), k.float(), v.float()
            mixed = (
                F.scaled_dot_product_attention(q, k, v)
                .to(qkv.dtype)
                .transpose(1, 2)
                .reshape(n, length, width)
            )
        tokens = tokens + self.out(mixed)
        return tokens + self.mlp(self.norm_mlp(tokens))


class CrossSampleAttention(nn.Module):
    """Cross-sample mutual attention (CMA) of CAML (Gao et al., MICCAI 2023) on features (N, E, S) -> the same
    shape.

    One block over the voxels of every sample, then one over the samples of the batch at the same position:
    labeled and unlabeled samples see each other. In training only; the identity in eval mode, where a
    prediction must not depend on the rest of its batch.

    dim, heads, mlp_ratio: of both `AttentionBlock`s.
    """

    def __init__(self, dim: int, heads: int = 4, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.voxels = AttentionBlock(dim, heads, mlp_ratio)
        self.samples = AttentionBlock(dim, heads, mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features
        tokens = self.voxels(features.flatten(2).transpose(1, 2))  # (N, V, E)
        tokens = self.samples(tokens.transpose(0, 1))  # (V, N, E)
        return tokens.permute(1, 2, 0).reshape(features.shape).to(features.dtype)
