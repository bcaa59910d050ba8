"""SemiTrainer on a tiny planned dataset: parity with nnU-Net, continuation, refusals, what hidden labels
cannot do."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.commands.trainers import trainers_folder
from nnssl.methods.diffcl import DiffCL
from nnssl.training.memory_format import channels_last
from nnssl.training.randomness import seed_everything
from nnssl.training.trainer import SemiTrainer
from tests.building import put
from tests.place import MEAN_TEACHER, SHORT, SMALL, Place, dies_in_epoch, losses, run, trained
from tests.raw_dataset import content
from tests.teacher_method import AveragingTrainer

pytestmark = pytest.mark.slow


def assert_same_run(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert [r.keys() for r in a] == [r.keys() for r in b]
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6, nan_ok=True)


def test_supervised_losses_equal_stock_nnunet(place: Place) -> None:
    """Same random state, same batches, same steps: to 1e-6 in training loss, validation loss and Dice of two
    epochs."""
    place.plan(**{k: v for k, v in SHORT.items() if k != "seed"})  # stock has no seed
    logs = []
    for name in ("nnUNetTrainer", "nnUNetTrainerSupervised"):
        trainer = place.trainer(name)
        for key in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
            setattr(trainer, key, SHORT[key])
        on_train_start = trainer.on_train_start

        def start(begin: Callable = on_train_start, trainer: Any = trainer) -> None:
            from nnssl.data.streams import make_repeatable

            begin()
            make_repeatable(
                trainer.dataloader_train.data_loader
            )  # blur by timing: not the same twice in stock either

        trainer.on_train_start = start
        seed_everything(3)
        logs.append(run(trainer).logger.local_logger.my_fantastic_logging)
    for key in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
        np.testing.assert_allclose(logs[0][key], logs[1][key], atol=1e-6, err_msg=key)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place: Place) -> None:
    first = losses(run(place.trainer()))
    shutil.rmtree(place.results)
    assert losses(run(place.trainer())) == first
    assert list(first[0])[:3] == ["epoch", "lr", "loss/supervised"] and len(first) == 2
    place.plan("Other", **{**SHORT, "seed": 1}, DiffCL=SMALL)
    assert losses(run(place.trainer(plans="Other")))[0]["loss/supervised"] != first[0]["loss/supervised"]


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerDiffCL",
        "nnUNetTrainerSemi",
        pytest.param("nnUNetTrainerSupervised", marks=pytest.mark.nightly),
    ],
)
def test_a_continued_run_equals_an_uninterrupted_one(place: Place, name: str) -> None:
    weighed = name == "nnUNetTrainerSemi" or None  # its state must survive, too
    place.plan(**{**SHORT, "num_epochs": 4}, DiffCL=SMALL, agreement=weighed)
    whole = losses(run(place.trainer(name)))
    shutil.rmtree(place.results)
    killed = place.trainer(name)
    killed.on_epoch_start = dies_in_epoch(killed, 2)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    assert len(losses(killed)) == 2
    torch.rand(100), np.random.rand(100)  # whatever the process did meanwhile
    resumed = place.trainer(name, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 2
    assert_same_run(losses(run(resumed)), whole)


def test_losses_csv_is_cut_back_to_the_checkpoint(place: Place) -> None:
    place.plan(**{**SHORT, "num_epochs": 4, "save_every": 2}, DiffCL=SMALL)
    trainer = place.trainer()
    trainer.on_epoch_start = dies_in_epoch(trainer, 3)
    trainer._best_ema = 2.0  # no "best" checkpoint in this run: only the one after epoch 1
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    assert [r["epoch"] for r in losses(trainer)] == [0, 1, 2]
    resumed = place.trainer(resume=True)
    maybe_load_checkpoint(resumed, True, False)
    assert [r["epoch"] for r in losses(run(resumed))] == [0, 1, 2, 3]


@pytest.mark.parametrize(("amp", "tried"), [("bfloat16", True), ("float32", False)])
def test_bfloat16_is_tried_on_the_cpu_before_it_is_used(
    place: Place, monkeypatch: pytest.MonkeyPatch, amp: str, tried: bool
) -> None:
    grids: list[Any] = []
    monkeypatch.setattr(
        "nnssl.training.trainer.refuse_wrong_bfloat16",
        lambda network, patch_size, last: grids.append((patch_size, last)),
    )
    place.plan(**{**SHORT, "amp": amp, "channels_last": True})
    trainer = place.trainer("nnUNetTrainerSupervised")
    trainer.initialize()
    assert grids == [(trainer.configuration_manager.patch_size, True)] * tried


@pytest.mark.parametrize("amp", ["bfloat16", "float32"])
def test_the_validation_on_a_cpu_runs_in_the_precision_of_the_training(
    place: Place, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    found: list[Any] = []

    def predict(self: Any, save_probabilities: bool = False) -> None:
        found.append(
            (
                self.network(torch.zeros(1, 2, *self.configuration_manager.patch_size))[0].dtype,
                save_probabilities,
            )
        )

    monkeypatch.setattr("nnssl.training.trainer.refuse_wrong_bfloat16", lambda *_: None)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", predict)
    place.plan(**{**SHORT, "amp": amp})
    trainer = place.trainer("nnUNetTrainerSupervised")
    trainer.initialize()
    trainer.perform_actual_validation(True)
    assert found == [(getattr(torch, amp), True)]


@pytest.mark.parametrize("config", ["3d_fullres", pytest.param("2d", marks=pytest.mark.nightly)])
def test_channels_last_changes_rounding_only_and_lasts_through_a_continuation(
    place: Place, config: str
) -> None:
    """The first steps agree with those of the default format; a killed and continued run is that which was
    never killed."""
    dimensions, found = 3 if config == "3d_fullres" else 2, {}
    for last in (False, True):
        name = f"Last{last}"
        place.plan(name, **SHORT, DiffCL=SMALL, channels_last=last)
        found[last] = losses(run(place.trainer(plans=name, config=config)))
    for term in ("loss/supervised", "loss/diffusion"):
        assert [r[term] for r in found[True]] == pytest.approx([r[term] for r in found[False]], rel=1e-3)
    shutil.rmtree(place.results)
    trainer = place.trainer(plans="LastTrue", config=config)
    trainer.on_epoch_start = dies_in_epoch(trainer, 1)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    resumed = place.trainer(plans="LastTrue", config=config, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    kernels = [p for p in resumed.method.parameters() if p.dim() == dimensions + 2]
    assert kernels and all(p.is_contiguous(memory_format=channels_last(dimensions)) for p in kernels)
    assert losses(run(resumed)) == found[True]


def test_a_continued_run_knows_the_best_epoch_of_the_one_before(place: Place) -> None:
    """nnU-Net writes the latest checkpoint before it compares: the best is that of the epoch before there."""
    trainer = run(place.trainer())
    trainer._best_ema = 0.25
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.logger.local_logger.my_fantastic_logging["ema_fg_dice"] = [0.25, float("nan"), 0.5]
    trainer.save_checkpoint(path)
    resumed = place.trainer(resume=True)
    resumed.load_checkpoint(path)
    assert resumed._best_ema == 0.5


def test_every_checkpoint_carries_everything_and_the_student_once(place: Place) -> None:
    trainer = place.trainer()
    trainer.on_train_end = lambda: None  # keeps checkpoint_latest
    run(trainer)
    trainer.current_epoch -= 1
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    for name in ("latest", "best", "final"):
        checkpoint = torch.load(
            os.path.join(trainer.output_folder, f"checkpoint_{name}.pth"), weights_only=False
        )
        state = checkpoint["nnssl"]
        assert set(state) == {
            "method",
            "rng",
            "pretrained",
            "history",
            "agreement",
            "mirror_axes",
            "config",
            "versions",
            "cases",
            "order",
        }
        kept = {k.split(".")[0] for k in state["method"]}
        assert {"denoiser", "projector", "bank"} <= kept and "student" not in kept
        assert set(checkpoint["network_weights"]) == set(trainer.network.state_dict())
        assert (
            state["config"]["method"]["ddim_steps"] == 2 and state["versions"]["torch"] == torch.__version__
        )


def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = place.trainer()
    trainer.initialize()
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)

    def breaks(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=False)["nnssl"]["history"] == []


def test_continuing_from_a_foreign_checkpoint_is_refused(place: Place) -> None:
    trainer = place.trainer()
    trainer.initialize()
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    del content["nnssl"]
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r"no key `nnssl`.*-pretrained_weights"):
        place.trainer().load_checkpoint(path)


def test_continuing_under_another_configuration_is_refused(place: Place) -> None:
    trainer = place.trainer()
    trainer.initialize()
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    place.plan("Wider", **SHORT, DiffCL={**SMALL, "bank_size": 32})
    with pytest.raises(RuntimeError, match=r"checkpoint_latest\.pth does not fit this configuration: .*bank"):
        place.trainer(plans="Wider").load_checkpoint(path)
    with pytest.raises(RuntimeError, match="was written by nnUNetTrainerDiffCL, expected nnUNetTrainerCPS"):
        place.trainer("nnUNetTrainerCPS").load_checkpoint(path)


def test_a_changed_plan_is_told_when_a_run_goes_on(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = place.trainer()
    trainer.initialize()
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    file = place.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    place.plan(**{**SHORT, "num_epochs": 7}, DiffCL={**SMALL, "threshold": 0.5})
    changed = json.loads(file.read_text())
    changed["configurations"]["3d_fullres"]["batch_dice"] = "changed"
    file.write_text(json.dumps(changed))
    other = place.trainer()
    other.load_checkpoint(path)
    said = capsys.readouterr().out
    assert "nnssl.num_epochs 7 (there 2); nnssl.DiffCL.threshold 0.5 (there 0.95); batch_dice changed" in said
    file.write_text(json.dumps(plans))
    same = place.trainer()
    same.load_checkpoint(path)
    assert "has changed since" not in capsys.readouterr().out
    place.plan(**SHORT, DiffCL={**SMALL, "hfm_cutoff": 0.9})
    with pytest.raises(RuntimeError, match=r"with nnssl\.DiffCL\.hfm_cutoff 0\.25, the plans file has 0\.9"):
        place.trainer().load_checkpoint(path)


def test_the_plan_of_trained_folds_is_not_written_over_by_another(place: Place) -> None:
    split = place.preprocessed / "splits_final.json"
    split.write_text(json.dumps(2 * json.loads(split.read_text())))
    first = run(place.trainer())
    plans = Path(first.output_folder_base) / "plans.json"
    before = plans.read_bytes()
    place.plan(**SHORT, DiffCL={**SMALL, "hfm_cutoff": 0.9})
    other = place.trainer(fold=1)
    with pytest.raises(RuntimeError, match=r"plans\.json is the plan of fold_0, too.* hfm_cutoff changed"):
        other.run_training()
    assert plans.read_bytes() == before
    place.plan(**{**SHORT, "num_epochs": 1}, DiffCL=SMALL)  # the same function
    run(place.trainer(fold=1))


@pytest.mark.parametrize("more_epochs", [False, True])
def test_a_validation_of_earlier_weights_is_set_aside(place: Place, more_epochs: bool) -> None:
    first = run(place.trainer())
    validation = Path(first.output_folder) / "validation"
    validation.mkdir()
    (validation / "summary.json").write_text("{}")
    if more_epochs:
        again = place.trainer(resume=True)
        again.load_checkpoint(os.path.join(first.output_folder, "checkpoint_final.pth"))
        run(again)
        assert (validation / "summary.json").is_file()  # no step was taken
        place.plan(**{**SHORT, "num_epochs": 3}, DiffCL=SMALL)
        again = place.trainer(resume=True)
        again.load_checkpoint(os.path.join(first.output_folder, "checkpoint_final.pth"))
    else:
        again = place.trainer()
    run(again)
    assert not validation.exists() and (validation.with_name("validation.bak") / "summary.json").is_file()
    assert "validation, of other weights, is now validation.bak" in Path(again.log_file).read_text("utf-8")


def test_what_the_end_of_a_training_needs_is_told_at_its_start(place: Place) -> None:
    truth = place.preprocessed / "gt_segmentations" / "lab_05.nii.gz"
    truth.unlink()
    trainer = run(place.trainer())
    lacks = "gt_segmentations lacks the labels of lab_05"
    assert f"{lacks}. Copy them" in Path(trainer.log_file).read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=f"{lacks}.*then validate with --val"):
        trainer.perform_actual_validation()
    (place.preprocessed / "dataset_fingerprint.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_fingerprint\.json does not exist: .*`nnssl plan-"):
        place.trainer().run_training()


def test_two_stages_have_no_deep_supervision(place: Place) -> None:
    file = place.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["n_stages"] = 2
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:2]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][:1]
    file.write_text(json.dumps(plans))
    with pytest.raises(RuntimeError, match="a network of two stages, for which"):
        place.trainer("nnUNetTrainerFixMatch").initialize()


def write_fold(place: Place, **keys: list[int]) -> None:
    """A split of one fold by the numbers of its cases."""
    fold = {key: [f"lab_{number:02d}" for number in numbers] for key, numbers in keys.items()}
    (place.preprocessed / "splits_final.json").write_text(json.dumps([fold]))


def test_cases_that_were_trained_on_are_not_validated_as_unseen(drawn: Place) -> None:
    write_fold(drawn, train=[0, 1, 2], val=[5], unlabeled=[3, 4])
    path = os.path.join(trained(drawn).output_folder, "checkpoint_final.pth")
    write_fold(drawn, train=[1, 2], val=[0, 5], unlabeled=[3, 4])
    for only_validate in (False, True):
        with pytest.raises(
            RuntimeError, match=r"splits_final.json, fold 0, key val: lab_00, whose labels /.*"
        ):
            maybe_load_checkpoint(drawn.trainer(MEAN_TEACHER), not only_validate, only_validate)

    content = torch.load(path, weights_only=False)
    assert content["nnssl"]["cases"]["train"] == ["lab_00", "lab_01", "lab_02"]
    del content["nnssl"]["cases"]  # an older checkpoint
    torch.save(content, path)
    trainer = drawn.trainer(MEAN_TEACHER)
    maybe_load_checkpoint(trainer, True, False)
    assert "does not name its cases" in Path(trainer.log_file).read_text(encoding="utf-8")


def test_what_is_kept_for_every_case_is_found_by_its_name(drawn: Place) -> None:
    write_fold(drawn, train=[0, 1, 2], val=[5], unlabeled=[3, 4])
    before = drawn.trainer("nnUNetTrainerFilterMatch")
    before.initialize()
    gone, kept = (before.method.case_index[f"lab_0{number}"] for number in (3, 4))
    before.method.left[kept], before.method.seen[gone], before.method.seen[kept] = True, 2, 3
    path = os.path.join(before.output_folder, "checkpoint_latest.pth")
    before.save_checkpoint(path)
    write_fold(drawn, train=[0, 1, 2], val=[5], unlabeled=[4])
    now = drawn.trainer("nnUNetTrainerFilterMatch")
    now.load_checkpoint(path)
    place = now.method.case_index["lab_04"]
    assert place != kept and now.method.outside() == {"lab_04"}
    assert now.method.seen[place] == now.method.seen.sum() == 3


def test_other_changes_of_a_fold_are_told_by_name(drawn: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fold(drawn, train=[0, 1, 2], val=[5], unlabeled=[3, 4])
    trained(drawn)
    write_fold(drawn, train=[0, 1, 3], val=[5], unlabeled=[4])
    trainer = drawn.trainer(MEAN_TEACHER)
    maybe_load_checkpoint(trainer, True, False)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "checkpoint_final.pth: train: added lab_03; removed lab_02" in log
    assert "checkpoint_final.pth: unlabeled: removed lab_03" in log and ": val: " not in log

    # while a training runs, too
    write_fold(drawn, train=[0, 1], val=[2, 5])
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: pytest.fail("validated"))
    with pytest.raises(RuntimeError, match=r"key val: lab_02, whose labels this network was trained on"):
        trainer.perform_actual_validation()


@pytest.mark.nightly
def test_a_case_stays_trained_on_in_the_checkpoints_of_the_continued_run(place: Place) -> None:
    place.plan(**{**SHORT, "num_epochs": 2})
    write_fold(place, train=[0, 1, 2], val=[5])
    killed = place.trainer(MEAN_TEACHER)
    killed.on_epoch_start = dies_in_epoch(killed, 1)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    write_fold(place, train=[0, 1], val=[5])
    resumed = place.trainer(MEAN_TEACHER, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    run(resumed)
    write_fold(place, train=[0, 1], val=[2, 5])
    with pytest.raises(RuntimeError, match=r"key val: lab_02"):
        maybe_load_checkpoint(place.trainer(MEAN_TEACHER), False, True)


def test_fold_all_validates_on_what_it_trained_on(drawn: Place) -> None:
    (drawn.preprocessed / "splits_final.json").unlink()
    trainer = drawn.trainer(MEAN_TEACHER, fold="all")
    trainer.initialize()
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    maybe_load_checkpoint(drawn.trainer(MEAN_TEACHER, fold="all"), False, True)


@pytest.mark.parametrize("axes", [[2], [0, 1], [], None])
def test_mirror_axes_hold_in_both_streams_and_in_prediction(
    place: Place, monkeypatch: pytest.MonkeyPatch, axes: list[int] | None
) -> None:
    made = []

    class Spy(MirrorTransform):
        def __init__(self, allowed_axes: tuple[int, ...]) -> None:
            made.append(allowed_axes)
            super().__init__(allowed_axes)

    for module in ("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnssl.data.views"):
        monkeypatch.setattr(f"{module}.MirrorTransform", Spy)
    place.plan(**SHORT, DiffCL=SMALL, mirror_axes=axes)
    trainer = place.trainer()
    trainer.initialize()
    trainer.get_dataloaders()
    expected = (0, 1, 2) if axes is None else tuple(axes)
    assert made == [expected] * (2 if expected else 0)  # the labeled and the unlabeled stream
    path = str(place.results / "checkpoint.pth")
    os.makedirs(place.results, exist_ok=True)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=False)["inference_allowed_mirroring_axes"] == (expected or None)


def test_mirror_axes_that_a_patch_does_not_have_are_refused(place: Place) -> None:
    place.plan(**SHORT, DiffCL=SMALL, mirror_axes=[1, 2])
    trainer = place.trainer(config="2d")
    with pytest.raises(ValueError, match=r"mirror_axes.*\[1, 2\].*patches of 2d have 2 axes"):
        trainer.initialize()


@pytest.mark.parametrize(("config", "expected"), [("3d_fullres", (0, 2)), ("2d", (1,))])
def test_auto_mirror_axes_come_from_the_training_labels_and_stay_with_the_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, config: str, expected: tuple[int, ...]
) -> None:
    """The two classes lie side by side along the middle axis of the volumes."""
    read: list[list[str]] = []
    module = "nnssl.training.trainer"
    original = importlib.import_module(module).offsets_of

    def spy(dataset: Any, cases: list[str], *args: Any) -> Any:
        read.append(list(cases))
        return original(dataset, cases, *args)

    monkeypatch.setattr(f"{module}.offsets_of", spy)
    place.plan(**SHORT, DiffCL=SMALL, mirror_axes="auto")
    place.split()
    trainer = place.trainer(config=config)
    trainer.initialize()
    trainer.get_dataloaders()
    assert trainer.method.planned.mirror_axes == trainer.inference_allowed_mirroring_axes == expected
    assert read == [trainer.do_split()[0]] and len(read[0]) == 3  # once, and no hidden label
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert f"mirror_axes: auto is {list(expected)} (axis 0: class 2 lies" in log
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=False)["inference_allowed_mirroring_axes"] == expected

    monkeypatch.setattr(f"{module}.offsets_of", lambda *args: [])  # labels changed since: all axes
    resumed = place.trainer(config=config, resume=True)
    resumed.load_checkpoint(path)
    resumed.get_dataloaders()
    assert resumed.method.planned.mirror_axes == resumed.inference_allowed_mirroring_axes == expected


def test_labels_of_unlabeled_cases_are_never_opened(place: Place) -> None:
    """Corrupt every label file of the hidden cases, raw and preprocessed, and the class locations: the run is
    identical."""
    clean = losses(run(place.trainer()))
    shutil.rmtree(place.results)
    hidden = json.loads((place.preprocessed / "splits_final.json").read_text(encoding="utf-8"))[0][
        "unlabeled"
    ]
    folder = place.preprocessed / "nnUNetPlans_3d_fullres"
    for case in hidden:
        for file in (
            place.raw / "labelsTr" / f"{case}.nii.gz",
            folder / f"{case}_seg.b2nd",
            folder / f"{case}.pkl",
        ):
            assert file.stat().st_size > 0
            file.write_bytes(b"these bytes are no label")
    shutil.rmtree(str(folder) + "_unlabeled")  # preprocessed anew, from the images alone
    assert losses(run(place.trainer())) == clean


def test_a_trainer_preprocesses_imagesun_itself(place: Place) -> None:
    """Whoever ran only nnU-Net's own commands is served too."""
    folder = Path(str(place.preprocessed / "nnUNetPlans_3d_fullres") + "_unlabeled")
    shutil.rmtree(folder, ignore_errors=True)
    run(place.trainer())
    assert {p.name for p in folder.glob("scan_*.pkl")} == {f"scan_0{i}.pkl" for i in range(3)}


