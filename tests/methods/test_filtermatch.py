from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nnssl.methods.filtermatch import FilterMatch, FilterMatchConfig
from tests.building import Task


def method(task: Task, config: FilterMatchConfig | None = None, **planned: Any) -> Any:
    torch.manual_seed(0)
    m = FilterMatch(task.network(), config or FilterMatchConfig(), replace(task.planned(), **planned))
    return m.train()


def test_before_the_start_of_self_training_it_is_supervised_alone() -> None:
    task = Task(channels=3)
    m, batch = method(task), task.batch()
    joint = m(batch, 0.01)["joint"]
    assert joint.item() == m.supervised_loss(m.student(batch.labeled), batch.target).item()


@pytest.mark.parametrize(
    "task",
    [
        Task(channels=3),
        Task(dim=2, channels=3),
        Task(channels=2, regions=True),
        Task(channels=2, regions=True, ignore=True),
        Task(channels=3, ignore=True),
        Task(deep_supervision=False),
    ],
)
def test_the_joint_loss_is_nnunets_on_the_turned_batch(task: Task) -> None:
    """Non-square patches turn by 180 degrees; before `mirror_from` nothing is mirrored."""
    m, batch = method(task), task.batch()
    found = m(batch, 0.2)["joint"]
    with torch.no_grad():
        outputs = m.student(batch.weak)
    scales = outputs if isinstance(outputs, list) else [outputs]
    targets = batch.target if isinstance(batch.target, list) else [batch.target]
    joint = []
    for y, z in zip(targets, scales, strict=True):
        if task.regions:
            own = (z > 0).to(y.dtype)  # a probability above 0.5
            own = torch.cat([own, torch.zeros_like(own[:, :1])], 1) if task.ignore else own
        else:
            own = z.argmax(1, keepdim=True).to(y.dtype)
        joint.append(torch.cat([y, own.flip(-1, -2)]))
    images = torch.cat([batch.labeled, batch.weak.flip(-1, -2)])
    expected = m.supervised_loss(m.student(images), joint if isinstance(batch.target, list) else joint[0])
    assert found.item() == expected.item()


def test_square_planes_turn_by_one_to_three_quarters_and_mirror_later() -> None:
    m = method(Task(), patch_size=(8, 12, 12))
    drawn = [m.orientation(3, 0.2) for _ in range(60)]
    assert {o.turns[0][0] for o in drawn} == {1, 2, 3} and not any(o.mirrored for o in drawn)
    assert {o.mirrored for o in (m.orientation(3, 0.5) for _ in range(200))} >= {(), (-3,), (-2, -1)}


@pytest.mark.parametrize(("axes", "turned"), [((0,), False), ((1,), False), ((1, 2), True), ((), False)])
def test_no_turn_amounts_to_a_forbidden_mirroring(axes: tuple[int, ...], turned: bool) -> None:
    m = method(Task(), patch_size=(8, 12, 12), mirror_axes=axes)
    for _ in range(30):
        orientation = m.orientation(3, 0.9)
        assert bool(orientation.turns) == turned
        assert {a + 3 for a in orientation.mirrored} <= set(axes)


@pytest.mark.parametrize("regions", [False, True])
def test_entropies_are_summed_over_the_voxels_of_a_patch(regions: bool) -> None:
    task = Task(channels=2, regions=regions)
    m, batch = method(task), task.batch()
    logits = torch.zeros(2, 2, 4, 4, 4)
    logits[1, 0] = 100.0  # certain of channel 0
    index, total = m.scan_entropies(logits, batch)
    assert index.tolist() == [0, 1]
    voxels = 64 * math.log(2)
    assert total.tolist() == pytest.approx([2 * voxels, voxels] if regions else [voxels, 0.0], abs=1e-5)


def pool(n: int = 20, **config: Any) -> Any:
    return method(Task(), FilterMatchConfig(**config), unlabeled_cases=tuple(f"u_{i:02}" for i in range(n)))


def test_the_scans_of_lowest_entropy_leave_for_good_and_the_state_says_so() -> None:
    m = pool()
    m.entropy.copy_(torch.arange(20.0).flip(0) * 2)
    m.seen.fill_(2)
    m.seen[19] = 0  # the lowest, but never seen
    m.shrink_pool()
    assert m.outside() == {"u_16", "u_17", "u_18"}  # 15 % of 20
    assert not m.seen.any() and not m.entropy.any()
    other = pool()
    assert other.outside() == set()
    other.load_state_dict(m.state_dict())
    assert other.outside() == {"u_16", "u_17", "u_18"}
    other.seen.fill_(1)
    other.shrink_pool()
    assert len(other.outside()) == 5  # 15 % of 17
    assert "5 scans have left the pool: u_00, u_01, u_16" in other.announce(0.5)


def test_one_scan_always_stays_and_nothing_leaves_at_share_0() -> None:
    m = pool(3, filter_share=1.0)
    m.seen.fill_(1)
    m.shrink_pool()
    assert len(m.outside()) == 2
    m.seen.fill_(1)
    m.shrink_pool()
    assert len(m.outside()) == 2
    still = pool(20, filter_share=0.0)
    still.seen.fill_(1)
    still.shrink_pool()
    assert still.outside() == set() and still.announce(0.5) == ""


@pytest.mark.parametrize(("skipped", "expected"), [((), [25, 50, 75]), ((25, 26, 75), [27, 50, 76])])
def test_the_choice_comes_at_every_interval_though_a_step_is_skipped(
    skipped: tuple[int, ...], expected: list[int]
) -> None:
    task = Task()
    m = method(task, FilterMatchConfig(filter_every=0.25), steps=100)
    calls: list[int] = []
    for step in (step for step in range(100) if step not in skipped):
        m.shrink_pool = partial(calls.append, step)
        m.after_step(task.batch(), step / 100)
    assert calls == expected


def test_patches_of_scans_that_have_left_give_way_to_others() -> None:
    task = Task()
    m, batch = method(task), task.batch()
    m.left[0], m._outside = True, None
    seen: list[torch.Tensor] = []
    forward = m.student.forward

    def spy(x: torch.Tensor) -> Any:
        seen.append(x)
        return forward(x)

    m.student.forward = spy
    m(batch, 0.2)
    assert torch.equal(seen[-1][2:], batch.weak[[1, 1]].flip(-1, -2))
    m.left[1], m._outside = True, None
    assert m(batch, 0.2)["joint"].item() == m.supervised_loss(forward(batch.labeled), batch.target).item()


def test_what_was_seen_counts_after_the_step() -> None:
    task = Task()
    m, batch = method(task), task.batch()
    m(batch, 0.2)
    assert not m.seen.any()
    m.after_step(batch, 0.2)
    assert m.seen.tolist() == [1, 1]
    with torch.no_grad():
        logits = m.student(batch.weak)[0]
    entropy = -(F.softmax(logits, 1) * F.log_softmax(logits, 1)).flatten(1).sum(1)
    torch.testing.assert_close(m.entropy, entropy, rtol=1e-4, atol=1e-3)


def test_what_will_not_act_is_said() -> None:
    many = tuple(f"case_{i}" for i in range(10))
    assert method(Task(), unlabeled_cases=many).describe() == ""
    said = method(Task(), unlabeled_cases=many, mirror_axes=(0, 1)).describe()
    assert said == "mirror_axes [0, 1] let no patch be turned, so none is moved before 33% of the training"
    said = method(Task(), unlabeled_cases=many[:3], mirror_axes=()).describe()
    assert said.startswith("mirror_axes [] let no patch be turned, so none is moved ever; of 3 unlabeled")
