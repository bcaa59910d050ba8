from __future__ import annotations

import pytest
import torch

from nnssl.labels import LabelSpace
from nnssl.losses.consistency import mse_consistency, sharpen

CLASSES, REGIONS = LabelSpace(3), LabelSpace(3, has_regions=True)


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 3, 2, 3, 4, generator=g, dtype=torch.float64).softmax(1) for _ in range(2))
    return p, q, (torch.rand(2, 1, 2, 3, 4, generator=g) > 0.4).double()


@pytest.mark.parametrize("masked", [True, False])
def test_mse_equals_the_loop(masked: bool) -> None:
    p, q, mask = example()
    if not masked:
        mask = torch.ones_like(mask)
    total = count = 0.0
    for b in range(2):
        for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
            if mask[(b, 0, *index)]:
                for k in range(3):
                    total += (p[(b, k, *index)].item() - q[(b, k, *index)].item()) ** 2
                    count += 1
    assert mse_consistency(p, q, mask if masked else None).item() == pytest.approx(total / count)


def test_opposite_decided_probabilities_of_two_classes_cost_one() -> None:
    p = torch.eye(2)[None]
    assert mse_consistency(p, p).item() == 0 and mse_consistency(p, p.flip(1)).item() == 1


def test_masked_voxels_get_no_gradient_and_an_empty_mask_is_a_differentiable_zero() -> None:
    p, q, mask = example()
    p.requires_grad_()
    mse_consistency(p, q, mask).backward()
    assert p.grad is not None and bool(((p.grad != 0) == (mask.expand_as(p) == 1)).all())
    p.grad = None
    loss = mse_consistency(p, q, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and p.grad is not None and not p.grad.any()


def test_gradients_are_right() -> None:
    p, q, mask = (x[:1, :, :1, :2, :2] for x in example())
    assert torch.autograd.gradcheck(
        lambda x, y: mse_consistency(x, y, mask), (p.requires_grad_(), q.requires_grad_())
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
def test_sharpening_is_the_normalised_power(temperature: float) -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1) ** (1 / temperature)
    torch.testing.assert_close(
        sharpen(logits, temperature, CLASSES), (p / p.sum(1, keepdim=True)).float(), atol=1e-6, rtol=1e-4
    )
    r = logits.sigmoid()
    powers = r ** (1 / temperature), (1 - r) ** (1 / temperature)
    torch.testing.assert_close(
        sharpen(logits, temperature, REGIONS), (powers[0] / sum(powers)).float(), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_sharpening_decides_without_changing_the_decision_and_stays_finite(labels: LabelSpace) -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    plain, sharp = labels.probabilities(logits), sharpen(logits, 0.1, labels)
    assert torch.equal(labels.harden(plain), labels.harden(sharp))
    assert (
        bool(((sharp - 0.5).abs() >= (plain - 0.5).abs() - 1e-6).all())
        if labels.has_regions
        else bool((sharp.amax(1) >= plain.amax(1)).all())
    )
    z = (1e4 * logits).requires_grad_()
    sharpen(z, 0.1, labels).square().sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
