from __future__ import annotations

import numpy as np
import pytest

from nnssl.data.mirroring import MOST_CASES, allowed_axes, class_offsets, offsets_of, worst


def phantom(offset: tuple[float, float, float], seed: int = 0, size: int = 24) -> np.ndarray:
    """Two overlapping balls, the second moved by `offset` voxels and a little noise; -1 outside the body."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1).astype(float)
    center = np.full(3, size / 2) + rng.uniform(-1, 1, 3)
    label = np.zeros((size,) * 3, dtype=np.int8)
    for value, shift in ((1, -np.array(offset) / 2), (2, np.array(offset) / 2)):
        label[np.linalg.norm(grid - center - shift, axis=-1) < 5] = value
    label[0] = -1
    label[-1] = 3  # ignored
    return label


def test_classes_side_by_side_forbid_the_axis_between_them() -> None:
    offsets = class_offsets([phantom((0, 9, 0), s) for s in range(8)], [1, 2], 3)
    assert allowed_axes(offsets, 3) == (0, 2)
    by_axis = {o.axis: o for o in offsets}
    assert by_axis[1].mean > 1 and by_axis[1].same == 1 and by_axis[1].cases == 8
    assert "axis 1: class 2 lies +" in str(by_axis[1]) and "100 % of 8 cases" in str(by_axis[1])


def test_the_side_must_be_the_same_in_almost_all_cases() -> None:
    sides = [1] * 19 + [-1]
    offsets = class_offsets([phantom((0, 9 * s, 0), i) for i, s in enumerate(sides)], [1, 2], 3)
    assert allowed_axes(offsets, 3) == (0, 2)  # 95 %
    offsets = class_offsets([phantom((0, 9 * s, 0), i) for i, s in enumerate(sides[1:])], [1, 2], 3)
    assert allowed_axes(offsets, 3) == (0, 1, 2)


def test_a_class_inside_another_forbids_nothing() -> None:
    label = phantom((0, 0, 0))
    label[10:13, 10:13, 10:13] = 1
    assert allowed_axes(class_offsets([label] * 3, [1, 2], 3), 3) == (0, 1, 2)


def test_one_class_or_one_case_shows_no_rule() -> None:
    assert class_offsets([phantom((0, 9, 0))], [1], 3) == []
    offsets = class_offsets([phantom((0, 9, 0))], [1, 2], 3)
    assert max(o.mean for o in offsets) > 1 and allowed_axes(offsets, 3) == (0, 1, 2)


def test_cases_without_one_of_the_classes_do_not_count() -> None:
    alone = phantom((0, 9, 0))
    alone[alone == 2] = 0
    empty = np.zeros_like(alone)
    offsets = class_offsets([alone, empty, *(phantom((0, 9, 0), s) for s in range(3))], [1, 2], 3)
    assert {o.cases for o in offsets} == {3} and allowed_axes(offsets, 3) == (0, 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_axes_are_those_of_the_preprocessed_volume(order: tuple[int, ...]) -> None:
    """nnU-Net transposes volumes; a 2D patch has their last two axes."""
    volumes = [phantom((9, 0, 0), s).transpose(order) for s in range(4)]
    moved = order.index(0)
    assert allowed_axes(class_offsets(volumes, [1, 2], 3), 3) == tuple(a for a in range(3) if a != moved)
    assert allowed_axes(class_offsets(volumes, [1, 2], 2), 2) == tuple(a for a in range(2) if a + 1 != moved)


def test_the_worst_pair_speaks_for_its_axis() -> None:
    offsets = class_offsets([phantom((2, 9, 0), s) for s in range(4)], [1, 2, 7], 3)
    assert [(o.axis, o.classes) for o in worst(offsets)] == [(0, (1, 2)), (1, (1, 2)), (2, (1, 2))]


class Dataset:
    def __init__(self) -> None:
        self.read: list[str] = []

    def load_case(self, name: str) -> tuple[None, np.ndarray, None, dict]:
        self.read.append(name)
        return None, phantom((0, 9, 0), int(name))[None], None, {}


class Labels:
    foreground_labels = (1, 2)


@pytest.mark.parametrize("n", [1, 3, 120])
def test_only_the_named_cases_are_read_and_not_too_many_of_them(n: int) -> None:
    dataset, names = Dataset(), [str(i) for i in range(n)]
    offsets = offsets_of(dataset, names, Labels(), 3)
    assert len(dataset.read) == len(set(dataset.read)) == min(n, MOST_CASES)
    assert set(dataset.read) <= set(names) and {o.cases for o in offsets} == {min(n, MOST_CASES)}
