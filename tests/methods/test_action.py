from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.anatomical import anatomical_contrast
from nnssl.losses.pseudo_label import cross_entropy
from nnssl.method import full_resolution
from nnssl.methods.action import ACTION, ACTIONConfig, crop_cells, pool
from nnssl.networks.dropout import Walk
from nnssl.sampling import gather_voxels
from tests.building import Task, put, with_unlabeled

SMALL = ACTIONConfig(
    threshold_pseudo=0.0,
    threshold_contrast=0.0,
    embedding=8,
    num_queries=16,
    num_negatives=32,
    candidates=64,
    classmix_probability=1.0,
    channel_dropout=0.0,
)
TASK_2D = Task(dim=2)


def method(task: Task = TASK_2D, config: ACTIONConfig = SMALL) -> ACTION:
    built = task.method(ACTION, config)
    assert isinstance(built, ACTION)
    return built


def move_student(m: ACTION, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in m.student.parameters():
            p.add_(by)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fractions", "phases"),
    [
        ((0.25, 0.25, 0.5), {0.0: 1, 0.24: 1, 0.25: 2, 0.49: 2, 0.5: 3, 1.0: 3}),
        ((0.0, 0.0, 1.0), {0.0: 3, 1.0: 3}),
        ((0.5, 0.0, 0.5), {0.0: 1, 0.5: 3}),
        ((0.4, 0.6, 0.0), {0.0: 1, 0.4: 2, 1.0: 2}),
    ],
)
def test_phases_follow_their_fractions(
    fractions: tuple[float, float, float], phases: dict[float, int]
) -> None:
    m = method(config=replace(SMALL, phase_fractions=fractions))
    assert {t: m.phase_at(t) for t in phases} == phases


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6])
def test_inactive_terms_are_zeros_without_weight_that_reach_every_parameter(t: float) -> None:
    m = method()
    terms, weights = m(TASK_2D.batch(), t), m.weights(t)
    inactive = [k for k in terms if weights[k] == 0]
    assert terms.keys() == weights.keys() and inactive and all(terms[k].item() == 0 for k in inactive)
    terms[inactive[0]].backward()
    assert all(
        (p.grad is not None and not p.grad.any()) == p.requires_grad
        for p in m.parameters()
        if p.requires_grad
    )


def test_the_first_phase_needs_neither_labels_nor_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    m = method()
    monkeypatch.delattr(m, "decode")
    unknown = torch.full((1,), float("nan"))
    batches = [
        replace(TASK_2D.batch(seed=i), labeled=unknown, target=unknown, labeled_cases=()) for i in range(3)
    ]
    for batch in batches[:2]:
        m(batch, 0.1)
        m.after_step(batch, 0.1)
    value = m(batches[2], 0.1)["global"]
    value.backward()
    assert value.item() > 0 and all(p.grad is None for p in m.student.decoder.stages.parameters())
    assert m.distillation_global.bank.count == 4 and m.distillation_local.bank.count == 0


def test_the_second_phase_fills_the_local_bank_with_crops_of_both_streams() -> None:
    m, batch = method(), TASK_2D.batch(labeled=2, unlabeled=1)
    m(with_unlabeled(batch, cases=("u_0",)), 0.3)
    assert m.distillation_local.bank.count == 0
    m.after_step(batch, 0.3)
    assert m.distillation_local.bank.count == 3 * 4 and m.distillation_global.bank.count == 1
    assert len(m.distillation_local.bank.cases[:12].unique()) == 3
    torch.testing.assert_close(m.distillation_local.bank.embeddings[:12].norm(dim=1), torch.ones(12))


def test_teacher_and_its_projectors_are_moving_averages() -> None:
    m, batch = method(), TASK_2D.batch()
    m(batch, 0.1)
    before = (
        [p.clone() for p in m.teacher.parameters()],
        [p.clone() for p in m.distillation_global.teacher.parameters()],
    )
    move_student(m)
    with torch.no_grad():
        for p in m.distillation_global.projector.parameters():
            p.add_(1.0)
    m.after_step(batch, 0.1)
    for old, module in zip(before, (m.teacher, m.distillation_global.teacher), strict=True):
        for o, p in zip(old, module.parameters(), strict=True):
            torch.testing.assert_close(p, o + 0.01)


def test_the_teacher_is_reset_once_when_the_third_phase_starts_also_in_a_continued_run() -> None:
    m = method()
    move_student(m, 0.01)
    m.before_step(0.3)
    assert not equal(m.teacher, m.student)
    m.before_step(0.5)
    assert equal(m.teacher, m.student)
    move_student(m, 0.01)
    m.before_step(0.6)
    assert not equal(m.teacher, m.student)

    continued = method()
    continued.load_state_dict(m.state_dict())
    continued.before_step(0.6)
    assert equal(continued.teacher, m.teacher) and not equal(continued.teacher, continued.student)


