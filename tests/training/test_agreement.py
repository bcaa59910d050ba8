from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

from nnssl.methods import method_classes
from nnssl.training import agreement as agreement_module
from nnssl.training.agreement import EVERY, HORIZON, Agreement
from nnssl.training.optimizer_step import read
from tests.building import Task
from tests.host_reads import HostReads
from tests.teacher_method import Averaging, AveragingConfig

WITHOUT = {"Supervised", "FilterMatch"}  # labels alone; one loss over both


def method(seed: int = 0) -> Any:
    return Task().method(Averaging, AveragingConfig(), seed=seed)


def last_stage(m: Any) -> list[Tensor]:
    return list(m.student.decoder.stages[-1].parameters())


def pulls(m: Any, labeled: Tensor, unlabeled: Tensor) -> dict[str, Tensor]:
    """Terms with the stated gradients on the first kernel of the last stage."""
    kernel = last_stage(m)[0]
    return {"supervised": (kernel * labeled).sum(), "consistency": (kernel * unlabeled).sum()}


def test_the_factor_is_the_cosine_of_the_gradients_on_the_last_stage() -> None:
    m, task = method(), Task()
    agreement = Agreement(m)
    assert agreement.factor == 1.0
    terms = m(task.batch(), 0.5)
    weights = agreement.weigh(terms, {"supervised": 1.0, "consistency": 0.25}, 0)
    g = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, last_stage(m), retain_graph=True)
        g[name] = torch.cat([x.flatten() for x in found])
    cosine = cosine_similarity(g["supervised"], g["consistency"], dim=0).item()
    assert agreement.cosine == pytest.approx(cosine, abs=1e-5)
    assert weights == {"supervised": 1.0, "consistency": 0.25 * max(0.0, agreement.cosine)}


def test_it_does_not_touch_the_backward_pass() -> None:
    m, task = method(), Task()
    gradients = []
    for agreement in (None, Agreement(m)):
        torch.manual_seed(0)
        terms = m(task.batch(), 0.5)
        if agreement is not None:
            agreement.weigh(terms, {"supervised": 1.0, "consistency": 1.0}, 0)
            assert all(p.grad is None for p in m.parameters())
        sum(terms.values()).backward()
        gradients.append([p.grad.clone() for p in m.student.parameters()])
        m.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_directions_are_averaged_then_compared_and_cut_at_zero() -> None:
    m = method()
    agreement = Agreement(m)
    weights = {"supervised": 1.0, "consistency": 2.0}
    torch.manual_seed(0)
    kernel = last_stage(m)[0]
    g = torch.randn_like(kernel)
    assert agreement.weigh(pulls(m, g, -g), weights, 0)["consistency"] == 0.0
    assert agreement.cosine == pytest.approx(-1)
    history = [(g, -g)]
    for i in range(1, 2 * HORIZON):
        history.append((torch.randn_like(g) + 0.3 * g, 100 * torch.randn_like(g) + 30 * g))
        found = agreement.weigh(pulls(m, *history[-1]), weights, i * EVERY)
        means = [torch.zeros_like(g).flatten(), torch.zeros_like(g).flatten()]
        for n, pair in enumerate(history, 1):
            for k, direction in enumerate(pair):
                means[k] = means[k] + (direction.flatten() / direction.norm() - means[k]) / min(n, HORIZON)
        assert agreement.cosine == pytest.approx(
            cosine_similarity(means[0], means[1], dim=0).item(), abs=1e-5
        )
        assert found["consistency"] == pytest.approx(2 * max(0.0, agreement.cosine))
    single = cosine_similarity(history[-1][0].flatten(), history[-1][1].flatten(), dim=0).item()
    assert agreement.cosine > 0.3 > single


