from __future__ import annotations

import torch
from torch import nn

from nnssl.ema import copy_weights, ema_update, frozen_copy
from tests.building import Task


def test_teacher_equals_the_closed_form_average_after_three_steps() -> None:
    student = Task(dim=2).network()  # its state_dict names shared tensors several times
    teacher = frozen_copy(student)
    start = [p.clone() for p in teacher.parameters()]
    steps = []
    for i in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * (i + 1))
        steps.append([p.clone() for p in student.parameters()])
        ema_update(teacher, student, 0.9)
    for t, s0, s1, s2, s3 in zip(teacher.parameters(), start, *steps, strict=True):
        torch.testing.assert_close(t.data, 0.9**3 * s0 + 0.1 * (0.81 * s1 + 0.9 * s2 + s3))


def test_buffers_are_copied_not_averaged() -> None:
    student = nn.BatchNorm2d(2)
    teacher = frozen_copy(student)
    student(torch.randn(4, 2, 3, 3) + 5)
    ema_update(teacher, student, 0.5)
    own, averaged = dict(student.named_buffers()), dict(teacher.named_buffers())
    assert torch.equal(averaged["running_mean"], own["running_mean"])
    assert averaged["num_batches_tracked"] == 1


def test_a_frozen_copy_is_detached_from_its_source_and_can_be_remade() -> None:
    source = nn.Linear(2, 2)
    copied = frozen_copy(source)
    weight = copied.get_parameter("weight")
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        source.weight += 1
    assert not torch.equal(weight, source.weight)
    copy_weights(copied, source)
    assert torch.equal(weight, source.weight)