def test_non_finite_losses_are_skipped_and_counted(place: Place) -> None:
    trainer = place.trainer()
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    before = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    batch = next(trainer.dataloader_train)
    batch["data"][0, 0, 0, 0, 0] = float("nan")
    outputs = [trainer.train_step(batch)]
    assert trainer.step.skipped == 1 and all(
        torch.equal(v, before[k]) for k, v in trainer.method.state_dict().items()
    )
    outputs.append(trainer.train_step(next(trainer.dataloader_train)))
    assert trainer.step.skipped == 1 and trainer.step.skipped_in_a_row == 0
    other = next(trainer.dataloader_train)
    other["keys"], other["unlabeled"]["keys"] = ["lab_77", batch["keys"][0]], ["scan_77", "scan_78"]
    other["data"][1] = float("nan")
    outputs.append(trainer.train_step(other))
    trainer.on_epoch_start()
    trainer.on_train_epoch_end(outputs)
    assert np.isfinite(trainer.history.rows[-1]["loss/supervised"])
    said = f"steps of this epoch were skipped: their loss was not finite; in all of them: {batch['keys'][0]}"
    assert said in Path(trainer.log_file).read_text(encoding="utf-8")


def test_many_non_finite_steps_in_a_row_stop_the_run_and_keep_the_checkpoint(place: Place) -> None:
    place.plan(**{**SHORT, "num_epochs": 3, "max_nonfinite_steps": 2}, DiffCL=SMALL)
    trainer = place.trainer()
    end = trainer.on_epoch_end

    def poison() -> None:
        end()
        with torch.no_grad():
            trainer.network.decoder.seg_layers[-1].bias.fill_(float("inf"))

    trainer.on_epoch_end = poison
    with pytest.raises(RuntimeError, match=r"not finite in 2 steps in a row.*initial_lr.*--c"):
        trainer.run_training()
    saved = torch.load(os.path.join(trainer.output_folder, "checkpoint_latest.pth"), weights_only=False)
    assert (
        all(torch.isfinite(v).all() for v in saved["network_weights"].values())
        and saved["current_epoch"] == 1
    )


