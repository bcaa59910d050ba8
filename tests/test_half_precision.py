"""Every loss, bank and projector on numbers of half precision, up to the edge of float16: finite, with finite
gradients, and equal to the same on the same numbers in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnssl.banks import CaseBank, ClassBank, EmbeddingBank
from nnssl.labels import LabelSpace
from nnssl.losses.affinity import (
    agreement,
    cross_image_log_probabilities,
    cross_image_loss,
    prototype_similarity,
    prototypes,
    refine,
)
from nnssl.losses.anatomical import anatomical_contrast
from nnssl.losses.consistency import mse_consistency, sharpen
from nnssl.losses.contrastive import info_nce
from nnssl.losses.correlation import class_correlation, omni_correlation
from nnssl.losses.deep_supervision import deep_supervision_loss
from nnssl.losses.distillation import bank_distillation
from nnssl.losses.pseudo_label import confidence_mask, cross_entropy, cross_entropy_dice, soft_dice_loss
from nnssl.methods.action import Distillation, crop_cells, pool
from nnssl.methods.caml import CorrelationHead
from nnssl.methods.semi import Semi
from nnssl.methods.uamt import normalized_entropy
from nnssl.networks.heads import VoxelProjector, scale_gradient
from nnssl.networks.hf_mamba import HighFrequencyMamba, high_pass
from nnssl.sampling import gather_interpolated

HALF = (torch.float16, torch.bfloat16)
CLASSES, REGIONS = LabelSpace(3), LabelSpace(3, has_regions=True)
LOGITS, FEATURES = 6e4, 1e3  # largest magnitudes
SIZE = (4, 6, 8)


@dataclass(frozen=True)
class Inputs:
    """Numbers of one dtype, the same in each."""

    dtype: torch.dtype
    scale: float = 1.0  # of the stated largest magnitudes

    def logits(self, seed: int = 0) -> Tensor:
        return self._draw((2, 3, *SIZE), LOGITS, seed)

    def features(self, *shape: int, seed: int = 0) -> Tensor:
        return self._draw(shape, FEATURES, seed)

    def _draw(self, shape: tuple[int, ...], largest: float, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        x = largest * self.scale * (2 * torch.rand(shape, generator=g) - 1)
        # rounded to the coarser of both, so that float32 sees the same numbers
        return x.to(torch.bfloat16).to(self.dtype).requires_grad_()


def label(num: int = 3, without: int | None = None) -> Tensor:
    """(2, 3, S) zeros and ones; `without`: a class that is empty."""
    g = torch.Generator().manual_seed(7)
    drawn = torch.randint(num, (2, 1, *SIZE), generator=g)
    if without is not None:
        drawn[drawn == without] = 0
    return torch.zeros(2, 3, *SIZE).scatter_(1, drawn, 1.0)


def member(empty: bool) -> Tensor:
    """(3, N) bool."""
    return label(without=2 if empty else None).movedim(1, 0).flatten(1) > 0.5


MASK = (torch.rand((2, 1, *SIZE), generator=torch.Generator().manual_seed(3)) > 0.3).float()
VALID = torch.rand((3, 16), generator=torch.Generator().manual_seed(4)) > 0.3


def filled(empty: bool) -> Tensor:
    return VALID & (torch.arange(3) != 2)[:, None] if empty else VALID


def unit(x: Tensor) -> Tensor:
    """As projectors give them."""
    return nn.functional.normalize(x.float(), dim=-1).to(x.dtype)


def seeded(layer: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return layer()


def contrast(x: Inputs, empty: bool) -> Tensor:
    features = x.features(2 * 192, 8)
    return anatomical_contrast(
        lambda index: features[index],
        member(empty),
        torch.ones(3, 2 * 192, dtype=torch.bool),
        num_queries=8,
        num_negatives=16,
        num_candidates=32,
    )


def cross_image(x: Inputs, empty: bool) -> Tensor:
    region = torch.arange(24) // 12
    g, known = prototypes(x.features(2, 8, 24), member(empty)[None, :, :24].expand(2, -1, -1), region, 2)
    m = prototype_similarity(x.features(2, 8, 24, seed=1), g, region).unflatten(2, (1, 3)) / 0.1
    known = known[:, None]
    log_p = cross_image_log_probabilities(m, known)
    target = label()[:, None].flatten(3)[..., :24]
    return cross_image_loss(log_p, target * known.any(0)[None, :, :, None], agreement(m, known, 10.0))


def projected(x: Inputs, empty: bool) -> Tensor:
    return seeded(lambda: VoxelProjector(8, 4))(x.features(3, 16, 8)) * filled(empty)[..., None]


def correlated(x: Inputs, empty: bool) -> Tensor:
    head = seeded(lambda: CorrelationHead(8, 4))
    return head(x.features(3, 16, 8)) * filled(empty)[..., None]


def distilled(x: Inputs, empty: bool) -> Tensor:
    distillation = seeded(lambda: Distillation(16, 4, 6))
    distillation.bank.push(unit(torch.randn(3 if empty else 6, 4)), torch.arange(10, 13 if empty else 16))
    student, teacher = (pool(x.features(2, 8, *SIZE, seed=s)) for s in (0, 1))
    return distillation(student, teacher, torch.tensor([10, 20]), 0.1, 0.01, True, True)


def class_bank(x: Inputs, empty: bool) -> Tensor:
    bank = ClassBank(3, 20, 8)
    for seed in (0, 1):
        bank.push(x.features(3, 16, 8, seed=seed), filled(empty))
    return torch.cat([bank.mean()[0], bank.rows.flatten(0, 1)])


def case_bank(x: Inputs, empty: bool) -> Tensor:
    bank = CaseBank(3, 2, 20, 8)
    bank.push([1, 0], x.features(3, 2, 16, 8), filled(empty)[:, None].expand(-1, 2, -1))
    torch.manual_seed(0)
    return bank.sample(8)[0]


def embedding_bank(x: Inputs, empty: bool) -> Tensor:
    bank = EmbeddingBank(8, 8)
    bank.push(x.features(2 if empty else 12, 8), torch.arange(2 if empty else 12))
    return bank.embeddings


def mamba(x: Inputs, empty: bool) -> Tensor:
    block = seeded(lambda: HighFrequencyMamba(8, (1.0, 1.0, 1.0)))
    with torch.no_grad():
        block.gate.fill_(0.01)
    features = x.features(1, 8, *SIZE)
    return block(torch.zeros_like(features) * features if empty else features)


# name -> (inputs, whether a class is empty) -> tensor; gradients flow where inputs are asked for it
CASES: dict[str, Callable[[Inputs, bool], Tensor]] = {
    "cross-entropy": lambda x, e: cross_entropy(x.logits(), label(without=2 if e else None), CLASSES, MASK),
    "cross-entropy, regions": lambda x, e: cross_entropy(x.logits(), label(), REGIONS, MASK * (not e)),
    "CE + Dice": lambda x, e: cross_entropy_dice(x.logits(), label(without=2 if e else None), CLASSES, MASK),
    "CE + Dice, regions": lambda x, e: cross_entropy_dice(x.logits(), label() * (not e), REGIONS, MASK),
    "deep supervision": lambda x, e: deep_supervision_loss(
        [x.logits(), x.logits(1)[..., ::2, ::2, ::2]], label(), CLASSES, MASK * (not e), (0.7, 0.3)
    ),
    "soft Dice": lambda x, e: soft_dice_loss(
        CLASSES.probabilities(x.logits()), label(without=2 if e else None)
    ),
    "confidence": lambda x, e: confidence_mask(REGIONS.probabilities(x.logits()), 0.9, REGIONS),
    "consistency": lambda x, e: mse_consistency(
        CLASSES.probabilities(x.logits()), sharpen(x.logits(1), 0.1, CLASSES).detach(), MASK * (not e)
    ),
    "sharpening": lambda x, e: sharpen(x.logits(), 0.1, REGIONS if e else CLASSES),
    "entropy": lambda x, e: normalized_entropy(CLASSES.probabilities(x.logits()).detach(), CLASSES),
    "InfoNCE": lambda x, e: info_nce(
        unit(x.features(3, 8)).float().detach(),
        unit(x.features(3, 16, 8, seed=1)),
        unit(x.features(3, 16, 8, seed=2)),
        filled(e),
        filled(e),
        0.1,
    ),
    "correlation, rows": lambda x, e: omni_correlation(
        x.features(48, 8),
        x.features(48, 8, seed=1),
        x.features(48, 8, seed=2).detach(),
        filled(e).flatten(),
        filled(e).flatten(),
        0.1,
    ),
    "correlation, classes": lambda x, e: class_correlation(
        x.features(3, 16, 8),
        x.features(3, 16, 8, seed=1),
        x.features(3, 16, 8, seed=2).detach(),
        filled(e),
        filled(e),
        0.1,
    ),
    "distillation": lambda x, e: bank_distillation(
        unit(x.features(4, 8)),
        unit(x.features(4, 8, seed=1)),
        unit(x.features(6, 8, seed=2)),
        torch.rand((4, 6), generator=torch.Generator().manual_seed(0)) > (1.0 if e else 0.3),
        0.1,
        0.01,
        own_key=True,
        center=unit(x.features(1, 8, seed=3))[0].detach() / 2,
    ),
    "anatomical contrast": contrast,
    "refinement": lambda x, e: refine(
        x.features(2, 8, *SIZE), CLASSES.probabilities(x.logits()) * (not e), 20.0
    ),
    "cross-image": cross_image,
    "projector": projected,
    "projector and predictor": correlated,
    "projector, predictor, teacher, bank": distilled,
    "pooled features": lambda x, e: pool(x.features(2, 8, *SIZE)),
    "pooled crops": lambda x, e: crop_cells(x.logits(), (1, 1, 1)),
    "scaled gradient": lambda x, e: scale_gradient(x.features(2, 8), 0.01),
    "interpolated voxels": lambda x, e: gather_interpolated(
        x.features(2, 8, 2, 3, 4), torch.arange(0, 2 * 192, 5), SIZE
    ),
    "high pass": lambda x, e: high_pass(
        x.features(1, 4, 16, 16, 16) + FEATURES * x.scale, (1.0, 1.0, 1.0), 0.25
    ),
    "high-frequency Mamba": mamba,
    "bank of classes": class_bank,
    "bank of cases": case_bank,
    "bank of embeddings": embedding_bank,
}
# in units of the largest value: what computes in float32 on rounded inputs only rounds at the end
TOLERANCE = 2e-3
COARSE = {  # dtype -> name -> tolerance of what lies within a network and runs in half precision by intent
    torch.float16: {"high-frequency Mamba": 0.01, "interpolated voxels": 5e-3},
    torch.bfloat16: {"high-frequency Mamba": 0.05, "interpolated voxels": 0.02, "high pass": 0.01},
}


def evaluate(
    case: Callable[[Inputs, bool], Tensor], dtype: torch.dtype, scale: float, empty: bool, autocast: bool
) -> tuple[Tensor, list[Tensor]]:
    """Value, and gradients of its mean at what it drew."""
    drawn: list[Tensor] = []

    class Recorded(Inputs):
        def _draw(self, shape: tuple[int, ...], largest: float, seed: int) -> Tensor:
            drawn.append(super()._draw(shape, largest, seed))
            return drawn[-1]

    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype if dtype in HALF else torch.bfloat16, enabled=autocast):
        value = case(Recorded(dtype, scale), empty)
    gradients = []
    if value.requires_grad:
        found = torch.autograd.grad(value.float().mean(), drawn, allow_unused=True)
        gradients = [g.float() for g in found if g is not None]
    return value.detach().float(), gradients


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["largest", "ordinary"])
@pytest.mark.parametrize("empty", [False, True], ids=["all", "empty"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_equals_float32(name: str, empty: bool, scale: float) -> None:
    exact, exact_gradients = evaluate(CASES[name], torch.float32, scale, empty, False)
    assert torch.isfinite(exact).all()
    for dtype in HALF:
        tolerance = COARSE[dtype].get(name, TOLERANCE if dtype == torch.float16 else 4 * TOLERANCE)
        value, gradients = evaluate(CASES[name], dtype, scale, empty, True)
        assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients), dtype
        error, largest = (value - exact).abs().max().item(), exact.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), dtype
        assert len(gradients) == len(exact_gradients)
        for g, h in zip(gradients, exact_gradients, strict=True):
            assert (g - h).norm() <= 10 * tolerance * h.norm() + 1e-6, dtype


@pytest.mark.parametrize("dtype", HALF)
def test_confidences_of_many_voxels_stay_exact(dtype: torch.dtype) -> None:
    """Sums over the voxels of a class pass the largest float16."""
    certain = torch.full((1, 1, 400, 400), 0.75)
    member = torch.ones(1, 1, 400, 400, dtype=torch.bool)
    with torch.autocast("cpu", dtype=dtype):
        mean, present = Semi.class_confidence(certain, member)
    assert mean.item() == pytest.approx(0.75, rel=1e-5) and present.all()
