"""Mamba-2's selective scan over many short lines at once, forward plus in reverse, as one product per line.

Over a short line the scan is cheapest as what it is dual to, a matrix that mixes the tokens, and the matrices
of both directions are the two triangles of one:

    y    = S u + 2 D x           u_j = dt_j x_j, per line and head
    S_ij = C_i . B_j E_ij        E_ij = exp(sum of dt A over the tokens after j up to i), j < i
                                        exp(sum of dt A over the tokens from i up to before j), j > i
                                        2, j = i: both directions see the token itself

Source of the duality: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 3; two directions in one and
gradients ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_LINE = 128  # 0.6 of the time of chunks on a CPU, as much at 200 tokens; 0.5 on an H100, 0.8 at 192
FEWEST_LINES = {"cpu": 64}  # fewer do not fill the products; elsewhere any number
BLOCK = {"cpu": 2**18}  # entries of the matrices worked on at once: they stay in a core's cache
BLOCK_ELSEWHERE = 2**24  # bounds the buffers


def is_short(lines: int, length: int, device: torch.device) -> bool:
    """Whether products per line are the faster way on this device."""
    return lines >= FEWEST_LINES.get(device.type, 1) and length <= LONGEST_LINE


def scan_both_directions(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ssd_scan` forward plus `ssd_scan` in reverse.

    Arguments and result as in `ssd_scan`, with one group (G = 1). Costs L^2 per line and head. Computed in
    float32 (float64 for float64 x), also under autocast.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        tokens = x.to(wide).permute(0, 2, 3, 1)  # (lines, H, P, L)
        step = dt.to(wide).permute(0, 2, 1)
        a, b, c, d = (v.to(wide) for v in (A, B[:, :, 0], C[:, :, 0], D))
        y = _Dual.apply(tokens.contiguous(), step.contiguous(), a, b.contiguous(), c.contiguous(), d)
        return y.permute(0, 3, 1, 2).to(x.dtype)


def _mixing(log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """S and E (lines, H, L, L) from dt A (lines, H, L), B and C (lines, L, N)."""
    after = log_decay.cumsum(-1)
    before = after - log_decay
    # the wrong triangle of each is positive
    forward = torch.sub(after.unsqueeze(-1), after.unsqueeze(-2))
    reverse = torch.sub(before.unsqueeze(-2), before.unsqueeze(-1))
    E = torch.minimum(forward, reverse, out=forward).exp_()
    E.diagonal(dim1=-2, dim2=-1).fill_(2)
    return torch.mul(E, (C @ B.mT).unsqueeze(1), out=reverse), E


def _blocks(log_decay: Tensor) -> list[slice]:
    lines, heads, length = log_decay.shape
    entries = BLOCK.get(log_decay.device.type, BLOCK_ELSEWHERE)
    size = max(1, entries // (heads * length**2))
    return [slice(start, start + size) for start in range(0, lines, size)]


def _over_heads(a: Tensor, b: Tensor) -> Tensor:
    """sum_h a_h b_h of (lines, H, L, L); on a CPU without a product of that size."""
    if a.device.type != "cpu" or torch.compiler.is_compiling():
        return (a * b).sum(1)
    total = a[:, 0] * b[:, 0]
    for head in range(1, a.shape[1]):
        total.addcmul_(a[:, head], b[:, head])
    return total


class _Dual(torch.autograd.Function):
    """x (lines, H, P, L), dt (lines, H, L), A (H,), B and C (lines, L, N), D (H,) -> y like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        u, log_decay = x * dt.unsqueeze(2), dt * A[:, None]
        mixed = torch.empty_like(u)
        for k in _blocks(log_decay):
            torch.matmul(u[k], _mixing(log_decay[k], B[k], C[k])[0].mT, out=mixed[k])
        ctx.save_for_backward(x, dt, A, B, C, D, mixed)
        return torch.addcmul(mixed, x, 2 * D[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, D, mixed = ctx.saved_tensors
        u, log_decay, grad_y = x * dt.unsqueeze(2), dt * A[:, None], grad_y.contiguous()
        grad_u, grad_B, grad_C = torch.empty_like(u), torch.empty_like(B), torch.empty_like(C)
        grad_after = torch.empty_like(dt)
        for k in _blocks(log_decay):
            S, E = _mixing(log_decay[k], B[k], C[k])
            torch.matmul(grad_y[k], S, out=grad_u[k])
            grad_S = grad_y[k].mT @ u[k]
            grad_score = _over_heads(grad_S, E)
            torch.bmm(grad_score, B[k], out=grad_C[k])
            torch.bmm(grad_score.mT, C[k], out=grad_B[k])
            lower = grad_S.mul_(S).tril_(-1)  # of the exponents
            torch.sub(lower.sum(-1), lower.sum(-2), out=grad_after[k])
        # sums over whole rows and columns of the exponents' gradient need no matrix
        grad_before = (u * grad_u).sum(2) - (grad_y * mixed).sum(2) + grad_after
        grad_decay = (grad_after + grad_before).flip(-1).cumsum(-1).flip(-1) - grad_before
        grad_x = torch.addcmul(grad_u * dt.unsqueeze(2), grad_y, 2 * D[:, None, None])
        grad_dt = grad_decay * A[:, None] + (grad_u * x).sum(2)
        grad_A, grad_D = (grad_decay * dt).sum((0, 2)), 2 * (grad_y * x).sum((0, 2, 3))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D
