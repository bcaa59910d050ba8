from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnssl.losses.deep_supervision import deep_supervision_loss
from nnssl.methods.semi import PseudoLabels, Semi, SemiConfig
from nnssl.orientations import Orientation
from tests.building import Task

PLAIN: dict[str, Any] = {
    "channel_dropout": 0.0,
    "turns": False,
    "mirrorings": False,
    "cutmix_probability": 0.0,
}


def method(task: Task | None = None, planned: dict[str, Any] | None = None, **config: Any) -> Any:
    task = task or Task()
    torch.manual_seed(0)
    m = Semi(task.network(), SemiConfig(**config), replace(task.planned(), **(planned or {})))
    m.make_copies()
    return m.train()


def answer(m: Any, *probabilities: torch.Tensor) -> None:
    """Let the teacher give these instead, pass after pass."""
    m.teach = lambda images: torch.cat(probabilities)


def test_the_teacher_is_the_mean_of_all_students_first_and_of_a_share_of_the_run_later() -> None:
    m = method(planned={"steps": 400}, teacher_share=0.01)  # an average over 4 steps
    assert [m.decay(step / 400) for step in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    assert m.decay(200 / 400) == pytest.approx(3 / 4)
    task, students = Task(), []
    for step in range(4):
        with torch.no_grad():
            for p in m.student.parameters():
                p.add_(torch.randn_like(p))
        students.append([p.clone() for p in m.student.parameters()])
        m.after_step(task.batch(), step / 400)
    for p, *history in zip(m.teacher.parameters(), *students, strict=True):
        torch.testing.assert_close(p, torch.stack(history).mean(0))


@pytest.mark.parametrize(
    ("steps", "share", "limit"),
    [(250_000, 0.01, 0.999), (1500, 0.01, 1 - 1 / 15), (50, 0.01, 0.0), (1500, 0.0, 0.0)],
)
def test_the_average_scales_with_the_run(steps: int, share: float, limit: float) -> None:
    assert method(planned={"steps": steps}, teacher_share=share).decay(1.0) == pytest.approx(limit)


def test_weights_are_confidence_times_agreement_of_the_passes() -> None:
    m = method(planned={"mirror_axes": (2,)}, mirrored_pass=True)
    p_1 = torch.tensor([[0.9, 0.9], [0.1, 0.1]]).view(1, 2, 1, 1, 2)
    p_2 = torch.tensor([[0.5, 0.9], [0.5, 0.1]]).view(1, 2, 1, 1, 2)  # of the mirrored view
    answer(m, p_1, p_2)
    labels, weight = m.pseudo_labels(torch.zeros(1, 1, 1, 1, 2))
    # voxel 0: 0.9 twice; voxel 1: 0.9 and 0.5, hence p = 0.7, d = 0.4
    assert weight.flatten().tolist() == pytest.approx([0.9, 0.7 * 0.6])
    assert labels[:, 0].flatten().tolist() == [1, 1]
    assert method(planned={"mirror_axes": ()}, mirrored_pass=True).random_mirroring(3) is None
    assert method().random_mirroring(3) is None


def test_regions_take_the_least_certain_channel_and_the_widest_gap() -> None:
    m = method(Task(channels=2, regions=True), {"mirror_axes": (0,)}, mirrored_pass=True)
    p_1, p_2 = (torch.tensor(v).view(1, 2, 1, 1, 1) for v in ([0.9, 0.2], [0.7, 0.1]))
    answer(m, p_1, p_2)
    labels, weight = m.pseudo_labels(torch.zeros(1, 1, 1, 1, 1))
    assert labels.flatten().tolist() == [1, 0]
    assert weight.item() == pytest.approx(0.8 * 0.8)


def test_the_mirrored_pass_is_undone_for_every_draw() -> None:
    """A teacher that looks at voxels alone gives the same either way."""
    m = method(mirrored_pass=True)
    m.teach = lambda images: torch.cat([images, -images], 1).softmax(1)
    weak = Task().batch().weak
    drawn = set()
    for _ in range(60):
        mirroring = m.random_mirroring(3)
        assert mirroring is not None
        drawn.add(mirroring.mirrored)
        m.pseudo_labels(weak)
        assert m.diagnostics["disagreement"].item() == 0
    assert len(drawn) == 7 and () not in drawn


def test_thresholds_follow_each_class_up_to_the_common_one() -> None:
    task = Task(channels=3)
    own = {"mirror_axes": (), "steps": 1000}
    m = method(task, own, soft_weights=False, threshold=0.95, adaptive_thresholds=True)
    p = torch.tensor([[0.98, 0.96, 0.70], [0.01, 0.02, 0.10], [0.01, 0.02, 0.20]])
    for row, c in ((0, 0.99), (1, 0.5), (2, 0.0)):  # as if seen: class 2 never
        m.confidence[row], m.observed[row] = c, 5 if c else 0
    answer(m, p.view(1, 3, 1, 1, 3))
    assert m.class_thresholds().tolist() == pytest.approx([0.95, 0.5, 0.0])
    _, weight = m.pseudo_labels(torch.zeros(1, 1, 1, 1, 3))
    assert weight.flatten().tolist() == [1, 1, 0]
    before = m.confidence.clone()
    m.after_step(task.batch(), 0.5)
    assert m.confidence[0].item() == pytest.approx(5 / 6 * 0.99 + 1 / 6 * 0.88)
    assert torch.equal(m.confidence[1:], before[1:]) and m.observed.tolist() == [6, 5, 0]
    assert method(task, threshold=0.9).class_thresholds().tolist() == pytest.approx([0.9] * 3)
    with pytest.raises(ValueError, match="adaptive_thresholds lowers the threshold, which is 0"):
        method(task, adaptive_thresholds=True)


def test_images_labels_and_weights_move_together() -> None:
    m = method(planned={"patch_size": (8, 12, 12)})
    assert m.planes() == [(1, 2)]
    images = torch.randn(3, 1, 8, 12, 12)
    moved, (labels, weight) = m.move(images, PseudoLabels(torch.cat([images, -images], 1), images.abs()))
    assert torch.equal(labels, torch.cat([moved, -moved], 1)) and torch.equal(weight, moved.abs())
    assert not torch.equal(moved, images)
    assert torch.equal(moved.flatten(1).sort(1).values, images.flatten(1).sort(1).values)


def test_nothing_moves_along_axes_that_may_not_be_mirrored() -> None:
    m = method(planned={"patch_size": (12, 12, 12), "mirror_axes": (0,)})
    assert m.planes() == []
    for _ in range(10):
        images = torch.randn(1, 1, 12, 12, 12)
        moved, _ = m.move(images, PseudoLabels(images, images))
        assert any(torch.equal(moved, o.apply(images)) for o in (Orientation(), Orientation(mirrored=(-3,))))


def test_labeled_patches_come_nearer_to_the_intensities_of_unlabeled_ones() -> None:
    m = method(planned={"previous": 1}, histogram_matching=0.5)
    labeled, weak = torch.rand(200, 3, 4, 4, 4), torch.rand(7, 3, 4, 4, 4) + 10
    restyled = m.restyled(labeled, weak)
    assert torch.equal(restyled[:, 2], labeled[:, 2])  # the segmentation of the previous stage
    changed = (restyled[:, :2] != labeled[:, :2]).flatten(1).any(1)
    assert 70 < changed.sum() < 130
    gone = (restyled[changed, :2].mean((1, 2, 3, 4)) - labeled[changed, :2].mean((1, 2, 3, 4))) / 10
    assert gone.min() < 0.1 and gone.max() > 0.9 and 0.4 < gone.mean() < 0.6
    assert method().restyled(labeled, weak) is labeled


@pytest.mark.parametrize("paste_share", [0.0, 1.0])
def test_both_streams_see_the_restyled_patches(paste_share: float) -> None:
    task = Task()
    m = method(task, paste_share=paste_share, histogram_matching=1.0, **PLAIN)
    seen: list[torch.Tensor] = []
    walk = m.walk

    def watched(network: Any, images: torch.Tensor, *rest: Any) -> Any:
        seen.append(images)
        return walk(network, images, *rest)

    m.walk = watched
    batch = task.batch()
    assert batch.unlabeled is not None
    batch = replace(batch, unlabeled=replace(batch.unlabeled, weak=batch.weak + 100))
    m.terms(batch, 0.5)
    assert seen[0][: len(batch.labeled)].mean() > 5


def fixed_pseudo_labels(m: Any, task: Task) -> PseudoLabels:
    labels = m.labels.harden(torch.rand(2, task.channels, *task.patch_size))
    pseudo = PseudoLabels(labels, torch.rand(2, 1, *task.patch_size))
    m.pseudo_labels = lambda weak: pseudo
    return pseudo


def test_side_by_side_it_is_nnunets_loss_and_its_weighted_form() -> None:
    task = Task(channels=3)
    m, batch = method(task, paste_share=0.0, **PLAIN), task.batch()
    pseudo = fixed_pseudo_labels(m, task)
    terms = m(batch, 0.5)
    supervised = m.supervised_loss(m.student(batch.labeled), batch.target)
    unlabeled = deep_supervision_loss(
        m.student(batch.strong[0]), pseudo.labels, m.labels, pseudo.weight, (2 / 3, 1 / 3)
    )
    torch.testing.assert_close(terms["supervised"], supervised)
    torch.testing.assert_close(terms["pseudo"], unlabeled)


def test_with_full_weights_the_weighted_form_is_nnunets_own() -> None:
    """Classes, every voxel counted, batch Dice, as in the plan of the tests."""
    task = Task(channels=3)
    m, batch = method(task), task.batch()
    onehot, _ = m.labels.encode(batch.full_target())
    outputs = m.student(batch.labeled)
    small = torch.nn.functional.interpolate(batch.full_target().float(), (4, 6, 8), mode="nearest-exact")
    own = m.supervised_loss(outputs, [batch.full_target(), small])
    mask = torch.ones_like(onehot[:, :1])
    torch.testing.assert_close(
        deep_supervision_loss(outputs, onehot, m.labels, mask, m.planned.scale_weights),
        own + 1,  # nnU-Net's Dice loss is -Dice, ours 1 - Dice
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 1), (2, 1)])
@pytest.mark.parametrize("ignore", [False, True])
def test_pasted_patches_carry_the_labels_and_weights_they_came_with(
    labeled: int, unlabeled: int, ignore: bool
) -> None:
    task = Task(channels=3, ignore=ignore)
    m, batch = method(task, paste_share=1.0, **PLAIN), task.batch(labeled, unlabeled)
    pseudo = fixed_pseudo_labels(m, task)
    pseudo = PseudoLabels(pseudo.labels[:unlabeled], pseudo.weight[:unlabeled])
    m.pseudo_labels = lambda weak: pseudo

    def half_boxes(x: torch.Tensor) -> torch.Tensor:
        box = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
        box[:, :, :4] = True
        return box

    m.boxes = half_boxes
    terms = m(batch, 0.5)
    onehot, known = m.labels.encode(batch.full_target())
    known = torch.ones_like(onehot[:, :1]) if known is None else known.float()
    images: list[torch.Tensor] = []
    y: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    weight: list[torch.Tensor] = []
    pairs = [(i, i % unlabeled, True) for i in range(labeled)]
    pairs += [((j + 1) % labeled, j, False) for j in range(unlabeled)]
    for l, u, box_is_unlabeled in pairs:
        first, second = (u, l) if box_is_unlabeled else (l, u)

        def halves(box: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            return torch.cat([box[:, :4], rest[:, 4:]], 1)

        parts = (
            (batch.strong[0], pseudo.labels, pseudo.weight, torch.zeros_like(pseudo.weight)),
            (batch.labeled, onehot, torch.zeros_like(known), known),
        )
        a, b = parts if box_is_unlabeled else parts[::-1]
        for found, x, z in zip((images, y, weight, seen), a, b, strict=True):
            found.append(halves(x[first], z[second]))
    outputs = m.student(torch.stack(images))
    for name, mask in (("supervised", seen), ("pseudo", weight)):
        expected = deep_supervision_loss(
            outputs, torch.stack(y), m.labels, torch.stack(mask), m.planned.scale_weights
        )
        torch.testing.assert_close(terms[name], expected)
    assert terms["pseudo"].item() != 0  # one sample per rank suffices


def test_a_share_of_the_steps_pastes() -> None:
    task = Task(dim=2)
    m, batch = method(task, paste_share=0.5), task.batch()
    calls: list[str] = []
    m.pasted = lambda *args: calls.append("pasted")
    m.side_by_side = lambda *args: calls.append("side by side")
    for _ in range(100):
        m.terms(batch, 0.5)
    assert 35 <= calls.count("pasted") <= 65


@pytest.mark.parametrize("paste_share", [0.0, 1.0])
def test_no_certain_voxel_leaves_a_differentiable_zero(paste_share: float) -> None:
    task = Task(channels=3)
    m = method(task, paste_share=paste_share, threshold=1.0, adaptive_thresholds=False)
    pseudo = m(task.batch(), 0.5)["pseudo"]
    pseudo.backward()
    assert pseudo.item() == 0 and m.diagnostics["weight"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in m.student.parameters())


def test_every_ingredient_can_be_switched_off() -> None:
    task = Task(channels=3)
    m = method(
        task,
        teacher_share=0.0,
        mirrored_pass=False,
        soft_weights=False,
        threshold=0.0,
        adaptive_thresholds=False,
        deep_supervision=False,
        paste_share=0.0,
        ramp_fraction=0.0,
        **PLAIN,
    )
    batch = task.batch()
    terms = m(batch, 0.5)
    with torch.no_grad():
        y = m.labels.harden(m.student(batch.weak)[0])
    logits = m.student(batch.strong[0])[0]
    expected = deep_supervision_loss(logits, y, m.labels, torch.ones_like(y[:, :1]), (1.0,))
    torch.testing.assert_close(terms["pseudo"], expected)
    assert m.weights(0.0) == {"supervised": 1.0, "pseudo": 1.0}


def test_channels_drop_from_scratch_and_not_from_pretrained_weights() -> None:
    """Unless the key says otherwise; the log says which default acts."""
    asked: list[float] = []
    said: list[str] = []

    def spy(m: Any) -> None:
        walk = m.walk

        def counted(*args: Any) -> Any:
            asked.append(args[-1])
            return walk(*args)

        m.walk = counted

    for pretrained, dropout in ((False, None), (True, None), (True, 0.3)):
        m = method(channel_dropout=dropout)
        m.pretrained = pretrained
        spy(m)
        m(Task().batch(), 0.5)
        said.append(m.announce(0.5))
    assert asked == [0.5, 0.0, 0.3]
    assert said == [
        "Semi: channel dropout 0.5, the default from scratch",
        "Semi: channel dropout 0, the default from pretrained weights",
        "",
    ]
