from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnssl.batch import SemiBatch
from nnssl.losses.consistency import mse_consistency
from nnssl.losses.pseudo_label import soft_dice_loss
from nnssl.method import weighted_sum
from nnssl.methods.caml import CAML, CAMLConfig
from nnssl.networks.dropout import Walk
from nnssl.sampling import top_members
from tests.building import Task, put, with_unlabeled
from tests.host_reads import HostReads
from tests.reference import caml as reference

SMALL = CAMLConfig(embedding=8, rows=16, queries=64, cutmix_probability=0.0, channel_dropout=0.0)


def method(task: Task = Task(), config: CAMLConfig = SMALL) -> CAML:  # noqa: B008
    built = task.method(CAML, config)
    assert isinstance(built, CAML)
    return built


def step(m: CAML, batch: SemiBatch, t: float = 0.5) -> dict[str, torch.Tensor]:
    terms = m(batch, t)
    m.after_step(batch, t)
    return terms


def certain(task: Task, classes: torch.Tensor, size: float = 4.0) -> torch.Tensor:
    """Logits (B, K, S) that call the classes (B, S)."""
    return size * torch.nn.functional.one_hot(classes, task.channels).movedim(-1, 1).float()


def say(
    m: CAML, logits_v: torch.Tensor, logits_a: torch.Tensor, features: Any = None, weak: Any = None
) -> None:
    """Let the two networks answer this for all images; weak: on the weak views, where it differs."""
    f = features or tuple(torch.randn(len(z), 4, *z.shape[2:]) for z in (logits_v, logits_a))
    put(m, walk=lambda *_: Walk(outputs(logits_v), [], [f[0]]))
    put(m, walk_auxiliary=lambda *_: Walk(outputs(logits_a), [], [f[1]]))
    put(m, weak_logits=lambda _: weak or (logits_v[2:].detach(), logits_a[2:].detach()))


def outputs(logits: torch.Tensor) -> list[torch.Tensor]:
    return [logits, logits[:, :, ::2, ::2, ::2]]


# the networks


def test_the_student_is_the_planned_network_and_the_auxiliary_another_one() -> None:
    m = method()
    assert m.student.state_dict().keys() == Task().network().state_dict().keys()
    assert not any("ConvTranspose" in type(module).__name__ for module in m.auxiliary.modules())
    assert not any(p is q for p in m.student.parameters() for q in m.auxiliary.parameters())


def test_attention_stands_behind_the_second_deepest_stage_and_starts_as_the_identity() -> None:
    m, seen = method(), []
    forward = m.attention.forward

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return forward(x)

    put(m.attention, forward=look)
    x = torch.randn(4, 1, *Task().patch_size)
    out, *_ = m.walk_auxiliary(m.auxiliary, x, m.attention, m.stage)
    assert seen == [(4, 6, 4, 6, 8)]
    assert all(torch.equal(a, b) for a, b in zip(out, m.auxiliary(x), strict=True))


def test_attention_stands_behind_the_deepest_stage_where_the_second_deepest_has_too_many_voxels() -> None:
    limits = {192: 1, 191: 2}  # the second-deepest of three stages has 4 x 6 x 8 voxels
    for limit, stage in limits.items():
        m = method(config=replace(SMALL, attention_tokens=limit))
        for p in m.attention.parameters():
            torch.nn.init.normal_(p, std=0.3)
        terms = step(m, Task().batch())
        terms["supervised_aux"].backward()
        assert m.stage == stage and all(
            p.grad is not None and p.grad.any() for p in m.attention.samples.mlp.parameters()
        )


def test_labeled_and_unlabeled_images_see_each_other_in_the_auxiliary_only() -> None:
    m, batch = method(), Task().batch()
    for p in m.attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    terms, others = (
        m(batch, 0.5),
        m(with_unlabeled(batch, strong=tuple(s + torch.randn_like(s) for s in batch.strong)), 0.5),
    )
    assert terms["supervised"].item() == others["supervised"].item()
    assert terms["supervised_aux"].item() != others["supervised_aux"].item()


