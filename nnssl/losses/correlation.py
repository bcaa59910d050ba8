"""CAML's omni-correlation consistency (Gao et al., MICCAI 2023), value and gradient in one pass over chunks of voxels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASKED = -1e30  # logit of a row that is not there: finite, so that 0 * log 0 stays 0


def omni_correlation(
    query_v: Tensor, query_a: Tensor, rows: Tensor, query_valid: Tensor, row_valid: Tensor, temperature: float, chunk: int = 1024
) -> Tensor:
    """Cross-entropy between the correlations of two networks' voxel embeddings with the rows of a bank.

        c_v = softmax_j(q_v . r_j / T),  c_a = softmax_j(q_a . r_j / T)          raw dot products, over all rows of all classes
        L   = - mean_i sum_j c_a,ij log c_v,ij

    Gradient into both queries, none into the rows. Without a valid query or row the result is a differentiable 0.

    Args:
        query_v, query_a: (N, E), the same voxels in both networks. query_valid: (N,) bool.
        rows: (M, E), no gradient. row_valid: (M,) bool.
        temperature: T > 0.
        chunk: voxels that are looked at together: the N x M correlations never exist at once, nor again in the backward pass.
    """
    wide = torch.promote_types(query_v.dtype, torch.float32)
    usable = query_valid & row_valid.any()
    weight = usable / usable.sum().clamp_min(1).to(wide)
    bias = torch.where(row_valid, 0.0, MASKED).to(wide)
    loss: Tensor = _OmniCorrelation.apply(query_v.to(wide), query_a.to(wide), rows.to(wide), weight, bias, temperature, chunk)
    return loss


class _OmniCorrelation(torch.autograd.Function):
    """sum_i w_i H(c_a,i, c_v,i); the gradient is taken beside the value, while the correlations of a chunk are at hand:

    dL_i / d(q_v . r_j / T) = c_v,ij - c_a,ij,    dL_i / d(q_a . r_j / T) = c_a,ij (- log c_v,ij - L_i)
    """

    @staticmethod
    def forward(
        ctx: Any, query_v: Tensor, query_a: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            scaled = rows / temperature
            grads_v, grads_a, values = [], [], []
            for v, a, w in zip(query_v.split(chunk), query_a.split(chunk), weight.split(chunk), strict=True):
                log_v = torch.log_softmax(torch.addmm(bias, v, scaled.T), dim=1)
                corr_a = torch.softmax(torch.addmm(bias, a, scaled.T), dim=1)
                value = -torch.einsum("nm,nm->n", corr_a, log_v)
                values.append(value @ w)
                if any(ctx.needs_input_grad[:2]):
                    grads_a.append((corr_a * (log_v + value[:, None])) @ scaled * -w[:, None])
                    grads_v.append(log_v.exp_().sub_(corr_a) @ scaled * w[:, None])
            ctx.save_for_backward(*(torch.cat(g) for g in (grads_v, grads_a) if g))
            return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_v, grad_a = ctx.saved_tensors
        return grad * grad_v, grad * grad_a, None, None, None, None, None
