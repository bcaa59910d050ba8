"""BCP: bidirectional copy-paste (Bai et al., CVPR 2023).

    x_in  = M x_u + (1 - M) x_l,     x_out = M x_l' + (1 - M) x_u'
    L     = l(f(x_in, x_out); y_l) over what came from labeled patches
          + alpha l(f(x_in, x_out); y_u) over what came from unlabeled patches,     y_u = harden f_ema(x_w)
    l     = CE + Dice over the stated voxels, at all deep supervision scales
    before t = t_pre:  L = L_sup(f(x), y),  x and y copy-pasted within the labeled batch

f         student, the planned network; deployed
f_ema     teacher: exponential moving average of f, a copy of f until t_pre; no gradient; may be deployed
          instead ("deploy": "teacher")
x_w, x_u  weak and strong view of the same unlabeled patch, voxels in correspondence
x_l', x_u'  another pairing of the same batches
M         box with 2/3 of every edge, anywhere in the patch

Differs from the paper:
- The strong view is pasted: labeled patches carry nnU-Net's intensity transforms, too.
- A box per sample, and both directions in one sum: more boxes per step at the same cost.
- One run and one schedule, without a return to the best pretrained checkpoint: nnU-Net has one.
- All components of pseudo-labels stay, not only the largest: structures may have several.
- Deep supervision throughout, with labels and boxes at every scale: planned networks are trained so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, NonNegative, Share
from nnssl.data.mixing import both_ways, cutmix_all, cutmix_mask
from nnssl.ema import ema_update
from nnssl.losses.deep_supervision import deep_supervision_losses
from nnssl.method import TeacherMethod


@dataclass(frozen=True)
class BCPConfig(Config):
    weight_pseudo: NonNegative = 0.5  # alpha: weight of the voxels from unlabeled patches (BCP)
    box_edge: Share = 2 / 3  # beta: edge of the box M, as a share of the patch's edge (BCP)
    # t_pre: share of the training on labeled patches alone (BCP: 2k of 17k steps on the left atrium)
    pretrain_fraction: Share = 2 / 17
    ema_decay: Share = 0.99  # decay of the teacher (BCP)


class BCP(TeacherMethod):
    name = "BCP"
    config_class = BCPConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": "Cross-entropy and Dice on patches mixed by copy-paste, over the voxels that come "
        "from labeled patches; before the copy-paste phase nnU-Net's loss.",
        "pseudo": "The same over the voxels that come from unlabeled patches, against the teacher's labels.",
    }
    config: BCPConfig

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        return self.pretrain(batch) if t < self.config.pretrain_fraction else self.copy_paste(batch)

    def pretrain(self, batch: SemiBatch) -> dict[str, Tensor]:
        """Boxes between labeled neighbours; the target alike at every scale."""
        box = self.boxes(batch.labeled)
        scales = [
            F.interpolate(box.float(), y.shape[2:], mode="nearest-exact").bool()
            for y in _as_list(batch.target)
        ]
        images, *target = cutmix_all((batch.labeled, box), *zip(_as_list(batch.target), scales, strict=True))
        supervised = self.supervised_loss(
            self.student(images), target if isinstance(batch.target, list) else target[0]
        )
        return {"supervised": supervised, "pseudo": 0 * supervised}

    def copy_paste(self, batch: SemiBatch) -> dict[str, Tensor]:
        """Boxes between labeled and unlabeled patches, both ways."""
        pseudo = self.labels.harden(self.teach(batch.weak))
        onehot, known = self.labels.encode(batch.full_target())
        known = torch.ones_like(onehot[:, :1], dtype=torch.bool) if known is None else known.bool()

        x_l, x_u = batch.labeled, batch.strong[0]
        from_unlabeled = torch.cat([self.boxes(x_l), ~self.boxes(x_u)])
        (x_l, onehot, known), (x_u, pseudo) = both_ways((x_l, onehot, known), (x_u, pseudo))
        outputs = self.student(torch.where(from_unlabeled, x_u, x_l))
        parts = [(onehot, (known & ~from_unlabeled).float()), (pseudo, from_unlabeled.float())]
        losses = deep_supervision_losses(outputs, parts, self.labels, self.planned.scale_weights)
        return dict(zip(("supervised", "pseudo"), losses, strict=True))

    def boxes(self, x: Tensor) -> Tensor:
        """M (B, 1, S) bool for patches (B, C, S)."""
        volume = self.config.box_edge ** (x.ndim - 2)
        return cutmix_mask(
            len(x), x.shape[2:], x.device, probability=1.0, volume=(volume, volume), stretch=0.0
        )

    def weights(self, t: float) -> dict[str, float]:
        return {
            "supervised": 1.0,
            "pseudo": 0.0 if t < self.config.pretrain_fraction else self.config.weight_pseudo,
        }

    def after_step(self, batch: SemiBatch, t: float) -> None:
        ema_update(
            self.teacher, self.student, 0.0 if t < self.config.pretrain_fraction else self.config.ema_decay
        )


def _as_list(target: Tensor | list[Tensor]) -> list[Tensor]:
    return target if isinstance(target, list) else [target]
