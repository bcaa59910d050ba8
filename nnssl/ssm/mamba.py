"""The Mamba-2 mixer in plain PyTorch, with mamba-ssm's scan on CUDA where it can be had.

    z, x, B, C, dt = split(in_proj(u))                    one projection, widths d_inner, d_inner, G N, G N, H
    x, B, C        = silu(conv1d(x, B, C))                depthwise, causal
    y              = scan(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    out            = out_proj(RMSNorm(y * silu(z)))

Source: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 7. Parameters are named, shaped and initialised
as in mamba-ssm's `Mamba2` (norm after the gate, no projection biases), so state_dicts pass both ways.
mamba-ssm is imported inside functions only.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnssl.ssm import dual
from nnssl.ssm.ssd import ssd_scan

BACKENDS = ("auto", "torch", "mamba_ssm")
KERNELS = "mamba_ssm.ops.triton.ssd_combined"


class Backend(NamedTuple):
    name: str
    usable: bool
    reason: str  # why not; empty where usable


def available_backends() -> list[Backend]:
    """What can compute the scan here and, where something cannot, why. Never raises."""
    reason = _why_no_mamba_ssm()
    return [Backend("torch", True, ""), Backend("mamba_ssm", not reason, reason)]


@functools.lru_cache(maxsize=1)
def _why_no_mamba_ssm() -> str:
    """Empty where mamba-ssm's scan runs and is right here: what imports may still fail to compile for the
    device at hand."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, none is available"
    try:
        importlib.import_module(KERNELS)
        generator = torch.Generator().manual_seed(0)
        x, dt, B, C = (
            torch.rand(1, 40, 2, *width, generator=generator).cuda() for width in ((16,), (), (16,), (16,))
        )
        A, D = -torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
        x.requires_grad_()
        outputs = [scan(x, dt, A, B, C, D, 16, True) for scan in (_mamba_ssm_scan, ssd_scan)]
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in (outputs, gradients))
        return "" if error < 0.02 else f"installed but wrong: its scan differs by {error:.1%} (relative)"
    except ModuleNotFoundError as missing:
        return f"{missing}; pip install mamba-ssm"
    # compiled packages fail in many ways: ImportError, OSError, RuntimeError, the compiler's own
    except Exception as broken:
        return f"installed but broken: {type(broken).__name__}: {broken}"


@torch.compiler.disable  # Triton kernels of their own: the compiled graph ends here and goes on behind
def _mamba_ssm_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    chunk_size: int | None,
    reverse: bool = False,
) -> Tensor:
    """`ssd_scan` by mamba-ssm's kernels, which know one direction only."""
    mamba_chunk_scan_combined = importlib.import_module(KERNELS).mamba_chunk_scan_combined
    chunk_size = chunk_size or 64
    if not reverse:
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D)
    return mamba_chunk_scan_combined(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), chunk_size, D=D).flip(1)


class GatedRMSNorm(nn.Module):
    """weight * v / sqrt(mean v^2 + eps) with v = y * silu(z), the mean over each of `groups` equal parts of
    the last axis."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., width) -> (..., width) in the dtype of y, computed in float32 at least."""
        gated = (y.to(torch.promote_types(y.dtype, torch.float32)) * F.silu(z)).unflatten(
            -1, (self.groups, -1)
        )
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight).to(y.dtype)