def test_without_any_unlabeled_case_the_run_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place.raw / "imagesUn")
    shutil.rmtree(
        place.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    )  # else they serve without the raw scans
    (place.preprocessed / "splits_final.json").unlink()
    with pytest.raises(
        RuntimeError,
        match=r"no unlabeled case.*/imagesUn does not exist.*nnssl split.*nnUNetTrainerSupervised",
    ):
        place.trainer().run_training()
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(
        RuntimeError, match=r"nnUNet_raw is not set, and none is preprocessed in .*_unlabeled"
    ):
        place.trainer().run_training()


def test_fold_all_and_unlisted_folds_are_refused_where_labels_are_hidden(place: Place) -> None:
    for fold in ("all", 3):
        with pytest.raises(ValueError, match=r"splits_final.json hides labels"):
            place.trainer(fold=fold).initialize()


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_preprocessing_that_ended_too_early_is_told_before_a_split_is_made(place: Place, fold: Any) -> None:
    splits_file = place.preprocessed / "splits_final.json"
    splits_file.unlink()
    for file in (place.preprocessed / "nnUNetPlans_3d_fullres").glob("lab_03*"):
        file.unlink()
    message = (
        r"nnUNetPlans_3d_fullres: 1 of 6 labeled cases in .*Dataset777_Tiny are not preprocessed \(lab_03\), "
        r".*`nnssl plan-and-preprocess -d 777 -c 3d_fullres -p nnUNetPlans`"
    )
    with pytest.raises(RuntimeError, match=message):
        place.trainer("nnUNetTrainerSupervised", fold=fold).run_training()
    assert not splits_file.exists()
    shutil.rmtree(place.raw)  # a machine with preprocessed data alone
    trainer = place.trainer("nnUNetTrainerSupervised", fold=fold)
    trainer.initialize()
    trainer.get_dataloaders()
    assert len(trainer.do_split()[0]) == (5 if fold == "all" else 4)


