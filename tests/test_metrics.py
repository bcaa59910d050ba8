from __future__ import annotations

import numpy as np
import pytest
from medpy.metric import binary

from nnssl.metrics import interval, overlap, surface, surface_distances


def blobs(seed: int, shape: tuple[int, ...] = (9, 10, 11)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(9, 10, 11), (15, 14)])
def test_values_equal_medpy(seed: int, shape: tuple[int, ...]) -> None:
    p, t, spacing = blobs(seed, shape), blobs(seed + 10, shape), (2.5, 1.0, 0.7)[: len(shape)]
    assert overlap(p, t) == pytest.approx((binary.dc(p, t), binary.jc(p, t)))
    voxel, mm = surface_distances(p, t, [(1.0,) * len(shape), spacing])
    assert voxel == pytest.approx((binary.hd95(p, t), binary.asd(p, t)))
    assert mm == pytest.approx((binary.hd95(p, t, spacing), binary.asd(p, t, spacing)))


def test_the_surface_is_at_the_edge_of_the_mask_and_of_the_array() -> None:
    mask = np.zeros((7, 7), bool)
    mask[:5, 1:6] = True
    found = {tuple(map(int, index)) for index in surface(mask)}
    inner = {(y, x) for y in range(1, 4) for x in range(2, 5)}
    assert found == {(y, x) for y in range(5) for x in range(1, 6)} - inner


def test_empty_masks() -> None:
    full, empty = np.ones((3, 4), bool), np.zeros((3, 4), bool)
    assert overlap(full, empty) == (0, 0) and np.isnan(overlap(empty, empty)).all()
    assert surface_distances(full, empty, [(1, 1)])[0] == (5, 5)
    assert np.isnan(surface_distances(empty, empty, [(1, 1)])[0]).all()


def test_the_interval_holds_the_mean_and_shrinks_with_the_cases() -> None:
    gap = np.random.default_rng(0).normal(0.1, 0.05, 40)
    low, high = interval(gap)
    assert low < gap.mean() < high and 0 < high - low < 0.05
    assert np.subtract(*interval(gap[:10])[::-1]) > high - low
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)
