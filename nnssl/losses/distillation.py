"""Contrastive distillation: a teacher's similarities to a memory bank are soft labels for the student's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import divisor


def bank_distillation(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    valid: Tensor,
    temperature_student: float,
    temperature_teacher: float,
    own_key: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """Mean over queries of the divergence of the student's from the teacher's similarities to the bank
    (ACTION; SEED's form).

        L = mean_i KL( softmax_j(z_i . m_j / T_t) || softmax_j(s_i . m_j / T_s) )

    Queries with fewer than two valid rows do not count (one similarity is no distribution); if none is left
    the result is a differentiable 0.

    Args:
        student: (N, E) unit norm, with gradient.
        teacher: (N, E) unit norm, no gradient flows.
        bank: (R, E) unit norm.
        valid: (N, R) bool, rows that a query is compared with.
        temperature_student: T_s > 0.
        temperature_teacher: T_t > 0, usually the smaller.
        own_key: whether z_i itself is one more row for its query. To the teacher it is the most similar one,
            so the student learns to tell z_i from the bank.
        center: (E,), what all embeddings are taken around before they are scaled to unit norm again, such as
            the bank's mean: what they have in common then tells nothing, and their becoming the same gains
            nothing.
    """
    with torch.autocast(
        student.device.type, enabled=False
    ):  # temperatures of 0.01 leave no room for bfloat16
        s, z, m = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher.detach(), bank)
        )
        if center is not None:
            s, z, m = (F.normalize(x - center.to(x.dtype), dim=1) for x in (s, z, m))
        lowest = torch.finfo(s.dtype).min  # not -inf: 0 * (-inf) would be NaN
        to_s, to_z = s @ m.T, z @ m.T
        if own_key:
            to_s, to_z = (torch.cat([(x * z).sum(1, keepdim=True), y], 1) for x, y in ((s, to_s), (z, to_z)))
            valid = torch.cat([valid.any(1, keepdim=True), valid], 1)
        log_s = F.log_softmax((to_s / temperature_student).masked_fill(~valid, lowest), dim=1)
        log_z = F.log_softmax((to_z / temperature_teacher).masked_fill(~valid, lowest), dim=1)
        divergence = (log_z.exp() * (log_z - log_s)).masked_fill(~valid, 0.0).sum(1)
    usable = valid.sum(1) >= 2
    return (divergence * usable).sum() / divisor(usable.sum())
