"""`nnssl pseudo-label`: the segmentations are nnU-Net's, the table's order is what it says, work is kept."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from skimage import io

from nnssl.commands import pseudo_label
from nnssl.commands.cli import main
from nnssl.commands.pseudo_label import PassPredictor, dice, quality, unedited
from nnssl.data.structures import structures
from tests.place import ARCHITECTURE, MEAN_TEACHER, Place, trained
from tests.raw_dataset import plans

ENDING = ".nii.gz"


def run(output: Path, *folds: str, configuration: str = "3d_fullres") -> int:
    chosen = ["-d", "777", "-c", configuration, "-f", *folds, "-tr", MEAN_TEACHER, "-device", "cpu"]
    return main(["pseudo-label", *chosen, "-o", str(output)])


def table(output: Path) -> list[dict[str, str]]:
    with (output / "quality.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def another_fold(trainer: Any, fold: str) -> None:
    """A model of other weights as one more fold."""
    folder = Path(trainer.output_folder_base) / f"fold_{fold}"
    shutil.copytree(trainer.output_folder, folder)
    file = folder / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    generator = torch.Generator().manual_seed(1)
    for weights in checkpoint["network_weights"].values():
        weights.add_(0.05 * torch.randn(weights.shape, generator=generator))
    torch.save(checkpoint, file)


def test_segmentations_are_those_of_nnunet_and_the_worst_come_first(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(drawn)
    another_fold(trainer, "1")
    output = tmp_path / "out"
    assert run(output, "0", "1") == 0
    assert "3 scans by agreement, worst first" in capsys.readouterr().out

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("0", "1"))
    scans = sorted((drawn.raw / "imagesUn").iterdir())
    lists = [[str(scans[i]), str(scans[i + 1])] for i in range(0, 6, 2)]
    (tmp_path / "nnunet").mkdir()
    predictor.predict_from_files_sequential(lists, str(tmp_path / "nnunet"), save_probabilities=True)
    for case in ("scan_00", "scan_01", "scan_02"):
        ours = sitk.ReadImage(str(output / "segmentations" / f"{case}{ENDING}"))
        theirs = sitk.ReadImage(str(tmp_path / "nnunet" / f"{case}{ENDING}"))
        assert (ours.GetSpacing(), ours.GetOrigin()) == (theirs.GetSpacing(), theirs.GetOrigin())
        a, b = (sitk.GetArrayFromImage(image) for image in (ours, theirs))
        inside = (slice(2, -2), slice(6, -6), slice(6, -6))  # nnU-Net weighs rims with subnormal half floats
        assert (a == b)[inside].mean() > 0.995
        with (tmp_path / "nnunet" / f"{case}.npz").open("rb") as stream:
            probabilities = np.load(stream)["probabilities"]
        confidence = read(output / "confidence" / f"{case}{ENDING}")
        assert np.abs(confidence - 100 * probabilities.max(0))[inside].max() <= 1

    rows = table(output)
    agreement = [float(row["agreement"]) for row in rows]
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert agreement == sorted(agreement) and agreement[0] >= 0 and agreement[-1] < 1
    for row in rows:
        per_class = [float(row[f"agreement {c}"]) for c in "ab" if row[f"agreement {c}"]]
        assert float(row["agreement"]) == pytest.approx(np.mean(per_class), abs=1e-4)
        voxels = (read(output / row["segmentation"]) == 2).sum()
        spacing = sitk.ReadImage(str(output / row["segmentation"])).GetSpacing()
        assert float(row["ml b"]) == pytest.approx(voxels * np.prod(spacing) / 1000, abs=1e-3)


def test_the_passes_of_a_fold_average_to_the_prediction_of_nnunet(drawn: Place) -> None:
    trainer = trained(drawn)
    ours, theirs = (
        cls(device=torch.device("cpu"), allow_tqdm=False, use_gaussian=False)
        for cls in (PassPredictor, nnUNetPredictor)
    )
    for predictor in (ours, theirs):
        predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("0",))
    assert ours.mirrorings() == [(), (0,), (2,), (0, 2)] and ours.num_passes == 4
    x = torch.randn(2, 12, 30, 26, generator=torch.Generator().manual_seed(0))
    passes = list(ours.passes(x))
    expected = theirs.predict_logits_from_preprocessed_data(x).float()
    assert torch.allclose(torch.stack(passes).mean(0), expected, atol=5e-3)
    assert all((one - expected).abs().max() > 0.01 for one in passes)


def test_an_interrupted_run_goes_on_and_edited_files_stay(
    drawn: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(drawn)
    output, predict = tmp_path / "out", pseudo_label._predict
    predicted: list[str] = []

    def interrupted(case: Any, *rest: Any) -> Any:
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(case.name)
        return predict(case, *rest)

    monkeypatch.setattr(pseudo_label, "_predict", interrupted)
    assert run(output, "0") == 130
    assert sorted(row["case"] for row in table(output)) == predicted
    mine, unedited_case = output / "segmentations" / f"{predicted[0]}{ENDING}", predicted[1]
    shutil.copy(drawn.raw / "labelsTr" / f"lab_00{ENDING}", mine)
    content = mine.read_bytes()
    predicted.clear()
    assert run(output, "0") == 0
    assert predicted == ["scan_02"] and len(table(output)) == 3
    assert mine.read_bytes() == content
    assert unedited(str(output / "segmentations"), ["scan_00", "scan_01"]) == ["scan_01"]

    # whoever has no use for the confidence may delete it
    (output / "confidence" / f"{unedited_case}{ENDING}").unlink()
    (output / "confidence" / mine.name).unlink()
    predicted.clear()
    assert run(output, "0") == 0 and predicted == [unedited_case]
    assert mine.read_bytes() == content

    # a scan that changes later, not in its time alone: redone, unless somebody worked on the segmentation
    predicted.clear()
    scans = [drawn.raw / "imagesUn" / f"{case}_0000{ENDING}" for case in ("scan_01", "scan_00")]
    for scan in scans:
        os.utime(scan, (1, 1))
    assert run(output, "0") == 0 and not predicted
    for scan in scans:
        sitk.WriteImage(sitk.ReadImage(str(scan)) + 1, str(scan))
    assert run(output, "0") == 1
    assert "was edited, and the scan" in capsys.readouterr().err
    assert mine.read_bytes() == content
    mine.unlink()
    assert run(output, "0") == 0 and sorted(predicted) == ["scan_00", "scan_01"]


def test_what_somebody_drew_before_the_scan_was_predicted_stays(
    drawn: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(drawn)
    output, predict = tmp_path / "out", pseudo_label._predict
    segmentations = output / "segmentations"

    def draw(case: str) -> bytes:
        segmentations.mkdir(exist_ok=True)
        shutil.copy(drawn.raw / "labelsTr" / f"lab_00{ENDING}", segmentations / f"{case}{ENDING}")
        return (segmentations / f"{case}{ENDING}").read_bytes()

    def interrupted(case: Any, *rest: Any) -> Any:
        if case.name == "scan_01":
            raise KeyboardInterrupt
        return predict(case, *rest)

    monkeypatch.setattr(pseudo_label, "_predict", interrupted)
    assert run(output, "0") == 130
    content = draw("scan_01")

    def meanwhile(case: Any, *rest: Any) -> Any:
        draw(case.name)
        return predict(case, *rest)

    monkeypatch.setattr(pseudo_label, "_predict", meanwhile)
    assert run(output, "0") == 1
    shown = capsys.readouterr()
    assert "Not predicted, and not in quality.csv: scan_01." in shown.out
    assert "came to be there meanwhile and is kept" in shown.err
    assert [row["case"] for row in table(output)] == ["scan_00"]
    for case in ("scan_01", "scan_02"):
        assert (segmentations / f"{case}{ENDING}").read_bytes() == content


def test_two_processes_with_the_same_command_share_the_work(
    drawn: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(drawn)
    output, predict = tmp_path / "out", pseudo_label._predict
    cases = ["scan_00", "scan_01", "scan_02"]
    predicted: list[str] = []
    files: dict[str, bytes] = {}

    def another(case: Any, *rest: Any) -> Any:
        if predicted:
            raise KeyboardInterrupt
        predicted.append(case.name)
        found = predict(case, *rest)
        monkeypatch.setattr(pseudo_label, "_predict", predict)
        assert run(output, "0") == 0  # the other one, faster
        files.update({path.name: path.read_bytes() for path in (output / "segmentations").iterdir()})
        monkeypatch.setattr(pseudo_label, "_predict", another)
        return found

    monkeypatch.setattr(pseudo_label, "_predict", another)
    assert run(output, "0") == 0
    assert predicted == ["scan_00"] and sorted(row["case"] for row in table(output)) == cases
    assert {path.name: path.read_bytes() for path in (output / "segmentations").iterdir()} == files
    assert run(output, "0") == 0 and "Not predicted" not in capsys.readouterr().out
    assert unedited(str(output / "segmentations"), cases) == cases


def test_other_models_and_foreign_folders_are_refused(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another_fold(trained(drawn), "1")
    output = tmp_path / "out"
    assert run(output, "0") == 0
    assert run(output, "1") == 1
    assert "holds pseudo-labels of another model" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    assert run(tmp_path / "foreign", "0") == 1
    assert "is not empty" in capsys.readouterr().err
    assert run(tmp_path / "new", "3") == 1
    assert "Found: fold_0/checkpoint_final.pth, fold_1" in capsys.readouterr().err
    (output / "pseudo_labels.json").write_text("[]")
    assert run(output, "0") == 1
    assert f"{output / 'pseudo_labels.json'}: holds list, expected a JSON object" in capsys.readouterr().err
    (drawn.results / f"{MEAN_TEACHER}__nnUNetPlans__3d_fullres" / "dataset.json").write_text("{}")
    assert run(tmp_path / "new", "0") == 1
    assert "3d_fullres/dataset.json, key labels: absent" in capsys.readouterr().err
    shutil.rmtree(drawn.raw / "imagesUn")
    assert run(tmp_path / "new", "0") == 1
    assert "no scans" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_damaged_scan_is_named_and_the_others_are_done(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(drawn)
    broken = drawn.raw / "imagesUn" / f"scan_01_0001{ENDING}"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert run(tmp_path / "out", "0") == 1
    said = capsys.readouterr().err
    assert "1 of 3 scans could not be predicted" in said and str(broken) in said
    assert [row["case"] for row in table(tmp_path / "out")] != []
    assert {row["case"] for row in table(tmp_path / "out")} == {"scan_00", "scan_02"}


def test_regions_and_a_single_pass(drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    for folder in (drawn.raw, drawn.preprocessed):
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        (folder / "dataset.json").write_text(json.dumps({**content, **regions}))
    trainer = trained(drawn)
    shutil.rmtree(drawn.raw / "labelsTr")  # no label is opened
    trainer.inference_allowed_mirroring_axes = None
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    output = tmp_path / "out"
    assert run(output, "0") == 0
    assert "by confidence (one fold and no mirroring" in capsys.readouterr().out
    rows = table(output)
    assert [row["agreement"] for row in rows] == [""] * 3 and "agreement whole" in rows[0]
    values = [float(row["confidence"]) for row in rows]
    assert values == sorted(values)
    confidence = read(output / "confidence" / f"scan_00{ENDING}")
    assert confidence.min() >= 50 and confidence.max() <= 100  # each region is decided at one half


def test_pictures_in_two_dimensions(drawn: Place, tmp_path: Path) -> None:
    """PNG in, PNG out; 2D patches of a dataset of pictures."""
    for part in ("imagesTr", "imagesUn", "labelsTr"):
        for file in (drawn.raw / part).iterdir():
            values = read(file)[5]
            shape = values if part == "labelsTr" else values / 4
            io.imsave(
                drawn.raw / part / file.name.replace(ENDING, ".png"),
                shape.astype(np.uint8),
                check_contrast=False,
            )
            file.unlink()
    for folder in (drawn.raw, drawn.preprocessed):
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".png"}))
    flat = json.loads(json.dumps(ARCHITECTURE).replace("3d", "2d"))
    for key in ("kernel_sizes", "strides"):
        flat["arch_kwargs"][key] = [size[1:] for size in flat["arch_kwargs"][key]]
    file = drawn.preprocessed / "nnUNetPlans.json"
    plan = json.loads(file.read_text(encoding="utf-8"))
    plan["image_reader_writer"] = "NaturalImage2DIO"
    two = {**plans(spacing=(999.0, 1.0, 1.0))["configurations"]["2d"], "patch_size": [28, 24]}
    plan["configurations"] = {"2d": {**two, "architecture": flat}}
    file.write_text(json.dumps(plan))
    (drawn.preprocessed / "nnUNetPlans_3d_fullres").rename(drawn.preprocessed / "nnUNetPlans_2d")
    trainer = drawn.trainer(MEAN_TEACHER, config="2d")
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = (0, 1)
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    for name in ("plans.json", "dataset.json"):
        source = "nnUNetPlans.json" if name == "plans.json" else name
        shutil.copy(drawn.preprocessed / source, Path(trainer.output_folder_base) / name)
    output = tmp_path / "out"
    assert run(output, "0", configuration="2d") == 0
    for part in ("segmentations", "confidence"):
        picture = io.imread(output / part / "scan_00.png")
        assert picture.shape == (28, 26) and picture.dtype == np.uint8
    volumes = {row[key] for row in table(output) for key in row if key.startswith("ml ")}
    assert volumes <= {"", "0"} and "" in volumes  # pixels have no volume


@pytest.mark.parametrize(
    ("shape", "spacing", "volume"),
    [
        ((2, 10, 10), (5, 1, 1), 1.0),
        ((1, 10, 10), (5, 1, 1), 0.5),
        ((1, 10, 10), (999, 1, 1), None),
        ((1, 10, 10), (999 * 0.5, 0.25, 0.5), None),
    ],
)
def test_a_thickness_that_the_reader_made_up_gives_no_volume(
    shape: tuple[int, ...], spacing: tuple[float, ...], volume: float | None
) -> None:
    found = pseudo_label._volumes(np.ones(shape, np.uint8), spacing, {"a": (1,), "b": (2, 3)})
    assert found == {"a": volume, "b": 0}


def test_the_measures_are_what_they_say() -> None:
    final = np.array([[1, 1, 2, 0]])
    classes = structures({"labels": {"background": 0, "b": 2, "a": 1, "absent": 3, "ignore": 4}})
    assert classes == {"a": (1,), "b": (2,), "absent": (3,)}
    probabilities = np.array([[[0, 0, 0, 1.0]], [[1, 0.5, 0, 0]], [[0, 0.5, 1, 0]], [[0, 0, 0, 0.0]]])
    row = quality(final, iter([final, np.array([[1, 0, 2, 2]])]), probabilities, classes, True)
    a, b = (1 + 2 / 3) / 2, (1 + 2 / 3) / 2
    assert row["per_class"] == {"a": pytest.approx(a), "b": pytest.approx(b), "absent": None}
    assert row["agreement"] == pytest.approx((a + b) / 2)
    assert row["confidence"] == pytest.approx((2 * 1.5 / (1.5 + 2) + 2 * 1 / (1.5 + 1)) / 2)
    nothing = quality(np.zeros((1, 4)), iter([np.zeros((1, 4))] * 2), probabilities, classes, True)
    assert (nothing["agreement"], nothing["confidence"]) == (0.0, 0.0)
    assert dice(np.zeros(2, bool), np.zeros(2, bool)) is None
    assert dice(np.array([True, False]), np.array([False, False])) == 0
    regions = structures({"labels": {"background": 0, "core": 2, "whole": [1, 2]}})
    assert regions == {"core": (2,), "whole": (1, 2)}


def test_the_summary_says_where_nothing_was_found(tmp_path: Path) -> None:
    file = tmp_path / "quality.csv"
    text = "rank,case,agreement,confidence,ml a\n1,x,0.0,0.0,0\n2,y,0.5,0.5,{}\n"
    file.write_text(text.format(0))
    assert "found nothing in any of them" in pseudo_label.summary(str(file))
    file.write_text(text.format(""))  # something, of unknown volume
    assert "worst first: x, y" in pseudo_label.summary(str(file))
    file.write_text(text.format(0.3))
    assert "worst first: x, y" in pseudo_label.summary(str(file))
