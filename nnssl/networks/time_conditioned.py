"""A planned U-Net that knows the diffusion step: one scale and shift per encoder stage."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.networks.features import check_planned, decode, encode


def sinusoidal_embedding(tau: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(B, width) float32: sin and cos of tau at geometrically spaced frequencies (Vaswani et al., NeurIPS
    2017, sec. 3.5). width: even."""
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(width // 2, device=tau.device) / (width // 2)
    )
    angles = tau.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeConditionedUNet(nn.Module):
    """g(x_tau, tau, x): the planned architecture, conditioned on tau.

    sinusoidal embedding -> two-layer MLP -> per encoder stage: features * (1 + scale) + shift. The last
    layers start at zero, so the network starts as the planned one on its input.

    Args:
        network: planned U-Net with `image channels + label channels` inputs.
        width: width of the step embedding and of the MLP.
    """

    def __init__(self, network: nn.Module, width: int = 128) -> None:
        super().__init__()
        self.network: Any = check_planned(network)
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulations = nn.ModuleList(
            nn.Linear(width, 2 * f) for f in self.network.encoder.output_channels
        )
        for parameter in self.modulations.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_tau: Tensor, tau: Tensor, image: Tensor) -> Tensor | list[Tensor]:
        """Logits as the planned network gives them. x_tau: (B, K, S); tau: (B,); image: (B, C, S)."""
        embedding = self.embed(sinusoidal_embedding(tau, self.width))

        def modulate(stage: int, features: Tensor) -> Tensor:
            scale, shift = (
                self.modulations[stage](embedding)
                .view(len(tau), -1, *[1] * (features.ndim - 2))
                .chunk(2, dim=1)
            )
            return features * (1 + scale) + shift

        skips = encode(self.network, torch.cat([image, x_tau], dim=1), modulate)
        return decode(self.network, skips).outputs
