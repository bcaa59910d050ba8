"""`nnssl export`: what a plain nnU-Net gets, what is refused, and that it predicts the same without nnssl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from nnssl.commands.cli import main
from tests.place import MEAN_TEACHER, SHORT, SMALL, Place, run, trained
from tests.raw_dataset import write_case

ROOT = Path(__file__).resolve().parents[2]
MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def export(output: Path, *options: str, name: str = MEAN_TEACHER, folds: tuple[str, ...] = ("0",)) -> int:
    return main(
        ["export", "-d", "777", "-c", "3d_fullres", "-f", *folds, "-tr", name, "-o", str(output), *options]
    )


def checkpoint(folder: Path, fold: str = "0") -> dict[str, Any]:
    return torch.load(folder / MODEL / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def same(weights: dict[str, torch.Tensor], network: torch.nn.Module) -> bool:
    state = network.state_dict()
    return weights.keys() == state.keys() and all(torch.equal(weights[k], state[k]) for k in state)


def test_the_folder_holds_a_plain_model_and_no_trace_of_nnssl(
    drawn: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = trained(drawn)
    (Path(trainer.output_folder_base) / "dataset_fingerprint.json").write_text("{}")
    assert "nnssl" in json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert export(tmp_path / "out") == 0
    assert sorted(files(tmp_path / "out" / MODEL)) == [
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0/checkpoint_final.pth",
        "plans.json",
    ]
    assert not any(b"nnssl" in content for content in files(tmp_path / "out" / MODEL).values())
    written = checkpoint(tmp_path / "out")
    assert written["trainer_name"] == "nnUNetTrainer" and same(written["network_weights"], trainer.network)
    assert written["inference_allowed_mirroring_axes"] == (0, 2)
    assert "optimizer_state" not in written
    said = capsys.readouterr().out
    assert (
        "nnUNetv2_predict_from_modelfolder -m" in said
        and "nnUNetv2_install_pretrained_model_from_zip" in said
    )


def test_what_to_run_next_can_be_pasted_and_a_wrong_model_is_told(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(drawn)
    capsys.readouterr()
    assert export(tmp_path / "two words") == 0
    said = capsys.readouterr().out
    assert f"-m '{tmp_path / 'two words' / MODEL}' -f 0 -i IMAGES" in said
    assert f"from_zip '{tmp_path / 'two words' / MODEL}.zip'" in said
    Path(trainer.output_folder_base, "dataset.json").write_text("{}")
    assert export(tmp_path / "out") == 1
    assert "dataset.json, key labels: absent" in capsys.readouterr().err


def test_the_predictor_of_nnunet_loads_the_same_network(drawn: Place, tmp_path: Path) -> None:
    trainer = trained(drawn)
    export(tmp_path / "out")
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(tmp_path / "out" / MODEL), ("0",))
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 2, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network.eval()(x))
    assert predictor.allowed_mirroring_axes == (0, 2)


def test_the_zip_installs_the_same_folder(drawn: Place, tmp_path: Path) -> None:
    trained(drawn)
    export(tmp_path / "out")
    install_model_from_zip_file(str(tmp_path / "out" / f"{MODEL}.zip"))
    assert files(drawn.results / MODEL) == files(tmp_path / "out" / MODEL)


def test_every_fold_and_the_chosen_checkpoint_are_exported(drawn: Place, tmp_path: Path) -> None:
    final, best = trained(drawn), trained(drawn, checkpoint="checkpoint_best.pth")
    shutil.copytree(final.output_folder, Path(final.output_folder_base) / "fold_all")
    with torch.no_grad():
        best.network.decoder.seg_layers[0].bias.add_(1.0)
    best.save_checkpoint(os.path.join(best.output_folder, "checkpoint_best.pth"))
    assert export(tmp_path / "out", folds=("0", "all")) == 0
    assert same(checkpoint(tmp_path / "out")["network_weights"], final.network)
    assert same(checkpoint(tmp_path / "out", "all")["network_weights"], final.network)
    assert export(tmp_path / "best", "-chk", "checkpoint_best.pth") == 0
    assert same(checkpoint(tmp_path / "best")["network_weights"], best.network)


def test_a_deployed_teacher_is_what_is_exported(drawn: Place, tmp_path: Path) -> None:
    drawn.plan(**SHORT, deploy="teacher")
    trainer = trained(drawn)
    with torch.no_grad():
        for p in trainer.method.teacher.parameters():
            p.add_(1.0)
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    assert export(tmp_path / "out") == 0
    weights = checkpoint(tmp_path / "out")["network_weights"]
    assert same(weights, trainer.method.teacher) and not same(weights, trainer.method.student)


def test_a_changed_network_is_refused_with_the_remedy_and_nothing_is_written(
    drawn: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained(drawn, "nnUNetTrainerDiffCL")
    assert export(tmp_path / "out", name="nnUNetTrainerDiffCL") == 1
    said = capsys.readouterr().err
    for part in (
        "nnUNetTrainerDiffCL changed the planned network",
        ".hfm.",
        "nnUNetv2_export_model_to_zip",
        '"hfm_stages": 0',
    ):
        assert part in said
    assert not files(tmp_path / "out")


def test_diffcl_without_its_block_can_be_exported(drawn: Place, tmp_path: Path) -> None:
    drawn.plan(**SHORT, DiffCL={**SMALL, "hfm_stages": 0})
    trainer = trained(drawn, "nnUNetTrainerDiffCL")
    assert export(tmp_path / "out", name="nnUNetTrainerDiffCL") == 0
    assert same(checkpoint(tmp_path / "out")["network_weights"], trainer.network)


def test_an_earlier_export_is_replaced_on_request_only_and_survives_a_failure(
    drawn: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = trained(drawn)
    output = tmp_path / "out"
    assert export(output) == 0
    first = files(output)
    assert export(output) == 1
    assert f"{output / MODEL} already exists" in capsys.readouterr().err and files(output) == first
    (output / MODEL / "fold_0" / "mine.txt").write_text("stale")
    assert export(output, "--overwrite", folds=("0", "3")) == 1  # there is no fold 3
    assert files(output).keys() == {*first, f"{MODEL}/fold_0/mine.txt"}
    capsys.readouterr()
    assert export(output, "--overwrite") == 1  # a training of stock nnU-Net would stand in such a folder
    assert "is no export alone, it holds fold_0/mine.txt" in capsys.readouterr().err
    assert files(output).keys() == {*first, f"{MODEL}/fold_0/mine.txt"}
    (output / MODEL / "fold_0" / "mine.txt").unlink()
    with torch.no_grad():
        trainer.network.decoder.seg_layers[0].bias.add_(1.0)
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    assert export(output, "--overwrite") == 0
    assert files(output).keys() == first.keys() and same(
        checkpoint(output)["network_weights"], trainer.network
    )
    with zipfile.ZipFile(output / f"{MODEL}.zip") as archive:
        inside = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    assert inside == {k: v for k, v in files(output).items() if not k.endswith(".zip")}


def test_what_was_not_trained_is_refused_with_what_there_is(
    drawn: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained(drawn, checkpoint="checkpoint_latest.pth")
    assert export(tmp_path / "out", name="nnUNetTrainerCPS") == 1
    said = capsys.readouterr().err
    assert (
        "nnUNetTrainerCPS__nnUNetPlans__3d_fullres" in said
        and f"Trained there: {MEAN_TEACHER}__nnUNetPlans__3d_fullres" in said
    )
    begun = drawn.results / "nnUNetTrainerBCP__nnUNetPlans__3d_fullres" / "fold_0"  # and refused at once
    begun.mkdir(parents=True)
    assert export(tmp_path / "out", name="nnUNetTrainerBCP") == 1
    assert f"{begun / 'checkpoint_final.pth'} does not exist" in capsys.readouterr().err
    assert export(tmp_path / "out") == 1
    assert "Found: fold_0/checkpoint_latest.pth. Choose with -f and -chk" in capsys.readouterr().err
    assert not files(tmp_path / "out")


@pytest.mark.slow
def test_without_nnssl_the_predictions_are_the_same(place: Place, tmp_path: Path) -> None:
    trainer = run(place.trainer(MEAN_TEACHER))
    assert export(tmp_path / "out") == 0
    images = tmp_path / "imagesTs"
    images.mkdir()
    write_case(images, "new", 500)
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('nnssl', 'nnssl_trainers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")} | {
        "PYTHONPATH": str(blocker),
        "nnUNet_def_n_proc": "1",
    }
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        b"ModuleNotFoundError"
        in subprocess.run([sys.executable, "-c", "import nnssl"], env=plain, capture_output=True).stderr
    )

    def predict(environment: dict[str, str], model: Path, to: str) -> Any:
        command = [
            sys.executable,
            os.path.join(sysconfig.get_path("scripts"), "nnUNetv2_predict_from_modelfolder"),
        ]
        options = [
            "-i",
            str(images),
            "-o",
            str(tmp_path / to),
            "-m",
            str(model),
            "-f",
            "0",
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ]
        done = subprocess.run(
            [*command, *options, "--save_probabilities"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with (tmp_path / to / "new.npz").open("rb") as stream:
            probabilities = np.load(stream)["probabilities"]
        return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / to / "new.nii.gz"))), probabilities

    expected, found = (
        predict(ours, Path(trainer.output_folder_base), "ours"),
        predict(plain, tmp_path / "out" / MODEL, "plain"),
    )
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape and (a == b).all()
