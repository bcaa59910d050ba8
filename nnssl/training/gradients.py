"""How strongly each term moves the student: norms of its gradient, at a few steps of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def is_measured(step: int, steps: int, n: int) -> bool:
    """Whether a step is in the middle of one of n equal parts of a training of so many steps."""
    parts_before, parts_after = ((2 * n * done + steps) // (2 * steps) for done in (step, step + 1))
    return parts_after > parts_before


def term_gradients(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], student: nn.Module, scale: float = 1.0
) -> dict[str, Tensor]:
    """|| d (lambda_k L_k) / d theta || per term, theta: the student's parameters. The graph stays, and no
    parameter's `grad` changes.

    NaN for terms whose weight is 0 and for those that do not reach the student, but train other networks.
    On several GPUs: of this process's own batch.

    Args:
        terms: L_k, scalars with their graph.
        weights: lambda_k.
        student: the network.
        scale: of the losses in the backward pass, against underflow in float16; divided out.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for k, term in terms.items():
        norms[k] = term.detach().new_full((), float("nan"))
        if weights[k] != 0 and term.requires_grad:
            found = torch.autograd.grad(
                scale * weights[k] * term, parameters, retain_graph=True, allow_unused=True
            )
            if each := [g.norm() for g in found if g is not None]:
                norms[k] = torch.stack(each).norm() / scale
    return norms
