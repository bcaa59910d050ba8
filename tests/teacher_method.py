"""A method with an averaged teacher, to test what the trainer does for such methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nnssl.batch import SemiBatch
from nnssl.config import Config, Share
from nnssl.ema import copy_weights, ema_update, frozen_copy
from nnssl.method import SemiMethod, full_resolution, inference
from nnssl.training.trainer import SemiTrainer


@dataclass(frozen=True)
class AveragingConfig(Config):
    decay: Share = 0.9


class Averaging(SemiMethod):
    name = "Averaging"
    config_class = AveragingConfig

    def build(self) -> None:
        self.teacher = frozen_copy(self.student)

    def make_copies(self) -> None:
        copy_weights(self.teacher, self.student)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        with inference(self.teacher):
            wanted = self.probabilities(full_resolution(self.teacher(batch.weak)))
        found = self.probabilities(full_resolution(self.student(batch.strong[0])))
        self.diagnostics = {"found": found.detach().amax(), "progress": found.new_tensor(t)}
        return {
            "supervised": self.supervised_loss(self.student(batch.labeled), batch.target),
            "consistency": (found - wanted).square().mean(),
        }

    def weights(self, t: float) -> dict[str, float]:
        return {"supervised": 1.0, "consistency": t}

    def after_step(self, batch: SemiBatch, t: float) -> None:
        ema_update(self.teacher, self.student, self.config.decay)

    def deployed(self, which: str) -> nn.Module:
        return self.teacher if which == "teacher" else self.student


class AveragingTrainer(SemiTrainer):
    method_class = Averaging
