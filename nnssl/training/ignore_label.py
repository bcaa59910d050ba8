"""nnU-Net's loss of classes with an ignore label, without its question at every scale whether there is a
voxel that counts: the host would wait for the answer."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import Tensor, nn


class IgnoringLoss(nn.Module):
    """w_ce CE + w_dice Dice over the voxels that carry a label; CE is 0 where there is none.

    loss: nnU-Net's, with its parts, weights and ignore label.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.dc, self.ce = loss.dc, loss.ce
        self.weight_dice, self.weight_ce, self.ignore_label = (
            loss.weight_dice,
            loss.weight_ce,
            loss.ignore_label,
        )

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, K, S), label map (B, 1, S) -> scalar."""
        labeled = target != self.ignore_label
        dice = self.dc(net_output, torch.where(labeled, target, 0), loss_mask=labeled)
        ce = torch.where(labeled.any(), self.ce(net_output, target[:, 0]), 0.0)
        return self.weight_ce * ce + self.weight_dice * dice


def without_waiting(loss: Any) -> Any:
    """nnU-Net's loss, deep supervision or not, with `IgnoringLoss` in the place of what would wait."""
    deep = hasattr(loss, "weight_factors")
    inner = loss.loss if deep else loss
    if not isinstance(inner, DC_and_CE_loss) or inner.ignore_label is None:
        return loss
    if not deep:
        return IgnoringLoss(inner)
    loss.loss = IgnoringLoss(inner)
    return loss
