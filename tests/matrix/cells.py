"""Every trainer on every column; results in one JSON file, from which docs/generate_compatibility.py writes a
page.

python -m tests.matrix RESULTS.json        all cells that the file lacks; --columns, --trainers: some of them
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.files import read_json, write_json
from tests.matrix.columns import COLUMNS, Workspace, surroundings, training_surroundings

GREEN, REFUSED, FAILING = "green", "refused", "failing"


def trainers() -> list[str]:
    return list(list_trainers(trainers_folder()))


@contextlib.contextmanager
def prepared(column: str) -> Iterator[Workspace]:
    """The column's dataset, planned and preprocessed, in a folder that goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"matrix-{column}-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            surroundings(folder, patch)
            place = COLUMNS[column].prepare(folder)
            training_surroundings(patch)
            yield place
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_cell(place: Workspace, column: str, trainer: str) -> dict[str, Any]:
    """Status, and where it is not green the reason; nothing of the run is kept.

    An error with a message of nnssl's own (ValueError, RuntimeError) before any epoch is a refusal.
    """
    start, output = time.process_time(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            COLUMNS[column].run(place, trainer)
        result = {"status": GREEN}
    except Exception as error:
        began = "Epoch 0" in output.getvalue()
        own = any("/nnssl/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-1:])
        refused = own and not began and isinstance(error, (ValueError, RuntimeError))
        result = {
            "status": REFUSED if refused else FAILING,
            "reason": f"{type(error).__name__}: {error}",
            **({} if refused else {"traceback": traceback.format_exc()}),
        }
    shutil.rmtree(place.folder / "results", ignore_errors=True)
    return {**result, "seconds": round(time.process_time() - start, 1)}


def run_matrix(path: Path, columns: Iterable[str], names: Iterable[str], again: bool = False) -> None:
    """Fill a results file; green cells in it are kept, several processes may share it."""
    names = list(names)
    for column in columns:
        known = _read(path)["columns"].get(column, {"cells": {}})["cells"]
        todo = [name for name in names if again or known.get(name, {}).get("status") != GREEN]
        if not todo:
            continue
        with prepared(column) as place:
            for name in todo:
                cell = run_cell(place, column, name)
                with FileLock(f"{path}.lock"):
                    content = _read(path)
                    content["versions"] = {
                        name: metadata.version(name) for name in ("nnunet-semi", "nnunetv2", "torch")
                    }
                    entry = content["columns"].setdefault(column, {"cells": {}})
                    entry["title"] = COLUMNS[column].title
                    entry["cells"] = dict(sorted({**entry["cells"], name: cell}.items()))
                    content["columns"] = {
                        c: content["columns"][c] for c in COLUMNS if c in content["columns"]
                    }
                    write_json(content, path, indent=1)
                print(column, name, cell["status"], cell["seconds"], cell.get("reason", ""), flush=True)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {"columns": {}}
