from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnssl.networks.features import check_planned, decode, encode
from nnssl.networks.time_conditioned import TimeConditionedUNet, sinusoidal_embedding
from tests.building import FEATURES, Task, gradient

TASKS = [Task(), Task(dim=2), Task(residual=True), Task(deep_supervision=False)]


def as_list(outputs: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize("task", TASKS)
def test_walking_the_network_gives_its_own_outputs(task: Task) -> None:
    net, x = task.network(), torch.randn(2, 1, *task.patch_size)
    outputs, features = decode(net, encode(net, x))
    for ours, own in zip(as_list(outputs), as_list(net(x)), strict=True):
        assert torch.equal(ours, own)
    assert [f.shape[1] for f in features] == list(FEATURES[-2::-1]) and features[-1].shape[2:] == x.shape[2:]


@pytest.mark.parametrize("task", TASKS)
def test_at_the_start_the_step_has_no_influence_and_the_network_is_the_planned_one(task: Task) -> None:
    planned = task.network(inputs=3)
    net = TimeConditionedUNet(planned)
    image, noisy = torch.randn(2, 1, *task.patch_size), torch.randn(2, 2, *task.patch_size)
    for tau in (torch.tensor([0, 999]), torch.tensor([500, 3])):
        for ours, own in zip(
            as_list(net(noisy, tau, image)), as_list(planned(torch.cat([image, noisy], 1))), strict=True
        ):
            torch.testing.assert_close(ours, own)


def test_after_a_step_the_prediction_depends_on_tau_sample_by_sample() -> None:
    task = Task(deep_supervision=False)
    net = TimeConditionedUNet(task.network(inputs=3))
    image, noisy = torch.randn(2, 1, *task.patch_size), torch.randn(2, 2, *task.patch_size)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(noisy, torch.tensor([0, 999]), image).square().mean().backward()
    assert all(gradient(p).any() for n, p in net.modulations.named_parameters() if n.endswith("weight"))
    optimizer.step()
    a, b = net(noisy, torch.tensor([0, 999]), image), net(noisy, torch.tensor([0, 10]), image)
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_sinusoidal_embedding_has_its_closed_form() -> None:
    e = sinusoidal_embedding(torch.tensor([0, 7]), 4)
    assert e[0].tolist() == [0, 0, 1, 1]
    assert e[1].tolist() == pytest.approx(
        [math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)], abs=1e-5
    )


def test_other_networks_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"Linear is not a planned U-Net.*PlainConvUNet or ResidualEncoderUNet"
    ):
        check_planned(nn.Linear(1, 1))
