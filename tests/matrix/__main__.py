from __future__ import annotations

import argparse
from pathlib import Path

import tests.conftest  # noqa: F401  # one thread, nothing of the user's nnU-Net
from tests.matrix.cells import run_matrix, trainers
from tests.matrix.columns import COLUMNS

parser = argparse.ArgumentParser(prog="python -m tests.matrix")
parser.add_argument("results", type=Path)
parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
parser.add_argument("--trainers", nargs="+", choices=trainers(), default=trainers())
parser.add_argument("--again", action="store_true", help="run green cells, too")
args = parser.parse_args()
run_matrix(args.results, args.columns, args.trainers, args.again)
