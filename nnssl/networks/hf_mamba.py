"""High-frequency Mamba (HFM), Diff-CL's block inside the encoder (arXiv 2503.09408), on any planned network.

    h   = x - low-pass(x)                       box of low frequencies removed, in physical units
    u   = h / rms(h)                            per image and channel, over the voxels (h has mean 0)
    u  <- u + Mamba2Mixer_a(lines of u along a) for every axis a in turn, forward and backward
    out = x (1 + tanh(gate u))

After the last axis every voxel has seen the whole grid through short scans of linear cost: the gradient at 16
voxels along an axis is at least 0.03 of a neighbour's, because memories of the heads start spread from two
voxels to the longest axis. gate (C,) starts at zero: at step 0 the network is the planned network. The gate
has a gradient there, opens with the first step, and then everything behind it learns. Where the paper leaves
it open these are our choices: attention by multiplication, Mamba-2 form, scans along lines, no convolution
inside the mixer (the planned network has its own).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.networks.features import stage_grids
from nnssl.ssm import Mamba2Mixer

HEAD = 8  # channels that share one memory, at most; there are at least two memories


def box_radii(grid: Sequence[int], spacing: Sequence[float], cutoff: float) -> tuple[int, ...]:
    """Highest DFT index inside the low-pass box, per axis: of n indices k is inside where min(k, n - k) <=
    radius.

    cutoff in (0, 1): fraction of the finest axis' Nyquist frequency 1 / (2 spacing). Coarser axes keep the
    same cycles/mm, at most their own Nyquist frequency, that is radius = n // 2: then the box does not
    restrict this axis.
    """
    finest = min(spacing)
    return tuple(
        math.floor(min(1.0, cutoff * mm / finest) * n / 2 + 1e-6) for n, mm in zip(grid, spacing, strict=True)
    )


def _fourier_basis(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Real Fourier vectors of the indices up to `radius`, orthonormal columns (size, 2 radius + 1)."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    position, index = (
        torch.arange(size, dtype=wide, device=device),
        torch.arange(1, radius + 1, dtype=wide, device=device),
    )
    phase = position.outer(index) * (2 * math.pi / size)
    constant = torch.full((size, 1), math.sqrt(0.5), dtype=wide, device=device)
    return (torch.cat([constant, phase.cos(), phase.sin()], dim=1) * math.sqrt(2 / size)).to(dtype)


_kept_fourier_basis = functools.lru_cache(maxsize=256)(_fourier_basis)


def _basis(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """None where the box does not restrict an axis."""
    if 2 * radius + 1 >= size:
        return None
    build = (
        _fourier_basis if torch.compiler.is_compiling() else _kept_fourier_basis
    )  # compiled code keeps no Python state
    return build(size, radius, device, dtype)


def _along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """matrix (m, n) times the axis of length n."""
    if axis == x.ndim - 1:
        return x @ matrix.T
    return (matrix @ x.flatten(axis + 1)).unflatten(-1, x.shape[axis + 1 :])


def _without_box(x: Tensor, radii: Sequence[int]) -> Tensor:
    bases = [
        (axis, _basis(x.shape[axis], radius, x.device, x.dtype)) for axis, radius in enumerate(radii, start=2)
    ]
    narrow = [(axis, basis) for axis, basis in bases if basis is not None]
    if not narrow:
        return torch.zeros_like(x)
    x = x.contiguous()
    low, (last, last_basis) = x, narrow[-1]
    for axis, basis in reversed(narrow):
        low = _along(basis.T, low, axis)
    for axis, basis in narrow[:-1]:
        low = _along(basis, low, axis)
    if last == x.ndim - 1:  # the only product of full size subtracts in place
        return torch.addmm(x.flatten(0, -2), low.flatten(0, -2), last_basis.T, alpha=-1).view_as(x)
    return x - _along(last_basis, low, last)


def _without_box_in_float32(x: Tensor, radii: Sequence[int]) -> Tensor:
    """In the dtype of x: the sums over a grid that lie between may leave the range of float16."""
    with torch.autocast(x.device.type, enabled=False):
        return _without_box(x.to(torch.promote_types(x.dtype, torch.float32)), radii).to(x.dtype)


class _HighPass(torch.autograd.Function):
    """Orthogonal projection, its own adjoint: the backward is the same operation and nothing is kept for
    it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, radii: tuple[int, ...]) -> Tensor:
        ctx.radii = radii
        return _without_box_in_float32(x, radii)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _without_box_in_float32(grad, ctx.radii), None


def high_pass(x: Tensor, spacing: Sequence[float], cutoff: float) -> Tensor:
    """x (B, C, *grid) without its low frequencies, same shape and dtype; equal to zeroing the box of
    `box_radii` in fftn(x).

    Separable: the box is the product of a projection Q Q^T per axis, Q (n, rank) a real Fourier basis, so
    three thin matrix products down, three up and no complex numbers. Any grid, also odd sizes and axes of one
    voxel (constant along it, hence inside the box there).
    """
    return _HighPass.apply(x, box_radii(x.shape[2:], spacing, cutoff))


