"""Windows that cover every voxel, and a fusion whose windows see the same place at all scales and nothing
else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnssl.networks.fusion import SpatialAwareFusion, cut_windows, windows_per_axis

GRIDS = ((8, 8, 12), (4, 4, 6), (4, 2, 3))
FEATURES = (3, 5, 6)


def fusion(
    features: tuple[int, ...] = FEATURES, grids: tuple[tuple[int, ...], ...] = GRIDS, **kwargs: Any
) -> SpatialAwareFusion:
    """With a transformer block that does something: fresh ones are the identity."""
    torch.manual_seed(0)
    module = SpatialAwareFusion(features, grids, **{"width": 8, "heads": 2, **kwargs})
    for name in ("out.weight", "mlp.2.weight"):
        nn.init.normal_(module.block.get_parameter(name))
    return module


def maps(
    features: tuple[int, ...] = FEATURES, grids: tuple[tuple[int, ...], ...] = GRIDS, batch: int = 2
) -> list[torch.Tensor]:
    return [torch.randn(batch, f, *g) for f, g in zip(features, grids, strict=True)]


def test_windows_are_as_many_as_wanted_and_at_least_two_voxels_wide() -> None:
    assert windows_per_axis((8, 9, 7, 5, 3, 2, 1), 4) == (4, 4, 3, 2, 1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3))
def test_every_voxel_is_found_in_the_window_that_owns_it(axes: list[tuple[int, int]]) -> None:
    grid, windows = [n for n, _ in axes], [min(n, w) for n, w in axes]
    index, place = cut_windows(grid, windows)
    assert index.shape == (
        math.prod(windows),
        math.prod(-(-n // w) for n, w in zip(grid, windows, strict=True)),
    )
    assert index.flatten()[place].tolist() == list(range(math.prod(grid)))
    for voxel, at in zip(
        torch.cartesian_prod(*[torch.arange(n) for n in grid]).view(-1, len(grid)).tolist(),
        place.tolist(),
        strict=True,
    ):
        owner = 0
        for i, n, w in zip(voxel, grid, windows, strict=True):
            owner = owner * w + i * w // n
        assert at // index.shape[1] == owner


def test_windows_that_fit_are_a_partition() -> None:
    index, _ = cut_windows((4, 6), (2, 3))
    assert index.tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]] and sorted(index.flatten().tolist()) == list(
        range(24)
    )


def test_e_is_at_the_finest_grid_with_few_enough_voxels() -> None:
    for limit, grid in ((10_000, (8, 8, 12)), (96, (4, 4, 6)), (95, (4, 2, 3)), (1, (4, 2, 3))):
        module = fusion(max_tokens=limit)
        assert module.grid == grid and module(maps()).shape == (2, 8, *grid)


@pytest.mark.parametrize(
    "grids",
    [
        ((12, 16), (6, 8), (3, 4)),
        ((5, 7, 9), (5, 4, 5), (3, 2, 3)),
        ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
        ((4, 5),),
    ],
)
def test_any_grid_is_fused_in_2d_and_3d(grids: tuple[tuple[int, ...], ...]) -> None:
    features = FEATURES[: len(grids)]
    module = fusion(features, grids)
    e = module(maps(features, grids))
    assert e.shape == (2, 8, *grids[0]) and torch.isfinite(e).all() and (e >= 0).all()
    e.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


def test_a_fresh_fusion_is_convolutions_of_the_resized_scales() -> None:
    torch.manual_seed(0)
    module, x = SpatialAwareFusion(FEATURES, GRIDS, width=8, max_tokens=96), maps()

    def conv(x: torch.Tensor, linear: Any) -> torch.Tensor:
        return F.conv3d(x, linear.weight[..., None, None, None], linear.bias)

    scales = [F.avg_pool3d(x[0], 2), x[1], x[2]]
    projected = [conv(s, p) for s, p in zip(scales, module.project, strict=True)]
    joint = torch.cat([F.interpolate(p, GRIDS[1], mode="trilinear") for p in projected], 1)
    expected = F.relu(F.instance_norm(conv(joint, module.merge)))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


def test_a_window_sees_the_same_place_at_all_scales_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = ((4, 6), (4, 6), (4, 6))  # nothing is resized, and without the norm nothing else mixes voxels
    module = fusion(FEATURES, grids, windows=2)
    monkeypatch.setattr(module.norm, "forward", lambda joint: joint)
    x = maps(FEATURES, grids)
    before = module(x)
    x[2] = x[2].clone()
    x[2][0, :, 1, 4] += 1  # rows 0-1, columns 3-5: the second of 2 x 2 windows
    changed = (module(x) - before).abs().amax(1) > 0
    assert (
        changed[0, :2, 3:].all()
        and not changed[0, 2:].any()
        and not changed[0, :, :3].any()
        and not changed[1].any()
    )


def test_the_transformer_sees_the_tokens_of_corresponding_windows_of_every_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every scale paints each voxel with the number of its window: then every sequence is of one colour."""
    module = fusion(windows=2)
    seen: dict[str, torch.Tensor] = {}
    paint = []
    for grid in GRIDS:
        index, place = cut_windows(grid, module.windows)
        paint.append((place // index.shape[1]).view(1, 1, *grid).float())
    for name, p in module.project.named_parameters():
        nn.init.constant_(p, float(name.endswith("weight")))
    block = module.block.forward

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        seen["tokens"] = tokens
        return block(tokens)

    monkeypatch.setattr(module.block, "forward", forward)
    module([p.expand(1, f, *p.shape[2:]) / f for p, f in zip(paint, FEATURES, strict=True)])
    count = math.prod(module.windows)
    assert module.windows == (2, 1, 1) and seen["tokens"].shape == (count, (768 + 96 + 24) // count, 8)
    torch.testing.assert_close(
        seen["tokens"], torch.arange(float(count))[:, None, None].expand_as(seen["tokens"])
    )


def test_bfloat16_stays_near_float32() -> None:
    module, x = fusion(), maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e = module(x)
    assert e.dtype == torch.float32
    torch.testing.assert_close(e, module(x), atol=0.1, rtol=0.1)


def test_buffers_are_not_part_of_the_state() -> None:
    assert not [k for k in fusion().state_dict() if "index" in k or "place" in k]
