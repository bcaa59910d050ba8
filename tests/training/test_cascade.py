"""A cascade: 3d_lowres, its predictions of all scans, 3d_cascade_fullres."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnssl.commands.cli import main
from nnssl.data.freshness import read_properties, write_properties
from nnssl.training.next_stage import fingerprint_of, folder_for_unlabeled, unusable_predictions
from tests.place import SHORT, Place, lean_nnunet, losses

pytestmark = pytest.mark.slow

TRAINER = "nnUNetTrainerMeanTeacher"
BRIEF = {**SHORT, "num_epochs": 1}
CASCADE = "3d_cascade_fullres"


@pytest.fixture
def cascade(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two stages as nnU-Net's planner writes them; in both folds all labeled cases take part."""
    lean_nnunet(monkeypatch)
    path = place.preprocessed / "nnUNetPlans.json"
    place.plan(**BRIEF)
    plans = json.loads(path.read_text(encoding="utf-8"))
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {
        **full,
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [s * 1.3 for s in full["spacing"]],
        "next_stage": CASCADE,
    }
    plans["configurations"][CASCADE] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans))
    monkeypatch.delenv("nnUNet_n_proc_DA")
    assert main(["plan-and-preprocess", "-d", "777", "-c", "3d_lowres", "-np", "1", "--no_pbar"]) == 0
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    cases = [f"lab_{i:02d}" for i in range(6)]
    first = {"train": cases[:3], "val": cases[3:5], "unlabeled": cases[5:]}
    second = {"train": cases[3:5], "val": cases[:3], "unlabeled": cases[5:]}
    (place.preprocessed / "splits_final.json").write_text(json.dumps([first, second]))
    return place


def train(place: Place, config: str, fold: Any = 0) -> Any:
    trainer = place.trainer(TRAINER, config=config, fold=fold)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer


def test_a_cascade_trains_and_predicts_and_never_opens_hidden_labels(
    cascade: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in cascade.preprocessed.parent.parent.rglob("lab_05*"):
        if "imagesTr" not in file.parts and "_unlabeled" not in file.parent.name:
            # its name still counts, its content is gone
            file.write_bytes(b"") if file.suffix != ".pkl" else None
    with pytest.raises(RuntimeError, match=r"5 labeled cases without .*lab_00 \(missing\).*fold 0, 1"):
        cascade.trainer(TRAINER, config=CASCADE).run_training()
    for fold in (0, 1):
        train(cascade, "3d_lowres", fold)
    low = cascade.results / f"{TRAINER}__nnUNetPlans__3d_lowres"
    predicted = Path(folder_for_unlabeled(str(low / "fold_0"), CASCADE))
    names = ["lab_05", "scan_00", "scan_01", "scan_02"]
    assert sorted(p.stem for p in predicted.iterdir()) == names
    for name in names:
        full = cascade.preprocessed / "nnUNetPlans_3d_fullres_unlabeled" / f"{name}.b2nd"
        found = blosc2.open(str(predicted / f"{name}.b2nd"), mode="r")
        assert found.shape == blosc2.open(str(full), mode="r").shape[1:] and found.dtype == np.uint8

    seen: list[Any] = []
    trainer = cascade.trainer(TRAINER, config=CASCADE)
    step = trainer.train_step

    def spy(batch: dict) -> dict:
        seen.append(batch)
        return step(batch)

    trainer.train_step = spy
    trainer.run_training()
    trainer.perform_actual_validation()
    assert len(losses(trainer)) == 1 and trainer.method.planned.previous == 2
    for batch in seen:
        for view in (batch["data"], batch["unlabeled"]["weak"], *batch["unlabeled"]["strong"]):
            assert view.shape[1] == 4 and set(view[:, 2:].unique().tolist()) <= {0.0, 1.0}
            assert not set(view[:, 0].unique().tolist()) <= {0.0, 1.0}

    images = tmp_path / "images"
    images.mkdir()
    for file in (cascade.raw / "imagesUn").glob("scan_00*"):
        shutil.copy(file, images)
    for config, previous in (("3d_lowres", None), (CASCADE, str(tmp_path / "3d_lowres"))):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        folder = str(low).replace("3d_lowres", config)
        (tmp_path / config).mkdir()
        predictor.initialize_from_trained_model_folder(folder, (0,), "checkpoint_final.pth")
        predictor.predict_from_files_sequential(
            str(images), str(tmp_path / config), folder_with_segs_from_prev_stage=previous
        )
        assert (tmp_path / config / "scan_00.nii.gz").is_file()

    # pseudo-labels are those of nnU-Net's two predictions, one after the other
    chosen = ["-d", "777", "-c", CASCADE, "-f", "0", "-tr", TRAINER, "-device", "cpu"]
    assert main(["pseudo-label", *chosen, "-o", str(tmp_path / "pseudo")]) == 0
    ours, theirs = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / folder / "scan_00.nii.gz")))
        for folder in ("pseudo/segmentations", CASCADE)
    )
    inside = (slice(2, -2), slice(6, -6), slice(6, -6))  # nnU-Net weighs rims with subnormal half floats
    assert (ours == theirs)[inside].mean() > 0.995 and len(np.unique(ours)) > 1
    (low / "fold_0" / "checkpoint_final.pth").unlink()
    assert main(["pseudo-label", *chosen, "-o", str(tmp_path / "again")]) == 1
    assert "3d_lowres/fold_0/checkpoint_final.pth does not exist" in capsys.readouterr().err


