"""Walks through nnU-Net's planned networks, where more than the logits is needed. No forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def check_planned(network: nn.Module) -> Any:
    """The network itself if it is a planned U-Net (encoder stages, decoder stages, transposed convolutions),
    else ValueError."""
    decoder = getattr(network, "decoder", None)
    if not all(hasattr(decoder, a) for a in ("stages", "transpconvs", "seg_layers")) or not hasattr(
        getattr(network, "encoder", None), "stages"
    ):
        raise ValueError(
            f"{type(network).__name__} is not a planned U-Net with encoder.stages and decoder.stages; "
            "plan the dataset with PlainConvUNet or ResidualEncoderUNet (nnU-Net's default or ResEnc "
            "planners)"
        )
    return network


def encode(network: Any, x: Tensor, modulate: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
    """Skip features of every encoder stage, finest first: (B, F_s, S_s).

    Args:
        network: a planned U-Net.
        x: (B, C, S).
        modulate: (stage, features) -> features, applied after each stage; the next stage sees the result.
    """
    encoder = network.encoder
    stem = getattr(encoder, "stem", None)
    if stem is not None:
        x = stem(x)
    skips = []
    for s, stage in enumerate(encoder.stages):
        x = stage(x)
        if modulate is not None:
            x = modulate(s, x)
        skips.append(x)
    return skips


def decode(network: Any, skips: list[Tensor]) -> tuple[Tensor | list[Tensor], list[Tensor]]:
    """Outputs as the network's own forward gives them, and the features of every decoder stage, coarsest
    first: (B, F_s, S_s)."""
    decoder = network.decoder
    x, features = skips[-1], []
    for s in range(len(decoder.stages)):
        x = decoder.stages[s](torch.cat((decoder.transpconvs[s](x), skips[-(s + 2)]), 1))
        features.append(x)
    if not decoder.deep_supervision:
        return decoder.seg_layers[-1](x), features
    return [layer(f) for layer, f in zip(decoder.seg_layers, features, strict=True)][::-1], features
