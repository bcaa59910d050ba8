from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.contrastive import info_nce
from tests.building import gradient


def example(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    a, p, n = (
        F.normalize(torch.randn(s, generator=g, dtype=torch.float64), dim=-1)
        for s in ((3, 5), (3, 4, 5), (3, 6, 5))
    )
    return a, p, n, torch.rand(3, 4, generator=g) > 0.3, torch.rand(3, 6, generator=g) > 0.3


def test_info_nce_equals_the_loop() -> None:
    a, p, n, pv, nv = example()
    values = []
    for k in range(3):
        for i in range(4):
            if pv[k, i] and nv[k].any():
                positive = math.exp(float(a[k] @ p[k, i]) / 0.1)
                negative = sum(math.exp(float(a[k] @ n[k, j]) / 0.1) for j in range(6) if nv[k, j])
                values.append(-math.log(positive / (positive + negative)))
    assert info_nce(a, p, n, pv, nv, 0.1).item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_equal_embeddings_cost_log_of_one_plus_negatives() -> None:
    e = F.normalize(torch.ones(1, 1, 4), dim=-1)
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert info_nce(e[0], e, e.expand(1, 3, 4), valid[:, :1], valid, 0.1).item() == pytest.approx(
        math.log(4), rel=1e-5
    )


def test_nothing_valid_is_a_differentiable_zero_without_nan() -> None:
    a, p, n, pv, nv = example()
    p, n = p.requires_grad_(), n.requires_grad_()
    for positives, negatives in ((pv & False, nv), (pv, nv & False)):
        loss = info_nce(a, p, n, positives, negatives, 0.1)
        loss.backward()
        assert loss.item() == 0 and not gradient(p).any() and not gradient(n).any()


def test_a_class_without_negatives_does_not_disturb_the_others() -> None:
    a, p, n, pv, nv = example()
    nv[1] = False
    without = torch.tensor([0, 2])
    expected = info_nce(a[without], p[without], n[without], pv[without], nv[without], 0.1)
    p.requires_grad_()
    loss = info_nce(a, p, n, pv, nv, 0.1)
    loss.backward()
    assert (
        loss.item() == pytest.approx(expected.item(), rel=1e-6)
        and torch.isfinite(gradient(p)).all()
        and not gradient(p)[1].any()
    )


def test_pulling_positives_closer_lowers_the_loss() -> None:
    a, p, n, pv, nv = example()
    closer = F.normalize(p + a[:, None], dim=-1)
    assert info_nce(a, closer, n, pv, nv, 0.1) < info_nce(a, p, n, pv, nv, 0.1)


def test_tiny_temperature_stays_finite() -> None:
    a, p, n, pv, nv = example()
    p.requires_grad_()
    loss = info_nce(a, p, n, pv, nv, 1e-4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient(p)).all()
