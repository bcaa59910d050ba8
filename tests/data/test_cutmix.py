from __future__ import annotations

import pytest
import torch

from nnssl.data.mixing import cutmix, cutmix_mask

CPU = torch.device("cpu")


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
