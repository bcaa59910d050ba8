from __future__ import annotations

import math
from typing import TypeVar

import pytest
import torch
from torch import nn

from nnssl.networks.attention import AttentionBlock, CrossSampleAttention
from tests.building import gradient

M = TypeVar("M", bound=nn.Module)


def opened(module: M, seed: int = 0) -> M:
    """With random weights everywhere, also where a fresh module has zeros."""
    torch.manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double()


def by_definition(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Sequence after sequence, head after head, with the matrix of attention written out."""
    assert isinstance(block, AttentionBlock)
    width = tokens.shape[-1] // block.heads
    results = []
    for x in tokens:
        q, k, v = block.qkv(block.norm_attention(x)).chunk(3, dim=-1)
        heads = []
        for h in range(block.heads):
            part = slice(h * width, (h + 1) * width)
            matrix = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
            heads.append(matrix / matrix.sum(1, keepdim=True) @ v[:, part])
        x = x + block.out(torch.cat(heads, dim=-1))
        results.append(x + block.mlp(block.norm_mlp(x)))
    return torch.stack(results)


def test_the_block_equals_its_definition() -> None:
    block = opened(AttentionBlock(8, heads=2, mlp_ratio=1.5))
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), by_definition(block, tokens))


def test_a_fresh_block_is_the_identity_and_its_last_layers_get_gradient() -> None:
    block, tokens = AttentionBlock(8), torch.randn(2, 5, 8)
    out = block(tokens)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    assert gradient(block.out.weight).any() and gradient(block.get_parameter("mlp.2.weight")).any()


def test_tokens_have_no_order_and_sequences_do_not_see_each_other() -> None:
    block = opened(AttentionBlock(8))
    tokens, order = torch.randn(2, 6, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])
    torch.testing.assert_close(block(tokens)[:1], block(tokens[:1]))


def test_one_token_needs_no_attention() -> None:
    block = opened(AttentionBlock(8))
    assert torch.isfinite(block(torch.randn(3, 1, 8, dtype=torch.float64))).all()


@pytest.mark.parametrize(
    ("heads", "ratio", "message"), [(3, 2.0, "heads"), (0, 2.0, "heads"), (4, 0.01, "mlp_ratio")]
)
def test_impossible_widths_are_refused(heads: int, ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionBlock(8, heads, ratio)


@pytest.mark.parametrize("grid", [(3, 2), (2, 3, 2), (1, 1, 1)])
def test_cross_sample_attention_looks_at_voxels_then_at_samples(grid: tuple[int, ...]) -> None:
    cma = opened(CrossSampleAttention(8, heads=2))
    features = torch.randn(3, 8, *grid, dtype=torch.float64)
    voxels = by_definition(cma.voxels, features.flatten(2).mT)
    expected = torch.stack(
        [by_definition(cma.samples, voxels[:, i][None])[0] for i in range(math.prod(grid))], dim=-1
    )
    torch.testing.assert_close(cma(features), expected.view_as(features))


def test_cross_sample_attention_is_the_identity_in_eval_mode() -> None:
    cma, features = opened(CrossSampleAttention(8)), torch.randn(3, 8, 2, 2, dtype=torch.float64)
    assert not torch.equal(cma(features), features) and torch.equal(cma.eval()(features), features)


def test_another_sample_changes_the_result_in_training() -> None:
    cma, features = opened(CrossSampleAttention(8)), torch.randn(2, 8, 2, 2, dtype=torch.float64)
    other = features.clone()
    other[1, :, 0, 0] += torch.randn(8)
    assert not torch.allclose(cma(features)[0], cma(other)[0])


@pytest.mark.parametrize("length", [24, 1100])
def test_bfloat16_stays_near_float32_and_keeps_its_dtype(length: int) -> None:
    block, tokens = opened(AttentionBlock(8)).float(), torch.randn(2, length, 8)
    expected, results = block(tokens), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(block(tokens))
    half = block.bfloat16()(tokens.bfloat16())
    assert half.dtype == torch.bfloat16
    for result in (*results, half.float()):
        assert (result - expected).norm() < 0.02 * expected.norm()
