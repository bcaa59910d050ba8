"""How features lie in memory: PyTorch's default (channel by channel) or `channels_last`."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(dimensions: int) -> torch.memory_format:
    """The format of (B, C, H, W) or (B, C, D, H, W), of 2 or 3 spatial dimensions, in which the channels of a
    voxel lie together."""
    return torch.channels_last_3d if dimensions == 3 else torch.channels_last


def use_channels_last(module: nn.Module, dimensions: int) -> None:
    """Put the kernels of all convolutions of so many dimensions into `channels_last`, in place; features
    follow the kernels."""
    for parameter in (
        module.parameters()
    ):  # not module.to(memory_format=...): that refuses any other tensor of four axes, as in a bank
        if parameter.dim() == dimensions + 2:
            parameter.data = parameter.data.contiguous(memory_format=channels_last(dimensions))
