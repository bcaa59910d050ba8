from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnssl.losses.affinity import (
    agreement,
    cross_image_log_probabilities,
    cross_image_loss,
    prototype_similarity,
    prototypes,
    purest,
    refine,
)
from tests.building import gradient
from tests.reference import semsim as reference

REGION = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def members(b: int, k: int, seed: int = 1) -> torch.Tensor:
    """(b, k, 9) bool, one class per voxel."""
    label = torch.randint(k, (b, 9), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(label, k).mT.bool()


# within an image


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("classes", [2, 7])  # fewer and more than the width of the features
def test_refinement_equals_the_explicit_matrix(scale: float, classes: int) -> None:
    e, p = randn(2, 5, 3, 4, 2), randn(2, classes, 3, 4, 2, seed=1).softmax(1)
    expected = reference.refine(e.flatten(2), p.flatten(2), scale)
    torch.testing.assert_close(refine(e, p, scale).flatten(2), expected)
    torch.testing.assert_close(refine(e.float(), p.float(), scale).flatten(2), expected.float())


def test_equal_features_give_half_the_mean_of_the_image() -> None:
    p = randn(2, 3, 4, 5).softmax(1)
    mean = p.mean((2, 3), keepdim=True)
    torch.testing.assert_close(refine(torch.ones(2, 6, 4, 5, dtype=torch.float64), p, 20.0), (p + mean) / 2)


def test_orthogonal_clusters_average_within_themselves_when_the_scale_is_large() -> None:
    cluster = torch.tensor([0, 1, 1, 0, 2, 0])
    e = 3 * torch.eye(3)[cluster].T[None]
    p = torch.tensor([[0.9, 0.1, 0.3, 0.6, 0.2, 0.0]])[None]
    expected = (p + torch.tensor([0.5, 0.2, 0.2, 0.5, 0.2, 0.5])) / 2
    torch.testing.assert_close(refine(e, p, 100.0), expected)


def test_refined_probabilities_are_probabilities() -> None:
    refined = refine(randn(1, 4, 3, 3), randn(1, 3, 3, 3).softmax(1), 5.0)
    assert refined.min() >= 0
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 3, 3, dtype=torch.float64))


def test_gradients_of_the_refinement_are_right() -> None:
    e, p = randn(1, 3, 2, 3).requires_grad_(), randn(1, 2, 2, 3, seed=1).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, p: refine(e, p, 4.0), (e, p))


def test_zero_features_keep_gradients_finite() -> None:
    e = torch.zeros(1, 3, 4, requires_grad=True)  # ReLU may silence a voxel in all channels
    refine(e, torch.rand(1, 2, 4), 20.0).sum().backward()
    assert torch.isfinite(gradient(e)).all()


