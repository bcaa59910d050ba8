"""Walks through nnU-Net's planned networks, where more than the logits is needed. No forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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


class Decoded(NamedTuple):
    """What a decoder computed.

    outputs     as the network's own forward gives them
    features    of every decoder stage, coarsest first: (B, F_s, S_s)
    """

    outputs: Tensor | list[Tensor]
    features: list[Tensor]


def decode(network: Any, skips: list[Tensor]) -> Decoded:
    """The planned decoder on the encoder's skips, finest first."""
    decoder = network.decoder
    x, features = skips[-1], []
    for s in range(len(decoder.stages)):
        x = decoder.stages[s](torch.cat((decoder.transpconvs[s](x), skips[-(s + 2)]), 1))
        features.append(x)
    if not decoder.deep_supervision:
        return Decoded(decoder.seg_layers[-1](x), features)
    outputs = [layer(f) for layer, f in zip(decoder.seg_layers, features, strict=True)]
    return Decoded(outputs[::-1], features)


def stage_grids(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Size of every encoder stage's features for a patch."""
    grid = tuple(patch_size)
    for stride in strides:
        grid = tuple(-(-n // s) for n, s in zip(grid, stride, strict=True))
        yield grid
