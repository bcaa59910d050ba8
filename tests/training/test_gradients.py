"""Gradients of single terms: a closed form, and that measuring them changes nothing."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import nn

from nnssl.training.gradients import is_measured, term_gradients
from tests.building import Task
from tests.place import SHORT, Place, dies_in_epoch, losses, run
from tests.teacher_method import AveragingTrainer
from tests.test_method_contract import ROWS, started


@pytest.mark.parametrize(("steps", "n"), [(10, 1), (10, 3), (720, 25), (7, 7), (7, 20), (7, 0)])
def test_measured_steps_are_in_the_middle_of_equal_parts(steps: int, n: int) -> None:
    found = [step for step in range(steps) if is_measured(step, steps, n)]
    middles = [math.ceil((i + 0.5) * steps / n) - 1 for i in range(n)]
    assert found == (middles if n <= steps else list(range(steps)))


def toy() -> tuple[nn.Linear, nn.Linear, dict[str, torch.Tensor], dict[str, float]]:
    """A student of weights (1, 2), whose terms have the gradients (3, 4), 2 w and (0, 0)."""
    student, other = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[1.0, 2.0]]))
    terms = {
        "linear": student(torch.tensor([3.0, 4.0])).sum(),
        "square": student.weight.square().sum(),
        "dead": 0 * student.weight.sum(),
        "off": student.weight.sum(),
        "elsewhere": other(torch.ones(1)).sum(),
        "constant": torch.zeros(()),
    }
    weights = {"linear": 0.5, "square": 2.0, "dead": 1.0, "off": 0.0, "elsewhere": 1.0, "constant": 1.0}
    return student, other, terms, weights


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_norms_are_those_of_the_weighted_terms(scale: float) -> None:
    student, _, terms, weights = toy()
    found = {k: v.item() for k, v in term_gradients(terms, weights, student, scale).items()}
    assert found.pop("linear") == pytest.approx(0.5 * 5)
    assert found.pop("square") == pytest.approx(2 * 2 * math.sqrt(5))
    assert found.pop("dead") == 0
    assert found.keys() == {"off", "elsewhere", "constant"} and all(map(math.isnan, found.values()))


def test_parameters_without_gradient_do_not_count() -> None:
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    student = nn.Sequential(first.requires_grad_(False), second)
    norms = term_gradients({"a": student(torch.ones(1)).sum()}, {"a": 1.0}, student)
    assert norms["a"].item() == pytest.approx(abs(first.weight.item()), rel=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_measuring_leaves_the_gradients_of_a_step_as_they_are(name: str) -> None:
    """Bit for bit, and each norm is that of a backward pass of its own."""
    row, t = ROWS[name], 0.5
    method, batch = started(row, Task()), Task().batch(seed=9)
    method.before_step(t)

    def gradients(measure: bool, only: str = "") -> tuple[list[torch.Tensor | None], dict[str, float]]:
        method.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        terms, weights = method(batch, t), method.weights(t)
        norms = term_gradients(terms, weights, method.student) if measure else {}
        sum(weights[k] * v for k, v in terms.items() if weights[k] != 0 and only in ("", k)).backward()
        return [copy.copy(p.grad) for p in method.parameters()], {k: v.item() for k, v in norms.items()}

    plain, _ = gradients(False)
    measured, norms = gradients(True)
    for a, b in zip(plain, measured, strict=True):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))
    for term, norm in norms.items():
        reaches = method.weights(t)[term] != 0 and "student" in row.reaches[term]
        assert math.isfinite(norm) == reaches
        if reaches:
            gradients(False, only=term)
            own = [p.grad.norm() for p in method.student.parameters() if p.grad is not None]
            assert norm == pytest.approx(torch.stack(own).norm().item(), rel=1e-4)


@pytest.mark.slow
def test_a_training_logs_gradients_and_stays_bit_for_bit_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plan(**{**SHORT, "num_epochs": 4})
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("measured while off"))
        plain = losses(run(place.trainer(AveragingTrainer)))
    assert not any(k.startswith("gradient/") for k in plain[0])
    place.plan("Measured", **{**SHORT, "num_epochs": 4, "term_gradients": 3})
    whole = losses(run(place.trainer(AveragingTrainer, plans="Measured")))
    assert [{k: v for k, v in row.items() if not k.startswith("gradient/")} for row in whole] == plain
    norms = [row["gradient/supervised"] for row in whole]  # in steps 1, 3 and 6 of 0 ... 7
    assert [math.isfinite(v) for v in norms] == [True, True, False, True]
    assert all(v > 0 for v in norms if math.isfinite(v))

    shutil.rmtree(place.results)
    killed = place.trainer(AveragingTrainer, plans="Measured")
    killed.on_epoch_start = dies_in_epoch(killed, 2)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    resumed = place.trainer(AveragingTrainer, plans="Measured", resume=True)
    maybe_load_checkpoint(resumed, True, False)
    again = losses(run(resumed))
    assert [row.keys() for row in again] == [row.keys() for row in whole]
    for one, other in zip(again, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6, nan_ok=True)
