"""`python -m benchmarks.leaderboard run | report | summary | convert`: from data to table and pictures."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.suite import FOLDER, load_suite


def key_value(text: str) -> tuple[str, Any]:
    """`mem_gb=16` -> ("mem_gb", 16): numbers as numbers, anything else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard", description=__doc__, allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="train and score every row that is not finished; resumes after any kill",
        allow_abbrev=False,
    )
    run.add_argument(
        "--data", type=Path, required=True, help="folder of nnU-Net raw datasets; nothing is written there"
    )
    run.add_argument("--work", type=Path, required=True, help="preprocessed data, checkpoints, logs")
    run.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="rows or methods, e.g. DiffCL '*_n2_s0'"
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="rows at a time on this machine (default: 1)")
    where.add_argument(
        "--slurm",
        nargs="*",
        type=key_value,
        metavar="KEY=VALUE",
        help="submit to SLURM; submitit's parameters",
    )
    run.add_argument("--minutes", type=float, help="stop after this many minutes; rerun to resume")
    report = commands.add_parser("report", help="table and pictures from the rows", allow_abbrev=False)
    summary = commands.add_parser(
        "summary", help="methods by mean rank over suites and budgets", allow_abbrev=False
    )
    summary.add_argument("suites", nargs="+", metavar="suite", help="names in suites/ or .toml files")
    for command in (run, report):
        command.add_argument("suite", help="a name in suites/ or a .toml file")
    for command in (run, report, summary):
        command.add_argument(
            "--results",
            type=Path,
            default=FOLDER / "results",
            help="where rows are kept (default: %(default)s)",
        )
    convert = commands.add_parser(
        "convert", help="public data of the papers -> nnU-Net raw dataset", allow_abbrev=False
    )
    convert.add_argument("name", help="la_h5, la_nrrd, pancreas_h5, pancreas_dicom, brats19_h5 or acdc_h5")
    convert.add_argument("--source", type=Path, required=True, help="the unpacked data")
    convert.add_argument("--raw", type=Path, required=True, help="where the dataset folder goes")
    convert.add_argument(
        "--lists",
        type=Path,
        help="folder of the papers' lists (train.list, test.list; default: found below --source)",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.command == "run":
            from benchmarks.leaderboard.run import run_suite

            slurm = None if args.slurm is None else dict(args.slurm)
            return int(
                run_suite(
                    load_suite(args.suite),
                    args.data,
                    args.work,
                    args.results,
                    args.only,
                    args.jobs,
                    slurm,
                    args.minutes,
                )
                > 0
            )
        if args.command == "report":
            from benchmarks.leaderboard.report import write_report

            print(write_report(load_suite(args.suite), args.results))
            if args.results.resolve() == (FOLDER / "results").resolve():
                from benchmarks.leaderboard.advice import write

                write()
        elif args.command == "summary":
            from benchmarks.leaderboard.summary import write_summary

            print(write_summary([load_suite(name) for name in args.suites], args.results))
        else:
            from benchmarks.leaderboard.convert import convert

            print(convert(args.name, args.source, args.raw, args.lists))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: rerun the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
