from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss

from nnssl.labels import LabelSpace
from nnssl.losses.pseudo_label import confidence_mask, cross_entropy, cross_entropy_dice, soft_dice_loss
from tests.building import gradient

CLASSES, REGIONS = LabelSpace(3), LabelSpace(3, has_regions=True)


def example(labels: LabelSpace, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    target = labels.harden(torch.rand(logits.shape, generator=g)).double()
    mask = (torch.rand(2, 1, 4, 5, 6, generator=g) > 0.5).double()
    return logits, target, mask


def loop_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, regions: bool
) -> float:
    total, count = 0.0, 0.0
    for b in range(logits.shape[0]):
        for index in torch.cartesian_prod(*[torch.arange(s) for s in logits.shape[2:]]).tolist():
            z, y, m = (
                logits[(b, slice(None), *index)],
                target[(b, slice(None), *index)],
                mask[(b, 0, *index)].item(),
            )
            if regions:
                p = z.sigmoid()
                value = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
            else:
                value = -(y * (z.exp() / z.exp().sum()).log()).sum()
            total, count = total + m * value.item(), count + m
    return total / count


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_cross_entropy_equals_the_loop(labels: LabelSpace) -> None:
    logits, target, mask = example(labels)
    assert cross_entropy(logits, target, labels, mask).item() == pytest.approx(
        loop_cross_entropy(logits, target, mask, labels.has_regions), rel=1e-5
    )
    everywhere = torch.ones_like(mask)
    assert cross_entropy(logits, target, labels).item() == pytest.approx(
        loop_cross_entropy(logits, target, everywhere, labels.has_regions), rel=1e-5
    )


def test_soft_dice_equals_the_formula_per_channel() -> None:
    _, target, mask = example(CLASSES)
    p = torch.rand(target.shape, dtype=torch.float64).softmax(1)
    dice = []
    for k in (1, 2):
        a, b = p[:, k] * mask[:, 0], target[:, k] * mask[:, 0]
        dice.append(((2 * (a * b).sum() + 1e-5) / (a.sum() + b.sum() + 1e-5)).item())
    assert soft_dice_loss(p, target, mask).item() == pytest.approx(1 - sum(dice) / 2)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_without_a_mask_it_is_nnunets_compound_loss_plus_one(labels: LabelSpace) -> None:
    logits, target, _ = example(labels)
    soft_dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": labels.has_regions, "ddp": False}
    if labels.has_regions:
        stock = DC_and_BCE_loss({}, soft_dice)(logits.float(), target.float())
    else:
        stock = DC_and_CE_loss(soft_dice, {})(logits.float(), target.argmax(1, keepdim=True))
    assert cross_entropy_dice(logits, target, labels).item() == pytest.approx(stock.item() + 1, abs=1e-5)


def test_perfect_prediction_costs_nothing_and_empty_mask_is_a_differentiable_zero() -> None:
    _, target, mask = example(CLASSES)
    assert cross_entropy_dice(200 * target, target, CLASSES).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(target.shape, requires_grad=True)
    loss = cross_entropy_dice(logits, target, CLASSES, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not gradient(logits).any()


def test_uniform_prediction_costs_log_k() -> None:
    _, target, mask = example(CLASSES)
    assert cross_entropy(torch.zeros_like(target), target, CLASSES, mask).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_large_logits_stay_finite(labels: LabelSpace) -> None:
    logits, target, mask = example(labels)
    logits = (1e6 * logits).float().requires_grad_()
    loss = cross_entropy_dice(logits, target.float(), labels, mask.float())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient(logits)).all()


def test_masked_voxels_get_no_gradient() -> None:
    logits, target, mask = example(CLASSES)
    logits.requires_grad_()
    cross_entropy_dice(logits, target, CLASSES, mask).backward()
    shown = mask.expand_as(logits) == 1
    assert gradient(logits)[shown].any() and not gradient(logits)[~shown].any()


def test_gradients_are_right() -> None:
    logits, target, mask = (x[:1, :, :2, :2, :2] for x in example(CLASSES))
    # float32 inside: probabilities and log-softmax are taken in single precision, hence the tolerances
    soft = torch.softmax(logits, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: soft_dice_loss(p, target, mask), soft)


def test_confidence_mask_marks_certain_voxels() -> None:
    p = torch.tensor([[0.96, 0.04], [0.6, 0.4]]).T.reshape(1, 2, 1, 2)
    assert confidence_mask(p, 0.95, LabelSpace(2)).flatten().tolist() == [1, 0]
    regions = torch.tensor([[0.96, 0.04], [0.6, 0.99]]).T.reshape(
        1, 2, 1, 2
    )  # second voxel: one region unsure
    assert confidence_mask(regions, 0.95, LabelSpace(2, has_regions=True)).flatten().tolist() == [1, 0]
