from __future__ import annotations

import pytest
import torch

from nnssl.method import full_resolution
from nnssl.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from tests.building import Task, with_unlabeled


def method(task: Task = Task(), config: MeanTeacherConfig = MeanTeacherConfig()) -> MeanTeacher:  # noqa: B008
    return task.method(MeanTeacher, config)


def test_consistency_is_zero_for_equal_networks_and_views() -> None:
    m, batch = method(), Task().batch()
    assert m(with_unlabeled(batch, strong=(batch.weak,)), 0.5)["consistency"].item() < 1e-12
    assert m(batch, 0.5)["consistency"].item() > 1e-8


def test_consistency_is_the_mean_square_over_voxels_and_channels_without_gradient_to_the_teacher() -> None:
    task = Task(channels=3)
    m, batch = method(task), task.batch()
    with torch.no_grad():
        for p in m.teacher.parameters():
            p.add_(0.1)
    term = m(batch, 0.5)["consistency"]
    with torch.no_grad():
        found = full_resolution(m.student(batch.strong[0])).softmax(1)
        wanted = full_resolution(m.teacher(batch.weak)).softmax(1)
    assert term.item() == pytest.approx((found - wanted).square().mean().item(), rel=1e-5)
    term.backward()
    assert all(p.grad is None for p in m.teacher.parameters())


def test_the_teacher_is_the_closed_form_average_after_three_steps() -> None:
    m, batch = method(config=MeanTeacherConfig(ema_decay=0.8)), Task().batch()
    states = [[p.detach().clone() for p in m.student.parameters()]]
    for _ in range(3):
        with torch.no_grad():
            for p in m.student.parameters():
                p.add_(torch.randn_like(p))
        states.append([p.detach().clone() for p in m.student.parameters()])
        m.after_step(batch, 0.5)
    for p, a, b, c, d in zip(m.teacher.parameters(), *states, strict=True):
        torch.testing.assert_close(p, 0.8**3 * a + 0.2 * (0.8**2 * b + 0.8 * c + d))


def test_the_teacher_may_be_deployed() -> None:
    m = method()
    assert m.deployed("teacher") is m.teacher and m.deployed("student") is m.student
