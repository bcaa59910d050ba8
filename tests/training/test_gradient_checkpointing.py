from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnssl.method import weighted_sum
from nnssl.methods import method_classes
from nnssl.training.gradient_checkpointing import recompute, recompute_stages
from tests.building import Task

T = 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "DiffCL": {
        "hfm_max_tokens": 512,
        "embedding": 8,
        "bank_size": 64,
        "bank_per_step": 16,
        "candidates": 128,
    },
}


def step(name: str, which: str, task: Task) -> tuple[dict[str, float], list[Tensor | None]]:
    """Losses and gradients of one step."""
    cls = method_classes()[name]
    method = task.method(cls, cls.config_class(**OPTIONS.get(name, {})))
    recompute(method, which)
    torch.manual_seed(1)
    terms = method(task.batch(), T)
    weighted_sum(terms, method.weights(T)).backward()
    return {k: float(v) for k, v in terms.items()}, [p.grad for p in method.parameters()]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Supervised", Task()),
        ("CPS", Task(dim=2)),
        ("CAML", Task()),
        ("DiffCL", Task()),
        ("MCNet", Task(residual=True)),
        ("SemSim", Task(dim=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dim}D",
)
def test_losses_and_gradients_are_the_same(name: str, task: Task) -> None:
    losses, gradients = step(name, "none", task)
    for which in ("second", "all"):
        other_losses, other_gradients = step(name, which, task)
        assert other_losses == losses
        for a, b in zip(gradients, other_gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def kept_bytes(which: str) -> int:
    """What autograd keeps of a forward pass of CPS."""
    cls, kept = method_classes()["CPS"], 0
    method = Task().method(cls, cls.config_class())
    recompute(method, which)

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        method(Task().batch(), T)
    return kept


def test_less_is_kept() -> None:
    everything, second, least = (kept_bytes(which) for which in ("none", "second", "all"))
    assert least < second < everything


def test_networks_without_gradient_are_left_alone() -> None:
    network = Task().network()
    assert recompute_stages(network.requires_grad_(False)) == 0
    assert recompute_stages(network.requires_grad_(True)) == 5


def test_compiled_networks_recompute_too() -> None:
    network = Task().network()
    recompute_stages(network)
    x = Task().batch().labeled
    expected = network(x)
    sum(y.sum() for y in expected).backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network.compile(backend="aot_eager")
    found = network(x)
    sum(y.sum() for y in found).backward()
    torch.testing.assert_close(list(found), list(expected))
    for p, g in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "second"), [("CPS", True), ("FixMatch", False), ("Semi", False), ("MCNet", True)]
)
def test_methods_without_a_second_network_that_trains_have_nothing_to_recompute(
    name: str, second: bool
) -> None:
    cls = method_classes()[name]
    assert bool(recompute(Task().method(cls, cls.config_class()), "second")) == second
    assert recompute(Task().method(cls, cls.config_class()), "all") > 0