def test_a_label_edited_after_preprocessing_is_named_at_the_start(place: Place) -> None:
    write_fold(place, train=[0, 1, 2], val=[5])
    for number, text in ((1, b"a trained one"), (4, b"one of no fold")):
        (place.raw / "labelsTr" / f"lab_{number:02d}.nii.gz").write_bytes(text)
    trainer = place.trainer("nnUNetTrainerSupervised")
    trainer.initialize()
    trainer.get_dataloaders()
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert f"WARNING: 1 labeled cases of fold 0 are used as preprocessed, but {place.raw} has" in log
    assert (
        "lab_01 (source changed). Run `nnssl plan-and-preprocess -d 777 -c 3d_fullres -p nnUNetPlans`" in log
    )


def test_data_of_another_plan_are_refused_before_any_scan_is_preprocessed_anew(place: Place) -> None:
    folder = place.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    before = content(folder)
    place.plan("coarse", **SHORT)
    file = place.preprocessed / "coarse.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.5, 1.5]
    file.write_text(json.dumps(plans))
    expected = (
        r"_3d_fullres: lab_00, .* preprocessed with other settings .* than coarse and dataset\.json "
        r"have now\. Run `nnssl plan-and-preprocess -d 777 -c 3d_fullres -p coarse`, .* data_identifier of "
    )
    with pytest.raises(RuntimeError, match=expected):
        place.trainer("nnUNetTrainerFixMatch", "coarse").run_training()
    assert content(folder) == before


