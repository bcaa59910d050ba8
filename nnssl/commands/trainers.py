"""``nnssl trainers``: which trainers there are, and where nnU-Net finds them."""

from __future__ import annotations

import ast
import importlib.util
import os


def trainers_folder() -> str:
    """Folder of the installed trainer files, found without importing them."""
    spec = importlib.util.find_spec("nnssl_trainers")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("The package nnssl_trainers is not installed. Reinstall nnunet-semi.")
    return os.path.abspath(next(iter(spec.submodule_search_locations)))


def list_trainers(folder: str) -> dict[str, str]:
    """{trainer: first line of its docstring}, from the source: importing would take seconds."""
    found = {}
    for file in sorted(os.listdir(folder)):
        name, extension = os.path.splitext(file)
        if name.startswith("nnUNetTrainer") and extension == ".py":
            with open(os.path.join(folder, file), encoding="utf-8") as stream:
                nodes = ast.parse(stream.read()).body
            for node in nodes:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    found[name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found