def test_the_pseudo_term_is_the_cross_entropy_of_each_sample_times_its_share_of_certain_voxels() -> None:
    m, batch = method(config=replace(SMALL, threshold_pseudo=0.97)), TASK_2D.batch()
    g = torch.Generator().manual_seed(0)
    certain = torch.rand(2, 12, 16, generator=g) < torch.tensor([0.8, 0.1]).view(2, 1, 1)
    p = torch.where(certain, 0.99, 0.6)
    p_w = torch.stack([p, 1 - p], 1)
    put(m, labels=_Fixed(m.labels, p_w))
    seen: dict[str, Walk] = {}
    walk = m.walk
    put(m, walk=lambda *a: seen.setdefault("out", walk(*a)))
    torch.manual_seed(0)
    value = m(batch, 0.6)["pseudo"]
    logits = full_resolution(seen["out"].outputs)[2:]
    # every voxel is class 0, the one class present, so that ClassMix shows the neighbour whole
    share, target = (
        certain.float().mean((1, 2)).roll(1),
        torch.tensor([1.0, 0]).view(1, 2, 1, 1).expand(1, 2, 12, 16),
    )
    expected = torch.stack([share[b] * cross_entropy(logits[b : b + 1], target, m.labels) for b in range(2)])
    assert value.item() == pytest.approx(expected.mean().item(), rel=1e-5) and value.item() > 0


class _Fixed:
    """A label space whose first probabilities (the teacher's) are given ones."""

    def __init__(self, labels: Any, first: torch.Tensor) -> None:
        self.labels, self.first = labels, [first]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.labels, name)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return self.first.pop() if self.first else self.labels.probabilities(logits)


