"""Preprocessed cases as they were written: a file that is missing or damaged is named, with what to do.

The properties (``.pkl``) of a case that we preprocessed end in a checksum of their own, which pickle does not
read, and record those of both arrays: Blosc2 decompresses most damaged images without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os.path import isfile, join
from traceback import walk_tb
from typing import Any

import blosc2
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2

from nnssl.data.freshness import checksum, read_properties

SUFFIXES = (".b2nd", "_seg.b2nd")
READING = ("load_case", "generate_train_batch")  # functions that read cases
WORKERS = "background workers are no longer alive"


class DamagedCase(RuntimeError):
    """A file of a preprocessed case is missing or damaged."""


def refuse_damage(folder: str, case: str, thorough: bool = False) -> None:
    """DamagedCase naming the file of a case that is missing or not what was written.

    thorough  decompress arrays of which no checksum was recorded, too
    """
    marker = join(folder, case + ".pkl")
    remedy = f"Delete {marker} and run `nnssl plan-and-preprocess`: it redoes the case"
    if not isfile(marker):
        raise DamagedCase(f"{marker}: missing. Run `nnssl plan-and-preprocess`: it redoes the case")
    properties = read_properties(marker)
    if properties is None:
        raise DamagedCase(f"{marker}: damaged. {remedy}")
    recorded = properties.get("nnssl", {}).get("checksums")
    for index, suffix in enumerate(SUFFIXES):
        path = join(folder, case + suffix)
        if not isfile(path):
            raise DamagedCase(f"{path}: missing. {remedy}")
        if recorded and checksum(path) != recorded[index]:
            raise DamagedCase(f"{path}: damaged, its content does not match its checksum. {remedy}")
        if thorough and not recorded and not _readable(path):
            raise DamagedCase(f"{path}: damaged, it cannot be decompressed. {remedy}")


def _readable(path: str) -> bool:
    try:
        blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1})[:]
    except Exception:  # blosc2 has no error class of its own
        return False
    return True


class Checked:
    """Which cases of a folder this process has found intact: each is looked at when it is first read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen: set[str] = set()

    def __call__(self, case: str) -> None:
        if case not in self.seen:
            refuse_damage(self.folder, case)
            self.seen.add(case)


class IntactDataset(nnUNetDatasetBlosc2):
    """nnU-Net's dataset, which refuses damaged cases."""

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, Any]:
        if "checked" not in self.__dict__:
            self.checked = Checked(self.source_folder)
        self.checked(identifier)
        return super().load_case(identifier)


def dataset_class(folder: str) -> type:
    """nnU-Net's dataset of a folder of preprocessed cases, refusing damaged ones."""
    found = infer_dataset_class(folder)
    return IntactDataset if found is nnUNetDatasetBlosc2 else found


@contextmanager
def damage_named(cases: Callable[[], Iterable[tuple[str, str]]]) -> Iterator[None]:
    """Where reading cases fails in the block or in a background worker, look for the file and name it.

    cases  gives folder and name of every case that may have been read
    """
    try:
        yield
    except DamagedCase:
        raise
    except Exception as error:
        frames = {frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)}
        if WORKERS in str(error) or frames.intersection(READING):
            for folder, case in cases():
                refuse_damage(folder, case, thorough=True)
        raise
