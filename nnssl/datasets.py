"""Names and numbers of datasets, and which plans one has. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from os.path import isdir, isfile, join
from typing import Any

from nnssl.files import read_json

DATASET = re.compile(r"Dataset(\d{3,})(_.*)?")


def dataset_number(name: str) -> int | None:
    """Of a dataset's name; None where it is none."""
    match = DATASET.fullmatch(name)
    return int(match[1]) if match else None


def plans_of(preprocessed: str) -> list[str]:
    """Names of the plans in a dataset's preprocessed folder."""
    names = os.listdir(preprocessed) if isdir(preprocessed) else []
    files = [
        name
        for name in names
        if name.endswith(".json") and name[0] != "." and isfile(join(preprocessed, name))
    ]
    return sorted(name[:-5] for name in files if "lans" in name or _is_plan(join(preprocessed, name)))


def _is_plan(file: str) -> bool:
    """By its keys: a plan may have any name."""
    try:
        content = read_json(file)
    except (ValueError, OSError, RecursionError):
        return False
    return is_plan(content)


def is_plan(content: Any) -> bool:
    """Whether the content of a JSON file is a plan of nnU-Net."""
    return isinstance(content, dict) and {"configurations", "plans_name"} <= content.keys()