class LargestTensor(TorchDispatchMode):
    """Context that knows the most elements of any tensor that an operation gave, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_the_matrix_is_never_in_memory() -> None:
    voxels = 2048
    e, p = torch.randn(1, 16, voxels, requires_grad=True), torch.rand(1, 2, voxels)
    with LargestTensor() as largest:
        refine(e, p, 20.0).square().sum().backward()
    assert e.grad is not None and 16 * voxels <= largest.elements < voxels**2 / 16


# across images


def test_the_purest_voxels_are_those_near_the_highest_share_of_the_image() -> None:
    share = torch.tensor([[[1.0, 0.95, 0.89, 0.0], [0.0, 0.05, 0.11, 0.1], [0.0, 0.0, 0.0, 0.0]]])
    expected = [[[True, True, False, False], [False, False, True, True], [False] * 4]]
    assert purest(share).tolist() == reference.purest(share).tolist() == expected


def test_prototypes_equal_the_loop_and_fall_back_to_the_image() -> None:
    e, member = randn(2, 4, 9), members(2, 3)
    member[0, 1] = 0  # absent in image 0
    member[1, 2, :5] = 0  # absent in regions 0 and 1 of image 1
    member[1, 2, 6] = 1
    g, known = prototypes(e, member, REGION, 3)
    assert known.tolist() == [[True, False, True], [True, True, True]]
    for j in range(2):
        for c in range(3):
            for r in range(3):
                expected = reference.prototype(e[j], member[j, c], REGION, r)
                torch.testing.assert_close(
                    g[j, c, r], torch.zeros(4).double() if expected is None else expected
                )
    torch.testing.assert_close(g[1, 2, 0], g[1, 2, 1])


@pytest.mark.parametrize("absent", [[], [(0, 1)], [(0, 1), (0, 2)], [(0, 1), (1, 1)]])
def test_cross_image_probabilities_and_weights_equal_the_loop(absent: list[tuple[int, int]]) -> None:
    e_u, e_l, member = randn(2, 4, 9), randn(2, 4, 9, seed=2), members(2, 3)
    for j, c in absent:
        member[j, c] = 0
    expected_p, expected_weight = reference.cross_image(e_u, e_l, member, REGION, 0.3, 2.0)
    g, known = prototypes(e_l, member, REGION, 3)
    m = prototype_similarity(e_u, g, REGION)[:, :, None] / 0.3
    p = cross_image_log_probabilities(m, known[:, None]).exp()
    torch.testing.assert_close(p[:, 0].mT, torch.tensor(expected_p, dtype=torch.float64))
    torch.testing.assert_close(
        agreement(m, known[:, None], 2.0)[:, 0], torch.tensor(expected_weight, dtype=torch.float64)
    )


def test_with_all_classes_known_it_is_the_papers_sum_over_images() -> None:
    m = randn(2, 3, 1, 4, 5)
    e = m.exp().sum(1)
    torch.testing.assert_close(
        cross_image_log_probabilities(m, torch.ones(3, 1, 4, dtype=torch.bool)),
        (e / e.sum(2, keepdim=True)).log(),
    )


def test_identical_prototypes_give_uniform_probabilities_and_full_weight() -> None:
    g = randn(4)[None, None, None].expand(2, 3, 3, 4)
    m = prototype_similarity(randn(2, 4, 9), g, REGION)[:, :, None] / 0.1
    known = torch.ones(2, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        cross_image_log_probabilities(m, known), torch.full((2, 1, 3, 9), -math.log(3), dtype=torch.float64)
    )
    torch.testing.assert_close(agreement(m, known, 1000.0), torch.ones(2, 1, 9, dtype=torch.float64))


def test_images_that_contradict_each_other_weigh_two_to_the_minus_r() -> None:
    m = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])[None, :, None, :, None]
    assert agreement(m, torch.ones(2, 1, 2, dtype=torch.bool), 3.0).item() == pytest.approx(2**-3)


def test_an_image_with_one_class_does_not_vote() -> None:
    m = torch.tensor([[50.0, 0.0], [-50.0, 50.0]])[None, :, None, :, None]
    assert agreement(m, torch.tensor([[[True, False]], [[True, True]]]), 1000.0).item() == 1


def test_untempered_cosines_cannot_reach_the_published_threshold() -> None:
    best = torch.tensor([1.0, -1.0]).expand(2, 2)[None, :, None, :, None]
    p = cross_image_log_probabilities(best, torch.ones(2, 1, 2, dtype=torch.bool)).exp()
    assert p.max().item() == pytest.approx(0.8808, abs=1e-4)


def test_r_over_temperature_squared_is_what_counts() -> None:
    """KL is quadratic in small differences: r = 10 at temperature 0.1 weighs as the published r = 1000
    without temperature."""
    cosines = 0.5 + 0.01 * randn(4, 2, 1, 3, 50)
    known = torch.ones(2, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        agreement(cosines / 0.1, known, 10.0), agreement(cosines, known, 1000.0), atol=5e-3, rtol=0
    )
    assert agreement(cosines / 0.1, known, 1000.0).mean() < 0.5 < agreement(cosines / 0.1, known, 10.0).min()


def test_gradients_across_images_are_right() -> None:
    e_u, e_l, member = randn(1, 3, 9).requires_grad_(), randn(2, 3, 9, seed=2).requires_grad_(), members(2, 2)
    target = torch.nn.functional.one_hot(torch.arange(9) % 2, 2).mT[None, None].double()
    mask = randn(1, 1, 9).abs()

    def loss(e_u: torch.Tensor, e_l: torch.Tensor) -> torch.Tensor:
        g, known = prototypes(e_l, member, REGION, 3)
        m = prototype_similarity(e_u, g, REGION)[:, :, None] / 0.5
        return cross_image_loss(cross_image_log_probabilities(m, known[:, None]), target, mask)

    assert torch.autograd.gradcheck(loss, (e_u, e_l))


@pytest.mark.parametrize("labeled", [False, True])
def test_unknown_classes_and_unlabeled_images_keep_gradients_finite(labeled: bool) -> None:
    e_u, e_l = randn(1, 3, 9).float().requires_grad_(), randn(2, 3, 9).float().requires_grad_()
    member = torch.zeros(2, 2, 9, dtype=torch.bool)
    member[:, 0] = labeled  # background only, or nothing at all
    g, known = prototypes(e_l, member, REGION, 3)
    m = prototype_similarity(e_u, g, REGION)[:, :, None] / 0.01
    log_p = cross_image_log_probabilities(m, known[:, None])
    target = torch.zeros(1, 1, 2, 9)
    target[:, :, 0] = 1
    loss = cross_image_loss(log_p, target, agreement(m, known[:, None], 10.0))
    loss.backward()
    assert loss.item() == pytest.approx(0 if labeled else math.log(2), abs=1e-6)
    assert torch.isfinite(gradient(e_u)).all() and torch.isfinite(gradient(e_l)).all()


def test_masked_voxels_get_no_gradient() -> None:
    logits = randn(1, 1, 2, 4).requires_grad_()
    target = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    cross_image_loss(logits.log_softmax(2), target, torch.tensor([[[1.0, 0.0, 0.0, 0.5]]])).backward()
    assert not gradient(logits)[..., 1:3].any() and gradient(logits)[..., [0, 3]].all()
