"""Mamba-2's selective state-space scan in its dual form: matrix products over chunks instead of a loop over
tokens.

Source: Dao & Gu, "Transformers are SSMs" (ICML 2024), section 6 (block decomposition of the semiseparable
matrix).

Symbols, per batch item and head (a chunk has Q tokens, a segment is as many chunks as are worked on at once):
    s_i           sum of dt A over the tokens of the chunk up to and including i
    decay_ij      exp(s_i - s_j) for j <= i, else 0                                              (Q, Q)
    score_ij      C_i . B_j                                                                      (Q, Q)
    y_i           sum_j decay_ij score_ij dt_j x_j + exp(s_i) C_i state + D x_i
    state         before the chunk                                                               (N, P)
    chunk state   what the chunk adds, sum_j exp(s_Q - s_j) dt_j B_j x_j^T                       (N, P)

The states before all chunks of a segment follow from what the chunks add by one more product with decays, now
between chunks. `reverse` changes the side of triangles and sums ("up to" becomes "from"); no tensor of the
size of x is flipped.

The backward pass recomputes all of this segment by segment: only the inputs and one state per segment are
kept.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SEGMENT_TOKENS = {
    "cpu": 4096
}  # batch x tokens worked on at once: the buffers of a segment stay in a core's cache
SEGMENT_TOKENS_ELSEWHERE = (
    131_072  # many enough to fill an accelerator, few enough to bound the (Q, Q) buffers
)
SEGMENT_CHUNKS = 256  # bounds the product between chunks, quadratic in their number
SMALLEST_LOG = -69.0  # factors below 1e-30 count as 0: denormal numbers slow matrix products on CPUs tenfold


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    chunk_size: int | None = None,
    reverse: bool = False,
) -> Tensor:
    """Selective state-space scan, equal to the recurrence

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        h (N, P), zero before the first token
        y_t = C_t h_t + D x_t

    x (batch, L, H, P): inputs of H heads, any L >= 1; dt (batch, L, H): steps >= 0, after softplus; A (H,):
    negative; B, C (batch, L, G, N): shared by the H / G heads of a group; D (H,): skip, optional.
    Returns y (batch, L, H, P) in the dtype of x. Computed in float32 (float64 for float64 x), also under
    autocast; the decays come from float64 sums. `chunk_size` changes the cost only (default: 32 on CPUs, 64
    elsewhere); `reverse` runs from the last token to the first. Differentiable once, in all tensors. Raises
    ValueError where shapes disagree.
    """
    if chunk_size is None:
        chunk_size = 32 if x.device.type == "cpu" else 64
    _check_shapes(x, dt, A, B, C, D, chunk_size)
    y: Tensor = _Scan.apply(x, dt, A, B, C, D, chunk_size, reverse)
    return y


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chunk_size: int
) -> None:
    if x.ndim != 4 or B.ndim != 4 or x.shape[1] < 1:
        raise ValueError(
            f"expected x (batch, L >= 1, H, P) and B (batch, L, G, N), found {tuple(x.shape)} and "
            f"{tuple(B.shape)}"
        )
    batch, length, heads, _ = x.shape
    expected = {
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, *B.shape[2:]),
        "C": tuple(B.shape),
        "D": (heads,),
    }
    for name, tensor in {"dt": dt, "A": A, "B": B, "C": C, "D": D}.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]} for x {tuple(x.shape)}"
            )
    if heads % B.shape[2]:
        raise ValueError(f"the {heads} heads of x must be a multiple of the {B.shape[2]} groups of B and C")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")


def _segments(
    batch: int, length: int, chunk_size: int, device: torch.device, reverse: bool
) -> list[tuple[slice, int]]:
    """(tokens, number of chunks) in scan order. Tokens that fill no chunk form a shorter one at the end:
    nothing is padded."""
    tokens = SEGMENT_TOKENS.get(device.type, SEGMENT_TOKENS_ELSEWHERE)
    most = min(max(tokens // max(batch * chunk_size, 1), 1), SEGMENT_CHUNKS)
    whole = length // chunk_size
    count = -(-whole // most)
    bounds = [chunk_size * (whole * i // count) for i in range(count + 1)] if count else []
    parts = [(slice(start, stop), (stop - start) // chunk_size) for start, stop in itertools.pairwise(bounds)]
    if length % chunk_size:
        parts.append((slice(whole * chunk_size, length), 1))
    return parts[::-1] if reverse else parts


def _cumsum(values: Tensor, reverse: bool) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1) if reverse else values.cumsum(-1)


def _exp(logs: Tensor) -> Tensor:
    """exp in place, 0 below SMALLEST_LOG."""
    return torch.threshold_(logs, SMALLEST_LOG, -torch.inf).exp_()


def _decays(sums: Tensor, dtype: torch.dtype, reverse: bool) -> Tensor:
    """exp(s_i - s_j) where token j is not after i in scan order, else 0: (..., Q) -> (..., Q, Q) in
    `dtype`."""
    high = sums.to(dtype)
    low = (sums - high).to(
        dtype
    )  # the difference in twice the precision of dtype, without a float64 tensor of this size
    logs = (high.unsqueeze(-1) - high.unsqueeze(-2)).add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    factors = _exp(logs)
    return factors.triu_() if reverse else factors.tril_()


def _crossing(pairs: Tensor, reverse: bool) -> Tensor:
    """sum of pairs_ij with j before t and i not before t, the gradient of a log-decay: (..., Q, Q) -> (...,
    Q). Nothing cancels."""
    ones = torch.ones(pairs.shape[-2:], dtype=pairs.dtype, device=pairs.device)
    from_before = pairs @ (ones.tril_(-1) if reverse else ones.triu_(1))
    return (from_before.triu_() if reverse else from_before.tril_()).sum(-2)


def _by_chunk(tensor: Tensor, chunks: int, groups: int) -> Tensor:
    """(batch, tokens, heads, ...) -> (batch, chunks, groups, heads per group, Q, ...), contiguous as batched
    products want it."""
    return tensor.unflatten(1, (chunks, -1)).transpose(2, 3).contiguous().unflatten(2, (groups, -1))


def _by_token(tensor: Tensor) -> Tensor:
    return tensor.flatten(2, 3).transpose(2, 3).flatten(1, 2)


def _by_head(tensor: Tensor) -> Tensor:
    """What the chunks have to say about states: (batch, chunks, groups, heads per group, N, P) -> (batch, H,
    chunks, N P)."""
    return tensor.flatten(4).flatten(2, 3).transpose(1, 2)


def _over_heads(tensor: Tensor) -> Tensor:
    return tensor.sum(3, keepdim=True) if tensor.shape[3] > 1 else tensor


class _Segment(NamedTuple):
    """What both passes need of a segment. Leading axes (batch, chunks, groups, heads per group or 1) unless
    said otherwise."""

    x: Tensor  # (..., Q, P)
    dt: Tensor  # (..., Q)
    B: Tensor  # (..., Q, N), 1 per group
    C: Tensor  # (..., Q, N), 1 per group
    decay: Tensor  # (..., Q, Q)
    score: Tensor  # (..., Q, Q), 1 per group
    from_start: Tensor  # (..., Q, 1) exp(s_i)
    to_end: Tensor  # (..., Q, 1) exp(s_Q - s_j)
    chunk_decay: Tensor  # (batch, H, chunks + 1, chunks + 1)
    # (batch, H, chunks + 1, N P): the state before the segment and what each chunk adds, in the order of the
    # tokens
    added: Tensor
    # (batch, H, chunks + 1, N P): the states before the chunks and the state after the segment, likewise
    states: Tensor

    def mix(self, D: Tensor | None) -> Tensor:
        """(..., Q, Q): decay_ij score_ij dt_j + [i = j] D; overwrites decay."""
        mix = self.decay.mul_(self.score).mul_(self.dt.unsqueeze(-2))
        if D is not None:
            mix.diagonal(dim1=-2, dim2=-1).add_(D.to(mix.dtype).view(*mix.shape[2:4], 1))
        return mix

    def by_chunk(self, states: Tensor) -> Tensor:
        """(batch, H, chunks, N P) -> (..., N, P)."""
        return states.transpose(1, 2).reshape(*self.x.shape[:4], self.B.shape[-1], self.x.shape[-1])


def _segment(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: int, reverse: bool
) -> _Segment:
    """x, dt, B, C are the segment's part (batch, tokens, ...) of the scan's; state (batch, H, N P) is the one
    before it."""
    dtype, groups = state.dtype, B.shape[2]
    x, B, C, dt = (
        _by_chunk(tensor, chunks, groups) for tensor in (x.to(dtype), B.to(dtype), C.to(dtype), dt)
    )
    # float64: a large step early in a chunk must not blur the differences of the small ones after it
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    sums = _cumsum(dt.to(wide) * A.to(wide).view(groups, -1, 1), reverse)
    total = sums[..., :1] if reverse else sums[..., -1:]
    dt, from_start, to_end = (
        dt.to(dtype),
        _exp(sums.to(dtype, copy=True)).unsqueeze(-1),
        _exp((total - sums).to(dtype)).unsqueeze(-1),
    )
    adds = _by_head((B * (to_end * dt.unsqueeze(-1))).mT @ x)
    added = torch.cat([adds, state.unsqueeze(2)] if reverse else [state.unsqueeze(2), adds], dim=2)
    chunk_sums = F.pad(_cumsum(total.flatten(2).transpose(1, 2), reverse), (0, 1) if reverse else (1, 0))
    chunk_decay = _decays(chunk_sums, dtype, reverse)
    return _Segment(
        x,
        dt,
        B,
        C,
        _decays(sums, dtype, reverse),
        C @ B.mT,
        from_start,
        to_end,
        chunk_decay,
        added,
        states=chunk_decay @ added,
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        chunk_size: int,
        reverse: bool,
    ) -> Tensor:
        batch, length, heads, width = x.shape
        y = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device)
        state = torch.zeros(
            (batch, heads, B.shape[-1] * width),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        befores = []
        with torch.autocast(x.device.type, enabled=False):
            for tokens, chunks in _segments(batch, length, chunk_size, x.device, reverse):
                befores.append(state)
                part = _segment(
                    x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], state, chunks, reverse
                )
                before = part.states[:, :, 1:] if reverse else part.states[:, :, :-1]
                out = part.mix(D) @ part.x
                out += (part.C * part.from_start) @ part.by_chunk(before)
                y[:, tokens] = _by_token(out)
                state = part.states[:, :, 0 if reverse else -1]
        ctx.save_for_backward(x, dt, A, B, C, D, torch.stack(befores))
        ctx.chunk_size, ctx.reverse = chunk_size, reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, befores = ctx.saved_tensors
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
        grad_A, grad_D = (befores.new_zeros(A.shape) for _ in range(2))
        grad_state = torch.zeros_like(befores[0])
        segments = _segments(x.shape[0], x.shape[1], ctx.chunk_size, x.device, ctx.reverse)
        with torch.autocast(x.device.type, enabled=False):
            for (tokens, chunks), state in zip(reversed(segments), reversed(befores.unbind()), strict=True):
                part = _segment(
                    x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], state, chunks, ctx.reverse
                )
                grads = _segment_backward(
                    part,
                    A,
                    D,
                    _by_chunk(grad_y[:, tokens].to(state.dtype), chunks, B.shape[2]),
                    grad_state,
                    ctx.reverse,
                )
                part_x, part_dt, part_A, part_B, part_C, part_D, grad_state = grads
                for target, value in (
                    (grad_x, part_x),
                    (grad_dt, part_dt),
                    (grad_B, part_B),
                    (grad_C, part_C),
                ):
                    target[:, tokens] = _by_token(value)
                grad_A += part_A
                grad_D += part_D
        return (
            grad_x,
            grad_dt,
            grad_A.to(A.dtype),
            grad_B,
            grad_C,
            None if D is None else grad_D.to(D.dtype),
            None,
            None,
        )


def _segment_backward(
    part: _Segment, A: Tensor, D: Tensor | None, grad_y: Tensor, grad_state: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the state before the segment.

    grad_y (batch, chunks, groups, heads per group, Q, P); grad_state (batch, H, N P): gradient of the state
    after the segment.
    """
    chunk, before = (slice(0, -1), slice(1, None)) if reverse else (slice(1, None), slice(0, -1))
    dt_column = part.dt.unsqueeze(-1)
    # states: `asked` is the gradient of the states, `grad_added` that of what they are sums of
    C_start, B_end = part.C * part.from_start, part.B * part.to_end
    asked = _by_head(C_start.mT @ grad_y)
    asked = torch.cat(
        [grad_state.unsqueeze(2), asked] if reverse else [asked, grad_state.unsqueeze(2)], dim=2
    )
    grad_added = part.chunk_decay.mT @ asked
    flow = _crossing((asked @ part.added.mT).mul_(part.chunk_decay), reverse)[:, :, chunk]
    grad_adds = part.by_chunk(grad_added[:, :, chunk])
    grad_C_start = grad_y @ part.by_chunk(part.states[:, :, before]).mT
    grad_B_end = part.x @ grad_adds.mT  # per unit of dt
    sent, got = (grad_B_end * B_end).sum(-1), (grad_C_start * C_start).sum(-1)
    # pairs of tokens within a chunk
    pairs = grad_y @ part.x.mT
    grad_D = pairs.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4)).flatten()
    pairs *= part.decay
    weighted = pairs * part.score
    grad_dt = weighted.sum(-2) + sent
    weighted *= part.dt.unsqueeze(-2)
    grad_score = _over_heads(pairs.mul_(part.dt.unsqueeze(-2)))
    grad_C = grad_score @ part.B + _over_heads(grad_C_start.mul_(part.from_start))
    grad_B = grad_score.mT @ part.C + _over_heads(grad_B_end.mul_(part.to_end * dt_column))
    grad_x = part.mix(D).mT @ grad_y
    grad_x += (B_end * dt_column) @ grad_adds
    # steps: what decays over t is what crosses it, within the chunk, out of earlier chunks, into later ones,
    # and past the chunk
    sent = sent * part.dt
    past = flow.transpose(1, 2).reshape(*part.dt.shape[:4], 1)
    earlier = _cumsum(F.pad(sent, (-1, 1) if reverse else (1, -1)), reverse)
    grad_log = _crossing(weighted, reverse) + _cumsum(got, not reverse) + earlier + past
    grad_dt += grad_log * A.to(grad_log.dtype).view(*part.dt.shape[2:4], 1)
    grad_A = (grad_log * part.dt).sum((0, 1, 4)).flatten()
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_added[:, :, -1 if reverse else 0]
