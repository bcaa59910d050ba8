"""Which trainers, datasets and plans there are, and what a mistyped name may mean. Imports nothing heavy."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import shlex
from collections.abc import Iterable, Iterator
from os.path import isdir, isfile, join

from nnssl.datasets import DATASET as DATASET
from nnssl.datasets import dataset_number

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
PREFIX = "nnunettrainer"
SHOWN = 20


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
            for node in _classes(join(folder, file)):
                if node.name == name:
                    found[name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def trainer_paths() -> list[str]:
    """Folders of nnUNet_extTrainer, ours among them."""
    given = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    paths = [path for path in given if path.strip() and isdir(path)]
    ours = trainers_folder()
    return paths if any(os.path.samefile(path, ours) for path in paths) else [ours, *paths]


def known_trainers() -> list[str]:
    """Every class that nnU-Net would find as a trainer: ours, those of nnUNet_extTrainer, its own."""
    nnunet = importlib.util.find_spec("nnunetv2")
    own = (
        [join(path, "training", "nnUNetTrainer") for path in nnunet.submodule_search_locations or ()]
        if (nnunet)
        else []
    )
    names: dict[str, None] = {}
    for folder in [*trainer_paths(), *own]:
        for place, _, files in sorted(os.walk(folder)):
            for file in sorted(files):
                if file.endswith(".py"):
                    names |= dict.fromkeys(node.name for node in _classes(join(place, file)))
    return list(names)


def _classes(file: str) -> Iterator[ast.ClassDef]:
    with open(file, encoding="utf-8", errors="replace") as stream:
        try:
            nodes = ast.parse(stream.read()).body
        except (SyntaxError, ValueError):  # nnU-Net tells it when it imports the file
            return
    yield from (node for node in nodes if isinstance(node, ast.ClassDef))


def meant(name: str, known: Iterable[str]) -> str:
    """`Did you mean A?`, or what there is."""
    names = sorted(known)
    keys = {n.lower().removeprefix(PREFIX): n for n in names}  # a long common beginning would make all alike
    if near := difflib.get_close_matches(name.lower().removeprefix(PREFIX), keys, 2, 0.7):
        return f"Did you mean {' or '.join(keys[key] for key in near)}?"
    more = f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
    return f"There are {', '.join(names[:SHOWN])}{more}." if names else "There are none."


def nnunet_folder(variable: str) -> str:
    """Where one of nnU-Net's variables points; ValueError if it is not set."""
    folder = os.environ.get(variable)
    if not folder:
        raise ValueError(f"{variable} is not set: export {variable}=/where/you/keep/{variable}")
    return folder


def check_folders() -> None:
    """ValueError where a variable names a file, or where the shell left a ~ as it is: all would be read and
    written below a folder ./~."""
    for variable in FOLDERS:
        if isfile(value := os.environ.get(variable, "")):
            raise ValueError(f"{variable}={value}: a file, expected a folder. Correct the variable.")
        if value.startswith("~"):
            raise ValueError(
                f"{variable}={value}: the shell expands no ~ within quotes, and a folder of this name would "
                f"be made. export {variable}={shlex.quote(os.path.expanduser(value))}"
            )


def check_trainer(name: str) -> None:
    """ValueError where nnU-Net would find no trainer of this name."""
    if name not in (known := known_trainers()):
        ours = [one for one in known if one.startswith("nnUNetTrainer")]
        raise ValueError(f"-tr {name}: no such trainer. {meant(name, ours)} `nnssl trainers` lists ours.")


def check_numbers() -> None:
    """ValueError where a variable that nnU-Net reads as a number is none."""
    for variable in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        value = os.environ.get(variable, "1")
        if not value.strip().isdecimal() or (variable == "nnUNet_def_n_proc" and int(value) == 0):
            least = "0 or more" if variable == "nnUNet_n_proc_DA" else "1 or more"
            raise ValueError(f"{variable}={value}: expected a whole number, {least}. Correct or unset it.")


def dataset_folders() -> dict[str, list[str]]:
    """{dataset: the variables below whose folders it is}."""
    found: dict[str, list[str]] = {}
    for variable in FOLDERS:
        folder = os.environ.get(variable, "")
        for name in sorted(os.listdir(folder)) if isdir(folder) else ():
            if DATASET.fullmatch(name) and isdir(join(folder, name)):
                found.setdefault(name, []).append(variable)
    return found


def dataset_name(given: str | int) -> str:
    """The dataset of a number or a name; ValueError with what there is."""
    text, found = str(given), dataset_folders()
    if text in found:
        return text
    if text.isdecimal():
        names = [name for name in found if dataset_number(name) == int(text)]
        if len(names) == 1:
            return names[0]
        if names:
            places = "; ".join(f"{name} in {', '.join(found[name])}" for name in names)
            raise ValueError(f"dataset {text} is ambiguous: {places}. Give one of them another number.")
    unset = [variable for variable in FOLDERS if not os.environ.get(variable)]
    hint = f" {', '.join(unset)}: not set." if unset else ""
    raise ValueError(
        f"no dataset {text} in {_places()}, expected a number or a name like Dataset501_LeftAtrium. "
        f"{meant(text, found)}{hint}"
    )


def _places() -> str:
    places = [f"{variable}={os.environ[variable]}" for variable in FOLDERS if os.environ.get(variable)]
    return ", ".join(places) or "nnUNet_raw or nnUNet_preprocessed"
