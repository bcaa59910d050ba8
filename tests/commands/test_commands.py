"""The real commands on real scans: plan, preprocess, train, kill -9, --c, predict, export and import of the
model."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[2]
SCANS = Path(os.environ.get("NNSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
DATASET, HIPPOCAMPUS = "Dataset501_LeftAtrium", "Dataset504_Hippocampus"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SCANS / DATASET).is_dir(), reason=f"no {DATASET} below {SCANS} (set NNSSL_TEST_DATA)"
    ),
]


class Shell:
    """Runs commands of this environment with nnU-Net's variables pointing below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")} | {
            **{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_extTrainer": str(ROOT / "nnssl_trainers"),
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def command(self, *arguments: str) -> list[str]:
        if arguments[0] == "nnssl":
            return [sys.executable, "-m", "nnssl.commands.cli", *arguments[1:]]
        return [sys.executable, os.path.join(sysconfig.get_path("scripts"), arguments[0]), *arguments[1:]]

    def __call__(self, *arguments: str, **extra: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            env={**self.environment, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=800,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}"
        return done.stdout


def plan(shell: Shell, dataset: str, spacing: str) -> None:
    """Plans and preprocesses coarsely, then makes the plan small and the schedule short."""
    options = ("-overwrite_target_spacing", spacing, spacing, spacing, "-np", "2", "-npfp", "2")
    shell("nnssl", "plan-and-preprocess", "-d", dataset[7:10], "-c", "3d_fullres", *options)
    plans = shell.folder / "preprocessed" / dataset / "nnUNetPlans.json"
    edited = json.loads(plans.read_text(encoding="utf-8"))
    configuration = edited["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [8, 16, 32, 32, 32, 32][: kwargs["n_stages"]]
    edited["nnssl"] = {
        "num_epochs": 4,
        "num_iterations_per_epoch": 4,
        "num_val_iterations_per_epoch": 1,
        "save_every": 1,
        "seed": 0,
        "DiffCL": {"ddim_steps": 2, "hfm_max_tokens": 4096},
    }
    plans.write_text(json.dumps(edited))


def copy_cases(shell: Shell, dataset: str, labeled: list[str], unlabeled: list[str], test: list[str]) -> None:
    source, raw = SCANS / dataset, shell.folder / "raw" / dataset
    for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs"):
        (raw / name).mkdir(parents=True)
    for folder, cases in (("imagesTr", labeled), ("imagesUn", unlabeled), ("imagesTs", test)):
        for case in cases:
            shutil.copy(source / "imagesTr" / f"{case}_0000.nii.gz", raw / folder)
    for case in labeled:
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", raw / "labelsTr")
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(labeled)}))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Seven labeled scans (one of them to be hidden), two in imagesUn, planned and preprocessed coarsely,
    small networks."""
    shell = Shell(tmp_path_factory.mktemp("commands"))
    cases = [f"LA_{i:03d}" for i in range(1, 11)]
    copy_cases(shell, DATASET, cases[:7], cases[7:9], cases[9:])
    plan(shell, DATASET, "3.5")
    shell("nnssl", "split", "-d", "501", "--labeled", "4", "--val", "LA_006", "LA_007", "--first")
    return shell


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Two classes; seven labeled scans, one of them hidden, two in imagesUn."""
    if not (SCANS / HIPPOCAMPUS).is_dir():
        pytest.skip(f"no {HIPPOCAMPUS} below {SCANS} (set NNSSL_TEST_DATA)")
    shell = Shell(tmp_path_factory.mktemp("hippocampus"))
    cases = sorted(
        p.name.removesuffix(".nii.gz") for p in (SCANS / HIPPOCAMPUS / "labelsTr").glob("*.nii.gz")
    )
    copy_cases(shell, HIPPOCAMPUS, cases[:7], cases[7:9], cases[9:10])
    plan(shell, HIPPOCAMPUS, "1.5")
    shell("nnssl", "split", "-d", "504", "--labeled", "4", "--val", *cases[5:7], "--first")
    return shell


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "losses.csv", encoding="utf-8") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def test_from_raw_scans_over_a_kill_to_predictions(shell: Shell) -> None:
    """The journey of the README; a run killed with SIGKILL and continued gives the losses of an uninterrupted
    one to 1e-6."""
    assert "Going on with the existing plan" in shell(
        "nnssl", "plan-and-preprocess", "-d", "501", "-c", "3d_fullres"
    )
    folds = json.loads(
        (shell.folder / "preprocessed" / DATASET / "splits_final.json").read_text(encoding="utf-8")
    )
    assert folds == [
        {
            "train": ["LA_001", "LA_002", "LA_003", "LA_004"],
            "val": ["LA_006", "LA_007"],
            "unlabeled": ["LA_005"],
        }
    ]
    assert "nnUNetTrainerDiffCL" in shell("nnssl", "trainers")
    assert "FAIL" not in shell("nnssl", "check", "-d", "501", "-c", "3d_fullres")

    train = ("nnUNetv2_train", "501", "3d_fullres", "0", "-tr", "nnUNetTrainerDiffCL", "-device", "cpu")
    fold = shell.folder / "results" / DATASET / "nnUNetTrainerDiffCL__nnUNetPlans__3d_fullres" / "fold_0"
    with subprocess.Popen(
        shell.command(*train),
        env={**shell.environment, "nnUNet_n_proc_DA": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 400
        while not (fold / "losses.csv").exists() or len(rows(fold)) < 2:
            assert process.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline, "no second epoch within 400 s"
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert len(rows(fold)) < 4
    shell(*train, "--c", nnUNet_n_proc_DA="0")
    continued = rows(fold)
    assert [r["epoch"] for r in continued] == [0, 1, 2, 3]
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1

    images = shell.folder / "raw" / DATASET / "imagesTs"
    common = (
        "-d",
        "501",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-tr",
        "nnUNetTrainerDiffCL",
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
    )
    shell("nnUNetv2_predict", "-i", str(images), "-o", str(shell.folder / "out"), *common)
    predicted = sitk.ReadImage(str(shell.folder / "out" / "LA_010.nii.gz"))
    assert predicted.GetSize() == sitk.ReadImage(str(images / "LA_010_0000.nii.gz")).GetSize()

    archive = str(shell.folder / "model.zip")
    shell(
        "nnUNetv2_export_model_to_zip",
        "-d",
        "501",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-tr",
        "nnUNetTrainerDiffCL",
        "-o",
        archive,
    )
    shutil.move(fold.parents[1], shell.folder / "uninstalled")
    shell("nnUNetv2_install_pretrained_model_from_zip", archive)
    shell("nnUNetv2_predict", "-i", str(images), "-o", str(shell.folder / "again"), *common)
    again = sitk.ReadImage(str(shell.folder / "again" / "LA_010.nii.gz"))
    assert (sitk.GetArrayFromImage(again) == sitk.GetArrayFromImage(predicted)).all()

    shutil.rmtree(shell.folder / "results" / DATASET)
    shell(*train, nnUNet_n_proc_DA="0")
    whole = rows(fold)
    for one, other in zip(continued, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    shell(*train, "--val")


@pytest.mark.parametrize("method", ["CAML", "SemSim", "ACTION"])
@pytest.mark.parametrize("dataset", [DATASET, HIPPOCAMPUS])
def test_every_system_trains_and_predicts_both_datasets(
    method: str, dataset: str, request: pytest.FixtureRequest
) -> None:
    shell = request.getfixturevalue("shell" if dataset == DATASET else "hippocampus")
    common = (
        "-d",
        dataset[7:10],
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-tr",
        f"nnUNetTrainer{method}",
        "-device",
        "cpu",
    )
    log = shell("nnUNetv2_train", dataset[7:10], "3d_fullres", "0", *common[6:], nnUNet_n_proc_DA="0")
    fold = shell.folder / "results" / dataset / f"nnUNetTrainer{method}__nnUNetPlans__3d_fullres" / "fold_0"
    trained = rows(fold)
    assert len(trained) == 4 and all(math.isfinite(value) for row in trained for value in row.values())
    if method == "ACTION":
        assert all(f"phase {i} of 3" in log for i in (1, 2, 3))
    images, out = shell.folder / "raw" / dataset / "imagesTs", shell.folder / f"out_{method}_{dataset}"
    shell("nnUNetv2_predict", "-i", str(images), "-o", str(out), *common, "-npp", "1", "-nps", "1")
    image = next(images.glob("*.nii.gz"))
    predicted = sitk.ReadImage(str(out / image.name.replace("_0000", "")))
    assert predicted.GetSize() == sitk.ReadImage(str(image)).GetSize()
    assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1, 2}


def test_find_best_configuration_accepts_our_trainers(shell: Shell) -> None:
    (shell.folder / "preprocessed" / DATASET / "splits_final.json").unlink(missing_ok=True)
    name = "nnUNetTrainerSupervised"
    shell(
        "nnUNetv2_train",
        "501",
        "3d_fullres",
        "0",
        "-tr",
        name,
        "-device",
        "cpu",
        "--npz",
        nnUNet_n_proc_DA="0",
    )
    said = shell(
        "nnUNetv2_find_best_configuration", "501", "-c", "3d_fullres", "-f", "0", "-tr", name, "-np", "1"
    )
    assert "3d_fullres" in said
