from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnssl.method import weighted_sum
from nnssl.training import optimizer_step
from nnssl.training.optimizer_step import OptimizationStep, reached
from tests.building import Task
from tests.host_reads import HostReads
from tests.test_method_contract import ROWS


def test_autocast_keeps_no_cast_weights_from_a_pass_without_gradient() -> None:
    layer = nn.Linear(3, 2)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), None, "bfloat16", torch.device("cpu"), 3
    )
    with step.autocast():
        assert (
            not torch.is_autocast_cache_enabled()
        )  # older releases of PyTorch lose the gradient below otherwise
        with torch.no_grad():
            layer(torch.ones(1, 3))
        loss = layer(torch.ones(1, 3)).float().sum()
    assert step.take(loss)
    assert all(p.grad is not None for p in layer.parameters())


def test_a_step_that_the_search_for_a_scale_leaves_out_changed_no_weight() -> None:
    layer = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), scaler, "float16", torch.device("cpu"), 3
    )
    before, taken = layer.weight.clone(), []
    for _ in range(6):
        step.optimizer.zero_grad()
        taken.append(step.take(100 * layer(torch.ones(1, 3)).sum()))
        assert torch.equal(before, layer.weight) != taken[-1]
        before = layer.weight.clone()
    assert taken[0] is False and True in taken
    assert step.skipped == 0


def test_a_gradient_that_is_finite_at_no_scale_ends_the_run() -> None:
    """The scaler would halve its scale to 0, and all further steps would change nothing without a word."""
    layer = nn.Linear(2, 1)
    before = layer.weight.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), scaler, "float16", torch.device("cpu"), 3
    )
    taken = []
    with pytest.raises(RuntimeError, match=r"at no scale down to 3\.05176e-05 its gradient"):
        for _ in range(100):
            step.optimizer.zero_grad()
            x = torch.zeros(1)
            # sqrt has an infinite slope at 0, and 0 * inf is NaN
            taken.append(step.take((layer.weight.sum() + (x * layer.weight.sum()).sqrt()).sum()))
    assert len(taken) == 31 and not any(taken) and torch.equal(layer.weight, before)


def test_every_network_is_clipped_on_its_own() -> None:
    gentle, wild = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD([*gentle.parameters(), *wild.parameters()], 1.0)
    networks = [list(gentle.parameters()), list(wild.parameters())]
    step = OptimizationStep(optimizer, None, "float32", torch.device("cpu"), 3, networks)
    before = gentle.weight.item(), wild.weight.item()
    assert step.take((gentle(torch.ones(1, 1)) + wild(torch.full((1, 1), 1e4))).sum())
    assert before[0] - gentle.weight.item() == pytest.approx(1, rel=1e-4)
    assert before[1] - wild.weight.item() == pytest.approx(12, rel=1e-4)


def test_a_parameter_outside_of_all_networks_is_clipped_and_watched_too() -> None:
    layer, scale = nn.Linear(1, 1, bias=False), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*layer.parameters(), scale], 1.0)
    step = OptimizationStep(optimizer, None, "float32", torch.device("cpu"), 3, [layer.parameters()])
    assert step.take(layer(torch.ones(1, 1)).sum() + 1e4 * scale.sum())
    assert scale.item() == pytest.approx(-12, rel=1e-4)
    optimizer.zero_grad()
    assert not step.take(layer(torch.ones(1, 1)).sum() + (0 * scale).sqrt().sum())  # its gradient is NaN
    assert scale.item() == pytest.approx(-12, rel=1e-4)


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_the_host_waits_once_for_all_that_it_wants_to_know(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), scaler, amp, torch.device("cpu"), 3, [layer.parameters()]
    )
    read, calls = optimizer_step.read, list[int]()

    def counted(*scalars: Tensor) -> list[float]:
        calls.append(len(scalars))
        return read(*scalars)

    monkeypatch.setattr(optimizer_step, "read", counted)
    scales = []
    for factor in (1.0, 1.0, 1.0, float("inf"), float("nan"), 1.0):
        step.optimizer.zero_grad()
        with HostReads() as reads:
            scales.append(step.loss_scale())
            loss = layer(torch.ones(1, 3)).square().sum()
            taken = step.take(loss * factor if factor != float("inf") else _WildGradient.apply(loss), [loss])
        assert taken == (factor == 1.0)
        assert step.values == [loss.item()]
        # before the first step the scaler has no scale on the device, only the number it starts with
        assert reads.found == []
    assert calls == [4] * 6
    expected = [1024.0, 1024.0, 1024.0, 2048.0, 2048.0, 1024.0]  # of the step before
    assert scales == (expected if amp == "float16" else [1.0] * 6)


class _WildGradient(torch.autograd.Function):
    """The identity with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))


def test_parts_that_no_weighted_term_reaches_rest_as_on_one_gpu() -> None:
    """On several GPUs their gradient is zero instead of none, and weight decay would move them."""
    moved = []
    for several in (False, True):
        torch.manual_seed(0)
        method = Task().method(ROWS["ACTION"].method, ROWS["ACTION"].config)
        optimizer = torch.optim.SGD(
            [p for p in method.parameters() if p.requires_grad], 0.1, weight_decay=0.1
        )
        step = OptimizationStep(optimizer, None, "float32", torch.device("cpu"), 3)
        start = [p.detach().clone() for p in method.parameters()]
        torch.manual_seed(1)
        terms, weights = method(Task().batch(), 0.1), method.weights(0.1)
        active = reached(weighted_sum(terms, weights))
        resting = [p for p in method.parameters() if several and id(p) not in active]
        optimizer.zero_grad()
        assert step.take(weighted_sum(terms, weights, all_terms=several), resting=resting)
        moved.append([not torch.equal(p, q) for p, q in zip(method.parameters(), start, strict=True)])
    assert moved[0] == moved[1] and 0 < sum(moved[0]) < len(moved[0])
