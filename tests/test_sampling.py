from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnssl.sampling import draw_members, gather_interpolated, gather_voxels, sample_members, top_members


def test_samples_are_members_and_differ_from_each_other() -> None:
    g = torch.Generator().manual_seed(0)
    member = torch.rand(4, 200, generator=g) > 0.7
    index, valid = sample_members(member, 30, g)
    for k in range(4):
        drawn = index[k][valid[k]].tolist()
        assert len(set(drawn)) == len(drawn) == min(30, int(member[k].sum())) and all(
            member[k, i] for i in drawn
        )


def test_rows_with_too_few_members_are_filled_with_invalid_places() -> None:
    member = torch.zeros(2, 10, dtype=torch.bool)
    member[0, 3] = True
    index, valid = sample_members(member, 4)
    assert valid.sum(1).tolist() == [1, 0] and index[0][valid[0]].item() == 3 and index.shape == (2, 4)


def test_asking_for_more_than_there_are_gives_all() -> None:
    index, valid = sample_members(torch.ones(1, 3, dtype=torch.bool), 10)
    assert sorted(index[0].tolist()) == [0, 1, 2] and valid.all()


def test_every_member_is_equally_likely() -> None:
    g = torch.Generator().manual_seed(1)
    member = torch.tensor([[True, False, True, True, False]])
    counts = torch.zeros(5)
    for _ in range(3000):
        counts[sample_members(member, 1, g)[0][0]] += 1
    assert counts[[1, 4]].sum() == 0 and (counts[[0, 2, 3]] / 1000 - 1).abs().max() < 0.15


def test_top_members_are_the_highest_of_the_members() -> None:
    score = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    index, valid = top_members(score, torch.tensor([[False, True, False, True]]), 3)
    assert index[0][valid[0]].tolist() == [1, 3]


def test_the_same_generator_draws_the_same() -> None:
    member = torch.ones(1, 50, dtype=torch.bool)
    a, b = (sample_members(member, 5, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_gathered_voxels_are_those_of_the_flattened_map() -> None:
    features = torch.randn(3, 4, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 3 * 60, (2, 7))
    flat = features.movedim(1, -1).reshape(-1, 4)
    assert torch.equal(gather_voxels(features, index), flat[index])
    assert torch.autograd.gradcheck(lambda f: gather_voxels(f, index), features)


@pytest.mark.parametrize(
    ("low", "size"),
    [
        ((3, 4, 5), (6, 8, 10)),
        ((2, 3, 4), (2, 12, 7)),
        ((1, 5, 2), (4, 5, 6)),
        ((3, 4), (12, 9)),
        ((4, 5), (4, 5)),
    ],
)
def test_interpolating_at_voxels_equals_gathering_the_interpolated_map(
    low: tuple[int, ...], size: tuple[int, ...]
) -> None:
    features = torch.randn(2, 3, *low, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 2 * torch.Size(size).numel(), (4, 50))
    dense = F.interpolate(
        features, size, mode="trilinear" if len(size) == 3 else "bilinear", align_corners=False
    )
    found, expected = gather_interpolated(features, index, size), gather_voxels(dense, index)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weight).sum(), features)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_draws_are_uniform_members_of_the_asked_rows() -> None:
    torch.manual_seed(0)
    member = torch.rand(3, 11) > 0.5
    member[1] = torch.arange(11) == 10
    row = torch.randint(0, 3, (300, 40))
    index = draw_members(member, row)
    assert index.shape == row.shape and member[row, index].all()
    for k in range(3):
        found = torch.bincount(index[row == k], minlength=11) / (row == k).sum()
        torch.testing.assert_close(found, member[k] / member[k].sum(), atol=0.03, rtol=0)


def test_rows_without_members_give_some_index() -> None:
    member = torch.zeros(2, 5, dtype=torch.bool)
    index = draw_members(member, torch.tensor([0, 1, 1]))
    assert ((index >= 0) & (index < 5)).all()
