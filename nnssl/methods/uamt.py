"""UA-MT: uncertainty-aware mean teacher (Yu et al., MICCAI 2019).

    L       = L_sup(f(x_l), y_l) + lambda(t) L_con
    L_con   = mean over the certain voxels and all channels of (p_s - p_w)^2
    p_s     = probabilities(f(x_s)),  p_w = probabilities(f_ema(x_w))
    certain = -sum_k mu_k ln mu_k < H(t) ln K,       H(t) = 3/4 + 1/4 ramp(t)
    mu      = mean of T passes of f_ema over x_w + noise, with dropout of feature channels

f         student, the planned network; deployed
f_ema     teacher: exponential moving average of f; no gradient; may be deployed instead ("deploy": "teacher")
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence
lambda(t) lambda_max ramp(t), Gaussian over the whole training

Differs from the paper:
- The T passes drop channels of all skips, and the student learns without: planned networks have no dropout.
- The target is the undisturbed teacher on the weak view, and the student sees the strong one: noise serves
  the uncertainty alone.
- Regions: certain where each of them is, -p ln p - (1 - p) ln(1 - p) < H(t) ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, Few, NonNegative, Share
from nnssl.labels import LabelSpace
from nnssl.losses.consistency import mse_consistency
from nnssl.method import SUPERVISED, TeacherMethod, full_resolution, inference, split_batch
from nnssl.networks.dropout import feature_dropout
from nnssl.networks.features import decode, encode
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class UAMTConfig(Config):
    weight_consistency: NonNegative = 0.1  # lambda_max: largest weight of L_con (UA-MT)
    ramp_fraction: Share = 1.0  # share of the training over which lambda rises (UA-MT: all of it)
    passes: Few = 8  # T: passes of the teacher that the uncertainty is estimated from (UA-MT)
    # standard deviation of the noise on x_w, which is cut off at twice that (the public code)
    noise: NonNegative = 0.1
    # share of the skips' channels that a pass drops (ours; the paper: 0.5 in two stages, and the student's)
    dropout: Share = 0.2
    threshold: Share = 0.75  # H(0): share of the largest entropy below which a voxel is certain (UA-MT)
    ema_decay: Share = 0.99  # alpha: decay of the teacher (UA-MT)


class UAMT(TeacherMethod):
    name = "UAMT"
    config_class = UAMTConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "consistency": "Mean squared difference between the student's probabilities and the teacher's, over "
        "the voxels of which the teacher is certain.",
        "certain": "Share of the unlabeled voxels of which the teacher is certain.",
    }
    config: UAMTConfig

    def build(self) -> None:
        super().build()
        self.disturbed = self.planned.compiled(disturbed_logits)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        p_w = self.teach(batch.weak)
        with inference(self.teacher):
            certain = (self.uncertainty(batch.weak) < self.entropy_threshold(t)).float()
        self.diagnostics = {"certain": certain.mean()}
        self.count_accepted(self.labels.harden(p_w), certain)
        labeled, unlabeled = split_batch(
            self.student(torch.cat([batch.labeled, batch.strong[0]])), len(batch.labeled)
        )
        return {
            "supervised": self.supervised_loss(labeled, batch.target),
            "consistency": mse_consistency(self.probabilities(full_resolution(unlabeled)), p_w, certain),
        }

    def uncertainty(self, x: Tensor) -> Tensor:
        """Entropy of mu (B, 1, S), in units of its maximum, for images (B, C, S)."""
        c, mu = self.config, torch.zeros((), device=x.device)
        for _ in range(c.passes):
            noise = (c.noise * torch.randn_like(x)).clamp(-2 * c.noise, 2 * c.noise)
            noise[:, x.shape[1] - self.planned.previous :] = 0
            mu = mu + self.probabilities(self.disturbed(self.teacher, x + noise, c.dropout)) / c.passes
        return normalized_entropy(mu, self.labels)

    def entropy_threshold(self, t: float) -> float:
        """H(t)."""
        return self.config.threshold + (1 - self.config.threshold) * gaussian_ramp(t, 1.0)

    def weights(self, t: float) -> dict[str, float]:
        return {
            "supervised": 1.0,
            "consistency": self.config.weight_consistency * gaussian_ramp(t, self.config.ramp_fraction),
        }


def disturbed_logits(network: Any, x: Tensor, dropout: float) -> Tensor:
    """Logits (B, K, S) of a planned network whose skips lose channels."""
    skips = feature_dropout(encode(network, x), dropout)
    return full_resolution(decode(network, skips).outputs)


def normalized_entropy(p: Tensor, labels: LabelSpace) -> Tensor:
    """Entropy of probabilities (B, K, S) over its maximum, (B, 1, S) in [0, 1]; of regions the largest of
    their binary entropies."""
    if labels.has_regions:
        return (torch.special.entr(p) + torch.special.entr(1 - p)).amax(1, keepdim=True) / math.log(2)
    return torch.special.entr(p).sum(1, keepdim=True) / math.log(labels.channels)
