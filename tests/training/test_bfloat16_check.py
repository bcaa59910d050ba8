from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl.training import bfloat16_check
from nnssl.training.memory_format import channels_last
from nnssl.training.randomness import rng_state
from tests.building import FEATURES, Task


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("task", [Task(), Task(dim=2)])
def test_wrong_bfloat16_gradients_are_refused_with_their_stage(
    task: Task, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, right = task.network(), bfloat16_check.weight_gradient
    state = rng_state()

    def accurate(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return right(x.float(), w.float(), g.float()).to(x.dtype)

    monkeypatch.setattr(bfloat16_check, "weight_gradient", accurate)
    bfloat16_check.refuse_wrong_bfloat16(network, task.patch_size, last)
    assert torch.equal(state["torch"], rng_state()["torch"])

    def wrong(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        assert all(v.is_contiguous(memory_format=channels_last(task.dim)) == last for v in (x, w))
        found = right(x.float(), w.float(), g.float())
        return found * float("nan") if x.dtype == torch.bfloat16 and x.shape[1] == FEATURES[2] else found

    monkeypatch.setattr(bfloat16_check, "weight_gradient", wrong)
    with pytest.raises(
        RuntimeError, match=r"stage 2 of the plan, .*3 x 4 voxels and 8 channels\. Set .amp. to .float32."
    ):
        bfloat16_check.refuse_wrong_bfloat16(network, task.patch_size, last)


def test_the_gradient_that_bfloat16_is_compared_with_is_that_of_a_convolution() -> None:
    layer, x = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1), bias=False), torch.randn(2, 3, 4, 5, 6)
    upstream = torch.randn(2, 3, 4, 5, 6)
    layer(x).backward(upstream)
    torch.testing.assert_close(
        bfloat16_check.weight_gradient(x, layer.weight.detach().clone(), upstream), layer.weight.grad
    )
