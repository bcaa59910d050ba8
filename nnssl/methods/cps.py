"""CPS: cross pseudo-supervision of two networks (Chen et al., CVPR 2021), in its CutMix form.

    L    = L_sup(f(x_l), y_l) + L_sup(h(x_l), y_l) + lambda(t) (L_p + L_p')
    L_p  = CE + Dice of f(x_s) against y_h = harden h(x_w)
    L_p' = CE + Dice of h(x_s) against y_f = harden f(x_w)

f         student, the planned network; deployed
h         second network: the planned architecture from another initialisation
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence; x_s with CutMix boxes,
          y_f and y_h cut alike
lambda(t) Gaussian ramp over the first 40 % of training

Differs from the paper:
- The mixed image is the strong view: CutMix alone changes no intensities.
- Dice beside CE, as nnU-Net trains.
- A ramp, because networks trained from scratch start with wrong labels.
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
from nnssl.losses.pseudo_label import Compared, cross_entropy_dices
from nnssl.method import SUPERVISED, SemiMethod, full_resolution, inference, split_batch
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class CPSConfig(Config):
    # lambda_max: largest weight of L_p, L_p' (ours; CPS: 1.5 on VOC, 6 on Cityscapes; medical code: 0.1)
    weight_pseudo: NonNegative = 0.5
    cutmix_probability: Share = 0.5  # probability of a CutMix box in a sample (ours)
    ramp_fraction: Share = 0.4  # share of the training over which lambda rises (ours)


class CPS(SemiMethod):
    name = "CPS"
    config_class = CPSConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "supervised_second": "The same of the second network.",
        "pseudo": "Cross-entropy and Dice of the student on the strong view against what the second "
        "network calls the weak view.",
        "pseudo_second": "Cross-entropy and Dice of the second network on the strong view against what the "
        "student calls the weak view.",
    }
    config: CPSConfig

    def build(self) -> None:
        self.second = self.planned.build_network(self.planned.input_channels, self.labels.channels)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        networks = (self.student, self.second)
        with inference(*networks):
            y_f, y_h = (
                self.labels.harden(self.probabilities(full_resolution(network(batch.weak))))
                for network in networks
            )
        box = cutmix_mask(
            len(batch.weak), batch.weak.shape[2:], batch.weak.device, self.config.cutmix_probability
        )
        y_f, y_h, x_s = cutmix_all(*((x, box) for x in (y_f, y_h, batch.strong[0])))

        images = torch.cat([batch.labeled, x_s])
        labeled_f, unlabeled_f = split_batch(self.student(images), len(batch.labeled))
        labeled_h, unlabeled_h = split_batch(self.second(images), len(batch.labeled))
        pseudo = [(full_resolution(unlabeled_f), y_h), (full_resolution(unlabeled_h), y_f)]
        of_f, of_h = cross_entropy_dices([Compared(*each) for each in pseudo], self.labels)
        return {
            "supervised": self.supervised_loss(labeled_f, batch.target),
            "supervised_second": self.supervised_loss(labeled_h, batch.target),
            "pseudo": of_f,
            "pseudo_second": of_h,
        }

    def weights(self, t: float) -> dict[str, float]:
        mu = self.config.weight_pseudo * gaussian_ramp(t, self.config.ramp_fraction)
        return {"supervised": 1.0, "supervised_second": 1.0, "pseudo": mu, "pseudo_second": mu}
