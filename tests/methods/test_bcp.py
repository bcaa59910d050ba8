from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnssl.losses.pseudo_label import cross_entropy_dice
from nnssl.method import SemiMethod, full_resolution
from nnssl.methods.bcp import BCP, BCPConfig
from tests.building import Task, gradient, put


def method(task: Task = Task(), config: BCPConfig = BCPConfig()) -> BCP:  # noqa: B008
    return task.method(BCP, config)


class Spy:
    """Records what the student saw and said, the latter with its gradient."""

    def __init__(self, m: SemiMethod) -> None:
        forward = m.student.forward

        def spy(x: torch.Tensor) -> Any:
            self.images, outputs = x, forward(x)
            self.outputs, self.logits = outputs, full_resolution(outputs)
            self.logits.retain_grad()
            return outputs

        m.student.forward = spy


def half_boxes(x: torch.Tensor) -> torch.Tensor:
    """The upper half of the first axis."""
    box = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
    box[:, :, : x.shape[2] // 2] = True
    return box


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (2, 1), (1, 2)])
def test_patches_are_pasted_both_ways_and_batches_are_cycled(labeled: int, unlabeled: int) -> None:
    m, batch = method(), Task().batch(labeled, unlabeled)
    put(m, boxes=half_boxes)
    spy = Spy(m)
    m(batch, 0.5)
    assert len(spy.images) == labeled + unlabeled
    upper, lower = slice(0, 4), slice(4, 8)
    for i in range(labeled):
        assert torch.equal(spy.images[i, :, upper], batch.strong[0][i % unlabeled, :, upper])
        assert torch.equal(spy.images[i, :, lower], batch.labeled[i, :, lower])
    for j in range(unlabeled):
        assert torch.equal(spy.images[labeled + j, :, upper], batch.labeled[(j + 1) % labeled, :, upper])
        assert torch.equal(spy.images[labeled + j, :, lower], batch.strong[0][j, :, lower])


def test_each_part_is_compared_with_the_labels_it_came_with() -> None:
    """The teacher calls everything class 1: the halves of the mixed labels are written out by hand."""
    task = Task(channels=3)
    m, batch = method(task), task.batch()
    put(m, boxes=half_boxes)
    with torch.no_grad():
        m.teacher.decoder.seg_layers[-1].bias.copy_(torch.tensor([-50.0, 50.0, -50.0]))
    spy = Spy(m)
    terms = m(batch, 0.5)
    label = batch.full_target()[:, 0].long()
    mixed = torch.stack([label[0], label[1], label[1], label[0]])  # of x_in (twice), of x_out (twice)
    mask = torch.ones(4, 1, *task.patch_size)
    mask[:2, :, :4] = mask[2:, :, 4:] = 0  # where images are unlabeled
    onehot = torch.nn.functional.one_hot(mixed, 3).movedim(-1, 1).float()
    constant = torch.zeros_like(onehot)
    constant[:, 1] = 1
    for key, y, counted in (("supervised", onehot, mask), ("pseudo", constant, 1 - mask)):
        expected = torch.zeros(())
        for scale, (logits, weight) in enumerate(zip(spy.outputs, m.planned.scale_weights, strict=True)):
            step = 2**scale  # voxel step / 2 of every step is nearest
            y_s, m_s = (x[..., step // 2 :: step, step // 2 :: step, step // 2 :: step] for x in (y, counted))
            expected = expected + weight * cross_entropy_dice(logits, y_s, m.labels, m_s)
        torch.testing.assert_close(terms[key], expected)


@pytest.mark.parametrize("task", [Task(channels=3, ignore=True), Task(channels=2, regions=True, ignore=True)])
def test_ignored_voxels_carry_no_loss_wherever_they_are_pasted(task: Task) -> None:
    m, batch = method(task), task.batch()
    put(m, boxes=half_boxes)
    spy = Spy(m)
    m(batch, 0.5)["supervised"].backward()
    size = gradient(spy.logits).abs().sum(1)
    mask = m.labels.encode(batch.full_target())[1]
    assert mask is not None and not mask.all()
    known = mask[:, 0].bool()
    for sample, source, half in (
        (0, 0, slice(4, 8)),
        (1, 1, slice(4, 8)),
        (2, 1, slice(0, 4)),
        (3, 0, slice(0, 4)),
    ):
        assert torch.equal(size[sample, half] > 0, known[source, half])


def test_a_box_takes_two_thirds_of_every_edge() -> None:
    torch.manual_seed(0)
    m = method()
    box = m.boxes(torch.zeros(50, 1, 24, 30, 48))
    for axis, n in enumerate((24, 30, 48)):
        inside = box[:, 0].movedim(axis + 1, -1).flatten(1, 2).any(1).sum(1)
        assert (inside - 2 * n // 3).abs().max() <= 1
    assert len({tuple(b.flatten().tolist()) for b in box}) > 40  # a box per sample


def test_pretraining_is_nnunets_loss_of_labeled_copy_paste_at_every_scale() -> None:
    task = Task(channels=3)
    m, batch = method(task), task.batch()
    put(m, boxes=half_boxes)
    terms = m(replace(batch, unlabeled=None), 0.0)  # unlabeled patches are not even looked at
    images = torch.cat([batch.labeled.flip(0)[:, :, :4], batch.labeled[:, :, 4:]], 2)
    target = [
        torch.cat([y.flip(0)[:, :, : h // 2], y[:, :, h // 2 :]], 2)
        for y, h in zip(batch.target, (8, 4), strict=True)
    ]
    torch.testing.assert_close(terms["supervised"], m.supervised_loss(m.student(images), target))
    assert terms["pseudo"].item() == 0 and m.weights(0.0) == {"supervised": 1.0, "pseudo": 0.0}
    assert m.weights(0.5) == {"supervised": 1.0, "pseudo": 0.5}


def test_the_teacher_is_the_student_until_pretraining_ends_then_its_average() -> None:
    m, batch = method(config=BCPConfig(pretrain_fraction=0.2, ema_decay=0.75)), Task().batch()
    for t in (0.1, 0.3):
        before = [p.clone() for p in m.teacher.parameters()]
        with torch.no_grad():
            for p in m.student.parameters():
                p.add_(torch.randn_like(p))
        m.after_step(batch, t)
        decay = 0.0 if t < 0.2 else 0.75
        for new, old, s in zip(m.teacher.parameters(), before, m.student.parameters(), strict=True):
            torch.testing.assert_close(new, decay * old + (1 - decay) * s)
    assert m.deployed("teacher") is m.teacher


@pytest.mark.parametrize("t", [0.0, 0.5])
def test_every_scale_learns_in_every_phase(t: float) -> None:
    m = method()
    sum(m(Task().batch(), t).values()).backward()
    assert all(p.grad is not None for p in m.student.parameters())
    assert all(gradient(layer.weight).any() for layer in m.student.decoder.seg_layers)
