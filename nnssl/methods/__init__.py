"""One file per paper."""

from __future__ import annotations


def known_methods() -> set[str]:
    """Names of all methods: the sections that the `nnssl` key of a plans file may have."""
    return {
        "ACTION",
        "Supervised",
        "DiffCL",
        "FixMatch",
        "CPS",
        "CAML",
        "SemSim",
        "MeanTeacher",
        "BCP",
        "UAMT",
        "MCNet",
    }
