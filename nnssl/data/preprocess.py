"""nnU-Net's preprocessing, case by case: only what is missing or stale, in parallel, each case complete or
not there at all.

nnU-Net's ``DefaultPreprocessor.run`` deletes its output folder and starts over. Here the same
``run_case_save`` of the plan's preprocessor writes one case into a scratch folder in the target; the
finished files are then moved into place, the properties (``.pkl``) last: they mark a complete case.
"""

from __future__ import annotations

import os
import pickle
import random
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from os.path import basename, dirname, getsize, join

import blosc2
import numpy as np
from nnunetv2.configuration import default_num_processes
from tqdm import tqdm

from nnssl.data.dataset_json import declared_labels
from nnssl.data.freshness import Case, Target, checksum, judge, make_record, stale_reason, write_properties
from nnssl.data.parallel import unordered, usable_cores
from nnssl.data.raw import CheckedPlans, SourceError, num_channels
from nnssl.files import REMEDIES, move, one_at_a_time, refuse_full, remove_leftovers, scratch_folder

Log = Callable[[str], None]


def _produce(case: Case, target: Target, scratch: str, verbose: bool) -> str:
    """Preprocess one case; returns what went wrong, empty if nothing did (all failures are reported
    together)."""
    try:
        if not stale_reason(case, target):
            return ""  # a training that started at the same time was faster
        declared = declared_labels(target.dataset_json)
        plans = CheckedPlans(
            target.plans_manager.plans,
            case.images,
            num_channels(target.dataset_json),
            strict=case.label is None,
            declared=declared if case.label else None,
            spacing=target.plans_manager.get_configuration(target.configuration).spacing,
        )
        configuration = plans.get_configuration(target.configuration)
        preprocessor = configuration.preprocessor_class(verbose=verbose)
        stem = join(scratch, case.name)
        # before reading: a source that changes meanwhile is noticed next time
        record = make_record(case, target, [], with_digest=True)
        preprocessor.run_case_save(
            stem, list(case.images), case.label, plans, configuration, target.dataset_json
        )
        with open(stem + ".pkl", "rb") as file:
            properties = pickle.load(file)
        if case.label is not None:
            record["declared"] = sorted(declared)
        else:
            properties["class_locations"] = {}  # nnU-Net's loader asks for it
        _refuse_lost_image(stem + ".b2nd", case)
        record["bytes"] = [getsize(stem + ".b2nd"), getsize(stem + "_seg.b2nd")]
        record["checksums"] = [checksum(stem + ".b2nd"), checksum(stem + "_seg.b2nd")]
        write_properties({**properties, "nnssl": record}, stem + ".pkl")
        with one_at_a_time(target.folder):
            if not stale_reason(case, target):
                return ""  # its files and ours must not be mixed: Blosc2 never writes the same bytes twice
            with suppress(FileNotFoundError):
                os.remove(target.files(case.name)[2])
            for destination in target.files(case.name):
                move(join(scratch, basename(destination)), destination)
    except SourceError as error:
        return f"{case.name}: {error}"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REMEDIES and error.filename not in case.sources:
            raise  # the other cases would fail, too
        refuse_full(scratch)  # blosc2 does not say why it cannot write
        detail = traceback.format_exc() if verbose else f"{type(error).__name__}: {error}"
        return f"{case.name}: could not be preprocessed from {', '.join(case.sources)}: {detail}"
    return ""


def _refuse_lost_image(file: str, case: Case) -> None:
    """Refuse what normalisation made useless: NaN, infinity, or one value everywhere."""
    array = blosc2.open(file, mode="r")[:]
    finite, constant = bool(np.isfinite(array).all()), all(c.min() == c.max() for c in array)
    if not finite or constant:
        raise SourceError(
            f"{', '.join(case.images)}: {'constant' if finite else 'NaN or infinite values'} after "
            "normalisation. Look for extreme values or an empty image, and repair or remove the case."
        )


def bring_up_to_date(
    cases: Sequence[Case],
    target: Target,
    num_processes: int | None = None,
    log: Log = print,
    verbose: bool = False,
    show_progress: bool = True,
) -> int:
    """Preprocess the cases that are missing or stale; returns how many there were.

    Every other case is finished before a failing one is reported, so nothing that could be done is left
    undone. Raises ValueError naming the files and what to do, RuntimeError if a process died, OSError where
    the disk is full or read-only: finished cases are kept.
    """
    for folder in (target.folder, dirname(target.folder)):
        remove_leftovers(folder)
    todo = []
    for case in cases:
        reason, improved = judge(case, target)
        if reason:
            todo.append(case)
        elif improved is not None and os.access(target.folder, os.W_OK):
            write_properties(improved, target.files(case.name)[2])
    if not todo:
        return 0
    workers = min(num_processes or min(default_num_processes, usable_cores()), len(todo))
    kept = f", {len(cases) - len(todo)} others are up to date" if len(todo) < len(cases) else ""
    log(
        f"Preprocessing {len(todo)} cases into {target.folder} ({workers} "
        f"process{'es' * (workers > 1)}{kept})."
    )
    # folds started together share the work instead of all doing the same case
    random.Random(os.getpid()).shuffle(todo)
    os.makedirs(target.folder, exist_ok=True)
    with scratch_folder(target.folder) as scratch:  # the folder may be a link to another disk
        results = unordered(_produce, [(case, target, scratch, verbose) for case in todo], workers)
        errors = [
            error
            for error in tqdm(results, "preprocessing", len(todo), disable=not show_progress, mininterval=0.5)
            if error
        ]
    if errors:
        shown = "\n".join(f"  - {error}" for error in sorted(errors)[:20])
        raise ValueError(
            f"{len(errors)} of {len(todo)} cases could not be preprocessed (the others are done and "
            f"kept):\n{shown}\n"
            "Repair, replace or remove these files and rerun: only missing cases are redone."
        )
    return len(todo)
