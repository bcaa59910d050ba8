"""Mamba-2 mixer in plain PyTorch, with mamba-ssm's kernels where they can be imported.

Source: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 7; parameters named, shaped and initialised as `mamba_ssm.Mamba2`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnssl.ssm.ssd import ssd_scan

BACKENDS = ("auto", "torch", "mamba_ssm")


class BackendStatus(NamedTuple):
    name: str
    usable: bool
    reason: str  # why not; empty where usable


@functools.lru_cache(maxsize=1)
def _mamba_ssm_kernel() -> tuple[Callable[..., Tensor] | None, str]:
    """(chunk scan of mamba-ssm, "") or (None, why it cannot be used). A broken installation is a reason, never an exception."""
    if not torch.cuda.is_available():
        return None, "needs a CUDA device, none is available"
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        return module.mamba_chunk_scan_combined, ""
    except ModuleNotFoundError as error:
        return None, f"{error} (pip install mamba-ssm)"
    except Exception as error:  # compiled packages fail in many ways: OSError, RuntimeError, AttributeError ...
        return None, f"installed but broken: {type(error).__name__}: {error}"


def available_backends() -> list[BackendStatus]:
    """Every back end with whether it can run here and, if not, why; for `nnssl check`."""
    kernel, reason = _mamba_ssm_kernel()
    return [BackendStatus("torch", True, ""), BackendStatus("mamba_ssm", kernel is not None, reason)]


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)) over groups of the last axis: y, z (..., d) -> (..., d)."""

    def __init__(self, width: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size, self.eps = group_size, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y.float() if y.dtype != torch.float64 else y) * F.silu(z)
        groups = gated.unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight).to(y.dtype)


class Mamba2Mixer(nn.Module):
    """Mamba-2 token mixer, (B, L, d_model) -> (B, L, d_model)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        chunk_size: int = 64,
        backend: str = "auto",
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (0.001, 0.1),
        dt_init_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        headdim = math.gcd(self.d_inner, 64) if headdim is None else headdim
        if self.d_inner % headdim or self.d_inner // headdim % ngroups:
            raise ValueError(f"expand * d_model = {self.d_inner} must be a multiple of headdim = {headdim} and the heads of ngroups = {ngroups}")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, must be one of {BACKENDS}")
        kernel, reason = _mamba_ssm_kernel()
        if backend == "mamba_ssm" and kernel is None:
            raise RuntimeError(f"backend 'mamba_ssm' cannot be used: {reason}; use 'auto' or 'torch'")
        self.heads, self.headdim, self.groups, self.d_state = self.d_inner // headdim, headdim, ngroups, d_state
        self.chunk_size, self.backend = chunk_size, backend
        conv_width = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_width + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, d_conv, groups=conv_width, padding=d_conv - 1)
        low, high = (math.log(v) for v in dt_range)
        dt = torch.exp(low + (high - low) * torch.rand(self.heads)).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.d_inner, self.d_inner // ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model); `reverse` runs from the last token to the first."""
        z, xbcdt = self.in_proj(x).split([self.d_inner, self.in_proj.out_features - self.d_inner], dim=-1)
        return self.out_proj(self.norm(self._convolve_and_scan(xbcdt, reverse), z))

    def forward_orders(self, x: Tensor, orders: Sequence[Sequence[int]], bidirectional: bool = True) -> Tensor:
        """x (B, *grid, d_model) -> same shape; the scan runs over the voxels in several orders and the results are summed before norm.

        `orders`: permutations of the grid axes, the last one runs fastest.
        """
        batch, grid = x.shape[0], x.shape[1:-1]
        z, xbcdt = self.in_proj(x).split([self.d_inner, self.in_proj.out_features - self.d_inner], dim=-1)
        axes = [[1 + a for a in order] for order in orders]
        tokens = torch.cat([xbcdt.permute(0, *a, -1).flatten(1, -2) for a in axes])
        y = self._convolve_and_scan(tokens, reverse=False)
        if bidirectional:
            y = y + self._convolve_and_scan(tokens, reverse=True)
        merged = torch.zeros_like(z)
        for part, a in zip(y.split(batch), axes, strict=True):
            back = [1 + a.index(k) for k in range(1, 1 + len(grid))]
            merged = merged + part.unflatten(1, [grid[k - 1] for k in a]).permute(0, *back, -1)
        return self.out_proj(self.norm(merged, z))

    def _convolve_and_scan(self, xbcdt: Tensor, reverse: bool) -> Tensor:
        """(B, L, conv width + heads) -> (B, L, d_inner)."""
        length, taps = xbcdt.shape[1], self.conv1d.kernel_size[0]
        xbc, dt = xbcdt.split([self.conv1d.in_channels, self.heads], dim=-1)
        weight = self.conv1d.weight.flip(-1) if reverse else self.conv1d.weight
        xbc = F.conv1d(xbc.transpose(1, 2), weight, self.conv1d.bias, padding=taps - 1, groups=self.conv1d.groups)
        xbc = F.silu(xbc[..., taps - 1 :] if reverse else xbc[..., :length]).transpose(1, 2)
        x, B, C = xbc.split([self.d_inner, self.groups * self.d_state, self.groups * self.d_state], dim=-1)
        x, B, C = x.unflatten(-1, (self.heads, self.headdim)), *(v.unflatten(-1, (self.groups, self.d_state)) for v in (B, C))
        dt = F.softplus(dt.to(torch.promote_types(torch.float32, self.dt_bias.dtype)) + self.dt_bias)
        return self._scan(x, dt, -torch.exp(self.A_log), B, C, reverse).flatten(-2)

    def _scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
        if self.backend == "torch" or (self.backend == "auto" and not x.is_cuda):
            return ssd_scan(x, dt, A, B, C, self.D, self.chunk_size, reverse)
        if not x.is_cuda:
            raise RuntimeError(f"backend 'mamba_ssm' needs CUDA tensors, got {x.device}; use 'auto' or 'torch'")
        kernel, _ = _mamba_ssm_kernel()
        if kernel is None:
            return ssd_scan(x, dt, A, B, C, self.D, self.chunk_size, reverse)
        if not reverse:
            return kernel(x, dt, A, B, C, self.chunk_size, D=self.D)
        return kernel(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), self.chunk_size, D=self.D).flip(1)
