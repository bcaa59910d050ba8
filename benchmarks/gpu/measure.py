"""What is measured, one function per kind of task. Each runs in a process of its own and returns a row for
JSON; whatever it raises becomes the row's traceback."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import nnunetv2.run.run_training as nnunet  # imported before the processes fork, as all that trainings need
import torch

import nnssl.methods  # noqa: F401
from benchmarks.gpu.plan import Place
from benchmarks.leaderboard.job import PACKAGES, Job
from benchmarks.leaderboard.prepare import tail
from nnssl.commands.environment import environment
from nnssl.files import read_json
from nnssl.training.cost import predict
from nnssl.training.trainer import SemiTrainer

MIB = 2**20


class Enough(Exception):
    """Ends a training after an epoch, once its checkpoint is written."""


def as_nnunet(measurement: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A measurement under the settings of nnU-Net's own command for GPUs."""

    @wraps(measurement)
    def measured(place: Place, **arguments: Any) -> dict[str, Any]:
        if place.device.type == "cuda":
            torch.set_num_threads(1)
            torch.backends.cudnn.benchmark = True
        return measurement(place, **arguments)

    return measured


@as_nnunet
def machine(place: Place) -> dict[str, Any]:
    """Versions and devices; on CUDA whether it computes."""
    x = torch.ones(64, 64, device=place.device)
    if float((x @ x).sum()) != 64**3:
        raise RuntimeError(f"a matrix product on {place.device} is wrong")
    return environment()


# trainings of a few steps


def trainer_for(
    place: Place,
    trainer: str,
    plans: str,
    compiled: bool,
    batch_size: int | None = None,
    loaders: int = 2,
    **settings: Any,
) -> Any:
    """nnU-Net's own way from a trainer's name to a trainer. The plan is written under the name `plans`, with
    the `settings` as its key nnssl; a stock trainer gets them as attributes."""
    os.environ |= place.space.environment()
    os.environ |= {"nnUNet_compile": "t" if compiled else "f", "nnUNet_n_proc_DA": str(loaders)}
    place.space.write_plans(plans, settings, batch_size)
    built = nnunet.get_trainer_from_args(
        place.space.identifier, place.suite.configuration, 0, trainer, plans, False, place.device
    )
    for key in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
        if key in settings:
            setattr(built, key, settings[key])
    return built


@as_nnunet
def smoke(
    place: Place, trainer: str, amp: str, compiled: bool, steps: int, resumed: bool, loaders: int
) -> dict[str, Any]:
    """An epoch of nnU-Net's loop; `resumed`: then a second one by a new trainer, from the checkpoint."""
    schedule = {"num_epochs": 2, "num_iterations_per_epoch": steps, "num_val_iterations_per_epoch": 1}
    plans = f"smoke_{trainer}_{amp}_{'compiled' if compiled else 'eager'}"
    settings: dict[str, Any] = {**schedule, "save_every": 1, "seed": 0, "amp": amp}
    build = partial(trainer_for, place, trainer, plans, compiled, loaders=loaders, **settings)
    begun, peaks = time.monotonic(), Peaks(place.device)
    first = build()
    folder = Path(first.output_folder_base)
    try:
        end = first.on_epoch_end

        def stop() -> None:
            end()
            raise Enough

        first.on_epoch_end = stop
        try:
            first.run_training()
        except Enough:
            finish_loaders(first)
        row = {"seconds": round(time.monotonic() - begun, 1), **peaks.read(), **outcome(first)}
        row["compiled"] = bool(first._do_i_compile())
        if resumed:
            del first
            second = build()
            second.load_checkpoint(str(folder / "fold_0" / "checkpoint_latest.pth"))
            second.run_training()
            row["resumed"] = outcome(second)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def outcome(trainer: Any) -> dict[str, Any]:
    """Losses of the last epoch; RuntimeError where the training loss is not finite."""
    losses = {k: float(trainer.logger.get_value(k, -1)) for k in ("train_losses", "val_losses")}
    history = getattr(trainer, "history", None)
    terms = history.rows[-1] if history is not None and history.rows else {}
    found = {"epoch": trainer.current_epoch, **losses}
    found |= {"terms": {k.removeprefix("loss/"): v for k, v in terms.items() if k.startswith("loss/")}}
    if hasattr(trainer, "step"):
        found["skipped_steps"] = trainer.step.skipped
    if not math.isfinite(losses["train_losses"]):
        raise RuntimeError(f"the training loss is not finite: {found}")
    return found


