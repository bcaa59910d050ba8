"""High-pass against the FFT, what the block does at its start and after, and where it goes in planned
networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnssl.networks.hf_mamba import (
    HighFrequencyMamba,
    box_radii,
    describe_hfm,
    hfm_stage,
    high_pass,
    insert_hfm,
)
from tests.building import gradient

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
PATCH, SPACING = (16, 24, 32), (3.0, 1.0, 1.0)


def planned(kind: str = "plain", dimensions: int = 3) -> nn.Module:
    """A small network as nnU-Net plans them: features 4, 8, 16, 16."""
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dimensions == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    settings = {
        "input_channels": 1,
        "n_stages": 4,
        "features_per_stage": [4, 8, 16, 16],
        "conv_op": conv,
        "kernel_sizes": 3,
        "strides": [s[-dimensions:] for s in STRIDES],
        "num_classes": 2,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    if kind == "plain":
        return PlainConvUNet(n_conv_per_stage=2, **settings)
    return ResidualEncoderUNet(n_blocks_per_stage=2, **settings)


def with_hfm(kind: str = "plain", dimensions: int = 3, **options: Any) -> Any:
    return insert_hfm(
        planned(kind, dimensions), PATCH[-dimensions:], SPACING[-dimensions:], max_tokens=200, **options
    )


def high_pass_by_fft(x: Tensor, radii: tuple[int, ...]) -> Tensor:
    """x without the DFT indices k with min(k, n - k) <= radius along every axis."""
    dims = tuple(range(2, x.ndim))
    inside = torch.ones(x.shape[2:], dtype=torch.bool)
    for axis, radius in enumerate(radii):
        index = torch.arange(x.shape[2 + axis])
        along = torch.minimum(index, len(index) - index) <= radius
        inside &= along.view([-1 if a == axis else 1 for a in range(len(radii))])
    return torch.fft.ifftn(torch.fft.fftn(x, dim=dims) * ~inside, dim=dims).real


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    axes=st.lists(
        st.tuples(st.integers(1, 13), st.sampled_from([0.5, 1.0, 2.5, 7.0])), min_size=2, max_size=3
    ),
    cutoff=st.floats(0.01, 0.99),
)
def test_high_pass_equals_zeroing_the_box_in_the_fft(axes: list[tuple[int, float]], cutoff: float) -> None:
    grid, spacing = [n for n, _ in axes], [mm for _, mm in axes]
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = high_pass(x, spacing, cutoff), high_pass_by_fft(x, box_radii(grid, spacing, cutoff))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, weight)[0] for y in (found, expected)), rtol=0, atol=1e-5
    )


def test_high_pass_on_strided_features_and_a_large_odd_grid_equals_the_fft() -> None:
    x = torch.randn(1, 4, 33, 47, 29).to(memory_format=torch.channels_last_3d)
    expected = high_pass_by_fft(x, box_radii(x.shape[2:], (1, 1, 1), 0.5))
    torch.testing.assert_close(high_pass(x, (1, 1, 1), 0.5), expected, rtol=0, atol=1e-5)


def test_high_pass_twice_is_high_pass_once_and_constants_vanish() -> None:
    x = torch.randn(2, 3, 10, 12)
    once = high_pass(x, (1, 1), 0.3)
    torch.testing.assert_close(high_pass(once, (1, 1), 0.3), once, rtol=0, atol=1e-5)
    assert high_pass(torch.full((1, 1, 9, 8), 5.0), (1, 1), 0.1).abs().max() < 1e-5


def test_high_pass_gradcheck() -> None:
    x = torch.randn(1, 2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: high_pass(v, (1, 1, 2), 0.4), x)


@pytest.mark.parametrize(
    ("grid", "spacing", "cutoff", "radii"),
    [
        ((24, 40, 48), (1, 1, 1), 0.25, (3, 5, 6)),  # a quarter of n // 2
        ((24, 40, 48), (1, 1, 2), 0.25, (3, 5, 12)),  # the same cycles per mm are twice the cycles per voxel
        ((8, 40, 40), (5, 1, 1), 0.25, (4, 5, 5)),  # more than this axis can hold: all of it
        ((7, 9, 1), (1, 1, 1), 0.5, (1, 2, 0)),
        ((10, 10), (0.3, 0.9), 1 / 3, (1, 5)),
    ],
)
def test_cutoff_is_a_frequency_in_cycles_per_mm(
    grid: tuple[int, ...], spacing: tuple[float, ...], cutoff: float, radii: tuple[int, ...]
) -> None:
    assert box_radii(grid, spacing, cutoff) == radii


@pytest.mark.parametrize("grid", [(6, 7, 5), (1, 8, 9), (1, 1, 1), (12, 13), (1, 5)])
def test_at_step_zero_the_block_is_the_identity_on_any_grid(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, 8, *grid)
    assert (HighFrequencyMamba(8, [1.0] * len(grid))(x) - x).abs().max() <= 1e-6


def test_the_gate_learns_first_and_then_everything_behind_it() -> None:
    torch.manual_seed(0)
    hfm, x, weight = HighFrequencyMamba(8, (1, 1, 1)), torch.randn(2, 8, 4, 5, 6), torch.randn(2, 8, 4, 5, 6)
    optimizer = torch.optim.SGD(hfm.parameters(), 0.1)
    (hfm(x) * weight).sum().backward()
    assert gradient(hfm.gate).abs().min() > 0
    assert all(gradient(p).abs().max() == 0 for p in hfm.mixers.parameters())
    optimizer.step()
    optimizer.zero_grad()
    (hfm(x) * weight).sum().backward()
    assert all(gradient(p).abs().max() > 0 for p in hfm.parameters())


def test_the_attention_depends_on_high_frequencies_only_and_not_on_their_scale() -> None:
    torch.manual_seed(0)
    hfm, x = HighFrequencyMamba(4, (1, 1), cutoff=0.4), torch.randn(1, 4, 16, 16)
    nn.init.constant_(hfm.gate, 0.5)
    wave = torch.cos(2 * torch.pi * 3 / 16 * torch.arange(16)).expand(16, 16)
    factor = hfm(x) / x
    assert (factor - 1).abs().max() > 1e-2
    torch.testing.assert_close(hfm(x + 7 + wave) / (x + 7 + wave), factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hfm(3 * x) / (3 * x), factor, rtol=1e-3, atol=1e-3)


def test_however_wide_the_gate_opens_features_are_doubled_at_most() -> None:
    torch.manual_seed(0)
    hfm, x = HighFrequencyMamba(8, (1.0, 1.0)), torch.randn(1, 8, 8, 12)
    nn.init.constant_(hfm.gate, 100.0)
    factor = hfm(x) / x
    assert factor.min() >= -1e-5 and factor.max() <= 2 + 1e-5 and factor.max() - factor.min() > 1.9


def test_a_voxel_reaches_far_along_every_axis_and_the_whole_grid() -> None:
    """Root mean square of the gradient over 24 initialisations, relative to the neighbours'."""
    grid, squares = (12, 20, 24), []
    for seed in range(24):
        torch.manual_seed(seed)
        hfm, x = HighFrequencyMamba(16, (1, 1, 1), reach=24, cutoff=0.01), torch.randn(1, 16, *grid)
        x.requires_grad_()
        nn.init.constant_(hfm.gate, 0.1)  # tanh nearly linear
        corner = (hfm(x)[0, :, 0, 0, 0] * torch.randn(16)).sum()
        squares.append(torch.autograd.grad(corner, x)[0][0].square().mean(0))
    gradient = torch.stack(squares).mean(0).sqrt()
    near = (gradient[1, 0, 0] + gradient[0, 1, 0] + gradient[0, 0, 1]) / 3
    assert gradient[0, 16, 0] / near > 0.03 and gradient[0, 0, 16] / near > 0.03
    assert gradient[6, 10, 12] / near > 0.01


