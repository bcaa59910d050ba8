"""The middle of a Mamba-2 mixer, depthwise convolution, SiLU and scan, as one differentiable operation that works segment by segment.

One after the other over whole sequences these are some sixty passes through memory, which take several times as long as their arithmetic.
Here a segment goes through all of them while it is in the cache, and the backward pass recomputes it: only the input and one state per
segment are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnssl.ssm.ssd import first_state, segment_backward, segment_forward, segments


class Sizes(NamedTuple):
    """Widths of the tokens (batch, L, H P + 2 G N + H) that Mamba-2's projection leaves: x, B, C and dt side by side."""

    heads: int  # H
    headdim: int  # P
    groups: int  # G
    state: int  # N

    @property
    def inner(self) -> int:
        return self.heads * self.headdim

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., H P + 2 G N) -> x (..., H, P), B (..., G, N), C (..., G, N)."""
        x, B, C = xbc.split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        return x.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))


def conv_scan(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    sizes: Sizes,
    chunk_size: int | None = None,
    reverse: bool = False,
) -> Tensor:
    """y = ssd_scan(x, softplus(dt + dt_bias), A, B, C, D) with x, B, C = silu(convolution of the tokens' x, B, C)

    tokens (batch, L, H P + 2 G N + H); weight (H P + 2 G N, 1, K) and bias (H P + 2 G N,) of a depthwise convolution over the K tokens up to
    each one (`reverse`: from each one on), with zeros outside the sequence; dt_bias, A, D (H,).
    Returns y (batch, L, H P) in the dtype of the tokens. Precision, `chunk_size` and `reverse` as in `ssd_scan`.
    """
    y: Tensor = _ConvScan.apply(tokens, weight, bias, dt_bias, A, D, sizes, chunk_size, reverse)
    return y


class _Window:
    """A segment's tokens with their neighbours under the convolution.

    pre = bias + sum_k weight_k v[source_k] on target_k, the slices that overlap for tap k; source in all tokens, target in the segment.
    """

    def __init__(self, part: slice, length: int, weight: Tensor, bias: Tensor, reverse: bool) -> None:
        self.part, self.taps, self.bias = part, [], bias
        last = weight.shape[-1] - 1
        for k in range(last + 1):
            shift = (last - k) if reverse else (k - last)
            start, stop = max(part.start + shift, 0), min(part.stop + shift, length)
            if start < stop:
                target = slice(start - shift - part.start, stop - shift - part.start)
                self.taps.append((k, slice(start, stop), target, weight[:, 0, k]))

    def convolve(self, xbc: Tensor) -> Tensor:
        """xbc (batch, L, W) -> (batch, segment, W) in the dtype of bias."""
        pre = self.bias.expand(len(xbc), self.part.stop - self.part.start, -1).clone()
        for _, source, target, weight in self.taps:
            pre[:, target].addcmul_(xbc[:, source], weight)
        return pre

    def backward(self, xbc: Tensor, grad: Tensor, grad_xbc: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
        """Adds the gradients of the convolution's output `grad` (batch, segment, W) to those of its inputs."""
        grad_bias += grad.sum((0, 1))
        for k, source, target, weight in self.taps:
            grad_weight[:, 0, k] += (grad[:, target] * xbc[:, source]).sum((0, 1))
            grad_xbc[:, source].addcmul_(grad[:, target], weight)


class _ConvScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        sizes: Sizes,
        chunk_size: int | None,
        reverse: bool,
    ) -> Tensor:
        batch, length, _ = tokens.shape
        y = torch.empty((batch, length, sizes.inner), dtype=tokens.dtype, device=tokens.device)
        state, befores = first_state(tokens, sizes.heads, sizes.headdim, sizes.state), []
        with torch.autocast(tokens.device.type, enabled=False):
            xbc, raw_dt = tokens.split([sizes.convolved, sizes.heads], dim=-1)
            for part, chunks in segments(batch, length, chunk_size, tokens.device, reverse):
                befores.append(state)
                pre = _Window(part, length, weight, bias, reverse).convolve(xbc)
                x, B, C = sizes.split(F.silu(pre, inplace=True))
                out, state = segment_forward(x, F.softplus(raw_dt[:, part] + dt_bias), A, B, C, D, state, chunks, reverse)
                y[:, part] = out.flatten(-2)
        ctx.save_for_backward(tokens, weight, bias, dt_bias, A, D, torch.stack(befores))
        ctx.sizes, ctx.chunk_size, ctx.reverse = sizes, chunk_size, reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, dt_bias, A, D, befores = ctx.saved_tensors
        sizes, reverse = ctx.sizes, ctx.reverse
        grad_tokens = torch.zeros_like(tokens, dtype=befores.dtype)
        grad_xbc, grad_raw = grad_tokens.split([sizes.convolved, sizes.heads], dim=-1)
        grad_weight, grad_bias, grad_A, grad_D = (torch.zeros_like(parameter) for parameter in (weight, bias, A, D))
        grad_state = torch.zeros_like(befores[0])
        parts = segments(tokens.shape[0], tokens.shape[1], ctx.chunk_size, tokens.device, reverse)
        with torch.autocast(tokens.device.type, enabled=False):
            xbc, raw_dt = tokens.split([sizes.convolved, sizes.heads], dim=-1)
            for (part, chunks), state in zip(reversed(parts), reversed(befores.unbind()), strict=True):
                window = _Window(part, tokens.shape[1], weight, bias, reverse)
                pre, raw = window.convolve(xbc), raw_dt[:, part] + dt_bias
                x, B, C = sizes.split(F.silu(pre))
                grads = segment_backward(
                    x, F.softplus(raw), A, B, C, D, state, grad_y[:, part].unflatten(-1, (sizes.heads, -1)), grad_state, chunks, reverse
                )
                new_x, new_dt, new_A, new_B, new_C, new_D, grad_state = grads
                grad_A += new_A
                grad_D += new_D
                grad_raw[:, part] = new_dt * torch.sigmoid(raw)
                grad_pre = torch.cat([new.flatten(-2) for new in (new_x, new_B, new_C)], dim=-1)
                gate = torch.sigmoid(pre)
                grad_pre *= torch.addcmul(gate, gate * (1 - gate), pre)  # derivative of silu
                window.backward(xbc, grad_pre, grad_xbc, grad_weight, grad_bias)
        return (
            grad_tokens.to(tokens.dtype),
            grad_weight,
            grad_bias,
            grad_raw.sum((0, 1)).to(dt_bias.dtype),
            grad_A,
            grad_D,
            None,
            None,
            None,
        )
