"""`summary`: methods by mean rank over all suites and budgets.

In every suite and budget those methods that have rows in all of them are ranked by their Dice minus that of
supervised training, paired by case and seed, over the seeds that all of them have there (a column without
such a seed has no ranks, and `in` counts it out); supervised training itself stands at 0. Ties share the mean
of their ranks. Rank 1 is the best. Other methods, such as ablations, would shift the ranks where they have
rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.leaderboard.plots import NAMES
from benchmarks.leaderboard.report import number, paired, read_rows, steps, summarise
from benchmarks.leaderboard.suite import Suite, SuiteError
from nnssl.files import write_text

VERDICTS = ("above", "not distinguishable", "below")


def columns(suites: Sequence[Suite], results: Path) -> dict[str, list[dict[str, Any]]]:
    """What is compared, by suite and budget; those without a supervised row or a method beside it are not in
    it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for suite in suites:
        rows = read_rows(suite, results)
        table = summarise(suite, rows)
        for budget in suite.budgets:
            entries = [
                e
                for e in table
                if e["budget"] == budget and e["method"] != "supervised_all"
                if e["method"] == "supervised" or "dice_minus_supervised" in e
            ]
            here: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                if row["status"] == "finished" and row["labeled"] == budget:
                    here.setdefault(row["method"], []).append(row)
            if len(entries) > 1 and "supervised" in here:
                for entry in entries:
                    own = here[entry["method"]]
                    base = suite.continued if suite.started(entry["method"]) else None
                    entry["cost"] = cost(own, here.get(base or "supervised", []))
                    entry["by_seed"] = gains_by_seed(own, here["supervised"])
                found[f"{suite.name}, {budget} labels"] = entries
    return found


def gains_by_seed(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """{seed: Dice minus supervised training's} where both have it."""
    shared = sorted({r["seed"] for r in own} & {r["seed"] for r in base})
    return dict(zip(shared, paired(own, base).mean(1).tolist(), strict=True)) if shared else {}


def cost(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a step, in steps of a base that ran for as long (start and validation are shared alike), over the
    seeds that both have: seeds may have run on another processor each."""
    ours, theirs = (
        {r["seed"]: r["cpu_seconds"] / steps(r) for r in rows if r.get("cpu_seconds")} for rows in (own, base)
    )
    shared = ours.keys() & theirs.keys()
    return sum(ours[s] for s in shared) / sum(theirs[s] for s in shared) if shared else None


def ranked(by_column: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One entry per method: those with rows everywhere by mean rank, then the others, without ranks."""
    methods: dict[str, dict[str, Any]] = {}
    everywhere = set.intersection(*({e["method"] for e in entries} for entries in by_column.values()))
    for column, entries in by_column.items():
        seeds = set.intersection(*(set(e["by_seed"]) for e in entries if e["method"] in everywhere))
        gains = {
            e["method"]: float(
                np.mean([g for s, g in e["by_seed"].items() if s in seeds or e["method"] not in everywhere])
            )
            for e in entries
            if seeds or e["method"] not in everywhere
        }
        compared = [m for m in gains if m in everywhere]
        ranks = dict(zip(compared, rankdata([-gains[m] for m in compared]).tolist(), strict=True))
        for entry in entries:
            method = entry["method"]
            own = methods.setdefault(method, {"ranks": {}, "gains": {}, "costs": []})
            if method in gains:
                own["gains"][column] = gains[method]
            if method in ranks:
                own["ranks"][column] = ranks[method]
            if "against_supervised" in entry:
                own.setdefault("verdicts", {})[column] = entry["against_supervised"]
            if entry.get("cost"):
                own["costs"].append(entry["cost"])
    table = [
        {
            "method": method,
            "mean_rank": float(np.mean(list(own["ranks"].values()))) if own["ranks"] else None,
            "mean_gain": float(np.mean(list(own["gains"].values()))) if own["gains"] else 0.0,
            "cost": float(np.mean(own["costs"])) if own["costs"] else None,
            **{k: own.get(k, {}) for k in ("ranks", "gains", "verdicts")},
        }
        for method, own in methods.items()
    ]
    return sorted(table, key=lambda e: (-len(e["gains"]), e["mean_rank"] or 0, -e["mean_gain"], e["method"]))


def markdown(by_column: Mapping[str, Sequence[Any]], table: Sequence[Mapping[str, Any]]) -> str:
    heads = ["method", "mean rank", "in", "mean Dice − supervised", *VERDICTS, "cost of a step", *by_column]
    lines = ["# All suites and budgets", ""]
    lines += [
        "Ranks by Dice minus supervised training's, paired by case and seed, among the methods with rows in "
        "all suites and budgets, over the seeds that all of these have there; rank 1 is the best. `in`: "
        "suites and budgets with a row. "
        "Above and below: the bootstrap interval does not hold 0. Cost: processor time per step, in "
        "supervised steps. Last columns: Dice points above supervised training.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for entry in table:
        verdicts = list(entry["verdicts"].values())
        cells = [NAMES.get(entry["method"], entry["method"]), number(entry["mean_rank"])]
        cells += [str(len(entry["gains"])), number(entry["mean_gain"], 100, signed=True)]
        cells += [str(verdicts.count(word)) if verdicts else "" for word in VERDICTS]
        cells += [number(entry["cost"])]
        cells += [number(entry["gains"].get(column), 100, signed=True) for column in by_column]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_summary(suites: Sequence[Suite], results: Path) -> str:
    """summary.md and summary.json into `results`; returns the Markdown text."""
    by_column = columns(suites, results)
    if not by_column:
        names = ", ".join(suite.name for suite in suites)
        raise SuiteError(
            f"no budget of {names} has a supervised row and another one in {results}: `run` first"
        )
    table = ranked(by_column)
    text = markdown(by_column, table)
    write_text(text, results / "summary.md")
    write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", results / "summary.json")
    return text
