from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.correlation import class_correlation, omni_correlation
from tests.reference import caml as reference

Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def example(n: int = 7, m: int = 5, e: int = 3, dtype: torch.dtype = torch.float64) -> Example:
    g = torch.Generator().manual_seed(0)
    v, a, rows = (0.3 * torch.randn(k, e, generator=g, dtype=dtype) for k in (n, n, m))
    return v, a, rows, torch.arange(n) % 3 != 1, torch.arange(m) != 2


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_it_equals_the_loop(chunk: int | None) -> None:
    inputs = example()
    assert omni_correlation(*inputs, 0.1, chunk).item() == pytest.approx(
        reference.omni_correlation(*inputs, 0.1), rel=1e-12
    )


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_are_right(chunk: int | None) -> None:
    v, a, rows, certain, known = example()
    assert torch.autograd.gradcheck(
        lambda x, y: 3 * omni_correlation(x, y, rows, certain, known, 0.5, chunk),
        (v.requires_grad_(), a.requires_grad_()),
    )


def test_value_and_gradient_are_those_of_log_softmax() -> None:
    v, a, rows, _, _ = example(n=40, m=30, dtype=torch.float32)
    results = []
    for fused in (True, False):
        x, y = v.clone().requires_grad_(), a.clone().requires_grad_()
        if fused:
            loss = omni_correlation(
                x, y, rows, torch.ones(40, dtype=torch.bool), torch.ones(30, dtype=torch.bool), 0.1, 16
            )
        else:
            loss = -((y @ rows.T / 0.1).softmax(1) * (x @ rows.T / 0.1).log_softmax(1)).sum(1).mean()
        loss.backward()
        results.append((loss.detach(), x.grad, y.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_equal_rows_cost_the_logarithm_of_their_number() -> None:
    v, a, rows, query_valid, row_valid = example()
    loss = omni_correlation(v, a, rows[:1].expand_as(rows), query_valid, row_valid, 0.1)
    assert loss.item() == pytest.approx(math.log(4))


def test_a_certain_network_pulls_the_other_and_equal_certain_ones_cost_nothing() -> None:
    rows, valid = torch.eye(3), torch.ones(3, dtype=torch.bool)
    certain, undecided = torch.eye(3) * 10, torch.zeros(3, 3)
    assert omni_correlation(certain, certain, rows, valid, valid, 0.1).item() == pytest.approx(0, abs=1e-6)
    v = undecided.requires_grad_()
    omni_correlation(v, certain, rows, valid, valid, 0.1).backward()
    assert v.grad is not None and torch.equal(
        v.grad.argmin(1), torch.arange(3)
    )  # descent moves towards the certain network's row


def test_invalid_rows_and_queries_do_not_exist() -> None:
    v, a, rows, query_valid, row_valid = example()
    expected = omni_correlation(
        v[query_valid], a[query_valid], rows[row_valid], query_valid[query_valid], row_valid[row_valid], 0.1
    )
    rows[~row_valid] = 1e3
    v.requires_grad_()
    loss = omni_correlation(v, a, rows, query_valid, row_valid, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item()) and v.grad is not None
    assert not v.grad[~query_valid].any() and v.grad[query_valid].any(1).all()


def test_nothing_valid_is_a_differentiable_zero() -> None:
    v, a, rows, query_valid, row_valid = example()
    for queries, kept in ((query_valid & False, row_valid), (query_valid, row_valid & False)):
        x, y = v.clone().requires_grad_(), a.clone().requires_grad_()
        loss = omni_correlation(x, y, rows, queries, kept, 0.1)
        loss.backward()
        assert (
            loss.item() == 0
            and x.grad is not None
            and y.grad is not None
            and not x.grad.any()
            and not y.grad.any()
        )


def test_huge_embeddings_stay_finite() -> None:
    v, a, rows, query_valid, row_valid = example(dtype=torch.float32)
    v, a = (1e4 * v).requires_grad_(), (-1e4 * a).requires_grad_()
    loss = omni_correlation(v, a, 1e3 * rows, query_valid, row_valid, 0.1)
    loss.backward()
    assert torch.isfinite(loss) and v.grad is not None and a.grad is not None
    assert torch.isfinite(v.grad).all() and torch.isfinite(a.grad).all()


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    v, a, rows, query_valid, row_valid = example(dtype=torch.bfloat16)
    expected = omni_correlation(v.float(), a.float(), rows.float(), query_valid, row_valid, 0.1)
    v.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = omni_correlation(v, a, rows, query_valid, row_valid, 0.1)
    loss.backward()
    assert loss.item() == expected.item() and v.grad is not None and v.grad.dtype == torch.bfloat16


def test_class_correlation_equals_the_loop() -> None:
    g = torch.Generator().manual_seed(0)
    q_v, q_a = (torch.randn(3, 5, 4, generator=g, dtype=torch.float64) for _ in "va")
    rows = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    query_valid, row_valid = torch.rand(3, 5, generator=g) > 0.3, torch.rand(3, 6, generator=g) > 0.3
    losses = []
    for k in range(3):
        for i in range(5):
            if not query_valid[k, i]:
                continue
            for q in (q_v[k, i], q_a[k, i]):
                share = [0.0] * 3
                for c in range(3):
                    for j in range(6):
                        if row_valid[c, j]:
                            cosine = (q @ rows[c, j]) / (q.norm() * rows[c, j].norm())
                            share[c] += math.exp(cosine / 0.1)
                losses.append(-math.log(share[k] / sum(share)))
    value = class_correlation(q_v, q_a, rows, query_valid, row_valid, 0.1)
    assert value.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda v, a: class_correlation(v, a, rows, query_valid, row_valid, 0.1),
        (q_v.requires_grad_(), q_a.requires_grad_()),
    )


def test_pointing_at_one_row_costs_the_class_correlation_but_not_the_published_one() -> None:
    rows = F.normalize(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    query = 100 * rows[:1, :1].expand(2, 6, 4)  # of both classes, at one row of class 0
    everything = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    q, filled = query.flatten(0, 1), rows.flatten(0, 1)
    collapsed = omni_correlation(q, q, filled, everything[0].flatten(), everything[1].flatten(), 0.1)
    assert collapsed.item() < 1e-3 < 0.3 < class_correlation(query, query, rows, *everything, 0.1).item()


@pytest.mark.parametrize("filled", [(), (0,)])
def test_fewer_than_two_classes_in_the_bank_give_a_differentiable_zero(filled: tuple[int, ...]) -> None:
    query, rows = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    row_valid = torch.zeros(2, 5, dtype=torch.bool)
    row_valid[list(filled)] = True
    value = class_correlation(query, query, rows, torch.ones(2, 3, dtype=torch.bool), row_valid, 0.1)
    value.backward()
    assert value.item() == 0 and query.grad is not None and not query.grad.any()
