from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from nnssl.training.ignore_label import IgnoringLoss, without_waiting

DICE = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}


def nnunets_loss(ignore_label: int | None = 3) -> DC_and_CE_loss:
    return DC_and_CE_loss(
        dict(DICE), {}, 1, 0.5, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss
    )


def value_and_gradient(loss: object, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)  # type: ignore[operator]
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("highest", [3, 4])
def test_value_and_gradient_are_nnunets(highest: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(highest, (2, 1, 4, 5, 6)).to(torch.int16)
    ours = IgnoringLoss(nnunets_loss())
    torch.testing.assert_close(
        value_and_gradient(ours, logits, target),
        value_and_gradient(nnunets_loss(), logits, target),
        rtol=0,
        atol=0,
    )


def test_where_every_voxel_is_ignored_the_gradient_is_zero() -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.full((2, 1, 4, 5), 3)
    ours = value_and_gradient(IgnoringLoss(nnunets_loss()), logits, target)
    torch.testing.assert_close(ours, value_and_gradient(nnunets_loss(), logits, target), rtol=0, atol=0)
    assert not ours[1].any()


def test_only_the_loss_that_waits_is_replaced() -> None:
    deep = DeepSupervisionWrapper(nnunets_loss(), (0.7, 0.3))
    assert isinstance(without_waiting(nnunets_loss()), IgnoringLoss)
    assert without_waiting(deep) is deep and isinstance(deep.loss, IgnoringLoss)
    for other in (nnunets_loss(None), DC_and_BCE_loss({}, dict(DICE), use_ignore_label=True)):
        assert without_waiting(other) is other
        wrapped = without_waiting(DeepSupervisionWrapper(other, (1.0,)))
        assert wrapped.loss is other
