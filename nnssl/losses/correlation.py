"""CAML's omni-correlation consistency (Gao et al., MICCAI 2023): as published, with value and gradient in one
pass over chunks of voxels, and over classes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import divisor

MASKED = -1e30  # logit of a row that is not there: finite, so that 0 * log 0 stays 0
CHUNK = {
    "cpu": 2**16
}  # correlations looked at together: on CPU they stay in its cache, elsewhere they fill the device
LARGE_CHUNK = 2**26
# smaller correlations count as this or as 0: processors compute with denormal numbers many times slower
TINY = 1e-20


def omni_correlation(
    query_v: Tensor,
    query_a: Tensor,
    rows: Tensor,
    query_valid: Tensor,
    row_valid: Tensor,
    temperature: float,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy between the correlations of two networks' voxel embeddings with the rows of a bank.

        c_v = softmax_j(q_v . r_j / T),  c_a = softmax_j(q_a . r_j / T)
        L   = - mean_i sum_j c_a,ij log c_v,ij

    Raw dot products, softmax over all rows of all classes. Gradient into both queries, none into the rows.
    Without a valid query or row the result is a differentiable 0.

    Args:
        query_v, query_a: (N, E), the same voxels in both networks. query_valid: (N,) bool.
        rows: (M, E), no gradient. row_valid: (M,) bool.
        temperature: T > 0.
        chunk: voxels looked at together (None: by the device). The N x M correlations never exist at once,
            nor again in the backward pass.
    """
    wide = torch.promote_types(query_v.dtype, torch.float32)
    usable = query_valid & row_valid.any()
    weight = usable / divisor(usable.sum()).to(wide)
    bias = torch.where(row_valid, 0.0, MASKED).to(wide)
    chunk = chunk or max(1, CHUNK.get(rows.device.type, LARGE_CHUNK) // len(rows))
    loss: Tensor = _OmniCorrelation.apply(
        query_v.to(wide), query_a.to(wide), rows.to(wide), weight, bias, temperature, chunk
    )
    return loss


def class_correlation(
    query_v: Tensor,
    query_a: Tensor,
    rows: Tensor,
    query_valid: Tensor,
    row_valid: Tensor,
    temperature: float,
    chunk: int | None = None,
) -> Tensor:
    """Correlations with the bank summed over the rows of each class, against the class that both call (ours).

        c_k = sum_{j of class k} softmax_j(q . r_j / T)          cosines, over all rows of all classes
        L   = - mean_i (log c_v,ik + log c_a,ik) / 2             k: the class of query i

    Unlike `omni_correlation` it has no minimum at which all voxels point at one row. Gradient into both
    queries, none into the rows. Without a valid query, or with less than two classes in the bank, the result
    is a differentiable 0.

    Args:
        query_v, query_a: (K, N, E), the same voxels in both networks, called k. query_valid: (K, N) bool.
        rows: (K, M, E), no gradient. row_valid: (K, M) bool.
        temperature: T > 0.
        chunk: voxels of a class looked at together (None: by the device); all K N x K M correlations never
            exist at once, nor again in the backward pass.
    """
    wide = torch.promote_types(query_v.dtype, torch.float32)
    known = row_valid.any(1)
    usable = query_valid & known[:, None] & (known.sum() >= 2)
    weight = usable / divisor(usable.sum()).to(wide) / 2
    bias = torch.where(row_valid, 0.0, MASKED).to(wide).flatten()
    chunk = chunk or max(1, CHUNK.get(rows.device.type, LARGE_CHUNK) // len(bias))
    with torch.autocast(rows.device.type, enabled=False):
        unit = F.normalize(rows.to(wide), dim=-1).flatten(0, 1) / temperature
        of_v, of_a = (F.normalize(query.to(wide), dim=-1) for query in (query_v, query_a))
        total: Tensor = _ClassCorrelation.apply(of_v, unit, weight, bias, chunk)
        return total + _ClassCorrelation.apply(of_a, unit, weight, bias, chunk)


class _OmniCorrelation(torch.autograd.Function):
    """sum_i w_i L_i with L_i = - sum_j c_a,ij log c_v,ij; the gradient is taken while a chunk's correlations
    are at hand:

    dL_i / d(q_v . r_j / T) = c_v,ij - c_a,ij,    dL_i / d(q_a . r_j / T) = - c_a,ij (log c_v,ij + L_i)
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_v: Tensor,
        query_a: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        with torch.autocast(rows.device.type, enabled=False):
            scaled = rows / temperature
            values, grads_v, grads_a = [], [], []
            for v, a in zip(query_v.split(chunk), query_a.split(chunk), strict=True):
                log_v = torch.log_softmax(torch.addmm(bias, v, scaled.T), dim=1)
                corr_a = F.threshold(
                    torch.softmax(torch.addmm(bias, a, scaled.T), dim=1), TINY, 0.0, inplace=True
                )
                product = corr_a * log_v
                value = -product.sum(1)
                values.append(value)
                if wanted:  # in place: these matrices are the cost
                    grads_a.append(product.addcmul_(corr_a, value[:, None]) @ scaled)
                    grads_v.append(log_v.clamp_(min=math.log(TINY)).exp_().sub_(corr_a) @ scaled)
            if wanted:
                ctx.save_for_backward(
                    torch.cat(grads_v) * weight[:, None], torch.cat(grads_a) * -weight[:, None]
                )
            return torch.cat(values) @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_v, grad_a = ctx.saved_tensors
        return grad * grad_v, grad * grad_a, None, None, None, None, None


class _ClassCorrelation(torch.autograd.Function):
    """sum_ki w_ki L_ki with L_ki = - log of the share of class k's rows in softmax_j z_kij, z = q . r; the
    gradient is taken while a chunk's correlations are at hand:

    dL_ki / dz_kij = softmax_j z_kij - [j of class k] softmax over the class alone
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
        total, grads = weight.new_zeros(()), torch.empty_like(query) if ctx.needs_input_grad[0] else None
        per_class = len(rows) // len(query)
        for k in range(len(query)):
            own = slice(k * per_class, (k + 1) * per_class)
            for start in range(0, query.shape[1], chunk):
                part = slice(start, start + chunk)
                z = torch.addmm(bias, query[k, part], rows.T)
                over_all = torch.logsumexp(z, dim=1, keepdim=True)
                over_own = torch.logsumexp(z[:, own], dim=1, keepdim=True)
                total = total + (over_all - over_own).squeeze(1) @ weight[k, part]
                if grads is not None:  # in place: this matrix is the cost
                    of_own = torch.exp(z[:, own] - over_own)
                    z.sub_(over_all).clamp_(min=math.log(TINY)).exp_()
                    z[:, own] -= of_own
                    torch.mm(z, rows, out=grads[k, part])
        if grads is not None:
            ctx.save_for_backward(grads.mul_(weight.unsqueeze(-1)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return grad * grads, None, None, None, None
