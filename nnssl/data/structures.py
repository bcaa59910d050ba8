"""The structures of a dataset: names and label values of what nnU-Net scores, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def structures(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: its label values} of every class by value, or of every region in the order of dataset.json;
    neither background nor ignored voxels."""
    found = {
        name: tuple(int(v) for v in values) if isinstance(values, (list, tuple)) else (int(values),)
        for name, values in dataset_json["labels"].items()
        if name != "ignore"
    }
    found = {name: values for name, values in found.items() if set(values) != {0}}
    if any(len(values) > 1 for values in found.values()):
        return found
    return dict(sorted(found.items(), key=lambda item: item[1]))


def mask_of(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """Voxels of a label map that belong to a structure."""
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)
