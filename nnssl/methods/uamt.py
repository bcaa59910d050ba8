"""UA-MT: uncertainty-aware mean teacher (Yu et al., MICCAI 2019).

    L     = L_sup(f(x_l), y_l) + lambda(t) L_con
    L_con = mean over the certain voxels and channels of (p_s - p_w)^2,   p_s = probabilities(f(x_s)),  p_w =
    probabilities(f_ema(x_w))
    certain: -sum_k mu_k ln mu_k < H(t) ln K,       mu = mean of T passes of f_ema over x_w + noise, with
        dropout of feature channels
    H(t)  = 3/4 + 1/4 ramp(t)

f         student, the planned network; deployed
f_ema     teacher: exponential moving average of f; no gradient; may be deployed instead ("deploy": "teacher")
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence
lambda(t) lambda_max ramp(t), Gaussian over the whole training

Differs from the paper (ours): planned networks have no dropout, so the T passes drop channels of all skips,
and the student learns without; the target is the undisturbed teacher, of the weak view, and the student sees
the strong one; regions: certain where each of them is, -p ln p - (1-p) ln(1-p) < H(t) ln 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.labels import LabelSpace
from nnssl.losses.consistency import mse_consistency
from nnssl.method import TeacherMethod, full_resolution, inference, split_batch
from nnssl.networks.dropout import feature_dropout
from nnssl.networks.features import decode, encode
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class UAMTConfig:
    weight_consistency: float = 0.1  # lambda_max
    ramp_fraction: float = 1.0  # share of training over which lambda rises (all of it, as published)
    passes: int = 8  # T
    noise: float = 0.1  # standard deviation of the noise on x_w, cut off at twice that (the public code's)
    dropout: float = 0.2  # of the skips' channels (ours; the paper: 0.5 in two stages, student too)
    threshold: float = 0.75  # H(0)
    ema_decay: float = 0.99  # alpha of the teacher

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, found {self.passes}")
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, found {self.noise}")
        for name in ("ramp_fraction", "dropout", "threshold", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], found {getattr(self, name)}")


class UAMT(TeacherMethod):
    name = "UAMT"
    config_class = UAMTConfig
    config: UAMTConfig

    def build(self) -> None:
        super().build()
        self.disturbed = self.planned.compiled(disturbed_logits)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        p_w = self.teach(batch.weak)
        with inference(self.teacher):
            certain = (self.uncertainty(batch.weak) < self.entropy_threshold(t)).float()
        self.diagnostics = {"certain": certain.mean()}
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
