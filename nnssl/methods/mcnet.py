"""MC-Net: mutual consistency of two decoders (Wu et al., MICCAI 2021).

    L    = L_sup(f) + L_sup(h) + lambda(t) L_mc
    L_mc = mse(p_f, sharpen p_h) + mse(p_h, sharpen p_f)                            on x_l and x_u
    sharpen p = p^(1/T) / sum_c p_c^(1/T)

f         student, the planned network: encoder and decoder; deployed
h         the same encoder with a second decoder, which interpolates where the planned one has transposed
          convolutions
x_u       strong view of an unlabeled patch, the same for both decoders
lambda(t) Gaussian ramp over the first 40 % of training

Differs from the paper:
- nnU-Net's compound loss with deep supervision as L_sup; theirs is Dice.
- The objective is twice the published one: each decoder then learns from L_sup at nnU-Net's learning rate.
- x_u has stronger intensity changes than the labeled patches, as unlabeled patches have in every method here.
- Sharpened probabilities are targets without gradient: a target should not follow its prediction.
- The second decoder interpolates behind a 1x1 convolution: the same function at a fraction of the cost.
- Regions are sharpened one by one against 1 - p. Ignored voxels carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnssl.batch import SemiBatch
from nnssl.config import Config, NonNegative, Share, Temperature
from nnssl.losses.consistency import mse_consistency, sharpen
from nnssl.method import SUPERVISED, Outputs, SemiMethod, full_resolution, split_batch
from nnssl.networks.features import decode, encode
from nnssl.networks.upsampling import interpolate_instead_of_transposing
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class MCNetConfig(Config):
    weight_supervised: NonNegative = 1.0  # beta: weight of each decoder's L_sup (ours; the public code: 0.5)
    weight_consistency: NonNegative = 2.0  # lambda_max: largest weight of L_mc (ours; the public code: 1)
    # share of the training over which lambda rises (the public code: 6k of 15k steps)
    ramp_fraction: Share = 0.4
    temperature: Temperature = 0.1  # T: temperature of the sharpening (MC-Net)


class MCNet(SemiMethod):
    name = "MCNet"
    config_class = MCNetConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "supervised_second": "The same of the second decoder.",
        "consistency": "Mean squared difference between each decoder's probabilities and the sharpened ones "
        "of the other.",
    }
    config: MCNetConfig

    def build(self) -> None:
        network = self.planned.build_network(self.planned.input_channels, self.labels.channels)
        self.second = interpolate_instead_of_transposing(network).decoder
        del (
            self.second.encoder
        )  # nnU-Net's decoders hold their encoder; this one reads the student's features
        self.both = self.planned.compiled(two_decoders)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        n = len(batch.labeled)
        outputs_f, outputs_h = self.both(
            self.student, self.second, torch.cat([batch.labeled, batch.strong[0]])
        )
        logits = [full_resolution(o) for o in (outputs_f, outputs_h)]
        p_f, p_h = (self.probabilities(z) for z in logits)
        with torch.no_grad():
            sharp_f, sharp_h = (sharpen(z, self.config.temperature, self.labels) for z in logits)
            mask = torch.ones_like(p_f[:, :1])
            labeled_mask = self.labels.encode(batch.full_target())[1]
            if labeled_mask is not None:
                mask[:n] = labeled_mask.float()
        return {
            "supervised": self.supervised_loss(split_batch(outputs_f, n)[0], batch.target),
            "supervised_second": self.supervised_loss(split_batch(outputs_h, n)[0], batch.target),
            "consistency": mse_consistency(p_f, sharp_h, mask) + mse_consistency(p_h, sharp_f, mask),
        }

    def weights(self, t: float) -> dict[str, float]:
        c = self.config
        consistency = c.weight_consistency * gaussian_ramp(t, c.ramp_fraction)
        return {
            "supervised": c.weight_supervised,
            "supervised_second": c.weight_supervised,
            "consistency": consistency,
        }


def two_decoders(network: Any, second: nn.Module, x: Tensor) -> tuple[Outputs, Outputs]:
    """Outputs of the planned network and of a second decoder on its encoder's features."""
    skips = encode(network, x)
    return decode(network, skips).outputs, second(skips)
