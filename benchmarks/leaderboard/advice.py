"""What `nnssl advise` knows: the committed tables of the leaderboard and the costs of steps, in one small
file of the package. Of the tables the rows of trainers that start from a supervised network and are compared
with continued supervised training, all keys of the method at their defaults; of suites alone in which every
such method has a row.

    python -m benchmarks.leaderboard.advice    # `report` on the committed results does it, too
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.suite import load_suite
from nnssl.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "nnssl" / "commands" / "measured.json"
LEADERBOARD, STEPS = ROOT / "benchmarks/leaderboard", ROOT / "benchmarks/speed/results/steps_cpu.json"


def content() -> str:
    """Text of the file."""
    suites = []
    for file in sorted((LEADERBOARD / "results").glob("*.json")):
        settings = LEADERBOARD / "suites" / file.name.replace(".json", ".toml")
        if not settings.is_file():
            continue  # no suite's
        suite = load_suite(str(settings))
        started = [(row, row.trainer.removeprefix("nnUNetTrainer")) for row in suite.rows() if row.start]
        whole = {
            row.method: name
            for row, name in started
            if row.method != suite.continued and name not in row.settings
        }
        rows = [
            {"method": whole[e["method"]], **_row(e)}
            for e in read_json(file)["table"]
            if e["method"] in whole and "dice_minus_continued" in e
        ]
        if not rows or {row["method"] for row in rows} < set(whole.values()):
            continue  # half a comparison: what was run first would be advised
        one = read_json(min((LEADERBOARD / "results" / file.stem).glob("*.json")))
        schedule = suite.schedule
        suites.append(
            {
                "name": file.stem,
                "title": suite.title,
                "dimension": 2 if suite.configuration == "2d" else 3,
                "classes": len(one["structures"]),
                "cases": len(one["cases"]),
                "steps": schedule["num_epochs"] * schedule["num_iterations_per_epoch"],
                "device": suite.device,
                "rows": rows,
            }
        )
    measured = read_json(STEPS)["plain"]
    seconds = {k.removeprefix("step "): v for k, v in measured["seconds"].items() if k.startswith("step ")}
    cost = {k.partition(",")[0]: round(v / seconds["Supervised"], 2) for k, v in seconds.items()}
    found = {"suites": suites, "step_cost": {k: v for k, v in cost.items() if " " not in k}}
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def write() -> None:
    write_text(content(), FILE)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    low, high = entry["dice_minus_continued_interval"]
    return {
        "labels": entry["labeled"],
        "seeds": len(entry["seeds"]),
        "dice": round(entry["dice"], 4),
        "gain": round(entry["dice_minus_continued"], 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


if __name__ == "__main__":
    write()
    print(f"wrote {FILE}")
