"""gpu.md from gpu.json: what was measured, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.plan import STOCK, Piece, Task, short_name
from benchmarks.speed.timing import table

Rows = dict[str, dict[str, Any]]


def report(pieces: list[Piece], rows: Rows) -> str:
    """Markdown: one section per piece that has rows, failures last."""
    parts = ["# What was measured on a GPU", head(rows)]
    failures: list[str] = []
    for piece in pieces:
        found = [(task, rows[task.name]) for task in piece.tasks if task.name in rows]
        if not found or piece.name == "machine":
            continue
        counts = f"{sum(row['status'] == 'finished' for _, row in found)} of {len(piece.tasks)} finished"
        parts.append(f"## {piece.name}: {piece.what}\n\n{counts}.")
        lines = SECTIONS[piece.tasks[0].kind.rpartition(":")[2]](found)
        parts.append(lines)
        failures += [
            f"### {task.name}: {row['status']}\n\n```text\n{last_lines(row.get('traceback', ''))}\n```"
            for task, row in found
            if row["status"] not in ("finished", "unfinished")
        ]
    if failures:
        parts += ["## What failed", *failures]
    return "\n\n".join(parts) + "\n"


def head(rows: Rows) -> str:
    """Machine, versions and commits behind the rows."""
    machine = rows.get("machine", {})
    lines = [f"- {name}: {value}" for name, value in machine.get("devices", {}).items()]
    used = {
        ", ".join(f"{k} {row['versions'][k]}" for k in ("python", "torch", "nnunetv2", "mamba-ssm", "nnssl"))
        for row in rows.values()
        if "versions" in row
    }
    lines += [f"- {text}" for text in sorted(used)]
    commits = sorted({row["commit"] for row in rows.values() if row.get("commit")})
    return "\n".join([*lines, f"- commit {', '.join(commits) or 'unknown'}"])


def last_lines(text: str, most: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-most:])


def peak(row: dict[str, Any]) -> float | str:
    """MiB: PyTorch's allocations on a GPU, resident memory on a CPU."""
    return row.get("peak_allocated_mib", row.get("peak_resident_mib", ""))


def smoke(found: list[tuple[Task, dict[str, Any]]]) -> str:
    lines = []
    for task, row in found:
        resumed = row.get("resumed", {}).get("train_losses", "")
        lines.append(
            [
                short_name(task.arguments["trainer"]),
                row["status"],
                row.get("train_losses", ""),
                row.get("val_losses", ""),
                resumed,
                row.get("skipped_steps", ""),
                peak(row),
                row.get("seconds", ""),
            ]
        )
    header = ["trainer", "status", "training loss", "validation loss", "resumed, training loss"]
    return table([*header, "skipped steps", "peak, MiB", "seconds"], lines)


def steps(found: list[tuple[Task, dict[str, Any]]]) -> str:
    stock = {
        row.get("batch_size"): row["step_seconds"]
        for task, row in found
        if task.arguments["trainer"] == STOCK and "step_seconds" in row
    }
    lines = []
    for task, row in found:
        seconds, batch = row.get("step_seconds"), row.get("batch_size", task.arguments["batch_size"])
        reads = row.get("host_reads")
        lines.append(
            [
                short_name(task.arguments["trainer"]),
                row["status"],
                batch or "",
                1e3 * seconds if seconds else "",
                row.get("steps_per_second", ""),
                seconds / stock[batch] if seconds and batch in stock else "",
                row.get("steps_per_second_with_loaders", ""),
                peak(row),
                row.get("predicted_peak_mib", ""),
                "" if reads is None else len(reads),
            ]
        )
    header = ["trainer", "status", "batch", "step, ms", "steps/s", "x stock", "steps/s with loaders"]
    return table([*header, "peak, MiB", "predicted, MiB", "host reads"], lines)


def mixer(found: list[tuple[Task, dict[str, Any]]]) -> str:
    names = sorted({name for _, row in found for name in row.get("milliseconds", {})})
    header = ["tokens x width", "status", *(f"{n}, {unit}" for n in names for unit in ("ms", "MiB"))]
    lines = []
    for task, row in found:
        values = [row.get(key, {}).get(n, "") for n in names for key in ("milliseconds", "peak_mib")]
        shape = f"{task.arguments['length']} x {task.arguments['width']}"
        lines.append([shape, row["status"], *values, *row.get("difference_to_torch", {}).values()])
    different = any(row.get("difference_to_torch") for _, row in found)
    reasons = {f"{k}: {v}" for _, row in found for k, v in row.get("not_usable", {}).items()}
    return "\n\n".join([table([*header, *["difference to torch"] * different], lines), *sorted(reasons)])


def hfm(found: list[tuple[Task, dict[str, Any]]]) -> str:
    lines = [
        [task.arguments["amp"], row["status"], name, value, row["share"].get(name, "")]
        for task, row in found
        for name, value in row.get("milliseconds", {}).items()
    ]
    return table(["autocast", "status", "part of a Diff-CL step", "ms", "share"], lines)


def train(found: list[tuple[Task, dict[str, Any]]]) -> str:
    return table(
        ["row", "status", "epoch", "Dice, %", "seconds of training", "peak, MiB"],
        [list(training_line(task, row)) for task, row in found],
    )


def training_line(task: Task, row: dict[str, Any]) -> Iterator[Any]:
    progress = row.get("progress", {})
    yield task.arguments["row"]
    yield row["status"]
    yield f"{progress['epoch']} of {progress['epochs']}" if progress else ""
    yield 100 * row["dice"] if row.get("dice") is not None else ""
    yield row.get("train_seconds", "")
    yield row.get("peak_gpu_memory_mb", row.get("peak_memory_mb", ""))


SECTIONS = {f.__name__: f for f in (smoke, steps, mixer, hfm, train)}
