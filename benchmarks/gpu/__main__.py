"""Everything that a GPU is needed for, in pieces, the most valuable first.

    python -m benchmarks.gpu --data RAW             # up to 9 minutes; call again until nothing is left
    python -m benchmarks.gpu --data RAW --list      # the plan, and what is done already
    python -m benchmarks.gpu --dry-run              # all of it on the CPU, at toy size, on generated scans

RAW holds nnU-Net raw datasets (the left atrium by default). Rows are kept in --results (gpu.json, gpu.md),
everything else in --work. A task that fails leaves its traceback in its row, and the next one begins; what
the time limit or a signal ends is begun anew by the next call, trainings from their last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.plan import TOY_DATASET, TOY_SCANS, Piece, pieces, suites
from benchmarks.gpu.report import report
from benchmarks.gpu.run import Results, Runner, ended_by_signals, has_gpu, prepare, toy_data
from nnssl.files import write_text

HERE = Path(__file__).parent
MINUTES = 9.0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--data", type=Path, metavar="RAW", help="folder of nnU-Net raw datasets; only read")
    top.add_argument("--dataset", metavar="NAME", help="one of them (default: the left atrium)")
    top.add_argument("--work", type=Path, help="preprocessed data, checkpoints, logs (default: gpu_work)")
    top.add_argument("--results", type=Path, help="gpu.json and gpu.md (default: benchmarks/gpu/results)")
    top.add_argument(
        "--minutes", type=float, default=MINUTES, help="stop after so many (default: %(default)s)"
    )
    top.add_argument("--only", nargs="+", metavar="PIECE", default=[], help="pieces by name, in this order")
    top.add_argument("--trainers", nargs="+", metavar="NAME", default=[], help="without the others")
    top.add_argument("--list", action="store_true", help="print the plan and end")
    top.add_argument("--retry", action="store_true", help="try tasks again that failed")
    top.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    # of the tasks' processes: they are forked, which a process that has asked CUDA cannot be; and several
    # compile side by side
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    end = time.monotonic() + 60 * args.minutes
    try:
        return run(args, end)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace, end: float) -> int:
    """0 where everything chosen is finished, 1 where something failed, 3 where time was too short."""
    with ExitStack() as stack:
        if args.dry_run and args.work is None:
            args.work = Path(stack.enter_context(TemporaryDirectory()))
        return run_in((args.work or Path("gpu_work")).resolve(), args, end)


def run_in(work: Path, args: argparse.Namespace, end: float) -> int:
    default = work / "results" if args.dry_run else HERE / "results"
    results = Results((args.results or default).resolve())
    if args.data is None and not args.dry_run:
        raise ValueError("--data is missing: the folder of nnU-Net's raw datasets; or --dry-run")
    data = (args.data or work / "data").resolve()
    short, official = suites(data, args.dataset, args.dry_run)
    every = pieces(short, official, args.dry_run, args.trainers)
    chosen = choose(every, args.only)
    print(plan_text(chosen, results, args.minutes), flush=True)
    if args.list:
        return 0
    if not args.dry_run and not has_gpu():
        raise RuntimeError("no CUDA device is available; --dry-run does all of it on the CPU, at toy size")
    runner = Runner(work, results, end, args.retry)
    try:
        with ended_by_signals():
            if args.dry_run and args.data is None:
                toy_data(data, TOY_SCANS, TOY_DATASET)
            prepare(short, data, work)
            runner.run(chosen)
    except KeyboardInterrupt:
        print("interrupted: call again to go on", file=sys.stderr)
    finally:
        if results.rows:
            text = report(every, results.rows)
            write_text(text, results.path.with_suffix(".md"))
            if args.dry_run:
                print(text)
            print(f"{results.path} and {results.path.with_suffix('.md').name} hold {len(results.rows)} rows")
    return status(chosen, results)


def choose(every: list[Piece], only: list[str]) -> list[Piece]:
    """The pieces named, in that order; ValueError where one is unknown."""
    named = {piece.name: piece for piece in every}
    if unknown := [name for name in only if name not in named]:
        raise ValueError(f"--only {unknown[0]}: no such piece. Pieces: {', '.join(named)}")
    return [named[name] for name in only] if only else every


def plan_text(chosen: list[Piece], results: Results, minutes: float) -> str:
    """What is going to be done, and what is done already."""
    lines = [f"{'piece':24}{'done':>9}  {'guess':>9}  what"]
    for piece in chosen:
        done = [task for task in piece.tasks if results.is_done(task)]
        left = sum(task.seconds for task in piece.tasks if task not in done) / piece.side_by_side
        guess = "open" if piece.tasks[0].kind.endswith(":train") else f"{left / 60:.1f} min"
        lines.append(f"{piece.name:24}{f'{len(done)}/{len(piece.tasks)}':>9}  {guess:>9}  {piece.what}")
    return "\n".join([*lines, f"This call ends after {minutes:g} minutes."])


def status(chosen: list[Piece], results: Results) -> int:
    rows = [
        results.rows.get(task.name, {"status": "absent"})["status"]
        for piece in chosen
        for task in piece.tasks
    ]
    if any(row in ("absent", "unfinished") for row in rows):
        return 3
    return int(any(row != "finished" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
