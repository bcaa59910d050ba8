from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnssl.networks.upsampling import (
    InterpolatingUpsample,
    as_interpolating,
    interpolate_instead_of_transposing,
)
from tests.building import Task


def test_convolving_before_interpolating_is_the_same_function() -> None:
    up = InterpolatingUpsample(nn.Conv3d, 6, 4, (1, 2, 3), bias=True).double()
    x = torch.randn(2, 6, 3, 4, 2, dtype=torch.float64)
    wide = F.interpolate(x, scale_factor=(1.0, 2.0, 3.0), mode="trilinear")
    assert wide.shape == (2, 6, 3, 8, 6)
    torch.testing.assert_close(up(x), F.conv3d(wide, up.conv.weight, up.conv.bias))


def test_constants_stay_constant_without_transposed_convolutions_checkerboard() -> None:
    up = InterpolatingUpsample(nn.Conv2d, 3, 2, (2, 2), bias=True)
    y = up(torch.ones(1, 3, 4, 5))
    torch.testing.assert_close(y, y[..., :1, :1].expand(1, 2, 8, 10))


@pytest.mark.parametrize("task", [Task(), Task(dim=2), Task(residual=True), Task(deep_supervision=False)])
def test_the_changed_network_has_the_outputs_of_the_planned_one(task: Task) -> None:
    planned, x = task.network(), torch.randn(2, 1, *task.patch_size)
    changed = interpolate_instead_of_transposing(task.network())
    assert not any(isinstance(m, (nn.ConvTranspose2d, nn.ConvTranspose3d)) for m in changed.modules())
    a, b = planned(x), changed(x)
    assert [y.shape for y in a] == [y.shape for y in b]
    sum(y.square().mean() for y in b).backward()
    assert all(p.grad is not None for m in changed.decoder.transpconvs for p in m.parameters())


def test_anisotropic_strides_are_kept() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    net = PlainConvUNet(
        1,
        3,
        [4, 6, 8],
        nn.Conv3d,
        3,
        strides,
        1,
        2,
        1,
        True,
        nn.InstanceNorm3d,
        {"affine": True},
        nonlin=nn.LeakyReLU,
    )
    x = torch.randn(1, 1, 4, 8, 12)
    expected = net(x).shape
    assert interpolate_instead_of_transposing(net)(x).shape == expected == (1, 2, 4, 8, 12)


def test_every_upsampling_is_smaller_by_the_kernel_of_the_transposed_convolution() -> None:
    old, new = Task().network(), interpolate_instead_of_transposing(Task().network())
    for a, b in zip(old.decoder.transpconvs, new.decoder.transpconvs, strict=True):
        assert b.conv.weight.numel() == a.weight.numel() // 8


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_the_weight_from_a_transposed_convolution_gives_its_mean_on_a_constant(
    stride: tuple[int, int, int],
) -> None:
    old = nn.ConvTranspose3d(3, 2, stride, stride, bias=False).double()
    new = InterpolatingUpsample(nn.Conv3d, 3, 2, stride, bias=False).double()
    new.conv.load_state_dict({"weight": as_interpolating(old.weight)})
    x = torch.randn(2, 3, 1, 1, 1, dtype=torch.float64).expand(2, 3, 2, 3, 4)
    mean = old(x).mean((2, 3, 4), keepdim=True)
    torch.testing.assert_close(new(x), mean.expand_as(new(x)))


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="planned U-Net"):
        interpolate_instead_of_transposing(nn.Sequential(nn.Conv3d(1, 2, 3)))
