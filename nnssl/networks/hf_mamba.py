"""High-frequency Mamba (HFM) of Diff-CL (arXiv 2503.09408), as a residual behind one encoder stage of a planned network.

    out = x + gate * out_proj(norm(sum over orders and directions of scan(high(x) / rms(high(x)))))

high    x minus its low-pass: the frequencies inside a box of the discrete Fourier transform (`high_pass`)
scan    selective state-space scan of one shared Mamba-2 mixer over the voxels, along every axis, forward and backward
gate    (C,), starts at zero: at step 0 the network is the planned network; its gradient is not zero there, so it opens at once,
        and from then on everything behind it learns
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl.ssm import Mamba2Mixer


def box_radii(grid: Sequence[int], spacing: Sequence[float], cutoff: float) -> tuple[int, ...]:
    """Highest DFT index inside the low-pass box, per axis: index k is inside where min(k, n - k) <= radius.

    `cutoff` in (0, 1) is the fraction of the finest axis' Nyquist frequency; a coarser axis keeps the same cycles/mm, capped at its own Nyquist.
    """
    finest = min(spacing)
    return tuple(math.floor(min(1.0, cutoff * s / finest) * n / 2 + 1e-6) for n, s in zip(grid, spacing, strict=True))


@functools.lru_cache(maxsize=256)
def _fourier_basis(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Orthonormal real Fourier vectors of indices 0..radius, (size, rank); None where they span everything."""
    if 2 * radius + 1 >= size:
        return None
    position = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    index = torch.arange(1, radius + 1, dtype=torch.float64)
    phase = position[:, None] * index
    waves = torch.cat([torch.full((size, 1), 0.5**0.5, dtype=torch.float64), phase.cos(), phase.sin()], dim=1)
    return (waves * (2 / size) ** 0.5).to(device, dtype)


def _remove_box(x: Tensor, radii: tuple[int, ...]) -> Tensor:
    low = x
    for axis, radius in enumerate(radii, start=2):
        basis = _fourier_basis(x.shape[axis], radius, x.device, x.dtype)
        if basis is not None:
            low = ((low.movedim(axis, -1) @ basis) @ basis.T).movedim(-1, axis)
    return x - low


class _HighPass(torch.autograd.Function):
    """The projection is its own adjoint: the gradient is the high-pass of the gradient and nothing has to be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, radii: tuple[int, ...]) -> Tensor:
        ctx.radii = radii
        return _remove_box(x, radii)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _remove_box(grad, ctx.radii), None


def high_pass(x: Tensor, spacing: Sequence[float], cutoff: float) -> Tensor:
    """x (B, C, *grid) minus its low-pass, same shape and dtype."""
    return _HighPass.apply(x, box_radii(x.shape[2:], spacing, cutoff))


class HighFrequencyMamba(nn.Module):
    """HFM, (B, C, *grid) -> same, for any grid with as many axes as `spacing` (mm per voxel of the feature map)."""

    def __init__(
        self, channels: int, spacing: Sequence[float], cutoff: float = 0.25, d_state: int = 16, expand: int = 2, backend: str = "auto"
    ) -> None:
        super().__init__()
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff is {cutoff}, must lie between 0 and 1 (fraction of the Nyquist frequency)")
        self.spacing, self.cutoff = tuple(float(s) for s in spacing), cutoff
        axes = range(len(self.spacing))
        self.orders = tuple((*(a for a in axes if a != fastest), fastest) for fastest in reversed(axes))
        self.mixer = Mamba2Mixer(channels, d_state, expand=expand, headdim=math.gcd(expand * channels, 32), backend=backend)
        self.gate = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        high = high_pass(x, self.spacing, self.cutoff)
        power = high.float().square().mean(tuple(range(2, x.ndim)), keepdim=True)
        tokens = (high * torch.rsqrt(power + 1e-5)).to(x.dtype).movedim(1, -1)
        out = self.mixer.forward_orders(tokens, self.orders) * self.gate
        return x + out.movedim(-1, 1).to(x.dtype)


def hfm_stage(patch_size: Sequence[int], strides: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Index of the highest-resolution encoder stage with at most `max_tokens` voxels for the planned patch."""
    grid = list(patch_size)
    for stage, stride in enumerate(strides):
        grid = [-(-n // s) for n, s in zip(grid, stride, strict=True)]
        if math.prod(grid) <= max_tokens:
            return stage
    raise ValueError(f"every encoder stage has more than max_tokens = {max_tokens} voxels, the last one {math.prod(grid)}: raise max_tokens")


def insert_hfm(
    network: nn.Module,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    *,
    max_tokens: int,
    num_stages: int = 1,
    cutoff: float = 0.25,
    d_state: int = 16,
    expand: int = 2,
    backend: str = "auto",
) -> nn.Module:
    """Put an HFM behind `num_stages` encoder stages of a planned network, in place; returns the network."""
    encoder = getattr(network, "encoder", None)
    strides = getattr(encoder, "strides", None)
    stages = getattr(encoder, "stages", None)
    if strides is None or stages is None:
        raise ValueError(f"HFM needs a PlainConvUNet or ResidualEncoderUNet, got {type(network).__name__}")
    first = hfm_stage(patch_size, strides, max_tokens)
    scale = [math.prod(s[a] for s in strides[:first]) for a in range(len(spacing))]
    for stage in range(first, min(first + num_stages, len(stages))):
        scale = [c * s for c, s in zip(scale, strides[stage], strict=True)]
        here = [float(mm) * c for mm, c in zip(spacing, scale, strict=True)]
        body = getattr(stages[stage], "blocks", stages[stage])
        body.add_module("hfm", HighFrequencyMamba(encoder.output_channels[stage], here, cutoff, d_state, expand, backend))
    return network
