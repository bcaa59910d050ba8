"""Dropout of feature channels, applied functionally: planned networks have no dropout layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def feature_dropout(skips: Sequence[Tensor], p: float) -> list[Tensor]:
    """Every channel of every sample is 0 with probability p, else divided by 1 - p (Tompson et al., CVPR 2015).

    Args:
        skips: feature maps (B, F_s, S_s), as from `encode`; to be decoded after.
        p: in [0, 1]; 0 leaves them as they are.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], found {p}")
    return [(F.dropout3d if x.ndim == 5 else F.dropout2d)(x, p) for x in skips]
