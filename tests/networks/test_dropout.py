from __future__ import annotations

import pytest
import torch

from nnssl.networks.dropout import feature_dropout


@pytest.mark.parametrize("size", [(4, 6), (2, 4, 6)])
def test_whole_channels_are_dropped_and_the_rest_scaled(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    skips = [torch.ones(5, 40, *size), torch.ones(5, 80, *[s // 2 for s in size])]
    dropped = feature_dropout(skips, 0.25)
    for before, after in zip(skips, dropped, strict=True):
        assert after.shape == before.shape
        per_channel = after.flatten(2)
        assert torch.equal(per_channel.amin(2), per_channel.amax(2))
        assert per_channel.unique().tolist() == pytest.approx([0, 4 / 3])
        share = (per_channel[..., 0] == 0).float().mean(1)  # every sample has a draw of its own
        assert share.unique().numel() > 1 and share.mean().item() == pytest.approx(0.25, abs=0.1)


def test_nothing_and_everything_dropped() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(feature_dropout([x], 0.0)[0], x)
    assert not feature_dropout([x], 1.0)[0].any()


def test_gradient_reaches_the_kept_channels_only() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 8, 2, 2, requires_grad=True)
    kept = feature_dropout([x], 0.5)[0]
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_an_impossible_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        feature_dropout([torch.zeros(1, 1, 2, 2)], p)