def test_it_is_measured_at_every_tenth_step_where_unlabeled_terms_weigh() -> None:
    m = method()
    agreement = Agreement(m)
    g = torch.randn_like(last_stage(m)[0])
    for step in range(3 * EVERY):
        agreement.weigh(pulls(m, g, g), {"supervised": 1.0, "consistency": float(step >= EVERY)}, step)
    assert agreement.measurements == 2


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_gradients_that_say_nothing_leave_it_as_it_was(value: float) -> None:
    m = method()
    agreement = Agreement(m)
    g = torch.randn_like(last_stage(m)[0])
    agreement.weigh(pulls(m, g, torch.full_like(g, value)), {"supervised": 1.0, "consistency": 1.0}, 0)
    assert (agreement.measurements, agreement.factor) == (0, 1.0)


def test_the_state_comes_back() -> None:
    m = method()
    agreement, other = Agreement(m), Agreement(m)
    g = torch.randn_like(last_stage(m)[0])
    agreement.weigh(pulls(m, g, g + torch.randn_like(g)), {"supervised": 1.0, "consistency": 1.0}, 0)
    other.load_state_dict(agreement.state_dict())
    assert other.cosine == agreement.cosine and other.measurements == 1
    assert agreement.directions is not None and other.directions is not None
    assert torch.equal(other.directions, agreement.directions)


@pytest.mark.parametrize("name", sorted(method_classes()))
def test_every_method_can_be_weighed_or_says_why_not(name: str) -> None:
    cls = method_classes()[name]
    task = Task()
    m = task.method(cls, cls.config_class())
    if name in WITHOUT:
        with pytest.raises(ValueError, match=f'"agreement".*{name} has .* alone: set it to false'):
            Agreement(m)
        return
    agreement = Agreement(m)
    batch = task.batch()
    m.before_step(0.9)
    terms, weights = m(batch, 0.9), m.weights(0.9)
    found = agreement.weigh(terms, weights, 0)
    assert found.keys() == weights.keys()
    assert all(found[k] == weights[k] for k in weights if not m.is_unlabeled(k))
    assert agreement.unlabeled and all(not k.startswith("supervised") for k in agreement.unlabeled)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    m, task = method(seed=rank), Task()
    wrapped = DistributedDataParallel(m, broadcast_buffers=False)
    agreement = Agreement(m)
    batches = [task.batch(seed=r) for r in range(2)]
    terms = wrapped(batches[rank], 0.5)
    weights = agreement.weigh(terms, {"supervised": 1.0, "consistency": 1.0}, 0)
    sum(weights[k] * v for k, v in terms.items()).backward()
    found = [p.grad.clone() for p in m.student.parameters()]
    m.zero_grad(set_to_none=True)
    terms = m(batches[rank], 0.5)  # the same without DDP
    g = []
    for name in ("supervised", "consistency"):
        own = torch.autograd.grad(terms[name], last_stage(m), retain_graph=True)
        g.append(torch.cat([x.flatten() for x in own]))
        dist.all_reduce(g[-1])
    assert agreement.cosine == pytest.approx(cosine_similarity(g[0], g[1], dim=0).item(), abs=1e-5)
    sum(weights[k] * v for k, v in terms.items()).backward()
    for a, p in zip(found, m.student.parameters(), strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(a, p.grad / 2, rtol=1e-4, atol=1e-6)
    torch.save(agreement.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_on_several_gpus_all_gradients_are_summed_before_they_are_compared(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2, join=True)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(a["directions"], b["directions"])
    assert (a["cosine"], a["measurements"]) == (b["cosine"], 1)


def test_a_measurement_is_read_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m = method()
    agreement = Agreement(m)
    g = torch.randn_like(last_stage(m)[0])
    calls: list[int] = []

    def counted(*scalars: Tensor) -> list[float]:
        calls.append(len(scalars))
        return read(*scalars)

    monkeypatch.setattr(agreement_module, "read", counted)
    for step in range(EVERY + 1):
        with HostReads() as reads:
            agreement.weigh(pulls(m, g, g), {"supervised": 1.0, "consistency": 1.0}, step)
        assert reads.found == []
    assert calls == [2, 2]
