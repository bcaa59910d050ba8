from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from benchmarks.leaderboard.metrics import NAMES, largest_component, score, score_case

SPACING = (2.0, 1.0, 0.5)


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a neighbour over a face that is outside, one by one."""
    found = []
    for index in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                near = index.copy()
                near[axis] += step
                if not (0 <= near[axis] < mask.shape[axis]) or not mask[tuple(near)]:
                    found.append(tuple(index))
    return np.array(sorted(set(found)))


def reference(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    both, p, t = (prediction & truth).sum(), prediction.sum(), truth.sum()
    values = [2 * both / (p + t), both / (p + t - both)]
    for scale in ((1.0, 1.0, 1.0), spacing):
        distance = cdist(surface(prediction) * scale, surface(truth) * scale)
        there, back = distance.min(1), distance.min(0)
        values += [np.percentile(np.concatenate([there, back]), 95), there.mean()]
    return [float(v) for v in values]


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_those_of_every_pair_of_surface_voxels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prediction, truth = (generator.random((6, 7, 8)) < 0.15 for _ in range(2))
    assert score(prediction, truth, SPACING) == pytest.approx(reference(prediction, truth, SPACING))


def test_a_box_shifted_by_two_voxels_in_closed_form() -> None:
    shape = (12, 12, 12)
    truth = box(shape, slice(3, 7), slice(3, 7), slice(3, 7))
    moved = box(shape, slice(5, 9), slice(3, 7), slice(3, 7))
    values = dict(zip(NAMES, score(moved, truth, SPACING), strict=True))
    assert values["dice"] == pytest.approx(0.5)
    assert values["jaccard"] == pytest.approx(1 / 3)
    assert values["hd95_voxel"] == pytest.approx(2)
    assert values["hd95_mm"] == pytest.approx(4)


def test_asd_goes_from_the_prediction_to_the_truth() -> None:
    shape = (9, 9, 9)
    truth = box(shape, slice(1, 8), slice(1, 8), slice(1, 8))
    far = truth | box(shape, slice(0, 1), slice(0, 1), slice(0, 1))
    asd = NAMES.index("asd_voxel")
    found = score(far, truth, (1, 1, 1))[asd]
    assert found is not None and found > 0
    assert score(truth, far, (1, 1, 1))[asd] == pytest.approx(0)


def test_a_missed_structure_scores_zero_and_the_diagonal() -> None:
    truth, nothing = box((3, 4, 12), slice(0, 1), slice(0, 1), slice(0, 1)), np.zeros((3, 4, 12), bool)
    mm = float(np.linalg.norm([6.0, 4.0, 6.0]))
    assert score(nothing, truth, SPACING) == pytest.approx([0, 0, 13, 13, mm, mm])
    assert score(truth, nothing, SPACING) == pytest.approx([0, 0, 13, 13, mm, mm])
    assert score(nothing, nothing, SPACING) == [None] * 6


def test_largest_component_joins_over_corners_and_drops_the_rest() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = mask[0, 3, 3] = True
    kept = largest_component(mask)
    assert kept.sum() == 3
    assert not kept[0, 3, 3]
    assert largest_component(np.zeros((2, 2, 2), bool)).sum() == 0


def test_a_case_is_scored_label_by_label_with_and_without_the_largest_component() -> None:
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[1:4, 1:4, 1:4], truth[5:7, 5:7, 5:7] = 1, 2
    prediction = truth.copy()
    prediction[7, 0, 0] = 1  # an island, away from the structure
    table = score_case(prediction, truth, (1, 1, 1), [1, 2, 3])
    assert table["dice"] == [pytest.approx(2 * 27 / (2 * 27 + 1), abs=1e-5), 1.0, None]
    assert table["dice_lcc"] == [1.0, 1.0, None]
    assert table["hd95_voxel_lcc"] == [0.0, 0.0, None]
    assert table["asd_voxel"][0] > 0


def test_voxels_with_the_ignore_label_do_not_count() -> None:
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2] = 1
    truth[2] = 2  # beyond the labels: ignored
    prediction = np.ones_like(truth)
    prediction[3] = 0
    assert score_case(prediction, truth, (1, 1, 1), [1])["dice"] == [1.0]
