"""State-space models as they are written down: one token after the other. Slow, for comparison only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def sequential_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t h_t + D x_t.

    x (batch, L, H, P), dt (batch, L, H), B and C (batch, L, G, N), A and D (H,) or one per token (batch, L,
    H) -> y (batch, L, H, P).
    """
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(heads_per_group, 2) for v in (B, C))
    h = x.new_zeros(*x[:, 0].shape, B.shape[-1])
    D = torch.zeros_like(dt) if D is None else D
    steps = [v.unbind(1) for v in (x, dt, A.expand(dt.shape), B, C, D.expand(dt.shape))]
    outputs = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        x_t, dt_t, A_t, B_t, C_t, D_t = (v[t] for v in steps)
        h = torch.exp(dt_t * A_t)[..., None, None] * h + (dt_t[..., None] * x_t)[..., None] * B_t.unsqueeze(
            -2
        )
        outputs.append((h * C_t.unsqueeze(-2)).sum(-1) + D_t[..., None] * x_t)
    return torch.stack(outputs[::-1] if reverse else outputs, 1)


def mamba2_mix(
    parameters: Mapping[str, Tensor], xbcdt: Tensor, *, d_state: int, headdim: int, ngroups: int = 1
) -> Tensor:
    """Convolution and scan of a Mamba-2 mixer: x, B, C, dt side by side (batch, L, ...) -> y (batch, L,
    d_inner)."""
    weight, bias = parameters["conv1d.weight"][:, 0], parameters["conv1d.bias"]
    heads = len(parameters["dt_bias"])
    xbc, dt = xbcdt[..., :-heads], xbcdt[..., -heads:]
    convolved = []
    for t in range(xbc.shape[1]):
        taps = [weight[:, -1 - back] * xbc[:, t - back] for back in range(weight.shape[1]) if t >= back]
        convolved.append(F.silu(bias + torch.stack(taps).sum(0)))
    x, B, C = torch.stack(convolved, 1).split([heads * headdim, ngroups * d_state, ngroups * d_state], dim=-1)
    x, B, C = (
        x.unflatten(-1, (heads, headdim)),
        B.unflatten(-1, (ngroups, d_state)),
        C.unflatten(-1, (ngroups, d_state)),
    )
    dt = torch.log1p(torch.exp(dt + parameters["dt_bias"]))
    return sequential_scan(x, dt, -torch.exp(parameters["A_log"]), B, C, parameters["D"]).flatten(-2)


def mamba2_output(parameters: Mapping[str, Tensor], y: Tensor, z: Tensor, *, ngroups: int = 1) -> Tensor:
    """RMSNorm over each group of the gated y, projected back to the model's width."""
    gated = (y * z * torch.sigmoid(z)).unflatten(-1, (ngroups, -1))
    normed = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed.flatten(-2) * parameters["norm.weight"] @ parameters["out_proj.weight"].T


def mamba2(
    parameters: Mapping[str, Tensor], u: Tensor, *, d_state: int, headdim: int, ngroups: int = 1
) -> Tensor:
    """A Mamba-2 mixer from its state_dict, u (batch, L, d_model) -> the same shape; the projection's order is
    z, x, B, C, dt."""
    d_inner = len(parameters["norm.weight"])
    zxbcdt = u @ parameters["in_proj.weight"].T
    y = mamba2_mix(parameters, zxbcdt[..., d_inner:], d_state=d_state, headdim=headdim, ngroups=ngroups)
    return mamba2_output(parameters, y, zxbcdt[..., :d_inner], ngroups=ngroups)
