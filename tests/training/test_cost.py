from __future__ import annotations

import functools
import gc
import importlib
import os
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.speed.cost import SMALL_2D, SMALL_3D, measured, plan
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.networks import hf_mamba
from nnssl.training.cost import CARDS, GIB, Cost, Ledger, Rehearsal, Trial, predict, try_steps

TINY = SMALL_3D | {"patch": [16, 32, 32], "features": [4, 6, 8, 8, 8]}
SETTINGS = (TINY, SMALL_2D | {"features": [4, 6, 8, 8, 8]})
MIB = 2**20


def trainer(name: str) -> Any:
    return getattr(importlib.import_module(f"nnssl_trainers.{name}"), name)


def cost(name: str, setting: dict[str, Any] = TINY, device: str = "cpu", **nnssl: Any) -> Cost:
    return predict(trainer(f"nnUNetTrainer{name}"), *plan(setting, **nnssl), device)


@functools.cache
def supervised_flops(setting: int, device: str) -> int:
    return cost("Supervised", SETTINGS[setting], device).flops


def test_ledger_counts_storage_once_and_forgets_what_is_gone() -> None:
    with Ledger() as ledger:
        x = torch.zeros(MIB)
        view = x[10:].view(2, -1)
        assert ledger.live == 4 * MIB
        y = (x + 1) * 2  # of x + 1 nothing is left
        assert (ledger.live, ledger.peak) == (8 * MIB, 12 * MIB)
        del y
        x.mul_(2)
        assert ledger.live == 4 * MIB
        del x
        assert ledger.live == 4 * MIB  # the view keeps it
        del view
        gc.collect()
        assert ledger.live == 0
        ledger.restart()
        assert ledger.peak == 0


def test_ledger_counts_what_autograd_keeps_and_the_arithmetic() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x = torch.zeros(2, 3, 8, 8)
    with Ledger() as ledger:
        y = conv(x)
        forward = 2 * 2 * 5 * 8 * 8 * 3 * 9
        assert ledger.flops == forward and ledger.live == 4 * y.numel()
        ledger.restart()
        y.sum().backward()
        assert ledger.flops == forward  # of the weight alone: x wants no gradient
        assert conv.weight.grad is not None and ledger.live >= 4 * (y.numel() + conv.weight.numel())


@pytest.mark.parametrize("name", ["Supervised", "CAML"])
def test_fake_steps_cost_what_real_ones_cost(name: str) -> None:
    predicted = cost(name)
    with Ledger() as ledger:
        rehearsal = Rehearsal(trainer(f"nnUNetTrainer{name}"), *plan(TINY), "cpu")
        rehearsal.step()
        ledger.restart()
        rehearsal.step()
    assert predicted.peak == pytest.approx(ledger.peak, rel=0.02)
    assert predicted.flops == pytest.approx(ledger.flops, rel=0.02)
    kept = [*rehearsal.method.parameters(), *rehearsal.method.buffers()]
    assert predicted.parameters == pytest.approx(sum(x.numel() * x.element_size() for x in kept), rel=0.01)
    trained = sum(p.numel() * 4 for p in rehearsal.method.parameters() if p.requires_grad)
    assert predicted.fixed > predicted.parameters + 1.9 * trained  # gradient and momentum


def of_nnunet() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")}


def test_prediction_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    before, kept = of_nnunet(), hf_mamba._kept_fourier_basis.cache_info()
    first = cost("DiffCL", DiffCL={"hfm_max_tokens": 512})
    assert of_nnunet() == before and hf_mamba._kept_fourier_basis.cache_info() == kept
    assert type(torch.zeros(1)) is torch.Tensor and float(torch.ones(2).sum()) == 2
    assert cost("DiffCL", DiffCL={"hfm_max_tokens": 512}) == first


def test_keys_of_the_plans_file_count() -> None:
    whole = cost("CPS", device="cuda")
    second = cost("CPS", device="cuda", gradient_checkpointing="second")
    every = cost("CPS", device="cuda", gradient_checkpointing="all")
    assert whole.peak > second.peak > every.peak and whole.flops < second.flops < every.flops
    assert cost("CPS", device="cuda", unlabeled_batch_size=1).peak < whole.peak
    assert cost("CPS", device="cuda", amp="float32").peak > 1.3 * whole.peak
    assert cost("CPS", device="cpu").peak == cost("CPS", device="cuda", amp="float32").peak


def test_a_trial_is_of_half_the_patch_where_the_whole_takes_too_long() -> None:
    setting = SMALL_3D | {"patch": [32, 64, 64], "features": [4, 4, 4, 4, 4]}
    content = plan(setting, num_epochs=10, num_iterations_per_epoch=3)
    part = try_steps(trainer("nnUNetTrainerMeanTeacher"), *content, "cpu", limit=0)
    assert (part.patch_size, part.share, part.steps) == ((16, 32, 32), 1 / 8, 1)
    assert part.schedule == 30 and part.memory == 0 and part.seconds > 0


def test_a_trial_scales_seconds_by_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def timed(trainer: Any, plans: Any, configuration: str, *args: Any) -> Trial:
        patch = plans["configurations"][configuration]["patch_size"]
        tried.append(tuple(patch))
        return Trial(2.0, 5, tuple(patch), 1.0, 0, 30)

    monkeypatch.setattr("nnssl.training.cost._timed", timed)
    content = plan(SMALL_3D | {"patch": [32, 48, 64]})
    assert try_steps(nn.Module, *content, "cpu", limit=15) == Trial(8.0, 5, (16, 48, 32), 0.25, 0, 30)
    assert try_steps(nn.Module, *content, "cpu", limit=16) == Trial(2.0, 5, (32, 48, 64), 1.0, 0, 30)
    assert tried == [(16, 48, 32), (16, 48, 32), (32, 48, 64)]
    small = plan(SMALL_3D | {"patch": [8, 16, 16]})
    assert try_steps(nn.Module, *small, "cpu", limit=0).share == 1


def test_smallest_card_is_one_that_is_sold() -> None:
    for gib, expected in ((1, CARDS[0]), (10, 12), (100, 141), (1000, None)):
        assert Cost(0, 0, int(gib * GIB), 0, 0).smallest_card == expected


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(list_trainers(trainers_folder())))
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_trainer_is_predicted(name: str, device: str) -> None:
    for number, setting in enumerate(SETTINGS):
        found = predict(trainer(name), *plan(setting), device)
        assert found.peak > found.fixed > found.parameters > 0
        # on unlabeled patches, as many as labeled ones, every method trains, too
        alone = supervised_flops(number, device)
        assert found.flops >= alone > 0 if name.endswith("Supervised") else found.flops > 1.9 * alone > 0


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind"), [("Supervised", "2D"), ("Semi", "3D")])
def test_prediction_is_within_15_percent_of_resident_memory(name: str, kind: str) -> None:
    found = measured(name, kind, {})["peak"]
    assert cost(name, {"2D": SMALL_2D, "3D": SMALL_3D}[kind]).peak == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("epochs", [12, 300, 1000])
def test_filtermatch_is_predicted_with_unlabeled_patches_in_any_schedule(epochs: int) -> None:
    assert cost("FilterMatch", num_epochs=epochs).flops > 1.9 * supervised_flops(0, "cpu")


def test_batches_may_be_larger_than_the_dataset() -> None:
    plans, configuration, dataset_json = plan(TINY | {"batch": 5})
    for name in ("CAML", "FilterMatch"):
        found = predict(
            trainer(f"nnUNetTrainer{name}"), plans, configuration, dataset_json | {"numTraining": 2}
        )
        assert found.flops > 0
