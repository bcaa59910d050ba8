"""`report`: Markdown, CSV and JSON tables, bar chart, label-budget curve, overlay panel and training curves, from the rows alone.

The same rows give the same files: nothing in them depends on when or where they were written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.leaderboard.prepare import write_whole
from benchmarks.leaderboard.suite import Suite, SuiteError

RESAMPLES, CONFIDENCE = 10_000, 95
METRICS = {
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95_voxel": "95HD vox",
    "asd_voxel": "ASD vox",
    "hd95_mm": "95HD mm",
    "asd_mm": "ASD mm",
}
PLAIN, BOUND, BASE = "#4878a8", "#9aa0a6", "#e39c37"
NAMES = {
    "supervised": "supervised only",
    "supervised_all": "supervised, all labels",
    "self_training": "self-training",
}


def read_rows(suite: Suite, results: Path) -> list[dict[str, Any]]:
    """The rows of the suite that are on disk, in its order; SuiteError if there is none, or one of other settings."""
    rows, outdated = [], []
    for row in suite.rows():
        path = results / suite.name / f"{row.name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            rows.append({**content, "name": row.name, "bound": row.kind == "supervised_all"})
            if content["fingerprint"] != row.fingerprint:
                outdated.append(str(path))
    if outdated:
        raise SuiteError(f"rows of other settings than the suite's: remove them or bring the suite back: {' '.join(outdated)}")
    if not rows:
        raise SuiteError(f"no row in {results / suite.name}: use `run` first")
    return rows


def per_case(rows: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """(cases,): mean over seeds and structures."""
    values = np.array([r["per_case"][metric] for r in rows], dtype=float)  # None -> nan
    return np.nanmean(values, axis=(0, 2))


def interval(difference: np.ndarray) -> tuple[float, float]:
    """Bootstrap percentile interval of a mean of paired differences, over the cases, seeded."""
    draws = np.random.default_rng(0).integers(len(difference), size=(RESAMPLES, len(difference)))
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(difference[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def summarise(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per budget and method with a finished row; the upper bound, trained on all labels, closes every budget."""
    finished = [r for r in rows if r["status"] == "finished"]
    upper = [r for r in finished if r["bound"]]
    table = []
    for budget in suite.budgets:
        here: dict[str, list[Mapping[str, Any]]] = {}
        for row in [*(r for r in finished if not r["bound"] and r["labeled"] == budget), *upper]:
            here.setdefault(row["method"], []).append(row)
        for method, found in here.items():
            entry: dict[str, Any] = {
                "budget": budget,
                "method": method,
                "labeled": found[0]["labeled"],
                "seeds": [r["seed"] for r in found],
            }
            for metric in METRICS:
                for name in (metric, f"{metric}_lcc"):
                    values = [r["metrics"][name] for r in found]
                    entry[name] = float(np.mean(values))
                    entry[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            for base in ("supervised", "self_training"):
                if base in here and base != method:
                    difference = per_case(found, "dice") - per_case(here[base], "dice")
                    entry[f"dice_minus_{base}"] = float(difference.mean())
                    entry[f"dice_minus_{base}_interval"] = interval(difference)
            if upper and "supervised" in here and method != "supervised":
                low, high = (float(per_case(r, "dice").mean()) for r in (here["supervised"], upper))
                entry["gap_closed"] = (float(per_case(found, "dice").mean()) - low) / (high - low) if high > low else None
            table.append(entry)
    return table


def number(value: float | None, factor: float = 1, sd: float | None = None, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{factor * value:{'+' if signed else ''}.2f}" + (f" ± {factor * sd:.2f}" if sd is not None else "")


def budget_table(entries: Sequence[Mapping[str, Any]], suffix: str = "") -> list[str]:
    """Lines of a Markdown table of one budget, best Dice first, the upper bound last."""
    heads = ["method", "seeds", *METRICS.values()]
    if not suffix:
        heads += ["− supervised", "− self-training", "gap closed %"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for e in sorted(entries, key=lambda e: (e["method"] == "supervised_all", -e[f"dice{suffix}"], e["method"])):
        cells = [NAMES.get(e["method"], e["method"]), str(len(e["seeds"]))]
        for metric in METRICS:
            cells.append(number(e[metric + suffix], 100 if metric in ("dice", "jaccard") else 1, e[f"{metric}{suffix}_sd"]))
        if not suffix:
            for base in ("supervised", "self_training"):
                low, high = e.get(f"dice_minus_{base}_interval", (None, None))
                cells.append(
                    f"{number(e[f'dice_minus_{base}'], 100, signed=True)} [{100 * low:+.2f}, {100 * high:+.2f}]" if low is not None else ""
                )
            cells.append("" if e.get("gap_closed") is None else f"{100 * e['gap_closed']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(suite: Suite, rows: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]) -> str:
    finished = [r for r in rows if r["status"] == "finished"]
    lines = [f"# {suite.title}", ""]
    if finished:
        lines += [setting(suite, finished), ""]
    for budget in suite.budgets:
        entries = [e for e in table if e["budget"] == budget]
        if entries:
            lines += [f"## {budget} labeled", "", *budget_table(entries), "", "Largest component of each structure:", ""]
            lines += [*budget_table(entries, "_lcc"), ""]
    if suite.published:
        lines += [*published_table(suite, table), ""]
    failed, there = [r for r in rows if r["status"] != "finished"], {r["name"] for r in rows}
    missing = [r.name for r in suite.rows() if r.name not in there]
    if failed or missing:
        lines += ["## Not finished", ""]
        lines += [f"- `{r['name']}`: **{r['status']}**: {r.get('error', '')}" for r in failed]
        lines += [f"- `{name}`: not run" for name in missing] + [""]
    pictures = {"bars": "Dice", "budgets": "Dice over labels", "overlay": "the same slice for every method", "curves": "training"}
    lines += [f"![{text}]({suite.name}_{name}.png)" for name, text in pictures.items()] if finished else []
    return "\n".join(lines).rstrip() + "\n"


def setting(suite: Suite, finished: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers are, and what they were got with."""
    plan, schedule = finished[0]["plan"], suite.schedule
    several = lambda key: "; ".join(sorted({str(r[key]) for r in finished}))  # noqa: E731
    versions = sorted({f"{k} {v}" for r in finished for k, v in r["versions"].items()})
    steps = f"{schedule['num_epochs']} x {schedule['num_iterations_per_epoch']} iterations"
    batch = f"batch {plan_batch(finished)} labeled + {schedule.get('unlabeled_batch_size') or plan_batch(finished)} unlabeled"
    seconds = sum(r["train_seconds"] for r in finished)
    spacing, patch = " x ".join(f"{s:g}" for s in plan["spacing"]), " x ".join(map(str, plan["patch_size"]))
    text = (
        f"{suite.dataset}, {suite.configuration}, {len(finished[0]['cases'])} validation cases, last checkpoint (never the best one), "
        "nnU-Net's own inference, evaluated at the resolution of the labels. "
        f"Schedule of every row: {steps}, {batch}, {schedule.get('amp', 'float16')}, spacing {spacing} mm, patch {patch}, "
        f"{plan['network']} with features {', '.join(map(str, plan['features']))}. Self-training: two rounds of half the steps each. "
        f"{several('hardware')}; {', '.join(versions)}. Training of the {len(finished)} rows took {seconds / 3600:.1f} hours.\n\n"
        "Mean over cases and structures, then over seeds, ± sd over seeds. 95HD and ASD as medpy's `hd95` and `asd`, in voxels and mm; a "
        "missed structure counts with the grid's diagonal. Differences: Dice points, paired by case, with a "
        f"{CONFIDENCE} % bootstrap interval over the cases ({RESAMPLES} resamples). "
        "Gap closed: share of the way from supervised only to all labels."
    )
    own = {m.removeprefix("nnUNetTrainer"): {**s.get("schedule", {}), **s.get("options", {})} for m, s in suite.method.items()}
    settings = "; ".join(f"{m} ({', '.join(f'{k} = {v}' for k, v in s.items())})" for m, s in own.items() if s)
    text += f" Settings of single methods: {settings}." if settings else ""
    return text + (f"\n\n{suite.note}" if suite.note else "")


def plan_batch(finished: Sequence[Mapping[str, Any]]) -> int:
    return next((r["plan"]["batch_size"] for r in finished if r["method"] != "self_training"), finished[0]["plan"]["batch_size"])


def published_table(suite: Suite, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The papers' figures beside ours."""
    ours = {(e["method"], e["budget"]): e for e in table}
    columns = {"dice": "Dice %", "jaccard": "Jaccard %", "hd95": "95HD vox", "asd": "ASD vox"}
    keys = {"dice": ("dice", 100), "jaccard": ("jaccard", 100), "hd95": ("hd95_voxel", 1), "asd": ("asd_voxel", 1)}
    heads = ["method", "labeled", *(f"{c}, published" for c in columns.values()), *(f"{c}, ours" for c in columns.values()), "source"]
    lines = [
        "## Published figures",
        "",
        "As printed by their authors; many of them chose the checkpoint that does best on the test scans. Ours never do.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for entry in suite.published:
        name = entry["method"].removeprefix("nnUNetTrainer")
        mine = ours.get((name, entry["labeled"]), {})
        printed = [f"{entry[c]:g}" if c in entry else "" for c in columns]
        measured = [number(mine.get(key), factor) for key, factor in keys.values()]
        source = entry["source"] + (f"; {entry['note']}" if "note" in entry else "")
        lines.append(f"| {' | '.join([name, str(entry['labeled']), *printed, *measured, source])} |")
    return lines


def comma_separated(table: Sequence[Mapping[str, Any]]) -> str:
    """The summary as CSV, one line per budget and method."""
    flat = []
    for entry in table:
        row = {k: v for k, v in entry.items() if not isinstance(v, (list, tuple))}
        row |= {"seeds": " ".join(map(str, entry["seeds"]))}
        for key, value in entry.items():
            if key.endswith("_interval"):
                row[f"{key}_low"], row[f"{key}_high"] = value
        flat.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    columns = list(dict.fromkeys(k for row in flat for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def colour(method: str) -> str:
    return BOUND if method.startswith("supervised") else BASE if method == "self_training" else PLAIN


def draw_bars(suite: Suite, table: Sequence[Mapping[str, Any]]) -> Figure:
    """Dice of every method, a panel per budget."""
    shown = [b for b in suite.budgets if any(e["budget"] == b for e in table)]
    most = max(len([e for e in table if e["budget"] == b]) for b in shown)
    figure = Figure(figsize=(4.6 * len(shown) + 0.6, 0.32 * most + 1.4), layout="constrained")
    lowest = min(100 * e["dice"] for e in table)
    for axis, budget in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        entries = sorted((e for e in table if e["budget"] == budget), key=lambda e: (e["dice"], e["method"]))
        values = [100 * e["dice"] for e in entries]
        errors = [100 * (e["dice_sd"] or 0) for e in entries]
        axis.barh(range(len(entries)), values, xerr=errors, color=[colour(e["method"]) for e in entries], height=0.7)
        for k, value in enumerate(values):
            axis.text(value, k, f" {value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(entries)), [NAMES.get(e["method"], e["method"]) for e in entries], fontsize=9)
        axis.set(title=f"{budget} labeled", xlabel="Dice % (axis does not start at 0)", xlim=(max(0, lowest - 3), max(values) + 2))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_budgets(suite: Suite, table: Sequence[Mapping[str, Any]]) -> Figure:
    """Dice over the number of labeled cases."""
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["tab20"]
    for k, method in enumerate(dict.fromkeys(e["method"] for e in table)):
        entries = [e for e in table if e["method"] == method]
        if method == "supervised_all":
            axis.axhline(100 * entries[0]["dice"], color="black", linestyle="--", linewidth=1, label=f"all {entries[0]['labeled']} labels")
            continue
        style = {"color": "black", "linewidth": 2} if method == "supervised" else {"color": colours(k % 20)}
        errors = [100 * (e["dice_sd"] or 0) for e in entries]
        axis.errorbar(
            [e["labeled"] for e in entries],
            [100 * e["dice"] for e in entries],
            errors,
            marker="o",
            label=NAMES.get(method, method),
            **style,
        )
    axis.set(xlabel="labeled cases", ylabel="Dice %", xticks=suite.budgets)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_curves(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Supervised training loss and pseudo Dice of every method at the smallest budget, first seed."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["bound"] or row["labeled"] == suite.budgets[0]:
            chosen.setdefault(row["method"], row)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    colours = matplotlib.colormaps["tab20"]
    for k, (method, row) in enumerate(chosen.items()):
        for axis, key in zip(axes, ("val_loss", "pseudo_dice"), strict=True):
            values = [np.nan if v is None else v for v in row["curve"][key]]
            axis.plot(
                range(1, len(values) + 1), values, color=colours(k % 20), label=NAMES.get(method, method) if key == "val_loss" else None
            )
    axes[0].set_ylabel("nnU-Net's loss, validation patches")
    axes[1].set(ylabel="pseudo Dice, validation patches", xlabel=f"epoch of {suite.schedule['num_iterations_per_epoch']} iterations")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{suite.budgets[0]} labeled; self-training: two rounds one after the other", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_overlay(suite: Suite, rows: Sequence[Mapping[str, Any]], panels: Path) -> Figure:
    """The rows' strips under each other, smallest budget, first seed: image, labels, prediction, error on the same slice."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if (row["bound"] or row["labeled"] == suite.budgets[0]) and (panels / f"{row['name']}.png").is_file():
            chosen.setdefault(row["method"], row)
    strips = {method: matplotlib.image.imread(panels / f"{row['name']}.png") for method, row in chosen.items()}
    height, width = next(iter(strips.values())).shape[:2]
    aspect = next(iter(chosen.values()))["panel"]["aspect"]
    columns = 1 if len(strips) < 5 else 2
    lines = -(-len(strips) // columns)
    figure = Figure(figsize=(6.6 * columns, (5.2 * height * aspect / width + 0.06) * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).T.ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (method, strip) in zip(axes, strips.items(), strict=False):
        axis.imshow(strip, aspect=aspect, interpolation="nearest")
        dice = np.nanmean([v if v is not None else np.nan for v in case_dice(chosen[method])])
        name = NAMES.get(method, method).replace(", ", ",\n")
        axis.text(-0.01, 0.5, f"{name}\n{100 * dice:.1f}", transform=axis.transAxes, ha="right", va="center", fontsize=8)
    case = next(iter(chosen.values()))["panel"]["case"]
    figure.suptitle(f"{case}, {suite.budgets[0]} labeled: image, labels, prediction, error; Dice % of the case", fontsize=9)
    return figure


def case_dice(row: Mapping[str, Any]) -> list[float | None]:
    return row["per_case"]["dice"][row["cases"].index(row["panel"]["case"])]


def write_report(suite: Suite, results: Path) -> str:
    """All files of the report into `results`; returns the Markdown text."""
    rows = read_rows(suite, results)
    table = summarise(suite, rows)
    text = markdown(suite, rows, table)
    write_whole(results / f"{suite.name}.md", text)
    write_whole(results / f"{suite.name}.json", json.dumps({"suite": suite.name, "table": table}, indent=1, sort_keys=True) + "\n")
    write_whole(results / f"{suite.name}.csv", comma_separated(table))
    finished = [r for r in rows if r["status"] == "finished"]
    if table:
        with matplotlib.rc_context({"svg.hashsalt": "leaderboard", "font.family": "DejaVu Sans"}):
            save(draw_bars(suite, table), results / f"{suite.name}_bars")
            save(draw_budgets(suite, table), results / f"{suite.name}_budgets")
            save(draw_curves(suite, finished), results / f"{suite.name}_curves")
            save(draw_overlay(suite, finished, results / suite.name / "panels"), results / f"{suite.name}_overlay", svg=False)
    return text


def save(figure: Figure, stem: Path, svg: bool = True) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=110, metadata={"Software": None})
    if svg:
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
