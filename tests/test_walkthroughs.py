"""The pages in docs/walkthroughs run as scripts: on generated scans in every run, on the real ones in the
nightly one.

On generated scans bash runs the page as it is, but nnssl's commands are carried out by this process, which
spares each the seconds that an interpreter takes to import.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnssl.commands.cli import main
from nnssl.training.history import History
from tests.place import lean_nnunet, point_at
from tests.raw_dataset import write_image
from tests.test_documentation import ROOT

SCANS = Path(os.environ.get("NNSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
PAGES = {
    "left-atrium": "Dataset501_LeftAtrium",
    "cine-mr": "Dataset502_ACDC",
    "hippocampus": "Dataset504_Hippocampus",
}
BRIEF = [(r'"num_iterations_per_epoch": \d+', '"num_iterations_per_epoch": 2')]
BRIEF += [(r'"num_val_iterations_per_epoch": \d+', '"num_val_iterations_per_epoch": 1')]
EPOCHS = {
    "left-atrium": [(r'short", \d+\), \("nnUNetPlans_more", \d+', 'short", 1), ("nnUNetPlans_more", 1')],
    "cine-mr": [(r'short", \d+\), \("nnUNetPlans_more", \d+', 'short", 1), ("nnUNetPlans_more", 1')],
    "hippocampus": [(r'"num_epochs": \d+', '"num_epochs": 1')],
}
FEW = {  # scans and features of the page that generated data do without
    "left-atrium": [(r"%03g 61 70", "%03g 61 62"), (r"%03g 5 28", "%03g 5 6"), (r"// 4", "// 16")],
    "cine-mr": [
        (r"%03g 1 30", "%03g 1 4"),
        (r"%03g 71 80", "%03g 71 71"),
        (r"// 4", "// 16"),
        (r"96, 96", "32, 32"),
    ],
    "hippocampus": [
        (r"head -n 30", "head -n 13"),
        (r"tail -n 20", "tail -n 3"),
        (r"31,90p", "14,14p"),
        (r"// 4", "// 16"),
    ],
}


def script(page: str, changes: list[tuple[str, str]]) -> str:
    """The code blocks of a page, changed; each change must find its place."""
    text = (ROOT / "docs" / "walkthroughs" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert "nnssl train" in code and "nnssl report" in code
    for pattern, new in changes:
        code, number = re.subn(pattern, new, code)
        assert number, f"{page}: {pattern}"
    return "set -euo pipefail\n" + code


def checked(folder: Path) -> None:
    """What every page leaves in its working folder."""
    assert (folder / "report" / "report.html").stat().st_size > 50_000
    assert list((folder / "report").glob("report_case_*.png"))


# on generated scans


def draw_scans(folder: Path, names: list[str], classes: int) -> Path:
    """Labeled scans of a bright blob per class, one behind the other."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(24), np.arange(24), indexing="ij"))
    for index, name in enumerate(names):
        generator = np.random.default_rng(index)
        label = np.zeros(grid.shape[1:], np.uint8)
        for k in range(classes):
            center = np.array([4, 6 + 6 * k, 12]) + generator.uniform(-1, 1, 3)
            scale = np.array([3, 3, 5])[:, None, None, None]
            label[(((grid - center[:, None, None, None]) / scale) ** 2).sum(0) < 1] = k + 1
        image = (100 + 60 * label + generator.normal(0, 10, label.shape)).astype(np.float32)
        write_image(folder / "imagesTr" / f"{name}_0000.nii.gz", image, (2.5, 2.5, 2.5))
        write_image(folder / "labelsTr" / f"{name}.nii.gz", label, (2.5, 2.5, 2.5))
    return folder


def names_of(page: str) -> list[str]:
    if page == "left-atrium":
        return [f"LA_{n:03d}" for n in (*range(1, 7), 61, 62)]
    if page == "cine-mr":
        return [f"ACDC_{n:03d}_{phase}" for n in (1, 2, 3, 4, 71) for phase in ("ED", "ES")]
    return [f"hippocampus_{n:03d}" for n in range(1, 15)]


class Shell:
    """Bash whose `nnssl` asks this process through a pair of pipes: arguments, folder and variables there,
    the exit status back."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder / "work", patch
        self.asked, self.answered = folder / "asked", folder / "answered"
        self.folder.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        for pipe in (self.asked, self.answered):
            os.mkfifo(pipe)
        ask = f'(printf "%s\\0" "$@"; printf "\\0"; env -0) > "{self.asked}"; exit $(cat "{self.answered}")'
        for name, line in (("nnssl", ask), ("python", f'exec "{sys.executable}" "$@"')):
            (commands / name).write_text(f"#!/bin/bash\n{line}\n")
            (commands / name).chmod(stat.S_IRWXU)
        patch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")

    def __call__(self, code: str) -> int:
        """Exit status of the script."""
        whole = f'trap \'printf "\\0" > "{self.asked}"\' EXIT\n{code}'
        with subprocess.Popen(["bash", "-c", whole], cwd=self.folder) as bash:
            for request in self._requests():
                arguments, _, variables = request.partition(b"\0\0")
                for line in variables.decode().rstrip("\0").split("\0"):
                    self.patch.setenv(*line.split("=", 1))
                self.patch.chdir(os.environ["PWD"])
                self.answered.write_text(f"{main(arguments.decode().split(chr(0)))}\n")
        return bash.returncode

    def _requests(self) -> Iterator[bytes]:
        while (request := self.asked.read_bytes()) != b"\0":
            yield request


def undrawn(_: Any, folder: str) -> None:
    """nnU-Net's plot takes a second."""
    Path(folder, "progress.png").touch()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_on_generated_scans(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(tmp_path, monkeypatch)
    lean_nnunet(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one core: no worker processes
    monkeypatch.setattr(MetaLogger, "plot_progress_png", undrawn)
    monkeypatch.setattr(History, "_plot", lambda *_: None)
    classes = 3 if page == "cine-mr" else 1 if page == "left-atrium" else 2
    source = draw_scans(tmp_path / "source" / PAGES[page], names_of(page), classes)
    monkeypatch.setenv("SOURCE", str(source))
    shell = Shell(tmp_path, monkeypatch)
    assert shell(script(page, [*BRIEF, *EPOCHS[page], *FEW[page]])) == 0
    checked(shell.folder)


# on real scans


def on_real_scans(page: str) -> pytest.ParameterSet:
    absent = not (SCANS / PAGES[page]).is_dir()
    reason = f"no {PAGES[page]} below {SCANS} (set NNSSL_TEST_DATA)"
    return pytest.param(page, marks=pytest.mark.skipif(absent, reason=reason))


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", [on_real_scans(page) for page in PAGES])
def test_a_page_runs_on_the_real_scans(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(tmp_path, monkeypatch)
    monkeypatch.setenv("SOURCE", str(SCANS / PAGES[page]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    done = subprocess.run(["bash", "-c", script(page, [*BRIEF, *EPOCHS[page]])], cwd=tmp_path / "work")
    assert done.returncode == 0
    checked(tmp_path / "work")
