"""The command nnUNetv2_train, as far as it trains with this library: a user's mistake is one line on stderr.

nnU-Net raises whatever it meets. Python's last resort for errors, sys.excepthook, is replaced in the process
of that command alone, when a trainer of ours is loaded; NNSSL_TRACEBACK=1 leaves it as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from traceback import walk_tb
from types import TracebackType

from nnssl.data.dataset_json import inspect_duplicate_keys
from nnssl.data.findings import raise_errors
from nnssl.data.inspection import inspect_plans_name
from nnssl.errors import told_line
from nnssl.files import read_json
from nnssl.training.arguments import add_arguments, check_data, check_fold, check_names
from nnssl.training.lookup import check_folders, check_numbers, dataset_name

COMMANDS = ("nnUNetv2_train", "run_training")


def watch() -> None:
    """From now on in nnUNetv2_train, nowhere else."""
    if _is_stock() and sys.excepthook is not _tell and not os.environ.get("NNSSL_TRACEBACK"):
        sys.excepthook = _tell


def check_command() -> None:
    """In nnUNetv2_train, ValueError where nnU-Net would go on with another plan's results or a random split,
    or fail after a long start."""
    if not _is_stock():
        return
    check_folders()
    check_numbers()
    try:
        args = _parse(sys.argv[1:])
    except SystemExit:  # an abbreviation, which nnU-Net takes
        return
    folder = os.path.join(os.environ["nnUNet_preprocessed"], dataset_name(args.dataset_name_or_id))
    plans_file = os.path.join(folder, args.p + ".json")
    name = read_json(plans_file).get("plans_name")
    raise_errors([*inspect_duplicate_keys(plans_file), *inspect_plans_name(plans_file, name)])
    check_fold(args.fold, os.path.join(folder, "splits_final.json"))


def _is_stock() -> bool:
    return os.path.splitext(os.path.basename(sys.argv[0]))[0] in COMMANDS


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    with redirect_stderr(StringIO()):
        return parser.parse_args(arguments)


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        if not getattr(error, "told", False):
            print("nnUNetv2_train: interrupted.", file=sys.stderr)
        return
    line = (None if _was_training(traceback) else _mistake(sys.argv[1:])) or told_line(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"nnUNetv2_train: error: {line}", file=sys.stderr)


def _was_training(traceback: TracebackType | None) -> bool:
    """Whether the error came out of the loop: the command line was good enough to get there."""
    frames = (frame for frame, _ in walk_tb(traceback))
    return any(frame.f_code.co_name == "run_training" and "self" in frame.f_locals for frame in frames)


def _mistake(arguments: Sequence[str]) -> str | None:
    """What is wrong with the command line, which nnU-Net's error may not tell."""
    try:
        check_folders()
        check_numbers()
        args = _parse(arguments)
        check_data(args, *check_names(args), ranks=args.num_gpus)
    except (Exception, SystemExit) as error:
        return told_line(error)
    return None
