"""The planned network with interpolation in the place of its transposed convolutions: another view of the
same architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.networks.features import check_planned


class InterpolatingUpsample(nn.Module):
    """1x1 convolution, then linear interpolation by `stride`: (B, C, S) -> (B, C', S * stride), bilinear in
    2D, trilinear in 3D.

    In this order, because both are linear and commute (a bias is constant): the same function as
    interpolating first, at one prod(stride)-th of the convolution.
    """

    def __init__(
        self,
        conv: type[nn.Conv2d] | type[nn.Conv3d],
        inputs: int,
        outputs: int,
        stride: Sequence[int],
        bias: bool,
    ) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 1, bias=bias)
        self.stride = tuple(float(s) for s in stride)
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.stride)]

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=self.stride, mode=self.mode)


def as_interpolating(weight: Tensor) -> Tensor:
    """The weight (C', C, 1, ...) of `InterpolatingUpsample.conv` nearest to that (C, C', *kernel) of a
    transposed convolution: its mean over the kernel. On a constant it gives the mean of what that gives."""
    return weight.mean(tuple(range(2, weight.ndim)), keepdim=True).transpose(0, 1)


CONVOLUTIONS: dict[type[nn.Module], type[nn.Conv2d] | type[nn.Conv3d]] = {
    nn.ConvTranspose2d: nn.Conv2d,
    nn.ConvTranspose3d: nn.Conv3d,
}


def interpolate_instead_of_transposing(network: nn.Module) -> Any:
    """Replace every transposed convolution of a planned network's decoder by an `InterpolatingUpsample`; in
    place, returns the network."""
    transposed = check_planned(network).decoder.transpconvs
    for s, old in enumerate(transposed):
        new = InterpolatingUpsample(
            CONVOLUTIONS[type(old)], old.in_channels, old.out_channels, old.stride, old.bias is not None
        )
        nn.init.kaiming_normal_(new.conv.weight, a=1e-2)  # as nnU-Net's networks
        if new.conv.bias is not None:
            nn.init.zeros_(new.conv.bias)
        transposed[s] = new.to(old.weight.device)
    return network
