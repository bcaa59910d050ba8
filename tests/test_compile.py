"""torch.compile of every trainer's networks and walks, on CPU, where nnU-Net leaves them uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from nnssl.method import SemiMethod, weighted_sum
from nnssl.training.trainer import compile_networks
from tests.building import Task
from tests.decisions import Decisions
from tests.test_cuda import MOMENTS
from tests.test_method_contract import ROWS, TASKS, Row

pytestmark = pytest.mark.nightly  # needs a C++ compiler
FIRST_EPOCH, SECOND_EPOCH = 4, 3
TOLERANCE = 1e-4
FLIPPED = 1e-3  # share of Diff-CL's hard decisions that rounding may turn, at most


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and the random numbers of uncompiled code."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def train(row: Row, task: Task, compiled: bool) -> list[dict[str, float]]:
    """Losses of two epochs in every phase; compiling must be over after the first."""
    torch.manual_seed(0)
    student = row.method.adapt_network(task.network(), row.config, task.patch_size, (1.0,) * task.dim)
    method: SemiMethod = row.method(student, row.config, task.planned(compile=compiled)).train()
    method.make_copies()
    if compiled:
        compile_networks(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-2)
    losses = []
    for t in MOMENTS.get(row.method.name, (0.5,)):
        for i in range(FIRST_EPOCH + SECOND_EPOCH):
            if i == FIRST_EPOCH:
                graphs = counters["stats"]["unique_graphs"]
            torch.manual_seed(i)
            batch = task.batch(seed=i)
            method.before_step(t)
            terms = method(batch, t)
            optimizer.zero_grad()
            weighted_sum(terms, method.weights(t)).backward()
            optimizer.step()
            method.after_step(batch, t)
            losses.append({k: v.item() for k, v in terms.items()})
        assert counters["stats"]["unique_graphs"] == graphs, f"compiled again at t = {t}"
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert (counters["stats"]["unique_graphs"] > 0) == compiled
    return losses


@pytest.mark.parametrize("task", ["3d", "2d"])
@pytest.mark.parametrize("name", ROWS)
def test_compiled_losses_are_those_of_uncompiled_code(name: str, task: str) -> None:
    decisions = Decisions()  # of Diff-CL; see test_rounding_grows_through_hard_decisions_alone
    with decisions.recorded():
        plain = train(ROWS[name], TASKS[task], False)
    with decisions.compared(held=name == "DiffCL"):
        compiled = train(ROWS[name], TASKS[task], True)
    if name == "DiffCL":
        assert decisions.entries > 0
        assert sum(entries for _, entries in decisions.flips) < FLIPPED * decisions.entries
    for step, (a, b) in enumerate(zip(plain, compiled, strict=True)):
        assert b == pytest.approx(a, abs=TOLERANCE), step
