"""The teacher update, in one place: exponential moving average over parameters and buffers."""

from __future__ import annotations

import copy

import torch
from torch import nn


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy of `network` in eval mode without gradients: a teacher before its first update."""
    teacher = copy.deepcopy(network)
    teacher.requires_grad_(False)
    return teacher.eval()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student for parameters; buffers are copied.

    Walks parameters() and buffers(), not the state_dict: the state_dict of nnU-Net's networks names shared
    tensors several times, and averaging those once per name would apply the decay repeatedly.

    Args:
        teacher: module with the same parameters and buffers as `student`, in the same order.
        student: source of the update.
        decay: weight of the old teacher, in [0, 1].
    """
    pairs = [(t, s.to(t.dtype)) for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1.0 - decay)
    copy_buffers(teacher, student)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Make `target` equal to `source`: parameters and buffers, matched by position."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.copy_(s)
    copy_buffers(target, source)


@torch.no_grad()
def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """Copy the buffers of `source` (running statistics, counters) into `target`, matched by position."""
    for t, s in zip(target.buffers(), source.buffers(), strict=True):
        t.copy_(s)