# consistency


def test_consistency_is_the_distance_to_the_sharpened_other_network_both_ways() -> None:
    """Targets of unlabeled patches are of the weak view."""
    task = Task(channels=3)
    m = method(task)
    z_v, z_a = (torch.randn(4, 3, *task.patch_size) for _ in "va")
    weak_v, weak_a = (torch.randn(2, 3, *task.patch_size) for _ in "va")
    say(m, z_v, z_a, weak=(weak_v, weak_a))
    sharp_v, sharp_a = (torch.cat([z[:2], w]).softmax(1) ** 10 for z, w in ((z_v, weak_v), (z_a, weak_a)))
    sharp_v, sharp_a = (p / p.sum(1, keepdim=True) for p in (sharp_v, sharp_a))
    expected = (z_v.softmax(1) - sharp_a).square().mean() + (z_a.softmax(1) - sharp_v).square().mean()
    assert m(task.batch(), 0.5)["consistency"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("task", [Task(channels=3), Task(channels=2, regions=True)])
def test_dice_is_of_the_unlabeled_patches_against_the_sharpened_other_network_both_ways(task: Task) -> None:
    m, axes = method(task), (0, 2, 3, 4)
    z_v, z_a = (torch.randn(4, task.channels, *task.patch_size) for _ in "va")
    weak_v, weak_a = (torch.randn(2, task.channels, *task.patch_size) for _ in "va")
    say(m, z_v, z_a, weak=(weak_v, weak_a))
    expected = 0.0
    for z, other in ((z_v[2:], weak_a), (z_a[2:], weak_v)):
        p, q = (
            (z.sigmoid(), (10 * other).sigmoid())
            if task.regions
            else (z.softmax(1)[:, 1:], (10 * other).softmax(1)[:, 1:])
        )
        expected += 1 - (2 * (p * q).sum(axes) / (p.sum(axes) + q.sum(axes))).mean().item()
    assert m(task.batch(), 0.5)["dice"].item() == pytest.approx(expected, rel=1e-5)


def test_channel_dropout_spares_labeled_patches_and_targets() -> None:
    terms = []
    for p in (0.0, 0.9):
        m = method(config=replace(SMALL, channel_dropout=p))
        torch.manual_seed(0)
        terms.append(m(Task().batch(), 0.5))
    assert all(terms[0][k].item() == terms[1][k].item() for k in ("supervised", "supervised_aux"))
    assert terms[0]["consistency"].item() != terms[1]["consistency"].item()


def test_boxes_mix_images_and_targets_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a box over everything, sample 0 shows sample 1 in its image and in its target: swapping the batch
    changes nothing."""
    monkeypatch.setattr(
        "nnssl.methods.caml.cutmix_mask", lambda n, size, *a, **k: torch.ones(n, 1, *size, dtype=torch.bool)
    )
    values = []
    for order in ([0, 1], [1, 0]):
        m, batch = method(), Task().batch()
        batch = with_unlabeled(batch, weak=batch.weak[order], strong=tuple(s[order] for s in batch.strong))
        values.append(m(batch, 0.5)["consistency"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_weak_views_give_targets_without_gradient_and_the_auxiliary_sees_the_labeled_images_with_them() -> (
    None
):
    m, batch = method(), Task().batch()
    for p in m.attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weak_v, weak_a = m.weak_logits(batch)
    assert (
        not weak_v.requires_grad
        and not weak_a.requires_grad
        and weak_v.shape == weak_a.shape == (2, 2, *Task().patch_size)
    )
    others = m.weak_logits(replace(batch, labeled=batch.labeled + torch.randn_like(batch.labeled)))
    assert torch.equal(weak_v, others[0]) and not torch.equal(weak_a, others[1])


def test_consistency_vanishes_where_both_networks_are_certain_of_the_same() -> None:
    task = Task()
    m, called = method(), torch.randint(0, 2, (4, *task.patch_size))
    say(m, certain(task, called, 30), certain(task, called, 30))
    assert m(task.batch(), 0.5)["consistency"].item() < 1e-8
    say(m, certain(task, called, 30), certain(task, 1 - called, 30))
    assert m(task.batch(), 0.5)["consistency"].item() == pytest.approx(2)


def test_the_sharpened_side_has_no_gradient() -> None:
    m = method()
    z_v, z_a = (torch.randn(4, 2, *Task().patch_size, requires_grad=True) for _ in "va")
    say(m, z_v, z_a)
    terms = m(Task().batch(), 0.5)
    terms["consistency"].backward(retain_graph=True)
    p = z_v.detach().clone().requires_grad_()
    mse_consistency(p.softmax(1), (z_a.detach() / 0.1).softmax(1)).backward()
    torch.testing.assert_close(z_v.grad, p.grad, atol=1e-8, rtol=1e-3)
    z_v.grad = None
    terms["dice"].backward()
    q = z_v.detach().clone().requires_grad_()
    soft_dice_loss(q.softmax(1)[2:], (z_a.detach() / 0.1).softmax(1)[2:]).backward()
    torch.testing.assert_close(z_v.grad, q.grad, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("task", [Task(channels=3, ignore=True), Task(channels=2, regions=True, ignore=True)])
def test_ignored_voxels_carry_no_consistency_and_do_not_enter_the_bank(task: Task) -> None:
    m, batch = method(task, replace(SMALL, rows=2000)), task.batch()
    ignored = batch.full_target()[:, -1:] == 1 if task.regions else batch.full_target() == 3
    z_v, z_a = (torch.randn(4, task.channels, *task.patch_size, requires_grad=True) for _ in "va")
    features = torch.cat([ignored, ignored]).float().expand(-1, 4, *task.patch_size)
    say(m, z_v, z_a, (features, features))
    step(m, batch)["consistency"].backward()
    assert z_v.grad is not None and z_a.grad is not None
    for grad in (z_v.grad, z_a.grad):
        assert not grad[:2][ignored.expand_as(grad[:2])].any() and grad[2:].abs().amin() > 0
    kept = m.bank.rows[m.bank.filled()]
    elsewhere = sum(head.projector(torch.zeros(4)) for head in (m.head_v, m.head_a)) / 2
    assert len(kept) > 100
    torch.testing.assert_close(kept, elsewhere.expand_as(kept))  # none has the features of an ignored voxel


# the bank


def test_the_bank_holds_after_the_step_what_both_networks_get_right() -> None:
    task = Task(channels=3)
    m, batch = method(task, replace(SMALL, rows=2000)), task.batch()
    label = batch.full_target()[:, 0].long()
    called_v, called_a = (
        torch.randint(0, 3, (4, *task.patch_size)),
        torch.randint(0, 3, (4, *task.patch_size)),
    )
    f_v, f_a = (torch.randn(4, 4, *task.patch_size) for _ in "va")
    say(m, certain(task, called_v), certain(task, called_a), (f_v, f_a))
    m(batch, 0.5)
    assert not m.bank.count.any()
    m.after_step(batch, 0.5)
    for b in range(2):
        for k in range(3):
            right = (label[b] == k) & (called_v[b] == k) & (called_a[b] == k)
            v, a = (f[b].movedim(0, -1)[right] for f in (f_v, f_a))
            expected = (m.head_v.projector(v) + m.head_a.projector(a)) / 2
            rows = m.bank.rows[k, b][m.bank.filled()[k, b]]
            assert len(rows) == right.sum() > 0
            order = lambda x: x[x[:, 0].argsort()]  # noqa: E731
            torch.testing.assert_close(order(rows), order(expected.detach()))


def test_rows_go_to_the_case_they_come_from() -> None:
    m, batch = method(), Task().batch()
    label = torch.cat([batch.full_target()[:, 0].long()] * 2)
    say(m, certain(Task(), label), certain(Task(), label))
    step(m, replace(batch, labeled_cases=("case_1", "case_1")))
    assert m.bank.count.tolist() == [[0, 32], [0, 32]]
    step(m, replace(batch, labeled_cases=("case_0", "case_1")))
    assert m.bank.count.tolist() == [[16, 48], [16, 48]]


def test_a_class_with_too_few_rows_is_left_out() -> None:
    m = method(config=replace(SMALL, correlation="rows", rows=8))
    m.bank.rows.normal_()
    m.bank.count.copy_(torch.tensor([[8, 8], [3, 4]]))  # class 1: seven of eight
    patch = Task().patch_size
    f_v, f_a, p_v = torch.randn(2, 4, *patch), torch.randn(2, 4, *patch), torch.rand(2, 2, *patch).softmax(1)
    agreed = torch.rand(2, 2, *patch) > 0.5
    torch.manual_seed(1)
    value = m.correlation_term(f_v, f_a, p_v, agreed)
    m.bank.rows[1] = 1e3
    torch.manual_seed(1)
    assert m.correlation_term(f_v, f_a, p_v, agreed).item() == value.item() > 0
    m.bank.count[1, 0] = 4
    torch.manual_seed(1)
    assert m.correlation_term(f_v, f_a, p_v, agreed).item() != value.item()


# correlation


@pytest.mark.parametrize("regions", [False, True])
def test_correlation_equals_the_loop_over_the_most_certain_agreeing_voxels(regions: bool) -> None:
    task = Task(regions=regions)
    m = method(task, replace(SMALL, correlation="rows", rows=8, queries=5))
    m.bank.rows.normal_(std=0.3)
    m.bank.count.fill_(4)  # 2 cases x 4: all are drawn
    f_v, f_a = (torch.randn(2, 4, *task.patch_size) for _ in "va")
    z_v, z_a = (torch.randn(2, 2, *task.patch_size) for _ in "va")
    p_v, p_a = m.probabilities(z_v), m.probabilities(z_a)
    agreed = m.labels.classes(m.labels.harden(p_v)) & m.labels.classes(m.labels.harden(p_a))
    value = m.correlation_term(f_v, f_a, p_v, agreed).item()

    p_v, p_a = (p.movedim(1, -1).reshape(-1, 2) for p in (p_v, p_a))
    x_v, x_a = (f.movedim(1, -1).reshape(-1, 4) for f in (f_v, f_a))
    chosen: list[int] = []
    for k in range(m.labels.num_classes):
        if not regions:
            both, certainty = (p_v.argmax(1) == k) & (p_a.argmax(1) == k), p_v[:, k]
        elif k == 0:
            both, certainty = (p_v <= 0.5).all(1) & (p_a <= 0.5).all(1), (1 - p_v).amin(1)
        else:
            both, certainty = (p_v[:, k - 1] > 0.5) & (p_a[:, k - 1] > 0.5), p_v[:, k - 1]
        members = both.nonzero()[:, 0]
        chosen += members[certainty[members].argsort(descending=True)[:5]].tolist()
    q_v, q_a = m.head_v(x_v[chosen]), m.head_a(x_a[chosen])
    rows = m.bank.rows[m.bank.filled()]
    everything = torch.ones(len(chosen), dtype=torch.bool), torch.ones(len(rows), dtype=torch.bool)
    assert len(chosen) == 5 * m.labels.num_classes
    assert value == pytest.approx(reference.omni_correlation(q_v, q_a, rows, *everything, 0.1), rel=1e-4)


def test_choosing_voxels_before_the_heads_gives_the_published_loss() -> None:
    """The public computation without batch norm, with the same heads and rows: heads everywhere, then the
    choice."""
    task = Task(channels=3)
    config = replace(SMALL, correlation="rows", rows=20, queries=50, query_share=1.0)
    m, label = method(task, config), torch.zeros(2, *task.patch_size, dtype=torch.long)
    label[0, 0, 0, :10], label[0, 0, 1, :10], label[1, 0, 0, :10], label[1, 0, 1, :10] = (
        1,
        2,
        1,
        2,
    )  # 20 voxels of each
    called = torch.cat([label, torch.randint(0, 3, (2, *task.patch_size))])
    called[:2][label == 0] = 1  # of the background only these are right:
    called[0, 1, 0, :10] = called[1, 1, 0, :10] = 0
    z_v, z_a = certain(task, called) + torch.rand(4, 3, *task.patch_size), certain(task, called)
    z_a[2:, :, :3] = z_a[2:, [1, 2, 0], :3]  # disagreement in some slices
    features = torch.randn(4, 4, *task.patch_size), torch.randn(4, 4, *task.patch_size)
    batch = replace(task.batch(), target=outputs(label[:, None]))
    say(m, z_v, z_a, features)
    step(m, batch)
    assert m.bank.count.sum(1).tolist() == [20, 20, 20]
    value = m(batch, 0.5)["correlation"]

    public = reference.PublicOmniCorrelation(4, 8, 3, rows=20, queries=50, temperature=0.1, batch_norm=False)
    for projector, predictor, head in zip(
        public.projectors, public.predictors, (m.head_v, m.head_a), strict=True
    ):
        for theirs, ours in ((projector, head.projector), (predictor, head.predictor)):
            for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                a.data.copy_(b.data)
    expected = public(features, (z_v, z_a), label, batch.labeled_cases)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_queries_are_at_most_a_share_of_the_unlabeled_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look(score: torch.Tensor, member: torch.Tensor, n: int) -> Any:
        asked.append(n)
        return top_members(score, member, n)

    monkeypatch.setattr("nnssl.methods.caml.top_members", look)
    for share, queries, expected in (
        (0.01, 12_800, 31),
        (0.01, 20, 20),
        (1.0, 12_800, 3072),
    ):  # 2 x 8 x 12 x 16 = 3072 voxels
        method(config=replace(SMALL, correlation="rows", query_share=share, queries=queries))(
            Task().batch(), 0.5
        )
        assert asked.pop() == expected and not asked


def test_correlation_is_zero_but_reaches_the_heads_while_the_bank_is_empty() -> None:
    m = method()
    term = m(Task().batch(), 0.5)["correlation"]
    term.backward()
    for head in (m.head_v, m.head_a):
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert term.item() == 0


def test_descending_the_correlation_makes_the_networks_correlate_alike() -> None:
    torch.manual_seed(0)
    m = method(config=replace(SMALL, rows=8))
    m.bank.rows.normal_()
    m.bank.count.fill_(8)
    patch = Task().patch_size
    f_v, f_a, p_v = torch.randn(2, 4, *patch), torch.randn(2, 4, *patch), torch.rand(2, 2, *patch).softmax(1)
    agreed = torch.ones(2, 2, *patch, dtype=torch.bool)
    parameters = [*m.head_v.parameters(), *m.head_a.parameters()]

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return m.correlation_term(f_v, f_a, p_v, agreed)

    before = loss()
    gradient = torch.autograd.grad(before, parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p.sub_(1e-3 * g)
    steepness = sum(g.square().sum().item() for g in gradient)
    assert (loss() - before).item() == pytest.approx(-1e-3 * steepness, rel=0.1)


# the step


@pytest.mark.parametrize("task", [Task(), Task(channels=2, regions=True), Task(dim=2, channels=4)])
def test_a_step_reads_nothing_back_to_the_host(task: Task) -> None:
    m, batch = method(task), task.batch()
    step(m, batch)
    with HostReads() as reads:
        terms = m(batch, 0.5)
        weighted_sum(terms, m.weights(0.5)).backward()
        m.after_step(batch, 0.5)
    assert reads.found == []


def test_host_reads_are_found() -> None:
    x = torch.arange(4.0)
    for read in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 1),
    ):
        with HostReads() as reads:
            read()
        assert reads.found, read
    with HostReads() as reads:
        torch.where(x > 1, x, 0).gather(0, torch.tensor([1]))[torch.tensor([0])].sum()
    assert not reads.found


def test_a_labeled_batch_larger_than_its_names_is_possible() -> None:
    m, batch = method(), Task().batch(labeled=3)
    terms = step(m, batch)
    assert all(torch.isfinite(v) for v in terms.values())
