"""nnU-Net itself, the lower bound of every comparison (Isensee et al., Nature Methods 2021).

    L = L_sup(f(x_l), y_l)

f       student, the planned network; deployed
L_sup   nnU-Net's compound loss with deep supervision

Differs from stock nnU-Net only in the keys for schedule, seed and logging. Unlabeled scans are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from nnssl.batch import SemiBatch
from nnssl.config import Config
from nnssl.method import SUPERVISED, SemiMethod


@dataclass(frozen=True)
class SupervisedConfig(Config):
    """No keys of its own."""


class Supervised(SemiMethod):
    name = "Supervised"
    config_class = SupervisedConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
    }
    needs_unlabeled = False

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        return {"supervised": self.supervised_loss(self.student(batch.labeled), batch.target)}

    def deployed(self, which: str) -> nn.Module:
        """The student: what other methods deploy on the same plan is none of the baseline's business."""
        return self.student

    def weights(self, t: float) -> dict[str, float]:
        return {"supervised": 1.0}
