from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from nnssl.method import weighted_sum
from nnssl.methods import diffcl
from nnssl.methods.diffcl import DiffCL, DiffCLConfig
from tests.building import Task, put
from tests.decisions import Decisions

SMALL = DiffCLConfig(
    ddim_steps=2,
    hfm_max_tokens=512,
    embedding=8,
    bank_size=64,
    bank_per_step=16,
    num_positives=16,
    num_negatives=32,
)


def method(task: Task = Task(), config: DiffCLConfig = SMALL) -> DiffCL:  # noqa: B008
    built = task.method(DiffCL, config)
    assert isinstance(built, DiffCL)
    return built


def test_at_step_0_the_student_is_the_planned_network() -> None:
    task = Task()
    torch.manual_seed(0)
    planned = task.network()
    student = DiffCL.adapt_network(task.network(), SMALL, task.patch_size, (1.0,) * 3)
    missing, unexpected = student.load_state_dict(planned.state_dict(), strict=False)
    assert not unexpected and missing and all(".hfm." in k for k in missing)
    x = torch.randn(1, 1, *task.patch_size)
    for a, b in zip(student(x), planned(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_without_hfm_the_student_is_the_planned_network_for_good() -> None:
    student = DiffCL.adapt_network(Task().network(), replace(SMALL, hfm_stages=0), (8, 12, 16), (1.0,) * 3)
    assert student.state_dict().keys() == Task().network().state_dict().keys()


def test_pseudo_probabilities_are_normalised_and_repeatable_from_the_same_noise() -> None:
    m, weak = method(), Task().batch().weak
    noise = torch.randn(2, 2, 8, 12, 16)
    first, second = (m.pseudo_probabilities(weak, noise) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
        torch.testing.assert_close(a.sum(1), torch.ones(2, 8, 12, 16))


def test_uncertain_pseudo_labels_carry_no_loss() -> None:
    m = method(config=replace(SMALL, threshold=1.0))
    terms = m(Task().batch(), 0.5)
    assert terms["pseudo"].item() == terms["diffusion_pseudo"].item() == 0
    assert method(config=replace(SMALL, threshold=0.0))(Task().batch(), 0.5)["pseudo"].item() > 0


def test_a_contrast_without_weight_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m = method(config=replace(SMALL, weight_contrast=0.0))
    monkeypatch.setattr(DiffCL, "contrast", lambda *a: pytest.fail("computed"))
    assert m(Task().batch(), 0.5)["contrast"].item() == 0


SURE, UNSURE, HALF = torch.zeros(2, 2, 8, 12, 16), *(torch.full((2, 2, 8, 12, 16), p) for p in (0.5, 0.3))
SURE[:, 1] = 1
HALF[:, 1] = 0.7
NEARLY = 1 - 0.08 * SURE - 0.92 * SURE.flip(1)  # 0.92 of the class of which SURE is sure


@pytest.mark.parametrize(
    ("p_f", "p_g", "f_learns", "f_learns_of_g", "g_learns"),
    [
        (SURE, SURE, True, True, True),
        (NEARLY, SURE, True, True, False),
        (SURE, NEARLY, True, False, True),
        (UNSURE, SURE, False, True, False),
        (SURE.flip(1), SURE, False, True, True),
        (SURE, UNSURE, False, False, True),
        (NEARLY, NEARLY, False, False, False),
    ],
)
@pytest.mark.parametrize("self_teaching", [True, False])
def test_f_learns_what_both_are_certain_of_together_or_g_alone_and_g_what_f_is(
    p_f: torch.Tensor,
    p_g: torch.Tensor,
    f_learns: bool,
    f_learns_of_g: bool,
    g_learns: bool,
    self_teaching: bool,
) -> None:
    config = replace(SMALL, cutmix_probability=0.0, denoiser_share=1.0, self_teaching=self_teaching)
    m, batch = method(config=config), Task().batch()
    put(m, pseudo_probabilities=lambda weak: (p_f, p_g))
    values = []
    for bias in ([0.0, 100.0], [100.0, 0.0]):  # both networks call everything 1, then 0
        with torch.no_grad():
            for network in (m.student, m.denoiser.network):
                network.decoder.seg_layers[-1].bias.copy_(torch.tensor(bias))
        values.append([m(batch, 0.5)[key].item() for key in ("pseudo", "diffusion_pseudo")])
    moved = [abs(a - b) > 0.9 for a, b in zip(*values, strict=True)]
    assert moved == [f_learns if self_teaching else f_learns_of_g, g_learns]


@pytest.mark.parametrize(
    ("p_f", "p_g", "adds", "withholds", "outvotes"),
    [
        (NEARLY, SURE, 1, 0, 0),
        (SURE, UNSURE, 0, 1, 0),
        (HALF.flip(1), SURE, 0, 0, 1),
        (SURE, SURE, 0, 0, 0),
    ],
)
def test_diagnostics_say_what_came_of_the_denoiser(
    p_f: torch.Tensor, p_g: torch.Tensor, adds: int, withholds: int, outvotes: int
) -> None:
    m = method(config=replace(SMALL, cutmix_probability=0.0))
    put(m, pseudo_probabilities=lambda weak: (p_f, p_g))
    m(Task().batch(), 0.5)
    found = [m.diagnostics[f"g_{name}"].item() for name in ("adds", "withholds", "outvotes")]
    assert found == [adds, withholds, outvotes]


def test_without_diffusion_f_learns_its_own_certain_labels_and_g_nothing() -> None:
    terms = {}
    for share in (0.0, 1.0):
        m = method(config=replace(SMALL, cutmix_probability=0.0, channel_dropout=0.0, denoiser_share=share))
        if share:
            put(
                m,
                estimate=lambda outputs, m=m: m.label_map(m.probabilities(m.student(Task().batch().weak)[0])),
            )
        torch.manual_seed(0)
        terms[share] = m(Task().batch(), 0.5)
        assert (m.weights(0.5)["diffusion"] > 0) == (m.weights(0.5)["diffusion_pseudo"] > 0) == (share > 0)
        assert ("g_certain" in m.diagnostics) == (share > 0)
    for key in ("supervised", "pseudo"):  # a denoiser that says what f says changes nothing for f
        assert terms[0.0][key].item() == pytest.approx(terms[1.0][key].item(), rel=1e-5)
    assert terms[0.0]["diffusion"].item() == terms[0.0]["diffusion_pseudo"].item() == 0


def test_channel_dropout_perturbs_the_strong_stream_of_f_alone() -> None:
    batch = Task().batch()
    terms = []
    for p in (0.0, 0.9):
        m = method(config=replace(SMALL, channel_dropout=p, threshold=0.0))
        torch.manual_seed(0)
        terms.append(m(batch, 0.5))
    assert terms[0]["supervised"].item() == terms[1]["supervised"].item()
    assert terms[0]["pseudo"].item() != terms[1]["pseudo"].item()


@pytest.mark.parametrize(("start", "sees_estimate"), [(0.002, True), (1.0, False)])
def test_sampling_starts_from_the_noised_estimate_or_from_noise(start: float, sees_estimate: bool) -> None:
    m, seen = (
        method(config=replace(SMALL, sampling_start=start, ddim_steps=1, label_scale=1.0)),
        [],
    )

    def forward(x: torch.Tensor, tau: torch.Tensor, image: torch.Tensor) -> list[torch.Tensor]:
        seen.append((x, tau))
        return [x]

    put(m.denoiser, forward=forward)
    noise = torch.randn(2, 2, 8, 12, 16)
    p_f, _ = m.pseudo_probabilities(Task().batch().weak, noise)
    x, tau = seen[0]
    assert tau.tolist() == [round(start * 1000) - 1] * 2
    assert torch.allclose(x, 2 * p_f - 1, atol=0.1) == sees_estimate  # at tau_0 = 1 there is hardly any noise
    assert torch.equal(x, noise) != sees_estimate


def test_sampling_must_fit_into_the_diffusion_steps() -> None:
    with pytest.raises(ValueError, match=r"ddim_steps must .* found 600"):
        DiffCLConfig(ddim_steps=600, sampling_start=0.5)


def test_boxes_cut_images_and_pseudo_labels_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With boxes over everything every sample is its neighbour, in image and pseudo-label: the same pairs as
    without boxes."""
    values = []
    for fill in (torch.zeros, torch.ones):
        m = method(config=replace(SMALL, threshold=0.0, channel_dropout=0.0, denoiser_share=1.0))
        monkeypatch.setattr(
            "nnssl.methods.diffcl.cutmix_mask",
            lambda n, size, *a, f=fill, **k: f(n, 1, *size, dtype=torch.bool),
        )
        noise = torch.randn(2, 2, 8, 12, 16, generator=torch.Generator().manual_seed(0))
        original = m.pseudo_probabilities
        put(m, pseudo_probabilities=partial(original, noise=noise))
        values.append(m(Task().batch(), 0.5)["pseudo"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_noisy_label_is_zero_where_labels_are_ignored() -> None:
    task = Task(channels=3, ignore=True)
    m, batch, seen = method(task, replace(SMALL, label_scale=1.0, denoiser_share=1.0)), task.batch(), {}
    forward = m.diffusion.q_sample

    def spy(x_0: torch.Tensor, tau: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        seen["x_0"] = x_0
        return forward(x_0, tau, eps)

    put(m.diffusion, q_sample=spy)
    m(batch, 0.5)
    ignored = (batch.full_target() == 3).expand(-1, 3, -1, -1, -1)
    assert not seen["x_0"][:2][ignored].any() and set(seen["x_0"][:2][~ignored].unique().tolist()) == {
        -1.0,
        1.0,
    }
    assert set(seen["x_0"][2:].unique().tolist()) == {-1.0, 1.0}


def test_the_bank_holds_labeled_embeddings_after_the_step_only() -> None:
    m, batch = method(), Task().batch()
    m(batch, 0.5)
    assert m.bank.count.sum() == 0
    m.after_step(batch, 0.5)
    assert m.bank.count.tolist() == [16, 16]
    torch.testing.assert_close(m.bank.rows[m.bank.filled()].norm(dim=-1), torch.ones(32))


def test_contrast_is_zero_but_differentiable_while_the_bank_is_empty() -> None:
    m = method()
    term = m(Task().batch(), 0.5)["contrast"]
    term.backward()
    assert term.item() == 0 and all(p.grad is not None and not p.grad.any() for p in m.projector.parameters())


def test_contrast_equals_the_loop() -> None:
    task = Task()
    m = method(
        task,
        replace(SMALL, candidates=10**6, num_positives=10**6, num_negatives=10**6, positive_fraction=0.1),
    )
    batch = task.batch()
    m(batch, 0.5)
    m.after_step(batch, 0.5)
    features, called = (
        torch.randn(4, 4, *task.patch_size),
        m.labels.harden(torch.rand(2, 2, *task.patch_size)),
    )
    onehot, _ = m.labels.encode(batch.full_target())
    value = m.contrast(features, 2, onehot, None, called, torch.ones(2, 1, *task.patch_size)).item()

    center = torch.nn.functional.normalize(m.bank.mean()[0], dim=-1)
    q = m.projector(features[2:].movedim(1, -1).reshape(-1, 4)).detach()
    says = called.movedim(1, -1).reshape(-1, 2).argmax(1)
    losses = []
    for k in range(2):
        similarity = q @ center[k]
        own = similarity[says == k].sort(descending=True).values
        ends = int(0.45 * len(own))
        positives = own[ends : len(own) - ends]
        negatives = similarity[says != k]
        losses += [
            -torch.log((p / 0.1).exp() / ((p / 0.1).exp() + (negatives / 0.1).exp().sum())) for p in positives
        ]
    assert value == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_uncertain_voxels_take_no_part_in_the_contrast() -> None:
    """Neither as positives nor as negatives: whatever their features are, the value is the same."""
    task, many = Task(), 10**6
    m = method(task, replace(SMALL, candidates=many, num_positives=many, num_negatives=many))
    batch = task.batch()
    m(batch, 0.5)
    m.after_step(batch, 0.5)
    onehot, _ = m.labels.encode(batch.full_target())
    features = torch.randn(4, 4, *task.patch_size)
    called = m.labels.harden(torch.rand(2, 2, *task.patch_size))
    certain = (torch.rand(2, 1, *task.patch_size) > 0.5).float()
    others = torch.cat([features[:2], features[2:] + 5 * (1 - certain)])
    values = [m.contrast(x, 2, onehot, None, called, certain).item() for x in (features, others)]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0


def test_ignored_voxels_never_enter_the_bank() -> None:
    """With regions, not as voxels of the complement either."""
    task = Task(dim=2, channels=2, regions=True, ignore=True)
    m, batch = method(task, replace(SMALL, bank_per_step=64)), task.batch()
    onehot, labeled = m.labels.encode(batch.full_target())
    assert labeled is not None and not labeled.all()
    put(m, projector=torch.nn.Identity())
    features = torch.zeros(4, SMALL.embedding, *task.patch_size)
    features[:2, :1] = 1 - labeled.float()  # an embedding tells whether its voxel is ignored
    m.contrast(features, 2, onehot, labeled, onehot, torch.ones(2, 1, *task.patch_size))
    assert m.pending is not None
    embeddings, valid = m.pending
    assert valid.all() and not embeddings[..., 0].any()


def test_negatives_of_a_region_lie_outside_of_it_where_regions_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Task(channels=2, regions=True)
    m = method(task, replace(SMALL, candidates=64, num_negatives=256))
    whole = torch.zeros(4, *task.patch_size)
    whole[:, 2:6] = 1
    core = whole.clone()
    core[:, 2:4] = 0  # within whole
    called = torch.stack([whole, core], 1)
    put(m, projector=torch.nn.Identity())
    features = torch.cat(
        [called, torch.ones(4, SMALL.embedding - 2, *task.patch_size)], 1
    )  # an embedding tells its regions
    labels = (called[:2], None, called[2:], torch.ones(2, 1, *task.patch_size))
    m.contrast(features, 2, *labels)
    m.after_step(task.batch(), 0.5)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(
        diffcl, "info_nce", lambda center, positive, negative, _, valid, __: seen.append((negative, valid))
    )
    m.contrast(features, 2, *labels)
    ((negative, valid),) = seen
    rows = m.labels.classes(called).shape[0]
    assert negative.shape[0] == rows == 3 and valid.any(1).all()
    for row, inside in ((rows - 2, 0), (rows - 1, 1)):  # after the complement: whole, core
        assert not negative[row][valid[row]][:, inside].any()


def test_descending_the_contrast_pulls_positives_pushes_negatives_and_keeps_classes_apart() -> None:
    """The gradient is that of the value (positives *and* negatives), and training the projector alone lowers
    it without collapse."""
    torch.manual_seed(0)
    task = Task()
    m = method(task, replace(SMALL, candidates=512, positive_fraction=0.5, embedding=16))
    means = 2 * torch.randn(2, 4)
    label = (torch.rand(4, *task.patch_size) > 0.6).long()
    features = (means[label] + torch.randn(*label.shape, 4)).movedim(-1, 1)
    onehot = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).float()

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return m.contrast(features, 2, onehot[:2], None, onehot[2:], torch.ones(2, 1, *task.patch_size))

    loss()
    m.after_step(task.batch(), 0.5)
    before, parameters = loss(), list(m.projector.parameters())
    gradient = torch.autograd.grad(before, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p.sub_(1e-3 * g)
    steepness = sum(g.square().sum().item() for g in gradient)
    assert (loss() - before).item() == pytest.approx(-1e-3 * steepness, rel=0.1)

    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        m.after_step(task.batch(), 0.5)
    center = torch.nn.functional.normalize(m.bank.mean()[0], dim=-1)
    assert loss() < 0.5 * before and (center[0] @ center[1]).item() < 0.5


@pytest.mark.parametrize("task", [Task(), Task(channels=2, regions=True)])
def test_hidden_noise_does_not_reach_the_deployed_student(task: Task) -> None:
    """What f predicts depends on its weights and the image alone: the diffusion branch is not part of it."""
    m = method(task)
    names = {n.split(".")[0] for n, _ in m.student.named_parameters()}
    assert names == {"encoder", "decoder"}


def test_label_maps_have_the_configured_scale_in_training_and_sampling() -> None:
    m, seen = method(config=replace(SMALL, label_scale=0.25)), []
    q_sample = m.diffusion.q_sample

    def look(x: torch.Tensor, tau: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return q_sample(x, tau, eps)

    put(m.diffusion, q_sample=look)
    m(Task().batch(), 0.5)
    assert torch.equal(seen[0].abs(), torch.full_like(seen[0], 0.25))
    call = torch.tensor([1e3, -1e3]).view(-1, 1, 1, 1)
    put(m.denoiser, forward=lambda x, tau, image: call.expand_as(x))
    _, p_g = m.pseudo_probabilities(torch.randn(2, 1, 8, 12, 16))
    torch.testing.assert_close(p_g, torch.tensor([1.0, 0.0]).view(-1, 1, 1, 1).expand_as(p_g))


@pytest.mark.parametrize(("share", "labeled", "unlabeled"), [(1.0, 2, 4), (0.5, 1, 2), (0.01, 1, 1)])
def test_the_denoiser_learns_from_a_share_of_the_patches_with_their_own_labels(
    share: float, labeled: int, unlabeled: int
) -> None:
    task = Task()
    m, batch = method(task, replace(SMALL, denoiser_share=share, label_scale=1.0)), task.batch(unlabeled=4)
    seen: dict[str, torch.Tensor] = {}
    noise, forward = m.diffusion.q_sample, m.denoiser.forward

    def spy_noise(x_0: torch.Tensor, tau: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        seen["x_0"] = x_0
        return noise(x_0, tau, eps)

    def spy_images(x: torch.Tensor, tau: torch.Tensor, images: torch.Tensor) -> Any:
        if m.denoiser.training:
            seen["images"] = images
        return forward(x, tau, images)

    put(m.diffusion, q_sample=spy_noise)
    put(m.denoiser, forward=spy_images)
    m(batch, 0.5)
    assert len(seen["images"]) == labeled + unlabeled
    onehot, _ = m.labels.encode(batch.full_target())
    drawn = [
        next(k for k, image in enumerate(batch.labeled) if torch.equal(image, x))
        for x in seen["images"][:labeled]
    ]
    assert len(set(drawn)) == labeled
    torch.testing.assert_close(seen["x_0"][:labeled], 2 * onehot[drawn] - 1)


def test_the_denoiser_may_be_narrower_than_the_student() -> None:
    m = method(config=replace(SMALL, denoiser_divisor=2))
    widths = m.denoiser.network.encoder.output_channels
    assert [2 * w for w in widths] == list(m.student.encoder.output_channels)


def test_the_weight_of_the_contrast_scales_what_reaches_the_student_and_not_its_head() -> None:
    gradients = []
    for weight in (0.5, 0.05):
        m, batch = method(config=replace(SMALL, weight_contrast=weight, threshold=0.0)), Task().batch()
        torch.manual_seed(0)
        m(batch, 0.5)
        m.after_step(batch, 0.5)
        torch.manual_seed(1)
        m(batch, 0.5)["contrast"].backward()
        gradients.append([m.student.encoder.stages[0], m.projector])
    student, head = ([g[i] for g in gradients] for i in (0, 1))
    norm = lambda net: torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()  # noqa: E731
    assert norm(student[0]) / norm(student[1]) == pytest.approx(10, rel=1e-3)
    assert norm(head[0]) == pytest.approx(norm(head[1]).item(), rel=1e-3)


def losses_of_steps(nudge: float, steps: int = 7) -> list[dict[str, float]]:
    """Of a training whose initial weights were multiplied by 1 + nudge x noise."""
    m, g = method(config=replace(SMALL, threshold=0.0)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1 + nudge * torch.randn(p.shape, generator=g))
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-2)
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        batch = Task().batch(seed=i)
        terms = m(batch, 0.5)
        optimizer.zero_grad()
        weighted_sum(terms, m.weights(0.5)).backward()
        optimizer.step()
        m.after_step(batch, 0.5)
        losses.append({k: v.item() for k, v in terms.items()})
    return losses


def test_rounding_grows_through_hard_decisions_alone() -> None:
    decisions = Decisions()
    with decisions.recorded():
        base = losses_of_steps(0.0)
    difference = {}
    for held in (True, False):
        with decisions.compared(held):
            nudged = losses_of_steps(3e-6)
        difference[held] = max(abs(a[k] - b[k]) for a, b in zip(base, nudged, strict=True) for k in a)
    assert decisions.flips  # of the run that decided by itself
    assert difference[True] < 3e-5 and difference[False] > 1e-4