def test_predictions_are_made_once_and_again_where_something_changed(cascade: Place) -> None:
    (cascade.preprocessed / "splits_final.json").unlink()
    first = train(cascade, "3d_lowres", "all")
    log = Path(first.log_file)
    assert "3 unlabeled cases predicted for 3d_cascade_fullres, 0 were up to date" in log.read_text()
    folder = Path(folder_for_unlabeled(first.output_folder, CASCADE))
    before = {file.name: blosc2.open(str(file), mode="r")[:] for file in folder.iterdir()}

    blosc2.asarray(np.zeros((3, 4, 5), np.uint8), urlpath=str(folder / "scan_00.b2nd"), mode="w")
    (folder / "scan_01.b2nd").unlink()
    (folder / "scan_02.b2nd").write_bytes(b"damaged")
    wrong = (
        r"3 unlabeled cases without a usable prediction by 3d_lowres in .*scan_00 \(of size \(3, 4, 5\), the "
        r"scan has .*scan_01 \(missing\), scan_02 \(damaged\).*--val"
    )
    with pytest.raises(RuntimeError, match=wrong):
        cascade.trainer(TRAINER, config=CASCADE, fold="all").run_training()

    first._predict_unlabeled(CASCADE)
    assert log.read_text().count("3 unlabeled cases predicted for 3d_cascade_fullres, 0 were") == 2
    (folder / "scan_01.b2nd").unlink()
    first._predict_unlabeled(CASCADE)
    assert "1 unlabeled cases predicted for 3d_cascade_fullres, 2 were up to date" in log.read_text()
    after = {file.name: blosc2.open(str(file), mode="r")[:] for file in folder.iterdir()}
    assert after.keys() == before.keys() and all(np.array_equal(after[k], before[k]) for k in before)

    old = fingerprint_of(first.network.state_dict(), (0, 1, 2))
    with torch.no_grad():
        next(first.network.parameters()).mul_(1.01)
    assert fingerprint_of(first.network.state_dict(), (0, 1, 2)) != old
    first._predict_unlabeled(CASCADE)
    assert log.read_text().count("3 unlabeled cases predicted for 3d_cascade_fullres, 0 were") == 3

    source = cascade.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    other = read_properties(str(source / "scan_00.pkl"))
    assert other is not None
    other["nnssl"]["sources"][0]["blake2b"] = "another"
    write_properties(other, str(source / "scan_00.pkl"))
    found = unusable_predictions(["scan_00", "scan_01"], str(source), str(folder), unlabeled=True)
    assert found == {"scan_00": "of another scan"}


def test_a_fold_whose_cases_no_fold_validates_is_refused(cascade: Place) -> None:
    path = cascade.preprocessed / "splits_final.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    with pytest.raises(RuntimeError, match=r"No fold of .* has lab_00, lab_01, lab_02 in its validation"):
        cascade.trainer(TRAINER, config=CASCADE).run_training()


def test_the_next_stage_must_be_preprocessed_before_the_first_is_trained(cascade: Place) -> None:
    shutil.rmtree(cascade.preprocessed / "nnUNetPlans_3d_fullres")
    with pytest.raises(RuntimeError, match=r"3d_fullres, which does not exist.*-c 3d_cascade_fullres"):
        cascade.trainer(TRAINER, config="3d_lowres").run_training()
