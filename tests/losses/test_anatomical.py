from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nnssl.losses.anatomical import anatomical_contrast, class_chances, draw_classes
from nnssl.sampling import gather_voxels
from tests.building import gradient
from tests.reference import action as reference

SMALL: dict[str, Any] = {"num_queries": 8, "num_negatives": 6, "temperature": 0.5}


def example(classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Representation (2, 5, 6, 7), one-hot label, mask, probabilities; classes differ and lie at unequal
    distances."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (2, 6, 7), generator=g)
    center = torch.randn(classes, 5, generator=g)
    rep = (center[label] + 0.7 * torch.randn(*label.shape, 5, generator=g)).movedim(-1, 1)
    onehot = F.one_hot(label, classes).movedim(-1, 1).float()
    mask = (torch.rand(2, 1, 6, 7, generator=g) > 0.1).float()
    return rep, onehot, mask, torch.rand(onehot.shape, generator=g)


def members(
    onehot: torch.Tensor, mask: torch.Tensor, probabilities: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    member = (onehot * mask).movedim(1, 0).flatten(1).bool()
    return member, probabilities.movedim(1, 0).flatten(1) < threshold


@cache
def losses_of_the_loop(n: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.stack([reference.anatomical_contrast(*example(), 0.6, 8, 6, 0.5) for _ in range(n)])


def on_map(
    embeddings: torch.Tensor, member: torch.Tensor, hard: torch.Tensor, **options: Any
) -> torch.Tensor:
    return anatomical_contrast(partial(gather_voxels, embeddings), member, hard, **options)


@pytest.mark.parametrize(
    ("contrast", "candidates"),
    [
        (on_map, {"num_candidates": 4096}),
        (on_map, {"num_candidates": 12}),
        (reference.exact_anatomical_contrast, {}),
    ],
)
def test_the_mean_over_seeds_is_that_of_the_published_algorithm(
    contrast: Callable[..., torch.Tensor], candidates: dict[str, int]
) -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    torch.manual_seed(0)
    found = torch.stack([contrast(rep, member, hard, **SMALL, **candidates) for _ in range(400)])
    loop = losses_of_the_loop(100)
    error = math.sqrt(found.var() / len(found) + loop.var() / len(loop))
    assert error < 0.012 * loop.mean() and abs(found.mean() - loop.mean()) < 4 * error


@pytest.mark.parametrize("contrast", [on_map, reference.exact_anatomical_contrast])
def test_gradients_agree_in_the_mean_with_the_published_algorithm(
    contrast: Callable[..., torch.Tensor],
) -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    rep.requires_grad_()
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_queries": 100, "num_negatives": 40}

    def mean_gradient(loss: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        return torch.stack([torch.autograd.grad(loss(), rep)[0] for _ in range(n)]).mean(0)

    found = mean_gradient(lambda: contrast(rep, member, hard, **options), 20)
    loop = mean_gradient(lambda: reference.anatomical_contrast(rep, onehot, mask, p, 0.6, 200, 40), 4)
    untouched = ~(member & hard).any(0).view(2, 6, 7)
    assert not found.movedim(1, -1)[untouched].any()
    assert F.cosine_similarity(found.flatten(), loop.flatten(), dim=0) > 0.97
    assert found.norm().item() == pytest.approx(loop.norm().item(), rel=0.1)


def test_orthogonal_classes_have_a_closed_form() -> None:
    rep = torch.eye(2).repeat_interleave(10, dim=0).T[None]  # (1, 2, 20): ten voxels of either class
    member = torch.stack([torch.arange(20) < 10, torch.arange(20) >= 10])
    value = on_map(rep, member, torch.ones_like(member), **SMALL)
    assert value.item() == pytest.approx(math.log(1 + 6 * math.exp(-1 / 0.5)), rel=1e-5)


def test_gradcheck_with_keys_held_fixed() -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    keys = rep.double().movedim(1, -1).reshape(-1, 5)

    def loss(queries: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        embed = lambda index: (queries if torch.is_grad_enabled() else keys)[index]  # noqa: E731
        return anatomical_contrast(embed, member, hard, **SMALL)

    assert torch.autograd.gradcheck(loss, keys.clone().requires_grad_(), fast_mode=True)


def test_keys_carry_no_gradient() -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    hard[1:] = False  # queries of class 0 alone: every other class is only a key
    rep.requires_grad_()
    on_map(rep, member, hard, **SMALL).backward()
    touched = gradient(rep).movedim(1, -1).reshape(-1, 5).any(1)
    assert touched.any() and not touched[~(member[0] & hard[0])].any()


def test_negative_classes_follow_the_similarity_of_the_means() -> None:
    center = F.normalize(torch.tensor([[1.0, 0], [0.8, 0.6], [-1, 0], [0, 1]]), dim=1)
    present = torch.tensor([True, True, True, False])
    chances = class_chances(center, present, 0.5)
    ratio = math.exp((0.8 - (-1.0)) / 0.5)
    torch.testing.assert_close(chances[0], torch.tensor([0, ratio, 1, 0]) / (1 + ratio))
    assert not chances[:3].diagonal().any() and not chances[:, 3].any()
    torch.manual_seed(0)
    drawn = draw_classes(chances, 20_000)
    for k in range(3):
        found = torch.bincount(drawn[k], minlength=4) / 20_000
        torch.testing.assert_close(found, chances[k], atol=0.015, rtol=0)
        assert not found[chances[k] == 0].any()


def test_absent_classes_do_not_count_and_classes_without_hard_voxels_add_zero() -> None:
    rep, onehot, mask, p = example(classes=3)
    member, hard = members(onehot, mask, p, 2.0)
    wider = torch.cat([member, torch.zeros_like(member[:1])])

    def value(m: torch.Tensor, h: torch.Tensor) -> float:
        torch.manual_seed(0)
        values = [on_map(rep, m, h, num_queries=50, num_negatives=500, temperature=0.5) for _ in range(10)]
        return torch.stack(values).mean().item()

    full = value(member, hard)
    assert value(wider, torch.ones_like(wider)) == pytest.approx(full, rel=0.01)
    parts = [value(member, hard & (torch.arange(3) == k)[:, None]) for k in range(3)]
    assert sum(parts) == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("case", ["empty", "one_class", "nothing_hard"])
def test_degenerate_batches_give_a_differentiable_zero(case: str) -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    if case == "empty":
        member = member & False
    elif case == "one_class":
        member[1:] = False
    else:
        hard = hard & False
    rep.requires_grad_()
    loss = on_map(rep, member, hard, **SMALL)
    loss.backward()
    assert loss.item() == 0 and not gradient(rep).any() and torch.isfinite(gradient(rep)).all()


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    rep, onehot, mask, p = example()
    member, hard = members(onehot, mask, p, 0.6)
    values = []
    for r in (rep.bfloat16(), rep.bfloat16().float()):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values.append(anatomical_contrast(partial(gather_voxels, r), member, hard, **SMALL))
    assert torch.equal(*values) and values[0].dtype == torch.float32
