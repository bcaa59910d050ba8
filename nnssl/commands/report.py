"""``nnssl report``: one page about one or several trainings."""

from __future__ import annotations

import argparse

from nnssl.report.build import write_report
from nnssl.report.runs import find_runs, runs_in_folders


def report(args: argparse.Namespace) -> None:
    """Write the page; ValueError where the arguments do not say which trainings."""
    named = {"-d": args.d, "-c": args.c, "-tr": args.tr}
    missing = [flag for flag, value in named.items() if value is None]
    if args.folders and len(missing) < len(named):
        raise ValueError("give either -d, -c and -tr, or folders of results, not both")
    if not args.folders and missing:
        raise ValueError(f"{', '.join(missing)} missing: give -d, -c and -tr, or folders of results")
    if args.folders:
        runs = runs_in_folders(args.folders, args.f)
    else:
        runs = find_runs(args.d, args.c, args.f, args.tr, args.p)
    path = write_report(runs, args.o)
    for note in (note for run in runs for note in run.notes):
        print(f"WARNING: {note}")
    print(path)