class HighFrequencyMamba(nn.Module):
    """HFM on features (B, channels, *grid) -> same shape and dtype, any grid of len(spacing) axes.

    spacing: mm between the voxels of the features; reach: longest initial memory in voxels; cutoff: see
    `box_radii`; d_state, expand, backend: see `Mamba2Mixer`. Raises ValueError for a cutoff outside (0, 1).
    """

    mixers: Any  # of Mamba2Mixer

    def __init__(
        self,
        channels: int,
        spacing: Sequence[float],
        reach: float = 32.0,
        cutoff: float = 0.25,
        d_state: int = 8,
        expand: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < cutoff < 1:
            raise ValueError(
                f"cutoff is {cutoff}, expected a fraction of the Nyquist frequency between 0 and 1 (both "
                "excluded)"
            )
        self.spacing, self.cutoff = tuple(float(mm) for mm in spacing), cutoff
        inner = expand * channels
        head = math.gcd(inner, min(HEAD, max(1, inner // 2)))
        self.mixers: Any = nn.ModuleList(
            Mamba2Mixer(
                channels, d_state, 1, expand, head, backend=backend, memory=(2.0, reach), norm_per_head=True
            )
            for _ in self.spacing
        )
        self.gate = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        high = high_pass(x, self.spacing, self.cutoff)
        power = high.float().square().mean(tuple(range(2, x.ndim)), keepdim=True)
        u = (high * torch.rsqrt(power + 1e-5)).to(x.dtype).movedim(1, -1)
        for axis, mixer in enumerate(self.mixers, start=1):
            lines = u.movedim(axis, -2)
            u = u + mixer.bidirectional(lines.flatten(0, -3)).reshape(lines.shape).movedim(-2, axis)
        return x * (1 + torch.tanh(self.gate * u).movedim(-1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"spacing={self.spacing}, cutoff={self.cutoff}"


def hfm_stage(patch_size: Sequence[int], strides: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Index of the encoder stage with the highest resolution that has at most `max_tokens` voxels for the
    planned patch.

    From the plan alone (patch size, strides per stage), hence the same for any tile at inference. Raises
    ValueError where no stage is small enough.
    """
    voxels = [math.prod(grid) for grid in stage_grids(patch_size, strides)]
    for stage, count in enumerate(voxels):
        if count <= max_tokens:
            return stage
    raise ValueError(
        f"no encoder stage has at most max_tokens = {max_tokens} voxels for the patch {tuple(patch_size)}: "
        f"the stages have {voxels}; set max_tokens to at least {voxels[-1]}"
    )


def insert_hfm(
    network: nn.Module,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    *,
    max_tokens: int,
    num_stages: int = 1,
    cutoff: float = 0.25,
    d_state: int = 8,
    expand: int = 1,
    backend: str = "auto",
) -> nn.Module:
    """Put an HFM behind `hfm_stage` and, for num_stages > 1, the stages after it; in place, returns the
    network.

    network: PlainConvUNet or ResidualEncoderUNet as planned; patch_size, spacing (mm): the plan's. The blocks
    become the children `hfm` of the stages' nn.Sequential, so all planned parameters keep their names. Raises
    ValueError for other networks, a network that has an HFM, too few stages, and numbers of axes that differ.
    """
    encoder: Any = getattr(network, "encoder", None)
    stages, strides = getattr(encoder, "stages", None), getattr(encoder, "strides", None)
    bodies = (
        [getattr(stage, "blocks", stage) for stage in stages] if isinstance(stages, nn.Sequential) else []
    )
    if not bodies or not all(isinstance(body, nn.Sequential) for body in bodies) or strides is None:
        raise ValueError(
            "HFM goes into the encoder of a PlainConvUNet or a ResidualEncoderUNet, found a "
            f"{type(network).__name__}"
        )
    if not len(patch_size) == len(spacing) == len(strides[0]):
        raise ValueError(
            f"patch size {tuple(patch_size)}, spacing {tuple(spacing)} and strides {strides[0]} differ in "
            "their number of axes"
        )
    if any(hasattr(body, "hfm") for body in bodies):
        raise ValueError("this network has an HFM already: insert_hfm wants the planned network")
    first = hfm_stage(patch_size, strides, max_tokens)
    if not 1 <= num_stages <= len(bodies) - first:
        raise ValueError(
            f"num_stages is {num_stages}, expected 1 to {len(bodies) - first}: HFM starts at stage {first} "
            f"of {len(bodies)}"
        )
    grids = list(stage_grids(patch_size, strides))
    for stage in range(first, first + num_stages):
        here = [
            mm * math.prod(stride[axis] for stride in strides[: stage + 1]) for axis, mm in enumerate(spacing)
        ]
        hfm = HighFrequencyMamba(
            encoder.output_channels[stage], here, float(max(grids[stage])), cutoff, d_state, expand, backend
        )
        bodies[stage].add_module("hfm", hfm.to(next(bodies[stage].parameters()).device))
    return network


def describe_hfm(network: Any, patch_size: Sequence[int]) -> str:
    """One line for the log: where `insert_hfm` put its blocks and what they see of the planned patch."""
    lines = []
    for stage, grid in enumerate(stage_grids(patch_size, network.encoder.strides)):
        hfm = next(
            (child for name, child in network.encoder.stages[stage].named_modules() if name.endswith("hfm")),
            None,
        )
        if isinstance(hfm, HighFrequencyMamba):
            box = ", ".join(f"+-{radius}" for radius in box_radii(grid, hfm.spacing, hfm.cutoff))
            size, mm = " x ".join(map(str, grid)), " x ".join(f"{value:g}" for value in hfm.spacing)
            lines.append(
                f"encoder stage {stage} ({len(hfm.gate)} channels, {size} = {math.prod(grid)} voxels of "
                f"{mm} mm, without DFT indices {box})"
            )
    return "HFM behind " + " and ".join(lines) if lines else "no HFM"