def test_classmix_mixes_images_and_labels_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything pasted, sample 0 shows sample 1 in the image and in its pseudo-label: swapping the
    batch changes nothing."""
    everything = lambda member, *a: torch.ones_like(member[0].unsqueeze(1))  # noqa: E731
    monkeypatch.setattr("nnssl.methods.action.classmix_mask", everything)
    batch, values = TASK_2D.batch(), []
    for order in ([0, 1], [1, 0]):
        swapped = with_unlabeled(batch, weak=batch.weak[order], strong=tuple(s[order] for s in batch.strong))
        values.append(method()(swapped, 0.6)["pseudo"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0


def test_classmix_leaves_out_a_share_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = lambda member, *a: torch.ones_like(member[0].unsqueeze(1))  # noqa: E731
    monkeypatch.setattr("nnssl.methods.action.classmix_mask", everything)
    batch = TASK_2D.batch(unlabeled=8)
    for probability, neighbours in ((0.0, (0, 0)), (0.5, (1, 7)), (1.0, (8, 8))):
        m = method(config=replace(SMALL, classmix_probability=probability))
        seen: list[torch.Tensor] = []
        walk = m.walk
        put(m, walk=lambda f, x, *a, walk=walk, seen=seen: seen.append(x) or walk(f, x, *a))
        torch.manual_seed(0)
        m(batch, 0.6)
        x_m, strong = seen[0][-8:], batch.strong[0]
        pasted = sum(torch.equal(x_m[b], strong[b - 1]) for b in range(8))
        assert pasted + sum(torch.equal(x_m[b], strong[b]) for b in range(8)) == 8
        assert neighbours[0] <= pasted <= neighbours[1]


def test_channel_dropout_spares_the_labeled_images() -> None:
    batch, values = TASK_2D.batch(), []
    for p in (0.0, 0.9):
        torch.manual_seed(0)
        values.append(method(config=replace(SMALL, channel_dropout=p))(batch, 0.6))
    torch.testing.assert_close(values[0]["supervised"], values[1]["supervised"])
    assert abs(values[0]["pseudo"].item() - values[1]["pseudo"].item()) > 1e-4


@pytest.mark.parametrize("task", [Task(), Task(dim=2, channels=4)])
def test_contrast_at_sampled_voxels_equals_contrast_on_the_dense_representation(task: Task) -> None:
    m = method(task)
    batch = task.batch()
    onehot, _ = m.labels.encode(torch.cat([batch.full_target(), batch.full_target().flip(2)]))
    counted = torch.rand(4, 1, *task.patch_size) > 0.2
    logits = torch.randn(4, task.channels, *task.patch_size)
    _, features = m.decode(m.student, m.encode(m.student, torch.randn(4, 1, *task.patch_size)))

    mode = "trilinear" if task.dim == 3 else "bilinear"
    maps = torch.cat([F.interpolate(f, task.patch_size, mode=mode, align_corners=False) for f in features], 1)
    dense = m.representation(maps.movedim(1, -1)).movedim(-1, 1)
    member = (onehot * counted).movedim(1, 0).flatten(1).bool()
    hard = logits.softmax(1).movedim(1, 0).flatten(1) < 0.97
    values, gradients = [], []
    for sampled in (True, False):
        torch.manual_seed(0)
        if sampled:
            value = m.contrast(features, logits, onehot, counted)
        else:
            embed = partial(gather_voxels, dense)
            options: dict[str, Any] = {
                "num_queries": 16,
                "num_negatives": 32,
                "temperature": 0.5,
                "num_candidates": 64,
            }
            value = anatomical_contrast(embed, member, hard, **options)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, m.representation.weight, retain_graph=True)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_a_voxel_of_nested_regions_counts_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(dim=2, channels=2, regions=True, ignore=True)
    m, batch, seen = method(task), task.batch(), {}

    def spy(embed: Any, member: torch.Tensor, hard: torch.Tensor, **options: Any) -> torch.Tensor:
        seen["member"] = member
        return embed(torch.zeros(1, dtype=torch.long)).sum()

    monkeypatch.setattr("nnssl.methods.action.anatomical_contrast", spy)
    m(batch, 0.6)
    member = seen["member"].view(3, 4, 12, 16)[:, :2]
    outer, inner, ignored = batch.full_target().movedim(1, 0).bool()
    assert torch.equal(member, torch.stack([~outer & ~ignored, outer & ~inner, inner]))
    assert ignored.any() and all(k.any() for k in member)


def test_unlabeled_voxels_below_the_threshold_have_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    m = method(config=replace(SMALL, threshold_contrast=0.7, threshold_pseudo=0.97, classmix_probability=0.0))
    sure = torch.rand(2, 12, 16) > 0.5
    p = torch.where(sure, 0.8, 0.6)
    put(m, labels=_Fixed(m.labels, torch.stack([p, 1 - p], 1)))
    seen: list[torch.Tensor] = []

    def contrast(embed: object, member: torch.Tensor, hard: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(member)
        return torch.zeros(())

    monkeypatch.setattr("nnssl.methods.action.anatomical_contrast", contrast)
    m(TASK_2D.batch(), 0.6)
    labeled, unlabeled = seen[0].view(2, 4, 12, 16).split(2, 1)
    assert labeled.any(0).all() and torch.equal(unlabeled, torch.stack([sure, torch.zeros_like(sure)]))


def test_patches_are_compared_with_rows_of_other_cases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    m, batch = method(), TASK_2D.batch()
    seen: list[torch.Tensor] = []
    m(batch, 0.1)
    m.after_step(batch, 0.1)  # a row of u_0 and one of u_1

    def distillation(
        student: torch.Tensor,
        teacher: torch.Tensor,
        bank: torch.Tensor,
        valid: torch.Tensor,
        *options: object,
    ) -> torch.Tensor:
        seen.append(valid)
        return student.sum()

    monkeypatch.setattr("nnssl.methods.action.bank_distillation", distillation)
    m(batch, 0.1)
    assert seen[0][:, :2].tolist() == [[False, True], [True, False]] and not seen[0][:, 2:].any()


def test_maps_are_pooled_by_mean_and_maximum() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(pool(x), torch.cat([x.flatten(2).mean(2), x.amax((2, 3))], 1))


@pytest.mark.parametrize(("patch", "n"), [((32, 48), 8), ((16, 8, 24), 4)])
def test_crops_keep_the_shape_of_what_is_in_their_cell(patch: tuple[int, ...], n: int) -> None:
    x, grid = torch.randn(2, 3, *patch), (2,) * len(patch)
    crops = crop_cells(x, grid)
    assert crops.shape == (2, 2 ** len(patch), 3 * n ** len(patch))
    last = x[(slice(None), slice(None), *(slice(size // 2, None) for size in patch))]
    pooling = torch.nn.functional.adaptive_avg_pool2d if n == 8 else torch.nn.functional.adaptive_avg_pool3d
    torch.testing.assert_close(crops[:, -1], pooling(last, n).flatten(1))


def test_only_fewer_crops_than_voxels_are_cut() -> None:
    assert method(config=replace(SMALL, crops_per_axis=14)).grid == (12, 14)


def test_phases_are_announced() -> None:
    m = method()
    lines = [m.announce(t) for t in (0.0, 0.2, 0.25, 0.5, 0.9)]
    assert lines[0] == lines[1] and lines[3] == lines[4] and len(set(lines)) == 3
    assert lines[0] == "phase 1 of 3, global distillation, without labels, until 25% of the training"


def test_the_teacher_can_be_deployed() -> None:
    m = method()
    assert m.deployed("teacher") is m.teacher and m.deployed("student") is m.student
    assert m.teacher.state_dict().keys() == m.student.state_dict().keys()


def test_a_phase_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="phase 1 without a loss"):
        ACTIONConfig(weight_global=0)
    assert ACTIONConfig(weight_global=0, phase_fractions=(0.0, 0.5, 0.5)).weight_global == 0


def test_a_trained_network_leaves_out_the_phase_without_labels_unless_it_is_asked_for() -> None:
    m = method(config=replace(SMALL, phase_fractions=None))
    assert [m.phase_at(t) for t in (0.0, 0.3, 0.6)] == [1, 2, 3]
    m.pretrained = True
    assert [m.phase_at(t) for t in (0.0, 0.3, 0.6)] == [2, 3, 3]
    m.config = replace(SMALL, phase_fractions=(0.5, 0.0, 0.5))
    assert [m.phase_at(t) for t in (0.0, 0.3, 0.6)] == [1, 1, 3]


def test_phases_share_the_whole_training() -> None:
    with pytest.raises(ValueError, match=r"phase_fractions must be shares with sum 1, found \[0.5, 0.4"):
        ACTIONConfig(phase_fractions=(0.5, 0.4, 0.2))
