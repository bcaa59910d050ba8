from __future__ import annotations

import math

import pytest
import torch

from nnssl.labels import LabelSpace
from nnssl.losses.consistency import mse_consistency
from nnssl.method import full_resolution
from nnssl.methods.uamt import UAMT, UAMTConfig, normalized_entropy
from tests.building import Task, put


def method(task: Task = Task(), config: UAMTConfig = UAMTConfig()) -> UAMT:  # noqa: B008
    return task.method(UAMT, config)


@pytest.mark.parametrize("channels", [2, 5])
def test_entropy_is_one_for_uniform_and_zero_for_certain_probabilities(channels: int) -> None:
    labels = LabelSpace(channels)
    uniform = torch.full((1, channels, 3, 4), 1 / channels)
    assert normalized_entropy(uniform, labels).flatten().tolist() == pytest.approx([1] * 12)
    assert not normalized_entropy(labels.harden(torch.rand(1, channels, 3, 4)), labels).any()
    p = torch.rand(1, channels, 3, 4).softmax(1)
    slow = [-sum(q * math.log(q) for q in voxel) / math.log(channels) for voxel in p[0].flatten(1).T.tolist()]
    assert normalized_entropy(p, labels).flatten().tolist() == pytest.approx(slow, rel=1e-5)


def test_of_regions_the_most_uncertain_decides() -> None:
    p = torch.tensor([[0.0, 0.5], [0.9, 0.99]]).view(2, 2, 1)
    h = [-q * math.log2(q) - (1 - q) * math.log2(1 - q) for q in (0.9, 0.99)]
    assert normalized_entropy(p, LabelSpace(2, has_regions=True)).flatten().tolist() == pytest.approx(
        [1.0, h[0]], rel=1e-5
    )


def test_the_threshold_rises_to_the_largest_entropy() -> None:
    m = method()
    assert m.entropy_threshold(0.0) == pytest.approx(0.75 + 0.25 * math.exp(-5))
    assert m.entropy_threshold(0.5) == pytest.approx(0.75 + 0.25 * math.exp(-1.25))
    assert m.entropy_threshold(1.0) == 1.0


def test_undisturbed_passes_have_the_entropy_of_the_teacher() -> None:
    m, batch = method(config=UAMTConfig(noise=0.0, dropout=0.0, passes=3)), Task().batch()
    with torch.no_grad():
        p = full_resolution(m.teacher(batch.weak)).softmax(1)
        torch.testing.assert_close(
            m.uncertainty(batch.weak), normalized_entropy(p, m.labels), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("config", [UAMTConfig(dropout=0.0), UAMTConfig(noise=0.0)])
def test_noise_and_dropout_each_disturb_the_passes(config: UAMTConfig) -> None:
    torch.manual_seed(0)
    m, batch = method(config=config), Task().batch()
    with torch.no_grad():
        assert not torch.equal(m.uncertainty(batch.weak), m.uncertainty(batch.weak))


def test_noise_is_cut_off_at_twice_its_deviation() -> None:
    m = method(config=UAMTConfig(noise=0.1, passes=8))
    disturbed, seen = m.disturbed, list[torch.Tensor]()

    def noted(network: torch.nn.Module, x: torch.Tensor, p: float) -> torch.Tensor:
        seen.append(x)
        return disturbed(network, x, p)

    put(m, disturbed=noted)
    weak = torch.zeros(2, 1, *Task().patch_size)
    with torch.no_grad():
        m.uncertainty(weak)
    drawn = torch.stack(seen)
    assert len(seen) == 8 and drawn.abs().max().item() == pytest.approx(0.2)
    assert drawn.std().item() == pytest.approx(0.1 * 0.959, rel=0.02)  # of a normal cut off there, ends kept


def test_only_certain_voxels_count() -> None:
    m, batch = method(), Task().batch()
    low = torch.ones(2, 1, *Task().patch_size)
    low[:, :, :3] = 0.1
    put(m, uncertainty=lambda x: low)
    term = m(batch, 0.5)["consistency"]
    with torch.no_grad():
        found, wanted = (
            full_resolution(m.student(batch.strong[0])).softmax(1),
            full_resolution(m.teacher(batch.weak)).softmax(1),
        )
    assert term.item() == pytest.approx(mse_consistency(found[:, :, :3], wanted[:, :, :3]).item(), rel=1e-4)
    assert m.diagnostics["certain"].item() == pytest.approx(3 / 8)


def test_without_a_certain_voxel_the_term_is_a_differentiable_zero() -> None:
    m = method()
    put(m, uncertainty=lambda x: torch.ones(2, 1, *Task().patch_size))
    term = m(Task().batch(), 0.5)["consistency"]
    term.backward()
    assert term.item() == 0 and all(
        torch.isfinite(p.grad).all() for p in m.student.parameters() if p.grad is not None
    )


def test_the_teacher_averages_the_student_and_may_be_deployed() -> None:
    m = method()
    before = [p.clone() for p in m.teacher.parameters()]
    with torch.no_grad():
        for p in m.student.parameters():
            p.add_(1.0)
    m.after_step(Task().batch(), 0.5)
    for old, new in zip(before, m.deployed("teacher").parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.01)
