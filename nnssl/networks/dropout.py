"""Dropout of feature channels, applied functionally: planned networks have no dropout layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.networks.features import decode, encode


def feature_dropout(skips: Sequence[Tensor], p: float) -> list[Tensor]:
    """Every channel of every sample is 0 with probability p, else divided by 1 - p (Tompson et al., CVPR
    2015).

    Args:
        skips: feature maps (B, F_s, S_s), as from `encode`; to be decoded after.
        p: in [0, 1]; 0 leaves them as they are.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], found {p}")
    return [(F.dropout3d if x.ndim == 5 else F.dropout2d)(x, p) for x in skips]


class Walk(NamedTuple):
    """What a network computed for a batch.

    outputs     as the network's own forward gives them
    skips       of every encoder stage and all images, finest first: (B, F_s, S_s)
    features    of every decoder stage, coarsest first: (B, F_s, S_s)
    """

    outputs: Tensor | list[Tensor]
    skips: list[Tensor]
    features: list[Tensor]


def forward_streams(
    network: Any,
    images: Tensor,
    clean: int | None = None,
    dropout: float = 0.0,
    decoded: int | None = None,
    modulate: Callable[[int, Tensor], Tensor] | None = None,
) -> Walk:
    """One pass for a clean and a perturbed stream: channel dropout acts on all encoder features behind the
    first `clean` images.

    Args:
        network: a planned U-Net.
        images: (B, C, S).
        clean: how many images keep their features; None: all.
        dropout: p of `feature_dropout`.
        decoded: how many images, from the first, go through the decoder; None: all.
        modulate: as in `encode`; dropout acts after it.
    """
    skips = encode(network, images, modulate)
    if dropout > 0 and clean is not None:  # one product per map, no copies of its parts
        ones = [s.new_ones(s.shape[:2] + (1,) * (s.ndim - 2)) for s in skips]
        factors = feature_dropout([o[clean:] for o in ones], dropout)
        skips = [s * torch.cat([o[:clean], f]) for s, o, f in zip(skips, ones, factors, strict=True)]
    outputs, features = decode(network, [s[:decoded] for s in skips])
    return Walk(outputs, skips, features)
