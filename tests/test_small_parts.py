"""Ramps, moving averages, banks, history, random states."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.banks import ClassBank
from nnssl.ema import copy_weights, ema_update, frozen_copy
from nnssl.method import full_resolution, inference, split_batch
from nnssl.schedules import gaussian_ramp
from nnssl.training import bfloat16_check as precision
from nnssl.training.history import History
from nnssl.training.memory_format import channels_last
from nnssl.training.optimizer_step import OptimizationStep
from nnssl.training.randomness import restore_rng, rng_state, seed_everything
from tests.building import FEATURES, Task


def test_gaussian_ramp_has_its_closed_form_and_stays_at_one() -> None:
    assert gaussian_ramp(0.0, 0.4) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.2, 0.4) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(0.4, 0.4) == gaussian_ramp(1.0, 0.4) == gaussian_ramp(0.0, 0.0) == 1.0


def test_teacher_equals_the_closed_form_average_after_three_steps() -> None:
    student = Task(dim=2).network()  # its state_dict names shared tensors several times
    teacher = frozen_copy(student)
    start = [p.clone() for p in teacher.parameters()]
    steps = []
    for i in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * (i + 1))
        steps.append([p.clone() for p in student.parameters()])
        ema_update(teacher, student, 0.9)
    for t, s0, s1, s2, s3 in zip(teacher.parameters(), start, *steps, strict=True):
        torch.testing.assert_close(t.data, 0.9**3 * s0 + 0.1 * (0.81 * s1 + 0.9 * s2 + s3))


def test_buffers_are_copied_not_averaged() -> None:
    student = nn.BatchNorm2d(2)
    teacher = frozen_copy(student)
    student(torch.randn(4, 2, 3, 3) + 5)
    ema_update(teacher, student, 0.5)
    assert torch.equal(teacher.running_mean, student.running_mean) and teacher.num_batches_tracked == 1


def test_a_frozen_copy_is_detached_from_its_source_and_can_be_remade() -> None:
    source = nn.Linear(2, 2)
    copied = frozen_copy(source)
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        source.weight += 1
    assert not torch.equal(copied.weight, source.weight)
    copy_weights(copied, source)
    assert torch.equal(copied.weight, source.weight)


def test_bank_keeps_the_last_rows_per_class() -> None:
    bank = ClassBank(2, 4, 1)
    rng, kept = np.random.default_rng(0), ([], [])
    for _ in range(20):
        rows = torch.from_numpy(rng.normal(size=(2, 3, 1))).float()
        valid = torch.from_numpy(rng.random((2, 3)) < 0.5)
        bank.push(rows, valid)
        for k in range(2):
            kept[k].extend(r.item() for r, v in zip(rows[k], valid[k], strict=True) if v)
    for k in range(2):
        assert sorted(bank.rows[k].flatten().tolist()) == pytest.approx(sorted(kept[k][-4:]))
    mean, known = bank.mean()
    assert known.all() and mean[0].item() == pytest.approx(np.mean(kept[0][-4:]), abs=1e-6)


def test_bank_mean_counts_filled_rows_only() -> None:
    bank = ClassBank(2, 8, 2)
    bank.push(torch.ones(2, 3, 2), torch.tensor([[True, True, False], [False, False, False]]))
    mean, known = bank.mean()
    assert (
        mean[0].tolist() == [1, 1]
        and known.tolist() == [True, False]
        and bank.filled().sum(1).tolist() == [2, 0]
    )


def test_bank_refuses_more_rows_than_it_holds() -> None:
    with pytest.raises(ValueError, match="at most 2 embeddings"):
        ClassBank(1, 2, 1).push(torch.ones(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))


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


def test_history_writes_one_row_per_epoch_and_rewinds(tmp_path: Path) -> None:
    history = History()
    for epoch in (0, 1, 2, 1):  # the last: continued from a checkpoint after epoch 0
        history.add(epoch, 0.01, {"loss/a": epoch / 3, "loss/b": 1.0}, {"a": 1.0, "b": 0.5})
    history.write(str(tmp_path))
    with open(tmp_path / "losses.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["epoch", "lr", "loss/a", "loss/b", "weight/a", "weight/b"]
    assert [r["epoch"] for r in rows] == ["0", "1"] and float(rows[1]["loss/a"]) == pytest.approx(
        1 / 3, abs=1e-9
    )
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert history.describe() == "losses a 0.3333 (weight 1), b 1.0000 (weight 0.5)"


def test_diagnostics_are_columns_and_end_the_line_of_the_log(tmp_path: Path) -> None:
    history = History()
    history.add(0, 0.01, {"loss/a": 0.5, "diagnostic/share": 0.25}, {"a": 1.0})
    history.write(str(tmp_path))
    assert (tmp_path / "losses.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == "epoch,lr,loss/a,diagnostic/share,weight/a"
    assert history.describe() == "losses a 0.5000 (weight 1); share 0.25"


def test_autocast_keeps_no_cast_weights_from_a_pass_without_gradient() -> None:
    layer = nn.Linear(3, 2)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), None, "bfloat16", torch.device("cpu"), 3
    )
    with step.autocast():
        assert (
            not torch.is_autocast_cache_enabled()
        )  # older releases of PyTorch lose the gradient below otherwise
        with torch.no_grad():
            layer(torch.ones(1, 3))
        loss = layer(torch.ones(1, 3)).float().sum()
    assert step.take(loss)
    assert all(p.grad is not None for p in layer.parameters())


def test_a_step_that_the_search_for_a_scale_leaves_out_changed_no_weight() -> None:
    layer = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124)
    step = OptimizationStep(
        torch.optim.SGD(layer.parameters(), 0.1), scaler, "float16", torch.device("cpu"), 3
    )
    before, taken = layer.weight.clone(), []
    for _ in range(6):
        step.optimizer.zero_grad()
        taken.append(step.take(100 * layer(torch.ones(1, 3)).sum()))
        assert torch.equal(before, layer.weight) != taken[-1]
        before = layer.weight.clone()
    assert taken[0] is False and True in taken
    assert step.skipped == 0


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("task", [Task(), Task(dim=2)])
def test_wrong_bfloat16_gradients_are_refused_with_their_stage(
    task: Task, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, right = task.network(), precision.weight_gradient
    state = rng_state()
    monkeypatch.setattr(
        precision, "weight_gradient", lambda x, w, g: right(x.float(), w.float(), g.float()).to(x.dtype)
    )
    precision.refuse_wrong_bfloat16(network, task.patch_size, last)
    assert torch.equal(state["torch"], rng_state()["torch"])

    def wrong(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        assert all(v.is_contiguous(memory_format=channels_last(task.dim)) == last for v in (x, w))
        found = right(x.float(), w.float(), g.float())
        return found * float("nan") if x.dtype == torch.bfloat16 and x.shape[1] == FEATURES[2] else found

    monkeypatch.setattr(precision, "weight_gradient", wrong)
    with pytest.raises(
        RuntimeError, match=r"stage 2 of the plan, .*3 x 4 voxels and 8 channels\. Set .amp. to .float32."
    ):
        precision.refuse_wrong_bfloat16(network, task.patch_size, last)


def test_the_gradient_that_bfloat16_is_compared_with_is_that_of_a_convolution() -> None:
    layer, x = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1), bias=False), torch.randn(2, 3, 4, 5, 6)
    upstream = torch.randn(2, 3, 4, 5, 6)
    layer(x).backward(upstream)
    torch.testing.assert_close(
        precision.weight_gradient(x, layer.weight.detach().clone(), upstream), layer.weight.grad
    )


def test_random_states_are_restored() -> None:
    seed_everything(3)
    state = rng_state()
    drawn = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    restore_rng([state])
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == drawn
    restore_rng([state], rank=1)  # a rank that did not exist then: nothing happens
