"""The real commands: plan, preprocess, train, kill -9, --c, predict, export and import of the model. On
phantoms in every run, on real scans in the nightly one."""

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

from nnssl.demo.phantoms import write_dataset

ROOT = Path(__file__).resolve().parents[2]
SCANS = Path(os.environ.get("NNSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
PHANTOMS, LEFT_ATRIUM, HIPPOCAMPUS = "Dataset900_Phantoms", "Dataset501_LeftAtrium", "Dataset504_Hippocampus"
SPACING = {PHANTOMS: "3", LEFT_ATRIUM: "3.5", HIPPOCAMPUS: "1.5"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def on(dataset: str) -> pytest.ParameterSet:
    """The `shell` of a dataset; real scans are for the nightly run."""
    marks = []
    if dataset != PHANTOMS:
        absent = not (SCANS / dataset).is_dir()
        reason = f"no {dataset} below {SCANS} (set NNSSL_TEST_DATA)"
        marks = [pytest.mark.nightly, pytest.mark.skipif(absent, reason=reason)]
    return pytest.param(dataset, marks=marks, id=dataset)


class Shell:
    """Runs commands of this environment with nnU-Net's variables pointing below one folder."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset, self.id = folder, dataset, dataset[7:10]
        self.raw = folder / "raw" / dataset
        self.preprocessed = folder / "preprocessed" / dataset
        self.results = folder / "results" / dataset
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


def plan(shell: Shell) -> None:
    """Plans and preprocesses coarsely, then makes the plan small and the schedule short."""
    coarse = ("-overwrite_target_spacing", *[SPACING[shell.dataset]] * 3)
    shell(
        "nnssl", "plan-and-preprocess", "-d", shell.id, "-c", "3d_fullres", *coarse, "-np", "2", "-npfp", "2"
    )
    plans = shell.preprocessed / "nnUNetPlans.json"
    edited = json.loads(plans.read_text(encoding="utf-8"))
    configuration = edited["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4, 8, 16, 16, 16, 16][: kwargs["n_stages"]]
    edited["nnssl"] = {
        "num_epochs": 4,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
        "save_every": 1,
        "seed": 0,
        "DiffCL": {"ddim_steps": 2, "hfm_max_tokens": 1024},
    }
    plans.write_text(json.dumps(edited))


def copy_cases(raw: Path) -> None:
    """Seven labeled scans, two in imagesUn, one in imagesTs, out of a dataset whose scans all have labels."""
    source = SCANS / raw.name
    ending = json.loads((source / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = sorted(p.name.removesuffix(ending) for p in (source / "labelsTr").glob(f"*{ending}"))[:10]
    for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs"):
        (raw / name).mkdir(parents=True)
    for folder, chosen in (("imagesTr", cases[:7]), ("imagesUn", cases[7:9]), ("imagesTs", cases[9:])):
        for case in chosen:
            shutil.copy(source / "imagesTr" / f"{case}_0000{ending}", raw / folder)
    for case in cases[:7]:
        shutil.copy(source / "labelsTr" / f"{case}{ending}", raw / "labelsTr")
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 7}))


@pytest.fixture(scope="module")
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Seven labeled scans (four to train, one hidden, two to validate), two in imagesUn, planned and
    preprocessed coarsely, small networks."""
    shell = Shell(tmp_path_factory.mktemp("commands"), request.param)
    if shell.dataset == PHANTOMS:
        write_dataset(shell.raw, labeled=7, unlabeled=2, test=1)
    else:
        copy_cases(shell.raw)
    plan(shell)
    cases = labeled_cases(shell)
    shell("nnssl", "split", "-d", shell.id, "--labeled", "4", "--val", *cases[5:], "--first")
    return shell


def labeled_cases(shell: Shell) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in (shell.raw / "labelsTr").glob("*.nii.gz"))


def scan_to_predict(shell: Shell) -> Path:
    return next((shell.raw / "imagesTs").glob("*_0000.nii.gz"))


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "losses.csv", encoding="utf-8") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.mark.parametrize("shell", [on(PHANTOMS), on(LEFT_ATRIUM)], indirect=True)
def test_from_raw_scans_over_a_kill_to_predictions(shell: Shell) -> None:
    """The journey of the README with a SIGKILL on the way; at night to export and import, and the losses are
    those of an uninterrupted run to 1e-6."""
    before = (shell.preprocessed / "nnUNetPlans.json").read_bytes()
    shell("nnssl", "plan-and-preprocess", "-d", shell.id, "-c", "3d_fullres")
    assert (shell.preprocessed / "nnUNetPlans.json").read_bytes() == before
    folds = json.loads((shell.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    cases = labeled_cases(shell)
    assert folds == [{"train": cases[:4], "val": cases[5:], "unlabeled": [cases[4]]}]
    assert "nnUNetTrainerDiffCL" in shell("nnssl", "trainers")
    assert "FAIL" not in shell("nnssl", "check", "-d", shell.id, "-c", "3d_fullres")

    train = ("nnUNetv2_train", shell.id, "3d_fullres", "0", "-tr", "nnUNetTrainerDiffCL", "-device", "cpu")
    model = shell.results / "nnUNetTrainerDiffCL__nnUNetPlans__3d_fullres"
    fold = model / "fold_0"
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
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert len(rows(fold)) < 4
    shell(*train, "--c", nnUNet_n_proc_DA="0")
    continued = rows(fold)
    assert [r["epoch"] for r in continued] == [0, 1, 2, 3]
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1

    scan = scan_to_predict(shell)
    which = ("-d", shell.id, "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerDiffCL")
    predict = ("nnUNetv2_predict", "-i", str(scan.parent), *which, "-device", "cpu", "-npp", "1", "-nps", "1")
    shell(*predict, "-o", str(shell.folder / "out"))
    prediction = scan.name.replace("_0000", "")
    predicted = sitk.ReadImage(str(shell.folder / "out" / prediction))
    assert predicted.GetSize() == sitk.ReadImage(str(scan)).GetSize()

    if shell.dataset == PHANTOMS:
        return  # the rest takes as long again
    archive = str(shell.folder / "model.zip")
    shell("nnUNetv2_export_model_to_zip", *which, "-o", archive)
    shutil.move(model, shell.folder / "uninstalled")
    shell("nnUNetv2_install_pretrained_model_from_zip", archive)
    shell(*predict, "-o", str(shell.folder / "again"))
    again = sitk.ReadImage(str(shell.folder / "again" / prediction))
    assert (sitk.GetArrayFromImage(again) == sitk.GetArrayFromImage(predicted)).all()

    shutil.rmtree(shell.results)
    shell(*train, nnUNet_n_proc_DA="0")
    whole = rows(fold)
    for one, other in zip(continued, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6, nan_ok=True)
    shell(*train, "--val")


@pytest.mark.nightly
@pytest.mark.parametrize("shell", [on(LEFT_ATRIUM), on(HIPPOCAMPUS)], indirect=True)
@pytest.mark.parametrize("method", ["CAML", "SemSim", "ACTION"])
def test_every_system_trains_and_predicts_real_scans(method: str, shell: Shell) -> None:
    which = ("-tr", f"nnUNetTrainer{method}", "-device", "cpu")
    log = shell("nnUNetv2_train", shell.id, "3d_fullres", "0", *which, nnUNet_n_proc_DA="0")
    trained = rows(shell.results / f"nnUNetTrainer{method}__nnUNetPlans__3d_fullres" / "fold_0")
    assert len(trained) == 4 and all(math.isfinite(value) for row in trained for value in row.values())
    if method == "ACTION":
        assert all(f"phase {i} of 3" in log for i in (1, 2, 3))
    scan, out = scan_to_predict(shell), shell.folder / f"out_{method}"
    where = ("-i", str(scan.parent), "-o", str(out), "-d", shell.id, "-c", "3d_fullres", "-f", "0")
    shell("nnUNetv2_predict", *where, *which, "-npp", "1", "-nps", "1")
    predicted = sitk.ReadImage(str(out / scan.name.replace("_0000", "")))
    assert predicted.GetSize() == sitk.ReadImage(str(scan)).GetSize()
    assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1, 2}


@pytest.mark.nightly
@pytest.mark.parametrize("shell", [on(PHANTOMS)], indirect=True)
def test_find_best_configuration_accepts_our_trainers(shell: Shell) -> None:
    (shell.preprocessed / "splits_final.json").unlink(missing_ok=True)
    which = ("-tr", "nnUNetTrainerSupervised")
    train = ("nnUNetv2_train", shell.id, "3d_fullres", "0", *which, "-device", "cpu", "--npz")
    shell(*train, nnUNet_n_proc_DA="0")
    find = ("nnUNetv2_find_best_configuration", shell.id, "-c", "3d_fullres", "-f", "0", *which, "-np", "1")
    assert "3d_fullres" in shell(*find)
