from __future__ import annotations

import math

import pytest
import torch

from nnssl.labels import LabelSpace
from nnssl.losses.deep_supervision import deep_supervision_loss
from nnssl.losses.pseudo_label import cross_entropy_dice

SIZES = ((4, 6, 8), (2, 3, 4))


def example(channels: int, regions: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    outputs = [torch.randn(2, channels, *s, dtype=torch.float64, requires_grad=True) for s in SIZES]
    if regions:
        target = (torch.rand(2, channels, *SIZES[0]) > 0.5).double()
    else:
        label = torch.randint(channels, (2, *SIZES[0]))
        target = torch.nn.functional.one_hot(label, channels).movedim(-1, 1).double()
    return outputs, target, torch.rand(2, 1, *SIZES[0], dtype=torch.float64)


def loop(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, regions: bool, stride: int
) -> torch.Tensor:
    """Voxel by voxel; of an even number of fine voxels the upper of the middle two is the nearest."""
    ce, count = torch.zeros(()).double(), torch.zeros(()).double()
    channels = logits.shape[1]
    overlap, found, wanted = (torch.zeros(channels).double() for _ in range(3))
    for b in range(len(logits)):
        for z in range(logits.shape[2]):
            for y in range(logits.shape[3]):
                for x in range(logits.shape[4]):
                    k, j, i = (stride * n + stride // 2 for n in (z, y, x))
                    t, m = target[b, :, k, j, i], mask[b, 0, k, j, i]
                    z_k = logits[b, :, z, y, x]
                    p = z_k.sigmoid() if regions else z_k.exp() / z_k.exp().sum()
                    if regions:
                        ce = ce - m * (t * p.log() + (1 - t) * (1 - p).log()).mean()
                    else:
                        ce = ce - m * p[t.bool()].log().sum()
                    count = count + m
                    overlap, found, wanted = overlap + m * p * t, found + m * p, wanted + m * t
    dice = (2 * overlap + 1e-5) / (found + wanted + 1e-5)
    return ce / count + 1 - dice[0 if regions else 1 :].mean()


@pytest.mark.parametrize(("channels", "regions"), [(2, False), (4, False), (2, True)])
def test_it_is_the_weighted_sum_of_the_loop_over_voxels(channels: int, regions: bool) -> None:
    outputs, target, mask = example(channels, regions)
    labels = LabelSpace(channels, regions)
    found = deep_supervision_loss(outputs, target, labels, mask, (2 / 3, 1 / 3))
    parts = [loop(o, target, mask, regions, s) for o, s in zip(outputs, (1, 2), strict=True)]
    expected = 2 / 3 * parts[0] + 1 / 3 * parts[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(v, outputs) for v in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_single_output_is_the_finest_scale() -> None:
    outputs, target, mask = example(3, False)
    labels = LabelSpace(3)
    found = deep_supervision_loss(outputs[0], target, labels, mask, (1.0,))
    assert found.item() == cross_entropy_dice(outputs[0], target, labels, mask).item()


def test_scales_of_weight_0_are_not_looked_at() -> None:
    outputs, target, mask = example(3, False)
    broken = [outputs[0], torch.full_like(outputs[1], math.nan)]
    assert deep_supervision_loss(broken, target, LabelSpace(3), mask, (1.0, 0.0)).isfinite()


def test_an_empty_mask_gives_a_differentiable_zero() -> None:
    outputs, target, mask = example(3, False)
    loss = deep_supervision_loss(outputs, target, LabelSpace(3), 0 * mask, (2 / 3, 1 / 3))
    assert loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(loss, outputs))


def test_too_few_weights_are_refused() -> None:
    outputs, target, mask = example(3, False)
    with pytest.raises(ValueError, match="2 scales need as many weights, found 1"):
        deep_supervision_loss(outputs, target, LabelSpace(3), mask, (1.0,))
