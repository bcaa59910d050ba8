from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.losses.pseudo_label import soft_dice_loss
from nnssl.method import full_resolution
from nnssl.methods.semsim import SemSim, SemSimConfig
from nnssl.networks.dropout import forward_streams
from tests.building import Task, with_unlabeled
from tests.reference import semsim as reference

SMALL = SemSimConfig(threshold=0.0, width=16, max_tokens=256)
STILL = replace(SMALL, channel_dropout=0.0, cutmix_probability=0.0)  # no randomness in a step


def method(task: Task = Task(), config: SemSimConfig = SMALL) -> SemSim:  # noqa: B008
    built = task.method(SemSim, config)
    assert isinstance(built, SemSim)
    return built


def values(m: SemSim, batch: Any) -> dict[str, float]:
    torch.manual_seed(0)
    return {k: v.item() for k, v in m(batch, 0.5).items()}


def boxes(monkeypatch: pytest.MonkeyPatch, *full: bool) -> None:
    """The first box drawn in a step is everything or nothing, and so is the second."""
    state = {"drawn": 0}

    def mask(n: int, size: Any, *args: Any, **kwargs: Any) -> Tensor:
        state["drawn"] += 1
        return torch.full((n, 1, *size), full[(state["drawn"] - 1) % 2])

    monkeypatch.setattr("nnssl.methods.semsim.cutmix_mask", mask)


def test_the_deployed_network_is_the_planned_one_without_fusion() -> None:
    m = method()
    assert m.deployed("student") is m.student
    assert m.student.state_dict().keys() == Task().network().state_dict().keys()
    assert {n for n, _ in m.named_children()} == {"student", "fusion"}


@pytest.mark.parametrize(("task", "grid", "regions"), [(Task(), (4, 6, 8), 8), (Task(dim=2), (12, 16), 16)])
def test_affinities_live_at_the_finest_grid_within_the_limit(
    task: Task, grid: tuple[int, ...], regions: int
) -> None:
    m = method(task)
    assert m.grid == grid and m.num_regions == regions and m.region.unique().tolist() == list(range(regions))
    assert "x".join(map(str, grid)) in m.describe()


