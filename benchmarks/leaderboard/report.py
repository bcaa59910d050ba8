"""`report`: Markdown, CSV and JSON tables, bar chart, label-budget curve, overlay panel and training curves,
from the rows alone.

The same rows give the same files: nothing in them depends on when or where they were written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.leaderboard.plots import NAMES, write_pictures
from benchmarks.leaderboard.suite import Suite, SuiteError
from nnssl.files import read_json, write_text
from nnssl.metrics import CONFIDENCE, RESAMPLES, interval

METRICS = {
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95_voxel": "95HD vox",
    "asd_voxel": "ASD vox",
    "hd95_mm": "95HD mm",
    "asd_mm": "ASD mm",
}


BASES = {
    "supervised": NAMES["supervised"],
    "continued": "supervised, continued",
    "self_training": NAMES["self_training"],
}  # what the others are compared with


def read_rows(suite: Suite, results: Path) -> list[dict[str, Any]]:
    """The rows of the suite that are on disk, in its order; SuiteError if there is none, or one of other
    settings."""
    rows, outdated = [], []
    for row in suite.rows():
        path = results / suite.name / f"{row.name}.json"
        if path.is_file():
            content = read_json(path)
            rows.append({**content, "name": row.name, "bound": row.kind == "supervised_all"})
            if content["fingerprint"] != row.fingerprint:
                outdated.append(str(path))
    if outdated:
        raise SuiteError(
            "rows of other settings than the suite's: remove them or bring the suite back: "
            f"{' '.join(outdated)}"
        )
    if not rows:
        raise SuiteError(f"no row in {results / suite.name}: use `run` first")
    return rows


def paired(
    rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], metric: str = "dice"
) -> np.ndarray:
    """(seeds, cases): differences of case means over structures, within each seed that both have."""

    def by_seed(found: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
        # None -> nan
        return {r["seed"]: np.nanmean(np.array(r["per_case"][metric], dtype=float), axis=1) for r in found}

    ours, theirs = by_seed(rows), by_seed(base)
    shared = sorted(ours.keys() & theirs.keys())
    return np.array([ours[seed] - theirs[seed] for seed in shared])


def compared(bounds: tuple[float, float]) -> str:
    """What an interval of differences says."""
    low, high = bounds
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable"


def summarise(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per budget and method with a finished row; the upper bound, trained on all labels, closes
    every budget."""
    finished = [r for r in rows if r["status"] == "finished"]
    upper = [r for r in finished if r["bound"]]
    table = []
    for budget in suite.budgets:
        here: dict[str, list[Mapping[str, Any]]] = {}
        own = [r for r in finished if not r["bound"] and r["labeled"] == budget]
        if not own and len(upper) < len(finished):  # nothing to compare the bound with, but elsewhere
            continue
        for row in [*own, *upper]:
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
            for base, name in bases(suite, method).items():
                difference = paired(found, here.get(name, []))
                if name != method and difference.size:
                    entry[f"dice_minus_{base}"] = float(difference.mean())
                    entry[f"dice_minus_{base}_interval"] = bounds = interval(difference)
                    entry[f"against_{base}"] = compared(bounds)
                    entry[f"seeds_{base}"] = len(difference)
            if (share := gap_closed(found, here.get("supervised", []), upper)) is not None:
                entry["gap_closed"] = share
            if seconds := [r["cpu_seconds"] for r in found if r.get("cpu_seconds")]:
                entry["cpu_seconds"] = float(np.mean(seconds))
                entry["cpu_seconds_per_step"] = entry["cpu_seconds"] / steps(found[0])
            table.append(entry)
    return table


def gap_closed(
    rows: Sequence[Mapping[str, Any]],
    supervised: Sequence[Mapping[str, Any]],
    upper: Sequence[Mapping[str, Any]],
) -> float | None:
    """Share of the way from supervised training to all labels, over the seeds that all three have; None
    where there is none, and where the interval of the way holds 0: a share of nothing says nothing."""
    shared = set.intersection(*({r["seed"] for r in found} for found in (rows, supervised, upper)))
    ours, theirs, bound = ([r for r in found if r["seed"] in shared] for found in (rows, supervised, upper))
    if not shared or ours == theirs or interval(gap := paired(bound, theirs))[0] <= 0:
        return None
    return float(paired(ours, theirs).mean() / gap.mean())


def bases(suite: Suite, method: str) -> dict[str, str]:
    """Methods that this one is compared with; `continued` only where it started from a row itself."""
    found = {"supervised": "supervised", "self_training": "self_training"}
    return found | ({"continued": suite.continued} if suite.continued and suite.started(method) else {})


