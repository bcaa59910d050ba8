"""FixMatch (Sohn et al., NeurIPS 2020) on voxels, with UniMatch's CutMix views (Yang et al., CVPR 2023).

    L   = L_sup(f(x_l), y_l) + lambda(t) L_u
    L_u = CE + Dice of f(x_s) against y = harden p_w, over voxels where max_k p_w >= T
    p_w = probabilities(f_ema(x_w))

f         student, the planned network; deployed
f_ema     f itself (`ema_decay` 0, as published), or a teacher: its exponential moving average; eval mode, no
          gradient; may be deployed instead ("deploy": "teacher")
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence; x_s with CutMix boxes,
          p_w cut alike
lambda(t) Gaussian ramp over the first 40 % of training

Differs from the papers:
- Dice beside CE, as nnU-Net trains.
- CE is averaged over the certain voxels; in both papers over all.
- A ramp, because networks trained from scratch are soon certain of wrong labels.
- Half of FixMatch's weight: UniMatch's of its two strong views together.
- One strong view and no feature perturbation: those are UniMatch's additions to FixMatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, NonNegative, Share
from nnssl.data.mixing import cutmix_all, cutmix_mask
from nnssl.losses.pseudo_label import confidence_mask, cross_entropy_dice
from nnssl.method import SUPERVISED, TeacherMethod, full_resolution, split_batch
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class FixMatchConfig(Config):
    # lambda_max: largest weight of L_u (UniMatch's two strong views together; FixMatch: 1)
    weight_pseudo: NonNegative = 0.5
    threshold: Share = 0.9  # T: confidence above which a pseudo-label counts (ours; both papers: 0.95)
    cutmix_probability: Share = 0.5  # probability of a CutMix box in a sample (UniMatch)
    ramp_fraction: Share = 0.4  # share of the training over which lambda rises (ours, as in CAML)
    # decay of the teacher; 0: the student labels for itself (both papers; Mean Teacher: 0.99)
    ema_decay: Share = 0.0


class FixMatch(TeacherMethod):
    name = "FixMatch"
    config_class = FixMatchConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "pseudo": "Cross-entropy and Dice of the student on the strong view against the pseudo-labels "
        "of the weak view, over the voxels above the confidence threshold.",
    }
    config: FixMatchConfig

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        p_w = self.teach(batch.weak)
        box = cutmix_mask(
            len(batch.weak), batch.weak.shape[2:], batch.weak.device, self.config.cutmix_probability
        )
        p_w, x_s = cutmix_all((p_w, box), (batch.strong[0], box))

        labeled, unlabeled = split_batch(self.student(torch.cat([batch.labeled, x_s])), len(batch.labeled))
        certain, pseudo = self.accepted(p_w, t), self.labels.harden(p_w)
        self.count_accepted(pseudo, certain)
        return {
            "supervised": self.supervised_loss(labeled, batch.target),
            "pseudo": cross_entropy_dice(full_resolution(unlabeled), pseudo, self.labels, certain),
        }

    def accepted(self, p: Tensor, t: float) -> Tensor:
        return confidence_mask(p, self.config.threshold, self.labels)

    def weights(self, t: float) -> dict[str, float]:
        return {
            "supervised": 1.0,
            "pseudo": self.config.weight_pseudo * gaussian_ramp(t, self.config.ramp_fraction),
        }
