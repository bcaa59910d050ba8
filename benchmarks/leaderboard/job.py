"""One row of the leaderboard: train, let nnU-Net predict the validation cases with the last checkpoint,
score, write the row."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
import traceback
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.leaderboard.prepare import BASE_PLAN, ROOT, Workspace, link, lock, run, tail
from benchmarks.leaderboard.suite import Row, Suite
from benchmarks.quality.terms import read_losses, term_table
from nnssl.commands.launch import launcher
from nnssl.files import copy_file, read_json, write_json, write_text

TRAIN = ("nnunetv2.run.run_training:run_training_entry", "nnUNetv2_train")
PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
PREDICT_BFLOAT16 = "benchmarks.leaderboard.predict:predict_in_bfloat16"
PACKAGES = ("nnunetv2", "batchgeneratorsv2", "torch", "numpy", "scipy")


class Job:
    """A row of a suite in its work folder."""

    def __init__(self, suite: Suite, row: Row, work: Path, results: Path) -> None:
        self.suite, self.row, self.work, self.results = suite, row, work, results
        self.space = Workspace(work / suite.name, suite)
        self.result = results / suite.name / f"{row.name}.json"
        self.panel = results / suite.name / "panels" / f"{row.name}.png"
        self.plans = f"{row.name}_{row.fingerprint}"
        self.log = self.space.folder / "logs" / f"{self.plans}.log"
        self.usage = self.space.folder / "logs" / f"{self.plans}.jsonl"
        self.commits = self.space.folder / "logs" / f"{self.plans}.commits"
        self.lock = self.space.folder / "locks" / self.plans
        self.epochs = int(row.settings["num_epochs"])

    def state(self) -> str:
        """finished | failed | outdated (of other settings) | absent, by the row on disk."""
        if not self.result.is_file():
            return "absent"
        found = read_json(self.result)
        return found["status"] if found["fingerprint"] == self.row.fingerprint else "outdated"

    def run(self) -> str:
        """All that is missing; returns the row's status, or `busy` where another process works on it."""
        with lock(self.lock) as mine:
            if not mine:
                return "busy"
            if self.state() == "finished":
                return "finished"
            begun = time.time()
            try:
                self.note_commit()
                folder = (
                    self.self_training()
                    if self.row.kind == "self_training"
                    else self.train(self.space, self.plans, self.row.settings)
                )
                row = {
                    **self.identity("finished"),
                    **self.scores(folder),
                    **self.terms(folder),
                    **self.provenance(folder, begun),
                }
            except Exception as error:
                with open(self.log, "a", encoding="utf-8") as file:
                    traceback.print_exc(file=file)
                self.fail(f"{type(error).__name__}: {error}")
                return "failed"
            self.write(row)
            return "finished"

    def train(
        self,
        space: Workspace,
        plans: str,
        settings: Any,
        fold: int | None = None,
        batch_size: int | None = None,
    ) -> Path:
        """A training to its end, from its last checkpoint if it has one; returns nnU-Net's folder of the
        fold."""
        fold = self.row.fold if fold is None else fold
        name = f"{self.row.trainer}__{plans}__{self.suite.configuration}"
        folder = space.folder / "results" / self.suite.dataset / name / f"fold_{fold}"
        if not (folder / "validation" / "summary.json").is_file():
            space.write_plans(plans, settings, batch_size)
            arguments = [
                space.identifier,
                self.suite.configuration,
                str(fold),
                "-tr",
                self.row.trainer,
                "-p",
                plans,
            ]
            begun = any(folder.glob("checkpoint_*.pth"))  # nnU-Net takes one or the other
            arguments += ["--c"] if begun or not self.row.start else ["-pretrained_weights", self.start()]
            self.nnunet(space, *TRAIN, *arguments)
        return folder

    def source(self) -> Job | None:
        """The row whose network this one starts from."""
        if self.row.start is None:
            return None
        row = next(row for row in self.suite.rows() if row.name == self.row.start)
        return Job(self.suite, row, self.work, self.results)

    def start(self) -> str:
        """Its last checkpoint; RuntimeError where there is none."""
        source = self.source()
        assert source is not None, "no row to start from"
        folder = source.folder()
        checkpoint = folder / "checkpoint_final.pth"
        if source.state() != "finished" or not checkpoint.is_file():
            raise RuntimeError(
                f"starts from row {source.row.name}, which has no finished checkpoint {checkpoint}: run it "
                "first, in the same work folder"
            )
        return str(checkpoint)

    def folder(self) -> Path:
        """nnU-Net's folder of the fold, of a row with one training."""
        name = f"{self.row.trainer}__{self.plans}__{self.suite.configuration}"
        return self.space.folder / "results" / self.suite.dataset / name / f"fold_{self.row.fold}"

    def nnunet(self, space: Workspace, *command: str) -> None:
        environment = space.environment()
        if self.suite.device == "cpu":
            environment.setdefault("nnUNet_n_proc_DA", "0")
        launch = launcher(cores=1, parent=os.getpid(), usage=str(self.usage))
        run(self.log, [*launch, *command, "-device", self.suite.device], environment)

    def self_training(self) -> Path:
        """What a user of stock nnU-Net does with unlabeled scans: train, predict them, train anew on both.

        Each round takes half of the row's steps. Round two draws its batch, as large as the labeled and the
        unlabeled batch of the other methods together, from the labeled cases and the pseudo-labeled scans;
        labeled cases stand in its list so many times that the expected number of labeled samples per step is
        the others'. Pseudo-labels come from the last checkpoint of round one. Both rounds are
        nnUNetTrainerSupervised: stock nnU-Net with a schedule and a seed.
        """
        settings, half = dict(self.row.settings), self.epochs // 2
        first = self.train(self.space, f"{self.plans}_r1", {**settings, "num_epochs": half})
        second = Workspace(self.space.folder / "self_training" / self.plans, self.suite)
        split = read_json(self.space.preprocessed / "splits_final.json")[self.row.fold]
        ending = read_json(self.space.raw / "dataset.json")["file_ending"]
        images = {
            name: sorted((self.space.raw / name).glob(f"*{ending}")) for name in ("imagesTr", "imagesUn")
        }
        case = lambda path: path.name.removesuffix(ending)[:-5]  # without the channel number  # noqa: E731
        pseudo, scans = second.folder / "pseudo", second.folder / "scans"
        unlabeled = {case(p): None for p in images["imagesUn"]} | dict.fromkeys(split["unlabeled"])
        if not (second.folder / "predicted").is_file():
            shutil.rmtree(pseudo, ignore_errors=True)
            for path in (*images["imagesTr"], *images["imagesUn"]):
                if case(path) in unlabeled:
                    link(path, scans / path.name)
            model = [
                "-d",
                self.space.identifier,
                "-c",
                self.suite.configuration,
                "-f",
                str(self.row.fold),
                "-tr",
                self.row.trainer,
            ]
            last = [
                "-p",
                f"{self.plans}_r1",
                "-chk",
                "checkpoint_final.pth",
                "-npp",
                "0",
                "-nps",
                "0",
                "--disable_progress_bar",
            ]
            in_bfloat16 = (
                self.suite.device == "cpu" and settings.get("amp") == "bfloat16"
            )  # as the validation of such a training
            entry = PREDICT_BFLOAT16 if in_bfloat16 else PREDICT
            self.nnunet(
                self.space, entry, "nnUNetv2_predict", "-i", str(scans), "-o", str(pseudo), *model, *last
            )
            (second.folder / "predicted").touch()
        if not (second.folder / "prepared").is_file():
            for path in (*images["imagesTr"], *images["imagesUn"]):
                link(path, second.raw / "imagesTr" / path.name)
            for name in (*split["train"], *split["val"]):
                link(
                    self.space.raw / "labelsTr" / f"{name}{ending}",
                    second.raw / "labelsTr" / f"{name}{ending}",
                )
            for name in unlabeled:
                link(pseudo / f"{name}{ending}", second.raw / "labelsTr" / f"{name}{ending}")
            dataset = read_json(self.space.raw / "dataset.json")
            count = len({*split["train"], *split["val"], *unlabeled})
            write_json({**dataset, "numTraining": count}, second.raw / "dataset.json")
            second.preprocessed.mkdir(parents=True, exist_ok=True)
            for name in (f"{BASE_PLAN}.json", "dataset_fingerprint.json"):
                copy_file(self.space.preprocessed / name, second.preprocessed / name)
            second.preprocess(self.log, BASE_PLAN, 1)
            (second.folder / "prepared").touch()
        plans = self.space.plans(f"{self.plans}_r1")
        batch = plans["configurations"][self.suite.configuration]["batch_size"]
        more = settings.get("unlabeled_batch_size") or batch
        times = max(1, round(len(unlabeled) * batch / (more * len(split["train"]))))
        train = sorted(split["train"] * times + list(unlabeled))
        write_json([{"train": train, "val": split["val"]}], second.preprocessed / "splits_final.json")
        folder = self.train(
            second,
            self.plans,
            {**settings, "num_epochs": self.epochs - half},
            fold=0,
            batch_size=batch + more,
        )
        self.rounds = [first, folder]
        return folder

    # the row

    def identity(self, status: str) -> dict[str, Any]:
        row, split = self.row, self.space.preprocessed / "splits_final.json"
        labeled = row.labeled
        if labeled is None and split.is_file():
            labeled = len(read_json(split)[row.fold]["train"])
        what = {
            "suite": self.suite.name,
            "method": row.method,
            "trainer": row.trainer,
            "dataset": self.suite.dataset,
            "labeled": labeled,
        }
        return {
            **what,
            "seed": row.seed,
            "fold": row.fold,
            "dice": None,
            "status": status,
            "fingerprint": row.fingerprint,
        }

    def fail(self, reason: str) -> None:
        """A visible row for a training that ended early; the next run tries again from its last
        checkpoint."""
        lines = reason.splitlines()
        self.write(
            {
                **self.identity("failed"),
                "error": lines[0] if lines else "",
                "log": tail(self.log).splitlines(),
            }
        )

    def write(self, row: dict[str, Any]) -> None:
        self.result.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in row.items())
        write_text("{\n" + lines + "\n}\n", self.result)

    def scores(self, folder: Path) -> dict[str, Any]:
        """Metrics of every validation case, their means, the panel."""
        import SimpleITK as sitk

        from benchmarks.leaderboard.metrics import score_case
        from benchmarks.leaderboard.panel import write_panel

        dataset = read_json(self.space.raw / "dataset.json")
        ending = dataset["file_ending"]
        structures = {
            k: v for k, v in dataset["labels"].items() if isinstance(v, int) and v > 0 and k != "ignore"
        }
        names = read_json(self.space.preprocessed / "splits_final.json")[self.row.fold]["val"]
        table: dict[str, list[list[float | None]]] = {}
        volumes = []
        for name in names:
            truth = sitk.ReadImage(str(self.space.raw / "labelsTr" / f"{name}{ending}"))
            prediction = sitk.GetArrayFromImage(
                sitk.ReadImage(str(folder / "validation" / f"{name}{ending}"))
            )
            reference = sitk.GetArrayFromImage(truth)
            volumes.append(int((reference > 0).sum()))
            for metric, values in score_case(
                prediction, reference, truth.GetSpacing()[::-1], list(structures.values())
            ).items():
                table.setdefault(metric, []).append(values)
        middle = names[
            int(np.argsort(volumes, kind="stable")[len(names) // 2])
        ]  # the same case for every method
        aspect = write_panel(self.space.raw, folder / "validation", middle, ending, self.panel)
        means = {
            metric: float(np.mean([v for row in values for v in row if v is not None]))
            for metric, values in table.items()
        }
        return {
            "dice": means["dice"],
            "metrics": {k: round(v, 5) for k, v in means.items()},
            "structures": list(structures),
            "cases": names,
            "per_case": table,
            "panel": {"case": middle, "aspect": aspect},
        }

    def terms(self, folder: Path) -> dict[str, Any]:
        """Value, weight and gradient of every term in each fifth of the training, where the suite asks for
        gradients and the method has several terms."""
        if not self.row.settings.get("term_gradients"):
            return {}
        table = {
            term: {k: [v and float(f"{v:.4g}") for v in values] for k, values in entry.items()}
            for term, entry in term_table(read_losses(folder)).items()
        }
        return {"terms": table} if len(table) > 1 else {}

    def provenance(self, folder: Path, begun: float) -> dict[str, Any]:
        """Curves, resolved configuration, plan, versions, hardware, time and memory.

        begun: when this process took the row (seconds since 1970). `train_seconds` are all epochs; `seconds`
        adds what this process did beside them, not what an earlier one did that was killed.
        """
        import torch

        epochs: list[tuple[float, float]] = []
        config = {}
        curve: dict[str, list[float | None]] = {}
        for one in getattr(self, "rounds", [folder]):
            checkpoint = torch.load(one / "checkpoint_final.pth", map_location="cpu", weights_only=False)
            log = checkpoint["logging"]
            epochs += zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
            for name, key in (
                ("train_loss", "train_losses"),
                ("val_loss", "val_losses"),
                ("pseudo_dice", "mean_fg_dice"),
            ):
                values = [float(v) for v in log[key]]
                curve[name] = curve.get(name, []) + [
                    round(v, 5) if math.isfinite(v) else None for v in values
                ]
            config = checkpoint["nnssl"]["config"]
        plan = read_json(folder.parent / "plans.json")["configurations"][self.suite.configuration]
        network = plan["architecture"]["arch_kwargs"]
        used = usage(self.usage)
        earlier = sum(end - start for start, end in epochs if start < begun)
        return {
            "curve": curve,
            "config": config,
            "plan": {
                **{k: plan[k] for k in ("spacing", "patch_size", "batch_size", "normalization_schemes")},
                **{
                    "network": plan["architecture"]["network_class_name"].split(".")[-1],
                    "features": network["features_per_stage"],
                },
            },
            "commit": ", ".join(dict.fromkeys(self.commits.read_text(encoding="utf-8").split())),
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "hardware": hardware(self.suite.device),
            "train_seconds": round(sum(end - start for start, end in epochs)),
            "seconds": round(earlier + time.time() - begun),
            **summary(used),
        }

    def note_commit(self) -> None:
        """Of the code that is about to work on the row, `+` where it was edited since; nothing outside a
        checkout."""
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8"
        ).stdout.strip()
        edited = subprocess.run(
            [*git, "status", "--porcelain", "nnssl", "nnssl_trainers"], capture_output=True, encoding="utf-8"
        ).stdout.strip()
        self.commits.parent.mkdir(parents=True, exist_ok=True)
        with open(self.commits, "a", encoding="utf-8") as file:
            file.write(head + "+" * bool(head and edited) + "\n")


def usage(path: Path) -> list[dict[str, int]]:
    """What the commands of a row used, as far as they lived to say so; a line cut short by a kill is left
    out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def summary(used: list[dict[str, int]]) -> dict[str, int]:
    """The highest peaks and the sum of the times. Commands that were killed are not in it."""
    return {
        key: (sum if key == "cpu_seconds" else max)(u[key] for u in used if key in u)
        for key in sorted({k for u in used for k in u})
    }


def hardware(device: str) -> str:
    """The GPU, or the processor of which one thread was used."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, one thread"


def run_job(suite: Suite, row: Row, work: Path, results: Path) -> str:
    """What the executor's processes call."""
    os.chdir(ROOT)
    return Job(suite, row, work, results).run()
