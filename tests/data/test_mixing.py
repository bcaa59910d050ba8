from __future__ import annotations

import pytest
import torch

from nnssl.data.mixing import classmix_mask, cutmix, cutmix_mask, match_histograms
from nnssl.labels import LabelSpace

CPU = torch.device("cpu")


# boxes


@pytest.mark.parametrize("size", [(24, 40, 48), (64, 64)])
def test_boxes_are_boxes_of_the_stated_volume(size: tuple[int, ...]) -> None:
    mask = cutmix_mask(200, size, CPU, probability=1.0, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (200, 1, *size) and mask.dtype == torch.bool
    share = mask.flatten(1).float().mean(1)
    assert share.min() > 0.01 and share.max() < 0.45 and 0.15 < share.mean() < 0.27
    for m in mask[:20, 0]:
        extent = torch.stack([m.nonzero().amin(0), m.nonzero().amax(0) + 1])
        assert m.sum() == (extent[1] - extent[0]).prod()


def test_without_stretch_boxes_have_the_shape_of_the_patch_anywhere_inside() -> None:
    size, edge = (24, 42, 48), 2 / 3
    mask = cutmix_mask(
        200, size, CPU, 1.0, (edge**3, edge**3), stretch=0.0, generator=torch.Generator().manual_seed(0)
    )
    for axis, n in enumerate(size):
        inside = (
            mask[:, 0].movedim(axis + 1, -1).flatten(1, 2).any(1)
        )  # (200, n): where the box is along this axis
        assert (inside.sum(1) - round(edge * n)).abs().max() <= 1
        assert inside[:, 0].any() and inside[:, -1].any() and inside[:, n // 2].all()


def test_boxes_appear_with_the_stated_probability() -> None:
    mask = cutmix_mask(
        2000, (8, 8, 8), CPU, probability=0.3, volume=(0.2, 0.4), generator=torch.Generator().manual_seed(0)
    )
    assert mask.flatten(1).any(1).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert not cutmix_mask(10, (8, 8), CPU, probability=0.0).any()


def test_the_box_shows_the_next_sample_and_the_rest_the_own() -> None:
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    mixed = cutmix(x, mask)
    assert mixed[:, 0, 0, 0].tolist() == [2, 0, 1] and mixed[:, 0, 3, 3].tolist() == [0, 1, 2]


def test_the_same_generator_draws_the_same_boxes() -> None:
    a, b = (cutmix_mask(4, (9, 9), CPU, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


# classes


def members(label: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.stack([label == k for k in range(classes)])


@pytest.mark.parametrize(("classes", "pasted"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_neighbours_classes_are_pasted_whole(classes: int, pasted: int) -> None:
    torch.manual_seed(0)
    label = torch.stack([torch.arange(24).view(2, 3, 4) % classes] * 3)
    mask = classmix_mask(members(label, classes + 2))
    assert mask.shape == (3, 1, 2, 3, 4) and mask.dtype == torch.bool
    for sample, neighbour in ((0, 2), (1, 0), (2, 1)):
        shown = [mask[sample, 0][label[neighbour] == k] for k in range(classes)]
        assert all(s.all() or not s.any() for s in shown) and sum(int(s.all()) for s in shown) == pasted


def test_every_class_is_equally_likely() -> None:
    torch.manual_seed(0)
    label = torch.arange(4).expand(2, 4)
    counts = torch.stack([classmix_mask(members(label, 6))[0, 0].float() for _ in range(1000)]).sum(0)
    assert (counts / 500 - 1).abs().max() < 0.1


def test_pasted_voxels_bring_the_pasted_classes() -> None:
    """After mixing, a voxel inside the mask has the neighbour's label, and it is one of the drawn classes."""
    g = torch.Generator().manual_seed(1)
    label = torch.randint(4, (3, 5, 6), generator=g)
    mask = classmix_mask(members(label, 4), g)
    mixed, image = cutmix(label[:, None], mask), cutmix(10.0 * label[:, None], mask)
    assert torch.equal(image, 10.0 * mixed)
    for b in range(3):
        neighbour = label[b - 1]
        assert torch.equal(mixed[b, 0][mask[b, 0]], neighbour[mask[b, 0]]) and torch.equal(
            mixed[b, 0][~mask[b, 0]], label[b][~mask[b, 0]]
        )
        assert len(mixed[b, 0][mask[b, 0]].unique()) == 2


def test_overlapping_regions_are_pasted_whole() -> None:
    torch.manual_seed(0)
    regions = torch.zeros(2, 2, 8)
    regions[:, 0, 2:] = 1
    regions[:, 1, 5:] = 1
    member = LabelSpace(2, has_regions=True).classes(regions)  # complement, region, region within it
    seen = {tuple(classmix_mask(member)[0, 0].int().tolist()) for _ in range(50)}
    complement, outer, inner = (1, 1, 0, 0, 0, 0, 0, 0), (0, 0, 1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 1, 1, 1)
    unions = {
        tuple(max(a, b) for a, b in zip(x, y, strict=True))
        for x, y in ((complement, outer), (complement, inner), (outer, inner))
    }
    assert seen == unions


def test_a_single_sample_is_mixed_with_itself() -> None:
    label = torch.randint(3, (1, 4, 4))
    assert torch.equal(cutmix(label[:, None], classmix_mask(members(label, 3))), label[:, None])


def test_the_same_generator_draws_the_same_classes() -> None:
    label = torch.randint(5, (4, 9, 9))
    a, b = (classmix_mask(members(label, 5), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


# histograms


def test_every_voxel_takes_the_value_at_its_own_quantile() -> None:
    x, reference = torch.randn(2, 2, 5, 6, 7), torch.rand(2, 2, 5, 6, 7)
    matched = match_histograms(x, reference)
    assert torch.equal(matched.flatten(2).sort(-1).values, reference.flatten(2).sort(-1).values)
    assert torch.equal(matched.flatten(2).argsort(-1), x.flatten(2).argsort(-1))
    # another size: the reference's quantiles, as NumPy defines them up to a voxel
    small = match_histograms(x, reference[..., :2, :2, :2])
    wanted = torch.quantile(reference[0, 1, :2, :2, :2], 0.5, interpolation="nearest")
    middle = x[0, 1].flatten().argsort()[105]
    steps = reference[0, 1, :2, :2, :2].flatten().sort().values
    assert (
        abs((steps == wanted).nonzero().item() - (steps == small[0, 1].flatten()[middle]).nonzero().item())
        <= 1
    )


def test_equal_values_stay_equal_and_a_common_background_remains() -> None:
    x, reference = torch.zeros(1, 1, 100), torch.zeros(1, 1, 100)
    x[..., 60:], reference[..., 50:] = torch.rand(40) + 1, torch.rand(50) + 5
    matched = match_histograms(x, reference)
    assert (matched[..., :60] == 0).all() and (matched[..., 60:] > 5).all()


def test_a_large_patch_is_matched_by_some_of_its_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    x, reference = (torch.randn(1, 1, 48, 48, 48, generator=generator) for _ in range(2))
    exact = match_histograms(x, reference, most=10**9)
    assert (match_histograms(x, 3 * reference + 1) - (3 * exact + 1)).abs().mean() < 0.1
    assert match_histograms(x.bfloat16(), reference).dtype == torch.bfloat16
    planes = torch.arange(64.0).expand(1, 1, 64, 64, 64)  # the same in every line
    other = match_histograms(planes, planes.transpose(-1, -2) * 2, most=4096)
    assert (other - 2 * planes).abs().max() <= 4