def test_turning_the_features_over_turns_over_what_the_block_adds() -> None:
    """Every axis is scanned in both directions with shared weights."""
    hfm, x = HighFrequencyMamba(4, (1, 1, 1)), torch.randn(1, 4, 4, 5, 6)
    nn.init.ones_(hfm.gate)
    torch.testing.assert_close(hfm(x.flip((2, 3, 4))), hfm(x).flip((2, 3, 4)), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_keeps_the_dtype_of_the_features() -> None:
    hfm, x = HighFrequencyMamba(8, (1, 1, 1)), torch.randn(1, 8, 4, 6, 6)
    nn.init.constant_(hfm.gate, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = hfm(x), hfm(x.bfloat16())
    assert (y.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(z.float(), hfm(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cutoff", [0.0, 1.0, -0.2])
def test_a_cutoff_that_keeps_nothing_or_everything_is_refused(cutoff: float) -> None:
    with pytest.raises(ValueError, match="expected a fraction of the Nyquist frequency between 0 and 1"):
        HighFrequencyMamba(8, (1, 1), cutoff=cutoff)


@pytest.mark.parametrize(
    ("max_tokens", "stage"), [(16 * 24 * 32, 0), (16 * 24 * 32 - 1, 1), (1536, 1), (1535, 2), (191, 3)]
)
def test_the_stage_is_the_highest_resolution_with_few_enough_voxels(max_tokens: int, stage: int) -> None:
    assert hfm_stage(PATCH, STRIDES, max_tokens) == stage


def test_too_small_a_limit_names_the_smallest_that_works() -> None:
    with pytest.raises(ValueError, match="set max_tokens to at least 48"):
        hfm_stage(PATCH, STRIDES, 47)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_insertion_keeps_all_planned_parameters_and_the_planned_function(kind: str, dimensions: int) -> None:
    network = planned(kind, dimensions)
    x = torch.randn(2, 1, *PATCH[-dimensions:])
    before, keys = [y.detach() for y in network(x)], set(network.state_dict())
    inserted = insert_hfm(network, PATCH[-dimensions:], SPACING[-dimensions:], max_tokens=200)
    assert inserted is network
    for a, b in zip(network(x), before, strict=True):
        assert (a - b).abs().max() <= 1e-6
    new = set(network.state_dict()) - keys
    assert (
        keys <= set(network.state_dict())
        and new
        and all(f".stages.{dimensions - 1}." in key and ".hfm." in key for key in new)
    )
    missing = network.load_state_dict(planned(kind, dimensions).state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == new


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_gradients_reach_the_gate_at_once_and_the_mixer_as_soon_as_it_opens(kind: str) -> None:
    network = with_hfm(kind)
    blocks = [m for m in network.modules() if isinstance(m, HighFrequencyMamba)]
    assert len(blocks) == 1
    torch.stack([y.square().sum() for y in network(torch.randn(1, 1, *PATCH))]).sum().backward()
    assert gradient(blocks[0].gate).abs().max() > 0 and gradient(blocks[0].mixers[0].A_log).abs().max() == 0
    nn.init.ones_(blocks[0].gate)
    torch.stack([y.square().sum() for y in network(torch.randn(1, 1, *PATCH))]).sum().backward()
    assert all(gradient(p).abs().max() > 0 for p in blocks[0].parameters())


@pytest.mark.parametrize("tile", [(8, 16, 16), (16, 24, 32), (24, 40, 48)])
def test_one_network_takes_tiles_of_any_size_at_the_stage_planned(tile: tuple[int, ...]) -> None:
    network = with_hfm()
    block = network.encoder.stages[2].hfm
    nn.init.ones_(block.gate)
    seen: list[tuple[int, ...]] = []
    handle = block.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape[2:]))
    )
    assert network(torch.randn(1, 1, *tile))[0].shape[2:] == tile
    handle.remove()
    assert seen == [tuple(n // 4 for n in tile)]


def test_several_stages_get_blocks_of_their_own_width_and_spacing() -> None:
    network = with_hfm("residual", num_stages=2)
    blocks = {
        i: stage.blocks.hfm for i, stage in enumerate(network.encoder.stages) if hasattr(stage.blocks, "hfm")
    }
    assert {i: (len(block.gate), block.spacing) for i, block in blocks.items()} == {
        2: (16, (12, 4, 4)),
        3: (16, (12, 8, 8)),
    }


def test_a_copy_and_a_reload_give_the_same_outputs() -> None:
    network = with_hfm()
    nn.init.ones_(network.encoder.stages[2].hfm.gate)
    fresh, x = with_hfm(), torch.randn(1, 1, *PATCH)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(network(x)[0], copy.deepcopy(network)(x)[0]) and torch.equal(
        network(x)[0], fresh(x)[0]
    )


def test_the_description_says_where_the_block_is() -> None:
    assert describe_hfm(planned(), PATCH) == "no HFM"
    text = describe_hfm(with_hfm(), PATCH)
    assert (
        "encoder stage 2 (16 channels, 4 x 6 x 8 = 192 voxels of 12 x 4 x 4 mm" in text
        and "+-1, +-0, +-1" in text
    )


def test_what_cannot_take_an_hfm_is_refused() -> None:
    with pytest.raises(ValueError, match="PlainConvUNet or a ResidualEncoderUNet, found a Linear"):
        insert_hfm(nn.Linear(2, 2), PATCH, SPACING, max_tokens=200)
    with pytest.raises(ValueError, match="has an HFM already"):
        insert_hfm(with_hfm(), PATCH, SPACING, max_tokens=200)
    with pytest.raises(ValueError, match="num_stages is 3, expected 1 to 2: HFM starts at stage 2 of 4"):
        with_hfm(num_stages=3)
    with pytest.raises(ValueError, match="differ in their number of axes"):
        insert_hfm(planned(), PATCH[1:], SPACING, max_tokens=200)


@pytest.mark.nightly
def test_the_block_compiles_as_one_graph() -> None:
    hfm, x = HighFrequencyMamba(4, (1, 1)), torch.randn(1, 4, 5, 6, requires_grad=True)
    nn.init.ones_(hfm.gate)
    compiled = torch.compile(hfm, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(hfm(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