def finish_loaders(trainer: Any) -> None:
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()


@as_nnunet
def steps(
    place: Place,
    trainer: str,
    amp: str,
    compiled: bool,
    batch_size: int | None,
    repeats: int,
    loaders: int,
    at: float = 0.5,
    settings: Mapping[str, Any] | None = None,
    details: bool = True,
) -> dict[str, Any]:
    """Seconds of a step on batches that wait in memory, peak memory, host reads; then with the loaders.

    at: progress of the training, where all terms count. details: with loaders, host reads and profile.
    """
    schedule = {"num_epochs": 1000, "num_iterations_per_epoch": 10**6}
    plans = f"steps_{trainer}_{amp}_{batch_size or 'planned'}_{'compiled' if compiled else 'eager'}"
    plans += "".join(f"_{key}-{value}" for key, value in sorted((settings or {}).items()))
    settings = {**schedule, "seed": 0, "amp": amp, **(settings or {})}
    peaks = Peaks(place.device)
    built = trainer_for(place, trainer, plans, compiled, batch_size, loaders, **settings)
    try:
        begun = time.monotonic()
        built.on_train_start()
        built.current_epoch = round(at * schedule["num_epochs"])
        built.on_train_epoch_start()
        batches = [next(built.dataloader_train) for _ in range(4)]
        built.train_step(batches[0])
        synchronize(place.device)
        row: dict[str, Any] = {"start_seconds": round(time.monotonic() - begun, 1)}
        peaks.reset()
        seconds = []
        for i in range(repeats + 3):
            start = time.perf_counter()
            built.train_step(batches[i % len(batches)])
            synchronize(place.device)
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds[3:])
        row |= {"step_seconds": step, "steps_per_second": 1 / step, **peaks.read()}
        row |= {"batch_size": built.batch_size, "compiled": bool(built._do_i_compile())}
        row |= {"patch_size": [int(n) for n in built.configuration_manager.patch_size]}
        if isinstance(built, SemiTrainer):
            plan = (place.space.plans(plans), place.suite.configuration, built.dataset_json)
            row["predicted_peak_mib"] = predict(type(built), *plan, place.device.type).peak / MIB
        if details:
            start = time.perf_counter()
            for _ in range(repeats):
                built.train_step(next(built.dataloader_train))
            synchronize(place.device)
            row["steps_per_second_with_loaders"] = repeats / (time.perf_counter() - start)
            row["loaders"] = loaders
            row["host_reads"] = host_reads(partial(built.train_step, batches[0]), place.device)
            row["profile"] = profile(partial(built.train_step, batches[1]), place.device)
        return row
    finally:
        shutil.rmtree(built.output_folder_base, ignore_errors=True)


class Peaks:
    """Peak memory of this process: PyTorch's allocations on CUDA, resident memory elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            return {
                "peak_allocated_mib": torch.cuda.max_memory_allocated() / MIB,
                "peak_reserved_mib": torch.cuda.max_memory_reserved() / MIB,
            }
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return {"peak_resident_mib": int(line.split()[1]) / 1024}
        raise RuntimeError("/proc/self/status has no VmHWM")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_reads(step: Callable[[], Any], device: torch.device) -> list[str] | None:
    """Places in our code, or the nearest outside, where the host waited for the device; None without CUDA."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return [f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in waits]


