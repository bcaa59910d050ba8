from __future__ import annotations

import torch
from torch import nn

from nnssl.method import full_resolution, inference, split_batch


def test_inference_restores_modes_and_gradients() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    with inference(net):
        assert not net[0].training and not torch.is_grad_enabled()
    assert net[0].training and torch.is_grad_enabled()


def test_outputs_split_and_full_resolution_work_with_and_without_deep_supervision() -> None:
    scales = [torch.arange(3.0)[:, None], 10 * torch.arange(3.0)[:, None]]
    first, rest = split_batch(scales, 1)
    assert [f.flatten().tolist() for f in first] == [[0], [0]] and [r.flatten().tolist() for r in rest] == [
        [1, 2],
        [10, 20],
    ]
    assert full_resolution(scales) is scales[0] and full_resolution(scales[1]) is scales[1]
