"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017), on voxels.

    L     = L_sup(f(x_l), y_l) + lambda(t) L_con
    L_con = mean over voxels and channels of (p_s - p_w)^2
    p_s   = probabilities(f(x_s)),  p_w = probabilities(f_ema(x_w))

f         student, the planned network; deployed
f_ema     teacher: exponential moving average of f; no gradient; may be deployed instead ("deploy": "teacher")
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence
lambda(t) Gaussian ramp over the first 40 % of training

Differs from the paper:
- A weak and a strong view instead of two like ones with dropout and noise: planned networks have no dropout.
- Consistency of unlabeled patches only: labeled ones have their labels.
- One decay throughout, where the paper changes it after the ramp: one setting less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, NonNegative, Share
from nnssl.losses.consistency import mse_consistency
from nnssl.method import SUPERVISED, TeacherMethod, full_resolution, split_batch
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class MeanTeacherConfig(Config):
    # lambda_max: largest weight of L_con (from UA-MT's comparison; the paper: 100, for image classes)
    weight_consistency: NonNegative = 0.1
    # share of the training over which lambda rises (ours; the paper: 40k of 150k steps)
    ramp_fraction: Share = 0.4
    ema_decay: Share = 0.99  # alpha: decay of the teacher (the paper during its ramp)


class MeanTeacher(TeacherMethod):
    name = "MeanTeacher"
    config_class = MeanTeacherConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "consistency": "Mean squared difference between the student's probabilities on the strong view and "
        "the teacher's on the weak view.",
    }
    config: MeanTeacherConfig

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        p_w = self.teach(batch.weak)
        labeled, unlabeled = split_batch(
            self.student(torch.cat([batch.labeled, batch.strong[0]])), len(batch.labeled)
        )
        return {
            "supervised": self.supervised_loss(labeled, batch.target),
            "consistency": mse_consistency(self.probabilities(full_resolution(unlabeled)), p_w),
        }

    def weights(self, t: float) -> dict[str, float]:
        return {
            "supervised": 1.0,
            "consistency": self.config.weight_consistency * gaussian_ramp(t, self.config.ramp_fraction),
        }