def test_fold_all_stays_normal_with_imagesun_only(place: Place) -> None:
    (place.preprocessed / "splits_final.json").unlink()
    trainer = run(place.trainer(fold="all"))
    assert len(trainer.do_split()[0]) == 6 and len(losses(trainer)) == 2


def test_a_class_without_any_labeled_voxel_is_refused(place: Place) -> None:
    import pickle

    for file in (place.preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"):
        content = pickle.loads(file.read_bytes())
        content["class_locations"][2] = []
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(RuntimeError, match=r"no labeled training case of fold 0 contains.*b"):
        place.trainer().run_training()


def test_training_without_preprocessing_says_what_to_run(place: Place) -> None:
    shutil.rmtree(place.preprocessed / "nnUNetPlans_3d_fullres")
    with pytest.raises(RuntimeError, match=r"nnUNetPlans_3d_fullres does not exist.*plan-and-preprocess"):
        place.trainer().initialize()


def test_a_wrong_key_in_the_plans_file_stops_before_anything_is_written(place: Place) -> None:
    place.plan(**SHORT, epochs=3)
    with pytest.raises(
        ValueError, match='"nnssl" in the plans file nnUNetPlans of Dataset777_Tiny: unknown key'
    ):
        place.trainer()
    assert not place.results.exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_key_in_the_wrong_place_of_the_plans_file_stops_the_stock_command_too(
    place: Place, inside: bool
) -> None:
    place.plan(**SHORT)
    file = place.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    (plans["configurations"]["3d_fullres"] if inside else plans)["num_epochs"] = 1
    file.write_text(json.dumps(plans), encoding="utf-8")
    with pytest.raises(ValueError, match="num_epochs: not read there"):
        place.trainer()
    assert not place.results.exists()


def test_2d_with_background_workers_and_another_unlabeled_batch(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    place.plan(**SHORT, unlabeled_batch_size=3, DiffCL=SMALL)
    trainer = place.trainer(config="2d")
    seen = []
    terms = DiffCL.terms

    def spy(self: DiffCL, batch: Any, t: float) -> Any:
        seen.append((batch.labeled.shape, batch.weak.shape, t))
        return terms(self, batch, t)

    monkeypatch.setattr(DiffCL, "terms", spy)
    run(trainer)
    assert all(
        len(labeled) == 4 and labeled[0] == 2 and weak[0] == 3 and weak[1:] == labeled[1:]
        for labeled, weak, _ in seen
    )
    assert [t for *_, t in seen] == [0.0, 0.25, 0.5, 0.75]


def test_a_single_unlabeled_patch_is_said_to_have_nothing_to_be_mixed_with(place: Place) -> None:
    place.plan(**SHORT, DiffCL=SMALL)
    trainer = place.trainer()
    said: list[str] = []
    put(trainer, print_to_log_file=lambda line: said.append(line))
    trainer._warn_without_neighbour(2)
    assert not said
    trainer._warn_without_neighbour(1)
    assert len(said) == 1 and "cutmix_probability has no effect" in said[0]


def test_the_averaged_teacher_can_be_deployed_and_continued(place: Place) -> None:
    place.plan(**{**SHORT, "num_epochs": 3, "deploy": "teacher"})
    whole = run(place.trainer(AveragingTrainer))
    assert whole.network is whole.method.teacher
    rows = losses(whole)
    shutil.rmtree(place.results)
    killed = place.trainer(AveragingTrainer)
    killed.on_epoch_start = dies_in_epoch(killed, 1)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    resumed = place.trainer(AveragingTrainer, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    assert_same_run(losses(run(resumed)), rows)


def test_diagnostics_are_logged_as_epoch_means(place: Place) -> None:
    rows = losses(run(place.trainer(AveragingTrainer)))
    assert [r["diagnostic/progress"] for r in rows] == [0.125, 0.625]  # t = 0, 1/4 | 1/2, 3/4
    assert all(0.5 <= r["diagnostic/found"] <= 1 for r in rows)


def test_phases_are_announced_in_the_log_when_they_begin(place: Place) -> None:
    place.plan(**{**SHORT, "num_epochs": 4}, ACTION={"embedding": 8, "candidates": 64})
    trainer = run(place.trainer("nnUNetTrainerACTION"))
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert [log.count(f"phase {i} of 3") for i in (1, 2, 3)] == [1, 1, 1]
    assert (
        log.index("phase 1 of 3")
        < log.index("Epoch 1")
        < log.index("phase 2 of 3")
        < log.index("Epoch 2")
        < log.index("phase 3 of 3")
    )
    assert [r["weight/anatomical"] for r in losses(trainer)] == [0, 0, 1, 1]
    assert [r["weight/global"] > 0 for r in losses(trainer)] == [True, True, False, False]


def test_memories_of_mamba_have_no_weight_decay(place: Place) -> None:
    """It would shorten each to a token or two in nnU-Net's schedule."""
    place.plan(**SHORT, DiffCL={"hfm_max_tokens": 512})
    trainer = place.trainer("nnUNetTrainerDiffCL")
    trainer.initialize()
    names = {id(p): name for name, p in trainer.method.named_parameters()}
    decayed, kept = ({names[id(p)] for p in g["params"]} for g in trainer.optimizer.param_groups)
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [trainer.weight_decay, 0]
    memory = {name for name in names.values() if name.endswith((".dt_bias", ".A_log", ".D"))}
    assert kept == memory and len(kept) == 9 and decayed | kept == set(names.values())
    trainer.lr_scheduler.step(1)
    assert len({g["lr"] for g in trainer.optimizer.param_groups}) == 1


@pytest.mark.parametrize("deploy", ["student", "teacher"])
def test_copies_are_made_from_pretrained_weights(place: Place, deploy: str) -> None:
    source = place.trainer("nnUNetTrainerSupervised")
    source.initialize()
    path = os.path.join(source.output_folder, "checkpoint_final.pth")
    source.save_checkpoint(path)
    place.plan(**{**SHORT, "seed": 5, "deploy": deploy})
    trainer = place.trainer(AveragingTrainer)
    maybe_load_checkpoint(trainer, False, False, path)
    trainer.on_train_start()
    for part in (trainer.method.student, trainer.method.teacher):
        assert torch.equal(
            part.encoder.stages[0][0].convs[0].conv.weight,
            source.network.encoder.stages[0][0].convs[0].conv.weight,
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.method.student.parameters(), trainer.method.teacher.parameters(), strict=True)
    )


def test_every_trainer_file_defines_a_semi_trainer_of_its_name() -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", trainers_folder())
        for file in Path(trainers_folder()).glob("nnUNetTrainer*.py"):
            trainer = recursive_find_trainer_class_by_name(file.stem)
            assert (
                issubclass(trainer, SemiTrainer) and f"nnUNetTrainer{trainer.method_class.name}" == file.stem
            )