class Mamba2Mixer(nn.Module):
    """Mixes tokens along a sequence in linear time: (B, L, d_model) -> (B, L, d_model), any L, float32,
    float64, bf16 or autocast.

    `headdim` P (default: the largest divisor of expand * d_model that divides 64): channels that share one
    decay. `memory`: the heads' initial memories are spread log-uniformly between so many tokens, instead of
    Mamba-2's few tokens; `norm_per_head`: heads of long memory, whose sums are small, then count as much as
    those of short memory. `chunk_size` changes the cost only. `backend`: "torch" everywhere; "mamba_ssm" its
    kernels, CUDA only; "auto" the kernels where they run, else "torch". Raises ValueError for sizes that do
    not divide and unknown back ends, RuntimeError where a demanded back end cannot run.
    """

    without_decay = ("dt_bias", "A_log", "D")  # as mamba-ssm: decay would shorten every memory to a token

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        chunk_size: int | None = None,
        backend: str = "auto",
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_init_range: tuple[float, float] = (0.001, 0.1),
        dt_init_floor: float = 1e-4,
        memory: tuple[float, float] | None = None,
        norm_per_head: bool = False,
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        headdim = math.gcd(d_inner, 64) if headdim is None else headdim
        if d_inner % headdim or (d_inner // headdim) % ngroups:
            raise ValueError(
                f"expand * d_model = {d_inner} must be a multiple of headdim = {headdim}, and its heads one "
                f"of ngroups = {ngroups}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        reason = "" if backend == "torch" else _why_no_mamba_ssm()
        if backend == "mamba_ssm" and reason:
            raise RuntimeError(f"backend 'mamba_ssm' cannot be used here: {reason}; choose 'auto' or 'torch'")
        self.backend = "torch" if reason else backend
        self.heads, self.groups, self.chunk_size = d_inner // headdim, ngroups, chunk_size
        self.widths = (d_inner, ngroups * d_state, ngroups * d_state)
        conv_width = sum(self.widths)
        self.in_proj = nn.Linear(d_model, d_inner + conv_width + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, d_conv, groups=conv_width, padding=d_conv - 1)
        low, high = (math.log(step) for step in dt_init_range)
        step = torch.empty(self.heads).uniform_(low, high).exp_().clamp_(min=dt_init_floor)
        decay = torch.empty(self.heads).uniform_(*A_init_range)
        if memory is not None:  # dt A = 1 / (tokens until a head has forgotten all but 1 / e)
            short, long = (-math.log10(tokens) for tokens in memory)
            step, decay = torch.logspace(short, long, self.heads), torch.ones(self.heads)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.A_log = nn.Parameter(decay.log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(d_inner, self.heads if norm_per_head else ngroups)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model); `reverse`: convolution and scan run from the last token to
        the first."""
        z, xbcdt = self._project(x)
        return self.out_proj(self.norm(self._mix(xbcdt, reverse), z))

    def bidirectional(self, x: Tensor) -> Tensor:
        """x (B, L, d_model) -> same shape: both directions with shared weights, summed before the norm.

        Without convolution and groups, short lines take the faster of two ways to the same sum, unless
        mamba-ssm's kernels are demanded.
        """
        z, xbcdt = self._project(x)
        lines, length, _ = x.shape
        plain = self.groups == 1 and self.conv1d.kernel_size[0] == 1 and self.backend != "mamba_ssm"
        if plain and dual.is_short(lines, length, x.device):
            y = dual.scan_both_directions(*self._scan_inputs(xbcdt, False)).flatten(-2)
        else:
            y = self._mix(xbcdt, False) + self._mix(xbcdt, True)
        return self.out_proj(self.norm(y, z))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d_model) -> the gate z (..., d_inner), and x, B, C, dt side by side."""
        zxbcdt = self.in_proj(x) if self.conv1d.kernel_size[0] > 1 else self._project_and_scale(x)
        z, xbcdt = zxbcdt.split([self.widths[0], self.in_proj.out_features - self.widths[0]], dim=-1)
        return z, xbcdt

    def _project_and_scale(self, x: Tensor) -> Tensor:
        """A convolution over one token scales and shifts: done to the weights, which are fewer than the
        tokens."""
        weight, scale, shift = self.in_proj.weight, self.conv1d.weight[:, 0, 0], self.conv1d.bias
        around = (self.widths[0], self.heads)
        scale = torch.cat([scale.new_ones(around[0]), scale, scale.new_ones(around[1])])
        shift = None if shift is None else F.pad(shift, around)
        return F.linear(x, weight * scale.unsqueeze(1), shift)

    def _mix(self, xbcdt: Tensor, reverse: bool) -> Tensor:
        """Convolution and scan, (B, L, conv width + heads) -> y (B, L, d_inner)."""
        inputs = self._scan_inputs(xbcdt, reverse)
        scan = ssd_scan if self._on_torch(inputs[0]) else _mamba_ssm_scan
        return scan(*inputs, self.chunk_size, reverse).flatten(-2)

    def _scan_inputs(
        self, xbcdt: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, dt, A, B, C, D of `ssd_scan`, after the convolution."""
        xbc, dt = xbcdt.split([sum(self.widths), self.heads], dim=-1)
        x, B, C = F.silu(self._convolve(xbc, reverse)).split(self.widths, dim=-1)
        x, B, C = (
            v.unflatten(-1, (parts, -1)) for v, parts in ((x, self.heads), (B, self.groups), (C, self.groups))
        )
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)
        return x, dt, -torch.exp(self.A_log), B, C, self.D

    def _convolve(self, xbc: Tensor, reverse: bool) -> Tensor:
        """Depthwise convolution over the d_conv tokens up to each one (`reverse`: from each one on): (B, L,
        W) -> (B, L, W)."""
        past = self.conv1d.kernel_size[0] - 1
        if past == 0:
            return xbc  # done in the projection
        weight = self.conv1d.weight.flip(-1) if reverse else self.conv1d.weight
        padded = F.pad(xbc, (0, 0, 0, past) if reverse else (0, 0, past, 0))
        # as a 2D convolution the tokens' own layout is "channels last", which is spared two transposed copies
        image = padded.transpose(1, 2).unsqueeze(2)
        return (
            F.conv2d(image, weight.unsqueeze(2), self.conv1d.bias, groups=self.conv1d.groups)
            .squeeze(2)
            .transpose(1, 2)
        )

    def _on_torch(self, x: Tensor) -> bool:
        if self.backend == "mamba_ssm" and not x.is_cuda:
            raise RuntimeError(
                f"backend 'mamba_ssm' needs tensors on a CUDA device, found {x.device}; choose 'auto' or "
                "'torch'"
            )
        return self.backend == "torch" or not x.is_cuda or x.dtype == torch.float64