def steps(row: Mapping[str, Any]) -> int:
    """Training steps of a row, over all rounds."""
    return len(row["curve"]["train_loss"]) * int(row["config"]["general"]["num_iterations_per_epoch"])


def number(value: float | None, factor: float = 1, sd: float | None = None, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{factor * value:{'+' if signed else ''}.2f}" + (
        f" ± {factor * sd:.2f}" if sd is not None else ""
    )


def budget_table(entries: Sequence[Mapping[str, Any]], suffix: str = "") -> list[str]:
    """Lines of a Markdown table of one budget, best Dice first, the upper bound last."""
    heads = ["method", "seeds", *METRICS.values()]
    if not suffix:
        compared_with = [b for b in BASES if any(f"dice_minus_{b}" in e for e in entries)]
        for base in compared_with:
            heads += [f"− {BASES[base].removesuffix(' only')}", "verdict"]
        heads += ["gap closed %", "core min", "s / step"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for e in sorted(
        entries, key=lambda e: (e["method"] == "supervised_all", -e[f"dice{suffix}"], e["method"])
    ):
        cells = [NAMES.get(e["method"], e["method"]), str(len(e["seeds"]))]
        for metric in METRICS:
            cells.append(
                number(
                    e[metric + suffix], 100 if metric in ("dice", "jaccard") else 1, e[f"{metric}{suffix}_sd"]
                )
            )
        if not suffix:
            for base in compared_with:
                cells += [difference_cell(e, base), e.get(f"against_{base}", "")]
            cells.append("" if e.get("gap_closed") is None else f"{100 * e['gap_closed']:.0f}")
            cells += [number(e.get("cpu_seconds"), 1 / 60), number(e.get("cpu_seconds_per_step"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference_cell(entry: Mapping[str, Any], base: str) -> str:
    """Difference, interval, and the number of paired seeds where it is not that of the row."""
    if f"dice_minus_{base}" not in entry:
        return ""
    low, high = entry[f"dice_minus_{base}_interval"]
    text = f"{number(entry[f'dice_minus_{base}'], 100, signed=True)} [{100 * low:+.2f}, {100 * high:+.2f}]"
    fewer = entry[f"seeds_{base}"] < len(entry["seeds"])
    return text + (f" (paired seeds: {entry[f'seeds_{base}']})" if fewer else "")


def verdict(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which methods are above, below or not distinguishable from what one can do without them."""
    methods = sorted(
        (e for e in entries if e["method"] not in NAMES), key=lambda e: (-e["dice"], e["method"])
    )
    sentences = []
    for base in BASES:
        for word in ("above", "not distinguishable", "below"):
            if found := [e for e in methods if e.get(f"against_{base}") == word]:
                names = ", ".join(
                    f"{e['method']} ({number(e[f'dice_minus_{base}'], 100, signed=True)})" for e in found
                )
                what = f"{word.capitalize()}{' from' * (word[0] == 'n')} {BASES[base]}"
                sentences.append(f"**{what}**: {names}.")
    if sentences and (share := methods[0].get("gap_closed")) is not None:
        sentences.append(
            f"The best, {methods[0]['method']}, closes {100 * share:.0f} % of the gap to all labels."
        )
    return [" ".join(sentences), ""] if sentences else []


def markdown(
    suite: Suite,
    rows: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str],
) -> str:
    finished = [r for r in rows if r["status"] == "finished"]
    lines = [f"# {suite.title}", ""]
    if finished:
        lines += [setting(suite, finished), ""]
    for budget in suite.budgets:
        entries = [e for e in table if e["budget"] == budget]
        if entries:
            lines += [
                f"## {budget} labeled",
                "",
                *verdict(entries),
                *budget_table(entries),
                "",
                "Largest component of each structure:",
                "",
            ]
            lines += [*budget_table(entries, "_lcc"), ""]
    if suite.published:
        lines += [*published_table(suite, table), ""]
    failed, there = [r for r in rows if r["status"] != "finished"], {r["name"] for r in rows}
    missing = [r.name for r in suite.rows() if r.name not in there]
    if failed or missing:
        lines += ["## Not finished", ""]
        lines += [f"- `{r['name']}`: **{r['status']}**: {r.get('error', '')}" for r in failed]
        lines += [f"- `{name}`: not run" for name in missing] + [""]
    lines += [f"![{text}]({suite.name}_{name}.png)" for name, text in pictures.items()]
    return "\n".join(lines).rstrip() + "\n"


def setting(suite: Suite, finished: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers are, and what they were got with."""
    plan, schedule = finished[0]["plan"], suite.schedule
    several = lambda key: "; ".join(sorted({str(r[key]) for r in finished}))  # noqa: E731
    versions = sorted({f"{k} {v}" for r in finished for k, v in r["versions"].items()})
    steps = f"{schedule['num_epochs']} x {schedule['num_iterations_per_epoch']} iterations"
    labeled = plan_batch(finished)
    batch = f"batch {labeled} labeled + {schedule.get('unlabeled_batch_size') or labeled} unlabeled"
    precision = schedule.get("amp", "float16") + ", channels_last" * schedule.get("channels_last", False)
    hours, training = (sum(r[key] for r in finished) / 3600 for key in ("seconds", "train_seconds"))
    unit = "core-hours" if suite.device == "cpu" else "GPU-hours"
    spacing, patch = " x ".join(f"{s:g}" for s in plan["spacing"]), " x ".join(map(str, plan["patch_size"]))
    text = (
        f"{suite.dataset}, {suite.configuration}, {len(finished[0]['cases'])} validation cases, last "
        "checkpoint (never the best one), "
        "nnU-Net's own inference, evaluated at the resolution of the labels. "
        f"Schedule of every row: {steps}, {batch}, {precision}, spacing {spacing} mm, patch {patch}, "
        f"{plan['network']} with features {', '.join(map(str, plan['features']))}. Self-training: two "
        "rounds of half the steps each. "
        f"{several('hardware')}; {', '.join(versions)}. "
        f"The {len(finished)} rows took {hours:.2f} {unit}, {training:.2f} of them in the epochs of "
        "training.\n\n"
        "Mean over cases and structures, then over seeds, ± sd over seeds. 95HD and ASD as medpy's `hd95` "
        "and `asd`, in voxels and mm; a "
        "missed structure counts with the grid's diagonal. Differences: Dice points, paired by case and seed "
        f"(only seeds that both rows have), with a {CONFIDENCE} % bootstrap interval over cases and seeds "
        f"({RESAMPLES} resamples); a row of one seed has the spread of the cases alone in it. "
        "Above, below: the interval does not hold 0. "
        "Core minutes and seconds per step: processor time of start, training and validation. "
        "Gap closed: share of the way from supervised only to all labels; none where the interval of that "
        "way holds 0."
    )
    own = {
        m.removeprefix("nnUNetTrainer"): {**s.get("schedule", {}), **s.get("options", {})}
        for m, s in suite.method.items()
    }
    settings = "; ".join(
        f"{m} ({', '.join(f'{k} = {v}' for k, v in s.items())})" for m, s in own.items() if s
    )
    text += f" Settings of single methods: {settings}." if settings else ""
    return text + (f"\n\n{suite.note}" if suite.note else "")


def plan_batch(finished: Sequence[Mapping[str, Any]]) -> int:
    return next(
        (r["plan"]["batch_size"] for r in finished if r["method"] != "self_training"),
        finished[0]["plan"]["batch_size"],
    )


def published_table(suite: Suite, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The papers' figures beside ours."""
    ours = {(e["method"], e["budget"]): e for e in table}
    columns = {"dice": "Dice %", "jaccard": "Jaccard %", "hd95": "95HD vox", "asd": "ASD vox"}
    keys = {
        "dice": ("dice", 100),
        "jaccard": ("jaccard", 100),
        "hd95": ("hd95_voxel", 1),
        "asd": ("asd_voxel", 1),
    }
    heads = [
        "method",
        "labeled",
        *(f"{c}, published" for c in columns.values()),
        *(f"{c}, ours" for c in columns.values()),
        "source",
    ]
    lines = [
        "## Published figures",
        "",
        "As printed in the source named; many authors chose the checkpoint that does best on the test "
        "scans. Ours never do.",
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


def write_report(suite: Suite, results: Path) -> str:
    """All files of the report into `results`; returns the Markdown text."""
    rows = read_rows(suite, results)
    table = summarise(suite, rows)
    finished = [r for r in rows if r["status"] == "finished"]
    text = markdown(suite, rows, table, write_pictures(suite, table, finished, results) if finished else {})
    write_text(text, results / f"{suite.name}.md")
    content = json.dumps({"suite": suite.name, "table": table}, indent=1, sort_keys=True)
    write_text(content + "\n", results / f"{suite.name}.json")
    write_text(comma_separated(table), results / f"{suite.name}.csv")
    return text
