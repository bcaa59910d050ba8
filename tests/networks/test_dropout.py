from __future__ import annotations

from typing import Any

import pytest
import torch

from nnssl.networks.dropout import Walk, feature_dropout, forward_streams
from tests.building import Task, gradient


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
    assert torch.equal(gradient(x), kept.detach())


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_an_impossible_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        feature_dropout([torch.zeros(1, 1, 2, 2)], p)


@pytest.mark.parametrize("modulate", [None, lambda s, features: features])
def test_a_walk_compiles_as_one_graph_and_keeps_its_names(modulate: Any) -> None:
    task = Task(dim=2)
    network, images = task.network(), torch.randn(4, 1, *task.patch_size)
    compiled = torch.compile(forward_streams, backend="eager", fullgraph=True)
    found = compiled(network, images, 2, 0.0, 3, modulate)
    wanted = forward_streams(network, images, 2, 0.0, 3, modulate)
    assert isinstance(found, Walk)
    for name in Walk._fields:
        for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True):
            assert torch.equal(a, b)
