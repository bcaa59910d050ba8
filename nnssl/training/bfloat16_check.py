"""Whether a CPU's bfloat16 convolutions have right gradients. Not all have: with PyTorch 2.15 (oneDNN) on a
processor without AMX, the weight gradient of 3 x 3 x 3 convolutions was garbage on grids of two slices, from
16 channels on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.networks.features import stage_grids
from nnssl.training.memory_format import channels_last

# voxels along the shortest axis up to which a grid is tried; small ones are where it goes wrong, and cost
# nothing
SMALL = 4
TOLERANCE = 0.05  # of the gradient's norm; rounding makes 0.0024


def refuse_wrong_bfloat16(network: Any, patch_size: Sequence[int], last: bool = False) -> None:
    """Try one convolution per small stage of a planned network's encoder, forward and backward, in bfloat16
    and float32 on the CPU.

    last: whether the networks will run in `channels_last`. Draws nothing from the global random state. Raises
    RuntimeError with grid and stage where the gradients differ.
    """
    encoder = network.encoder
    for stage, (grid, module) in enumerate(
        zip(stage_grids(patch_size, encoder.strides), encoder.stages, strict=True)
    ):
        conv = next(m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        if min(grid) <= SMALL and not _agrees(grid, conv.out_channels, conv.kernel_size, last):
            raise RuntimeError(
                f'"amp": "bfloat16" gives wrong gradients on this CPU (PyTorch {torch.__version__}): stage '
                f"{stage} of the plan, "
                f"{' x '.join(map(str, grid))} voxels and {conv.out_channels} channels. "
                'Set "amp" to "float32" under "nnssl" in the plans file'
            )


def _agrees(grid: tuple[int, ...], width: int, kernel: tuple[int, ...], last: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    form = channels_last(len(grid)) if last else torch.contiguous_format
    x, weight = (
        torch.randn(n, width, *shape, generator=draw).to(memory_format=form)
        for n, shape in ((2, grid), (width, kernel))
    )
    upstream = torch.randn(2, width, *grid, generator=draw).bfloat16()  # the same numbers for both
    exact = weight_gradient(x.bfloat16().float(), weight.bfloat16().float(), upstream.float())
    rounded = (weight_gradient(x.bfloat16(), weight.bfloat16(), upstream).float() for _ in range(3))
    return all(bool((r - exact).norm() <= TOLERANCE * exact.norm()) for r in rounded)  # NaN is no agreement


def weight_gradient(x: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of a convolution that keeps the grid, at its weight."""
    weight.requires_grad_()
    conv = F.conv3d if x.dim() == 5 else F.conv2d
    y = conv(x, weight, padding=[k // 2 for k in weight.shape[2:]])
    return torch.autograd.grad(y, weight, upstream)[0]