def profile(step: Callable[[], Any], device: torch.device, most: int = 12) -> dict[str, float]:
    """Milliseconds per operation, the dearest first."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as found:
        step()
        synchronize(device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, key))[:most]
    return {e.key[:80]: round(getattr(e, key) / 1e3, 3) for e in events}


# kernels


@as_nnunet
def mixer(place: Place, length: int, width: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of the mixer by every back end that runs here, and how far they differ."""
    from benchmarks.speed.ssm import BATCH, STATE, training_pass
    from benchmarks.speed.timing import medians, peak_bytes
    from nnssl.ssm import Mamba2Mixer, available_backends

    usable = [backend.name for backend in available_backends() if backend.usable]
    torch.manual_seed(0)
    blocks = {name: Mamba2Mixer(width, STATE, expand=2, backend=name) for name in usable}
    state = blocks["torch"].state_dict()
    x = torch.randn(BATCH, length, width, device=place.device)
    results = {}
    for name, block in blocks.items():
        block.load_state_dict(state)
        block.to(place.device)
        block(x).square().mean().backward()
        weight = block.in_proj.weight
        if weight.grad is None:
            raise RuntimeError(f"the back end {name} gives in_proj no gradient")
        results[name] = (block(x).detach(), weight.grad.clone())
    if importlib.util.find_spec("mambapy") is not None:
        from mambapy.mamba import MambaBlock, MambaConfig

        config = MambaConfig(d_model=width, n_layers=1, d_state=STATE, expand_factor=2, pscan=True)
        blocks["mambapy"] = MambaBlock(config)
    calls = {name: training_pass(block, length, width, place.device) for name, block in blocks.items()}
    differences = {
        name: max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, results["torch"], strict=True)
        )
        for name, found in results.items()
        if name != "torch"
    }
    return {
        "milliseconds": {k: 1e3 * v for k, v in medians(calls, repeats, place.device).items()},
        "peak_mib": {name: peak_bytes(call, place.device) / MIB for name, call in calls.items()},
        "difference_to_torch": differences,
        "not_usable": {b.name: b.reason for b in available_backends() if not b.usable},
    }


@as_nnunet
def hfm(place: Place, amp: str, repeats: int) -> dict[str, Any]:
    """What a Diff-CL step consists of, HFM among it, at the planned network, patch and batch."""
    from benchmarks.leaderboard.prepare import edit_plan
    from benchmarks.speed.steps import diffcl_parts
    from benchmarks.speed.steps import measure as measure_steps

    plan = edit_plan(place.space.plans(), place.suite)["configurations"][place.suite.configuration]
    network = plan["architecture"]["arch_kwargs"]
    arguments = {
        "features": network["features_per_stage"],
        "strides": [",".join(map(str, stride)) for stride in network["strides"]],
        "patch": plan["patch_size"],
        "batch": plan["batch_size"],
        "spacing": min(plan["spacing"]),
    }
    found = measure_steps(
        Namespace(
            **arguments,
            device=place.suite.device,
            amp=amp,
            methods=["DiffCL"],
            repeats=repeats,
            ddim_steps=2,
            max_tokens=32_768 if place.device.type == "cuda" else 512,
        )
    )
    seconds = found["seconds"]
    parts = diffcl_parts(seconds, found["floors"]["DiffCL"])
    return {
        "setting": arguments,
        "milliseconds": {f"step {k}": 1e3 * seconds[f"step {k}"] for k in ("Supervised", "DiffCL")}
        | {name: float(value) for name, value, _ in parts},
        "share": {name: share for name, _, share in parts},
    }


# trainings to the end


def train(place: Place, row: str) -> dict[str, Any]:
    """A row of the suite by nnU-Net's commands, from its last checkpoint where there is one."""
    for package in PACKAGES:  # that the row will name: rather missed now than after the training
        metadata.version(package)
    job = job_of(place, row)
    status = job.run()
    if status != "finished":
        raise RuntimeError(f"{row}: {status}; the end of {job.log}:\n{tail(job.log)}")
    return without_cases(read_json(job.result))


def job_of(place: Place, name: str) -> Job:
    """Suites of one dataset share its folder, but not the rows: their schedules differ."""
    row = next(row for row in place.suite.rows() if row.name == name)
    return Job(place.suite, row, place.work, place.work / "rows" / str(place.suite.iterations))


def without_cases(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("per_case", "cases", "panel", "status")}


def progress(place: Place, name: str) -> dict[str, Any] | None:
    """How far an unfinished training of the suite has come; None where it never began."""
    job = job_of(place, name)
    row = job.row
    pattern = f"{row.trainer}__{job.plans}__{place.suite.configuration}/fold_{row.fold}/training_log_*.txt"
    folder = place.space.folder / "results" / place.suite.dataset
    logs = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
    epochs, times, dice = (
        re.findall(found, text, re.MULTILINE)
        for found in (r": Epoch (\d+)\s*$", r"Epoch time: ([\d.]+) s", r"Pseudo dice (\[.*\])")
    )
    if not epochs:
        return None
    return {
        "epoch": int(epochs[-1]),
        "epochs": int(row.settings["num_epochs"]),
        "seconds_per_epoch": statistics.median(map(float, times)) if times else None,
        "pseudo_dice": dice[-1] if dice else None,
    }
