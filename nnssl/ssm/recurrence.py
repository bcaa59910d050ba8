"""Mamba-2's selective scan over many short lines at once, forward plus in reverse, as the plain recurrence.

On a processor a loop over the tokens, each a few passes over the states of all lines, costs less than the
matrix products over chunks of `ssd_scan`, as long as there are many lines. Lines are the last axis of every
buffer, so that a pass is one run through memory; both directions are lines of one loop.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h (P, N), per line, direction and head
    y_t = h_t C_t

Source of the recurrence: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 3; gradients ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST_LINES = 64  # fewer do not fill a pass
BLOCK = 512  # lines whose states are in memory at once in the backward pass


def scan_both_directions(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ssd_scan` forward plus `ssd_scan` in reverse.

    Arguments and result as in `ssd_scan`, with one group (G = 1). Memory: the states, (L, H, P, N) floats per
    line, of `BLOCK` lines, in the backward pass. Computed in float32 (float64 for float64 x), also under
    autocast.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    lines = len(x)
    with torch.autocast(x.device.type, enabled=False):
        tokens = x.to(wide).permute(1, 2, 3, 0)  # (L, H, P, lines)
        step = dt.to(wide).permute(1, 2, 0)
        decay = torch.exp(step * A.to(wide)[:, None])
        parts = (decay, tokens * step.unsqueeze(2), *(v.to(wide)[:, :, 0].permute(1, 2, 0) for v in (B, C)))
        y = _Recurrence.apply(*(torch.cat([v, v.flip(0)], dim=-1) for v in parts))
        y = y[..., :lines] + y[..., lines:].flip(0) + 2 * D.to(wide)[:, None, None] * tokens
        return y.permute(3, 0, 1, 2).to(x.dtype)


class _Recurrence(torch.autograd.Function):
    """decay a (L, H, M), input u (L, H, P, M), B and C (L, N, M) -> y (L, H, P, M) for M lines.

    The states are not kept: fresh memory for all of them costs more than to compute them again, a block of
    lines at a time.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        _, heads, width, lines = u.shape
        state = u.new_zeros(heads, width, B.shape[1], lines)
        y, buffer = torch.empty_like(u), torch.empty_like(state)
        for t in range(len(u)):
            torch.mul(u[t].unsqueeze(2), B[t], out=buffer)
            torch.addcmul(buffer, state, a[t, :, None, None], out=state)
            torch.sum(torch.mul(state, C[t], out=buffer), dim=2, out=y[t])
        ctx.save_for_backward(a, u, B, C)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        given = ctx.saved_tensors
        _, u, B, _ = given
        length, heads, width, lines = u.shape
        grads = tuple(torch.zeros_like(v) for v in given)
        states = u.new_empty(length, heads, width, B.shape[1], min(lines, BLOCK))
        for start in range(0, lines, BLOCK):
            block = slice(start, start + BLOCK)
            views = [v[..., block] for v in (*given, grad_y, *grads)]
            _gradients(states[..., : views[0].shape[-1]], *views)
        return grads


def _gradients(
    states: Tensor,
    a: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    grad_y: Tensor,
    grad_a: Tensor,
    grad_u: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
) -> None:
    """Of a block of lines, into grad_a to grad_C; states (L, H, P, N, M): memory."""
    for t in range(len(a)):
        torch.mul(u[t].unsqueeze(2), B[t], out=states[t])
        if t:  # the state before the first token is 0
            states[t].addcmul_(states[t - 1], a[t, :, None, None])
    grad, buffer = torch.zeros_like(states[0]), torch.empty_like(states[0])
    for t in reversed(range(len(a))):
        came, went = grad_y[t].unsqueeze(2), u[t].unsqueeze(2)
        grad.addcmul_(came, C[t])
        torch.sum(torch.mul(states[t], came, out=buffer), dim=(0, 1), out=grad_C[t])
        torch.sum(torch.mul(grad, B[t], out=buffer), dim=2, out=grad_u[t])
        torch.sum(torch.mul(grad, went, out=buffer), dim=(0, 1), out=grad_B[t])
        if t:
            torch.sum(torch.mul(grad, states[t - 1], out=buffer), dim=(1, 2), out=grad_a[t])
        grad.mul_(a[t, :, None, None])
