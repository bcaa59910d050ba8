"""Mamba-2's selective state-space scan in its dual form: matrix products over chunks instead of a loop over tokens.

Source: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 6 (block decomposition of the semiseparable matrix).

Symbols, per batch item and head; a chunk has Q tokens, a segment is as many chunks as are worked on at once:
    s_i             sum of dt A over the tokens of the chunk up to and including i, in float64 (differences of large sums decide)
    decay_ij        exp(s_i - s_j) for j <= i, else 0
    mix_ij          decay_ij (C_i . B_j) dt_j + [i = j] D                 (Q, Q)
    y_i             mix_ij x_j + exp(s_i) C_i . state before the chunk
    chunk state     sum_j exp(s_Q - s_j) dt_j B_j x_j^T                   (N, P)
The states before all chunks of a segment follow from the chunk states by one more product with decays. `reverse` mirrors "up to": the
triangles and cumulative sums change sides, no tensor is flipped. The backward recomputes all of this per segment: kept are the inputs and
one state per segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SEGMENT_TOKENS_CPU = 4096  # batch x tokens worked on at once: buffers stay in the cache
SEGMENT_CHUNKS = 256  # bounds the product over chunk states elsewhere


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    chunk_size: int = 64,
    reverse: bool = False,
) -> Tensor:
    """Selective state-space scan.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        h (N, P), zero before the first token
        y_t = C_t h_t + D x_t

    x (batch, L, H, P) inputs of H heads; dt (batch, L, H) step sizes >= 0 (after softplus); A (H,) < 0; B, C (batch, L, G, N) shared by the
    H / G heads of a group; D (H,) skip, optional. Returns y (batch, L, H, P) in the dtype of x; computed in float32 (float64 for float64
    inputs), also under autocast. Any L >= 1 without padding. `reverse`: from the last token to the first (h_{t+1} in place of h_{t-1}).
    Once differentiable in all tensors. `chunk_size` changes cost only.
    """
    _check(x, dt, A, B, C, D, chunk_size)
    y: Tensor = _Scan.apply(x, dt, A, B, C, D, chunk_size, reverse)
    return y


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chunk_size: int) -> None:
    if x.ndim != 4 or B.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"expected x (batch, L >= 1, H, P) and B (batch, L, G, N), got {tuple(x.shape)} and {tuple(B.shape)}")
    batch, length, heads, _ = x.shape
    expected = {"dt": (batch, length, heads), "A": (heads,), "B": (batch, length, *B.shape[2:]), "C": tuple(B.shape), "D": (heads,)}
    for name, value in {"dt": dt, "A": A, "B": B, "C": C, "D": D}.items():
        if value is not None and tuple(value.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected[name]} for x {tuple(x.shape)}")
    if heads % B.shape[2]:
        raise ValueError(f"{heads} heads (x) must be a multiple of the {B.shape[2]} groups (B, C)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, must be at least 1")


def _segments(length: int, batch: int, chunk_size: int, device: torch.device, reverse: bool) -> list[tuple[slice, int, int]]:
    """(tokens, chunks, chunk length) in scan order. The tokens that fill no chunk are a shorter chunk at the end: nothing is padded."""
    chunks = max(1, SEGMENT_TOKENS_CPU // (batch * chunk_size)) if device.type == "cpu" else SEGMENT_CHUNKS
    whole = length // chunk_size
    parts = [(first * chunk_size, min(chunks, whole - first), chunk_size) for first in range(0, whole, chunks)]
    if length % chunk_size:
        parts.append((whole * chunk_size, 1, length % chunk_size))
    return [(slice(start, start + n * q), n, q) for start, n, q in (reversed(parts) if reverse else parts)]


def _cumsum(values: Tensor, reverse: bool) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1) if reverse else values.cumsum(-1)


def _exp(logs: Tensor) -> Tensor:
    """exp in place, 0 below 1e-30: denormal factors would slow every product on CPUs by an order of magnitude."""
    return F.threshold_(logs, -69.0, -torch.inf).exp_()


def _decays(sums: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """exp(s_i - s_j) where j is not after i in scan order, else 0: (..., Q) -> (..., Q, Q)."""
    factors = _exp((sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype))
    return factors.triu_() if reverse else factors.tril_()


def _crossing(pairs: Tensor, reverse: bool) -> Tensor:
    """Sum of what crosses the step into t: pairs_ij with j before t and i not before t, (..., Q, Q) -> (..., Q). No cancellation."""
    ones = torch.ones(pairs.shape[-2:], dtype=pairs.dtype, device=pairs.device)
    before = pairs @ (ones.tril_(-1) if reverse else ones.triu_(1))
    return (before.triu_() if reverse else before.tril_()).sum(-2)


class _Segment(NamedTuple):
    """What forward and backward both need; leading axes (batch, chunks, H) unless said otherwise."""

    x: Tensor  # (..., Q, P)
    dt: Tensor  # (..., Q)
    B: Tensor  # (..., Q, N), shared within a group
    C: Tensor
    decay: Tensor  # (..., Q, Q)
    scores: Tensor  # (..., Q, Q) C_i . B_j, shared within a group
    from_start: Tensor  # (..., Q) exp(s_i)
    to_end: Tensor  # (..., Q) exp(s_Q - s_j)
    chunk_decay: Tensor  # (batch, H, chunks + 1, chunks + 1)
    stack: Tensor  # (batch, H, chunks + 1, N P): the state before the segment and the chunk states, in token order
    states: Tensor  # the same shape: the states before the chunks and after the segment

    def before(self, values: Tensor, reverse: bool) -> Tensor:
        """Of per-state `values` those that lie before each chunk: (batch, chunks, H, N, P)."""
        part = values[:, :, 1:] if reverse else values[:, :, :-1]
        return part.transpose(1, 2).unflatten(-1, (self.B.shape[-1], self.x.shape[-1]))


def _by_chunk(v: Tensor, chunks: int) -> Tensor:
    """(batch, tokens, heads, ...) -> (batch, chunks, heads, Q, ...), contiguous (for batched products)."""
    return v.unflatten(1, (chunks, -1)).transpose(2, 3).contiguous()


def _by_token(v: Tensor) -> Tensor:
    return v.transpose(2, 3).flatten(1, 2)


def _segment(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: int, reverse: bool) -> _Segment:
    """Tensors of one segment (batch, tokens, heads or groups, ...) and the state before it (batch, H, N P)."""
    dtype, heads = state.dtype, x.shape[2]
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # that device has no float64
    x, B, C = (_by_chunk(v.to(dtype), chunks) for v in (x, B, C))
    dt = _by_chunk(dt, chunks)
    sums = _cumsum(dt.to(wide) * A.to(wide).unsqueeze(-1), reverse)
    total = sums[..., 0] if reverse else sums[..., -1]
    dt = dt.to(dtype)
    scores = C @ B.mT
    if heads != B.shape[2]:
        B, C, scores = (v.repeat_interleave(heads // v.shape[2], 2) for v in (B, C, scores))
    to_end = _exp((total.unsqueeze(-1) - sums).to(dtype))
    chunk_states = (B * (to_end * dt).unsqueeze(-1)).mT @ x
    chunk_decay = _decays(F.pad(_cumsum(total.transpose(1, 2), reverse), (0, 1) if reverse else (1, 0)), reverse, dtype)
    parts = [state.unsqueeze(2), chunk_states.transpose(1, 2).flatten(3)]
    stack = torch.cat(parts[::-1] if reverse else parts, dim=2)
    return _Segment(
        x, dt, B, C, _decays(sums, reverse, dtype), scores, _exp(sums.to(dtype)), to_end, chunk_decay, stack, chunk_decay @ stack
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chunk_size: int, reverse: bool
    ) -> Tensor:
        batch, length, heads, width = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device)
        state = x.new_zeros((batch, heads, B.shape[-1] * width), dtype=dtype)
        starts = []
        with torch.autocast(x.device.type, enabled=False):
            for tokens, chunks, _ in _segments(length, batch, chunk_size, x.device, reverse):
                starts.append(state)
                seg = _segment(x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], state, chunks, reverse)
                mix = seg.decay.mul_(seg.scores).mul_(seg.dt.unsqueeze(-2))
                if D is not None:
                    mix.diagonal(dim1=-2, dim2=-1).add_(D.to(dtype).unsqueeze(-1))
                out = mix @ seg.x
                out += (seg.C * seg.from_start.unsqueeze(-1)) @ seg.before(seg.states, reverse)
                y[:, tokens] = _by_token(out)
                state = seg.states[:, :, 0 if reverse else -1]
        ctx.save_for_backward(x, dt, A, B, C, D, torch.stack(starts))
        ctx.chunk_size, ctx.reverse = chunk_size, reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, starts = ctx.saved_tensors
        reverse, dtype, groups = ctx.reverse, starts.dtype, B.shape[2]
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(v) for v in (x, dt, B, C))
        grad_A = torch.zeros(A.shape, dtype=dtype, device=A.device)
        grad_D = None if D is None else torch.zeros_like(D, dtype=dtype)
        grad_state = torch.zeros_like(starts[0])
        segments = _segments(x.shape[1], x.shape[0], ctx.chunk_size, x.device, reverse)
        with torch.autocast(x.device.type, enabled=False):
            for (tokens, chunks, _), state in zip(reversed(segments), reversed(starts.unbind()), strict=True):
                seg = _segment(x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], state, chunks, reverse)
                gy = _by_chunk(grad[:, tokens].to(dtype), chunks)
                # states: what the outputs and the later segments ask of them, and of what they are made of
                C_start = seg.C * seg.from_start.unsqueeze(-1)
                asked = (C_start.mT @ gy).transpose(1, 2).flatten(3)
                end = grad_state.unsqueeze(2)
                asked = torch.cat([end, asked] if reverse else [asked, end], dim=2)
                grad_stack = seg.chunk_decay.mT @ asked
                grad_state = grad_stack[:, :, -1 if reverse else 0]
                grad_chunk = (grad_stack[:, :, :-1] if reverse else grad_stack[:, :, 1:]).transpose(1, 2)
                grad_chunk = grad_chunk.unflatten(-1, (B.shape[-1], x.shape[-1])).contiguous()
                flow = _crossing((asked @ seg.stack.mT).mul_(seg.chunk_decay), reverse)
                grad_total = (flow[..., :-1] if reverse else flow[..., 1:]).transpose(1, 2)  # (batch, chunks, H)
                # within the chunks
                pair = gy @ seg.x.mT
                if grad_D is not None:
                    grad_D += pair.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
                pair.mul_(seg.decay)
                mix = seg.decay.mul_(seg.scores)
                inner = seg.scores.mul(pair)
                grad_scores = pair.mul_(seg.dt.unsqueeze(-2))
                mix.mul_(seg.dt.unsqueeze(-2))
                if D is not None:
                    mix.diagonal(dim1=-2, dim2=-1).add_(D.to(dtype).unsqueeze(-1))
                out = mix.mT @ gy
                B_end = seg.B * seg.to_end.unsqueeze(-1)
                out += (B_end * seg.dt.unsqueeze(-1)) @ grad_chunk
                grad_x[:, tokens] = _by_token(out)
                grad_C_start = gy @ seg.before(seg.states, reverse).mT
                grad_B_end = seg.x @ grad_chunk.mT
                sent = (grad_B_end * B_end).sum(-1)
                got = (grad_C_start * C_start).sum(-1)
                grad_dt_seg = inner.sum(-2).add_(sent)
                sent = sent * seg.dt
                earlier = _cumsum(sent, reverse) - sent
                grad_a = _crossing(inner.mul_(seg.dt.unsqueeze(-2)), reverse) + _cumsum(got, not reverse) + earlier + grad_total.unsqueeze(-1)
                grad_dt_seg += grad_a * A.to(dtype).unsqueeze(-1)
                grad_dt[:, tokens] = grad_dt_seg.transpose(2, 3).flatten(1, 2)
                grad_A += (grad_a * seg.dt).sum((0, 1, 3))
                gC = grad_C_start.mul_(seg.from_start.unsqueeze(-1)) + grad_scores @ seg.B
                gB = grad_B_end.mul_((seg.to_end * seg.dt).unsqueeze(-1)) + grad_scores.mT @ seg.C
                if groups != seg.x.shape[2]:
                    gC, gB = (v.unflatten(2, (groups, -1)).sum(3) for v in (gC, gB))
                grad_C[:, tokens], grad_B[:, tokens] = _by_token(gC), _by_token(gB)
        return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, None if D is None else grad_D.to(D.dtype), None, None