def test_images_and_predictions_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box over everything shows each sample as the other one; if its weak prediction is cut alike, no term
    notices."""
    m, batch = method(config=STILL), Task().batch()
    boxes(monkeypatch, False, False)
    without = values(m, batch)
    for full in ((True, True), (True, False), (False, True)):  # each view's box is its own
        boxes(monkeypatch, *full)
        assert values(m, batch) == pytest.approx(without, rel=1e-4)
    swapped = with_unlabeled(batch, weak=batch.weak.roll(1, 0))
    assert values(m, swapped) != pytest.approx(
        without, rel=1e-4
    )  # what forgetting one of the two would look like


@pytest.mark.parametrize(("view", "kept"), [(0, "cross"), (1, "pseudo")])
def test_each_view_has_its_own_terms_and_its_own_box(view: int, kept: str) -> None:
    m, batch = method(config=STILL), Task().batch()
    before = values(m, batch)
    strong = list(batch.strong)
    strong[view] = torch.randn_like(strong[view])
    after = values(m, with_unlabeled(batch, strong=tuple(strong)))
    assert {k for k in before if before[k] == pytest.approx(after[k], rel=1e-6)} == (
        {"supervised", "cross"} if kept == "cross" else {"supervised", "pseudo", "intra"}
    )


def test_pseudo_and_intra_equal_the_loops() -> None:
    task = Task(channels=3)
    m, batch = method(task, STILL), task.batch()
    terms = values(m, batch)
    with torch.no_grad():
        weak, skips_w = m.student.eval()(batch.weak), m.student.encoder(batch.weak)
        strong, skips_s = m.student.train()(batch.strong[0]), m.student.encoder(batch.strong[0])
        p_w, p_s = (full_resolution(o).softmax(1) for o in (weak, strong))
        assert terms["pseudo"] == pytest.approx(soft_dice_loss(p_s, m.labels.harden(p_w)).item(), rel=1e-5)
        refined = []
        for p, skips in ((p_w, skips_w), (p_s, skips_s)):
            coarse, e = F.avg_pool3d(p, 2).flatten(2), m.fusion(skips).flatten(2)
            refined.append(reference.refine(e, coarse, STILL.scale))
        assert terms["intra"] == pytest.approx(
            soft_dice_loss(refined[1], m.labels.harden(refined[0])).item(), rel=1e-4
        )


@pytest.mark.parametrize(
    "task",
    [Task(dim=2, channels=3), Task(dim=2, channels=3, ignore=True), Task(dim=2, channels=2, regions=True)],
)
def test_cross_equals_the_loop(task: Task) -> None:
    config = replace(STILL, threshold=0.6, max_tokens=64, temperature=0.3)
    m, batch = method(task, config), task.batch(unlabeled=1)
    with torch.no_grad():  # an untrained network calls everything the same
        m.student.decoder.seg_layers[-1].bias -= m.student(batch.weak)[0].mean((0, 2, 3))
    value = values(m, batch)["cross"]
    with torch.no_grad():
        e_l, e_w, e_s = (
            m.fusion(m.student.encoder(x)).flatten(2) for x in (batch.labeled, batch.weak, batch.strong[1])
        )
        onehot, mask = m.labels.encode(batch.full_target())
        mask = torch.ones_like(onehot[:, :1]) if mask is None else mask.float()
        pool = lambda x: F.avg_pool2d(x, 2).flatten(2)  # noqa: E731
        p_u = full_resolution(m.student.eval()(batch.weak))
        if task.regions:
            problems = [torch.cat([mask - onehot[:, r : r + 1], onehot[:, r : r + 1]], 1) for r in range(2)]
            called = [pool(p_u.sigmoid())[0, r] > 0.5 for r in range(2)]
        else:
            problems, called = [onehot], [pool(p_u.softmax(1))[0].argmax(0)]
        total, count, dissenting = 0.0, 0, 0
        for share, says in zip(problems, called, strict=True):
            member = reference.purest(pool(share))
            p_w, _ = reference.cross_image(e_w, e_l, member, m.region, 0.3, config.r)
            p_s, weight = reference.cross_image(e_s, e_l, member, m.region, 0.3, config.r)
            for v, (a, b, w) in enumerate(zip(p_w[0], p_s[0], weight[0], strict=True)):
                count += 1
                k = a.index(max(a))
                dissenting += a[k] >= 0.6 and k != says[v]
                if a[k] >= 0.6 and k == says[v]:
                    total -= w * float(torch.tensor(b[k]).log())
    assert total > 0 and dissenting > 0 and value == pytest.approx(total / count, rel=1e-3)


def test_where_no_labeled_image_knows_the_expected_class_cross_says_nothing() -> None:
    task = Task(dim=2, channels=3)
    m, batch = method(task, STILL), task.batch()
    known = torch.where(batch.full_target() == 2, 0, batch.full_target())  # class 2 is in no labeled image
    batch = replace(batch, target=[known, *batch.target[1:]])
    bias = m.student.decoder.seg_layers[-1].bias
    for called, alive in ((1, True), (2, False)):
        with torch.no_grad():
            bias.copy_(100 * F.one_hot(torch.tensor(called), 3))
        assert (values(m, batch)["cross"] > 0) is alive


def test_only_labeled_and_first_strong_view_are_decoded() -> None:
    task = Task()
    network, images = task.network(), torch.randn(6, 1, *task.patch_size)
    walked = forward_streams(network, images, decoded=4)
    assert [len(o) for o in walked.outputs] == [4, 4]
    assert [len(s) for s in walked.skips] == [6, 6, 6]
    assert [len(f) for f in walked.features] == [4, 4]
    torch.testing.assert_close(full_resolution(walked.outputs), network(images)[0][:4])


def test_channel_dropout_spares_the_labeled_images() -> None:
    task = Task()
    network, images = task.network(), torch.randn(6, 1, *task.patch_size)
    torch.manual_seed(0)
    dropped_out, clean = (
        forward_streams(network, images, 2, 0.5, 4),
        forward_streams(network, images, decoded=4),
    )
    found, wanted = full_resolution(dropped_out.outputs), full_resolution(clean.outputs)
    assert torch.equal(found[:2], wanted[:2]) and not torch.equal(found[2:], wanted[2:])
    dropped = 0
    for s, c in zip(dropped_out.skips, clean.skips, strict=True):
        assert torch.equal(s[:2], c[:2])
        for channel, full in zip(s[2:].flatten(0, 1), c[2:].flatten(0, 1), strict=True):
            dropped += int(not channel.any())
            assert not channel.any() or torch.equal(channel, 2 * full)
    assert 0.2 < dropped / (4 * (4 + 6 + 8)) < 0.8


def test_weak_predictions_carry_no_gradient() -> None:
    m, batch = method(), Task().batch()
    weak = batch.weak.clone().requires_grad_()
    strong = tuple(s.clone().requires_grad_() for s in batch.strong)
    terms = m(with_unlabeled(batch, weak=weak, strong=strong), 0.5)
    sum(terms.values()).backward()
    assert weak.grad is None and all(s.grad is not None and s.grad.any() for s in strong)


def test_uncertain_predictions_carry_no_loss() -> None:
    terms = values(method(config=replace(SMALL, threshold=1.0)), Task().batch())
    assert terms["pseudo"] == terms["intra"] == terms["cross"] == 0


def test_the_published_constants_act_on_nothing_across_images() -> None:
    published = replace(SMALL, threshold=0.95, scale=1.0, temperature=1.0, r=1000.0)
    m = method(config=published)
    assert values(m, Task().batch())["cross"] == 0 and m.diagnostics["cross_certain"] == 0


def test_diagnostics_are_shares_under_the_same_names_in_every_step() -> None:
    names = set()
    for threshold in (0.0, 0.95, 1.0):
        m = method(config=replace(SMALL, threshold=threshold))
        values(m, Task().batch())
        names.add(tuple(m.diagnostics))
        assert all(0 <= v <= 1 and not v.requires_grad for v in m.diagnostics.values())
        if threshold in (0.0, 1.0):
            assert m.diagnostics["pseudo_certain"] == m.diagnostics["intra_certain"] == 1 - threshold
    assert len(names) == 1


def test_weights_keep_the_published_proportions_and_rise() -> None:
    m = method()
    published = {"supervised": 1.0, "pseudo": 0.5, "intra": 0.25, "cross": 0.25}
    assert m.weights(0.4) == m.weights(1.0) == published
    assert m.weights(0.0) == pytest.approx(
        {k: v if k == "supervised" else v * 0.0067379 for k, v in published.items()}, rel=1e-4
    )
    assert method(config=replace(SMALL, ramp_fraction=0.0)).weights(0.0) == published


def test_width_is_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of heads 4, found 10"):
        SemSimConfig(width=10, heads=4)
