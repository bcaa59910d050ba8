"""One file per paper."""

from __future__ import annotations

import importlib
import pkgutil

from nnssl.method import SemiMethod


def method_classes() -> dict[str, type[SemiMethod]]:
    """Every method of this package by the name of its section in a plans file, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, SemiMethod) and value.__module__ == module.name:
                found[value.name] = value
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def known_methods() -> set[str]:
    """Names of all methods: the sections that the `nnssl` key of a plans file may have."""
    return set(method_classes())
