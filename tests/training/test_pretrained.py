"""-pretrained_weights of stock nnU-Net, with every trainer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl.commands.train import load_weights
from nnssl.commands.trainers import trainers_folder
from tests.place import SHORT, SMALL, Place

pytestmark = pytest.mark.slow
TRAINERS = sorted(p.stem for p in Path(trainers_folder()).glob("nnUNetTrainer*.py"))


@pytest.fixture
def finished(place: Place) -> str:
    """The checkpoint of a stock network, of the seed that no trainer below has."""
    place.plan(**SHORT, DiffCL=SMALL)
    torch.manual_seed(7)
    source = place.trainer("nnUNetTrainer")
    source.initialize()
    path = os.path.join(source.output_folder, "checkpoint_final.pth")
    source.disable_checkpointing = False
    source.save_checkpoint(path)
    return path


def function(network: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return network.eval()(torch.randn(1, 2, 8, 16, 16))[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_starts_from_a_stock_network_with_its_function_unchanged(
    place: Place, finished: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = place.trainer("nnUNetTrainer")
    maybe_load_checkpoint(stock, False, False, finished)  # stock keeps its own segmentation layers
    stock.network.load_state_dict(torch.load(finished, weights_only=False)["network_weights"])
    trainer = place.trainer(name)
    maybe_load_checkpoint(trainer, False, False, finished)
    torch.testing.assert_close(function(trainer.network), function(stock.network), rtol=0, atol=1e-5)
    assert "taken over (same labels)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nnUNetTrainerDiffCL", "nnUNetTrainer"])
def test_nnssl_train_loads_them_as_the_stock_command_does(place: Place, finished: str, name: str) -> None:
    states = []
    for load in (
        lambda t: maybe_load_checkpoint(t, False, False, finished),
        lambda t: load_weights(t, finished),
    ):
        torch.manual_seed(1)
        trainer = place.trainer(name)
        load(trainer)
        states.append(trainer.network.state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_a_second_network_adds_a_tenth_of_its_own_segmentation_layers(place: Place, finished: str) -> None:
    """Two networks that are the same could not teach each other, and fresh layers would teach mistakes."""
    weights = torch.load(finished, weights_only=False)["network_weights"]
    trainer = place.trainer("nnUNetTrainerCPS")
    trainer.initialize()
    own = {key: value.clone() for key, value in trainer.method.second.state_dict().items()}
    maybe_load_checkpoint(trainer, False, False, finished)
    for key, value in trainer.method.second.state_dict().items():
        expected = weights[key] + 0.1 * own[key] if ".seg_layers." in key else weights[key]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    first = trainer.method.second.decoder.seg_layers[0].weight
    assert not torch.equal(first, weights["decoder.seg_layers.0.weight"])
    assert "tensors, with 10% of its own in its segmentation layers" in Path(trainer.log_file).read_text()


def test_a_teacher_starts_as_the_pretrained_network(place: Place, finished: str) -> None:
    weights = torch.load(finished, weights_only=False)["network_weights"]
    trainer = place.trainer("nnUNetTrainerSemi")
    maybe_load_checkpoint(trainer, False, False, finished)
    for key, value in trainer.method.teacher.state_dict().items():
        assert torch.equal(value, weights[key])


def test_the_networks_may_be_on_another_device_than_the_checkpoint(place: Place, finished: str) -> None:
    trainer = place.trainer("nnUNetTrainerCPS")
    trainer.initialize()
    trainer.method.second.to("meta")
    maybe_load_checkpoint(trainer, False, False, finished)


@pytest.mark.parametrize(("name", "path"), [("CAML", "auxiliary.decoder"), ("MCNet", "second")])
def test_a_decoder_that_interpolates_starts_from_it_with_the_means_of_its_transposed_convolutions(
    place: Place, finished: str, name: str, path: str
) -> None:
    weights = torch.load(finished, weights_only=False)["network_weights"]
    trainer = place.trainer(f"nnUNetTrainer{name}")
    maybe_load_checkpoint(trainer, False, False, finished)
    decoder = trainer.method.get_submodule(path)
    for key, value in decoder.state_dict().items():
        if key.startswith(("stages", "seg_layers")):
            assert torch.equal(value, weights[f"decoder.{key}"])
    for s, upsample in enumerate(decoder.transpconvs):
        transposed = weights[f"decoder.transpconvs.{s}.weight"]
        torch.testing.assert_close(upsample.conv.weight.flatten(1), transposed.flatten(2).mean(2).T)
        assert torch.equal(upsample.conv.bias, weights[f"decoder.transpconvs.{s}.bias"])


def test_a_denoiser_starts_as_it_whatever_the_noisy_labels_are(place: Place, finished: str) -> None:
    trainer = place.trainer("nnUNetTrainerDiffCL")
    maybe_load_checkpoint(trainer, False, False, finished)
    torch.manual_seed(0)
    image, noisy = (torch.randn(1, c, 8, 16, 16) for c in (2, trainer.label_manager.num_segmentation_heads))
    with torch.no_grad():
        of_g = trainer.method.denoiser.eval()(noisy, torch.tensor([500]), image)[0]
        torch.testing.assert_close(of_g, trainer.network.eval()(image)[0], rtol=0, atol=1e-5)


def test_other_labels_leave_the_segmentation_layers_fresh(place: Place, finished: str) -> None:
    checkpoint = torch.load(finished, weights_only=False)
    checkpoint["init_args"]["dataset_json"]["labels"] = {"background": 0, "another organ": 1}
    torch.save(checkpoint, finished)
    trainer = place.trainer("nnUNetTrainerFixMatch")
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    maybe_load_checkpoint(trainer, False, False, finished)
    for key, value in trainer.network.state_dict().items():
        kept = ".seg_layers." in key
        assert torch.equal(value, before[key] if kept else checkpoint["network_weights"][key])


def test_a_network_of_other_widths_is_refused_by_name(place: Place, finished: str) -> None:
    plans = json.loads((place.preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            arguments = configuration["architecture"]["arch_kwargs"]
            arguments["features_per_stage"] = [6] * arguments["n_stages"]
    (place.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    trainer = place.trainer("nnUNetTrainerFixMatch")
    with pytest.raises(RuntimeError, match=r"checkpoint_final\.pth does not fit .* expected \(6, .*-p\)"):
        maybe_load_checkpoint(trainer, False, False, finished)


def test_weights_that_are_not_finite_are_refused(place: Place, finished: str) -> None:
    checkpoint = torch.load(finished, weights_only=False)
    next(iter(checkpoint["network_weights"].values())).view(-1)[0] = float("nan")
    torch.save(checkpoint, finished)
    with pytest.raises(RuntimeError, match=r"checkpoint_final\.pth: 4 of \d+ tensors have values that are"):
        maybe_load_checkpoint(place.trainer("nnUNetTrainerFixMatch"), False, False, finished)


@pytest.mark.parametrize("stock", [False, True])
def test_weights_that_know_validation_cases_are_named(place: Place, finished: str, stock: bool) -> None:
    checkpoint = torch.load(finished, weights_only=False)
    checkpoint["init_args"] = {**checkpoint["init_args"], "fold": 1}
    cases = {"train": ["lab_00", "lab_05"], "val": [], "unlabeled": []}
    checkpoint.pop("nnssl", None)
    if not stock:
        checkpoint["nnssl"] = {"cases": cases}
    checkpoint["network_weights"]["encoder.hfm.gate"] = torch.ones(4)  # of a Diff-CL
    file = str(place.preprocessed / "weights.pth")
    torch.save(checkpoint, file)
    trainer = place.trainer("nnUNetTrainerFixMatch")
    maybe_load_checkpoint(trainer, False, False, file)
    log = Path(trainer.log_file).read_text()
    said = (
        "is of fold 1 of this dataset, and this is fold 0" if stock else "was trained on the labels of lab_05"
    )
    assert f"WARNING: {file} {said}" in log
    assert "not taken, without a place here: 1 of its tensors (encoder.hfm.gate, ...)" in log
    before = len(log)
    maybe_load_checkpoint(trainer, False, False, finished)
    assert "WARNING" not in Path(trainer.log_file).read_text()[before:]


def test_a_run_knows_that_it_began_with_them_when_it_goes_on(place: Place, finished: str) -> None:
    fresh = place.trainer("nnUNetTrainerSemi")
    fresh.initialize()
    assert fresh.method.pretrained is False
    began = place.trainer("nnUNetTrainerSemi")
    maybe_load_checkpoint(began, False, False, finished)
    assert began.method.pretrained is True
    began.disable_checkpointing = False
    began.on_train_start()
    began.on_train_end()
    path = os.path.join(began.output_folder, "checkpoint_final.pth")
    resumed = place.trainer("nnUNetTrainerSemi")
    resumed.load_checkpoint(path)
    assert resumed.method.pretrained is True
