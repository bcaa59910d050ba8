from __future__ import annotations

import itertools

import pytest
import torch

from nnssl.orientations import Orientation, apply_each, random_orientation, square_planes


@pytest.mark.parametrize("dim", [2, 3])
def test_every_orientation_is_undone_exactly_and_all_of_a_cube_are_drawn(dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *[6] * dim)
    planes = list(itertools.combinations(range(dim), 2))
    seen = set()
    for _ in range(400):
        orientation = random_orientation(dim, planes, range(dim))
        moved = orientation.apply(x)
        assert torch.equal(orientation.undo(moved), x)
        seen.add(tuple(moved[0, 0].flatten()[:7].tolist()))
    assert len(seen) == {2: 8, 3: 48}[dim]  # the symmetries of square and cube


def test_turns_come_first_and_axes_count_from_the_last() -> None:
    x = torch.arange(4).view(2, 2)  # 0 1 / 2 3
    turned = Orientation(turns=((1, -2, -1),)).apply(x)
    assert turned.tolist() == [[1, 3], [0, 2]]
    assert Orientation(((1, -2, -1),), (-1,)).apply(x).tolist() == [[3, 1], [2, 0]]
    assert torch.equal(Orientation(((1, -2, -1),)).apply(x.expand(5, 1, 2, 2))[4, 0], turned)


def test_a_half_turn_keeps_the_shape_of_any_patch_and_is_two_mirrorings() -> None:
    x = torch.randn(1, 4, 6, 8)
    assert torch.equal(Orientation(((2, -2, -1),)).apply(x), x.flip(-1, -2))


def test_square_planes_have_equal_spacing_and_size() -> None:
    assert square_planes((8, 8, 8), (1, 1, 1), (0, 1, 2)) == [(0, 1), (0, 2), (1, 2)]
    assert square_planes((8, 8, 8), (3, 1, 1), (0, 1, 2)) == [(1, 2)]
    assert square_planes((4, 8, 8), (1, 1, 1.005), (2, 1, 0)) == [(1, 2)]
    assert square_planes((8, 8, 8), (1, 1, 1), (0, 2)) == [(0, 2)]
    assert square_planes((8, 8), (1, 1.1), (0, 1)) == []


def test_each_sample_gets_its_own() -> None:
    x = torch.randn(2, 1, 4, 4)
    moved = apply_each(x, [Orientation(), Orientation(mirrored=(-1,))])
    assert torch.equal(moved[0], x[0]) and torch.equal(moved[1], x[1].flip(-1))
