"""What pages say that only they say: examples run, trees and versions are those of the repository."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from nnssl import __version__
from nnssl.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from tests.building import Task

ROOT = Path(__file__).resolve().parents[1]
PROSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")]
PROSE += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "configuration.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_have_at_most_110_characters(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 110 and not line.startswith(("|", "!["))]


def test_the_method_of_the_page_is_mean_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of `Add a method` gives the losses of the method that it repeats, also after a step."""
    code = re.search(r"```python\n(.*?)```", read("docs/how-to/add-a-method.md"), re.DOTALL)
    assert code
    module = types.ModuleType("my_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__["__name__"] = module.__name__
    exec(code[1], module.__dict__)
    task, losses = Task(), []
    for cls, config in ((module.MyMethod, module.MyMethodConfig()), (MeanTeacher, MeanTeacherConfig())):
        method = task.method(cls, config)
        optimizer = torch.optim.SGD(method.student.parameters(), 0.1)
        for _ in range(2):
            terms = method.terms(task.batch(), 0.5)
            optimizer.zero_grad()
            sum(weight * terms[key] for key, weight in method.weights(0.5).items()).backward()
            optimizer.step()
            method.after_step(task.batch(), 0.5)
        losses.append({key: float(term.detach()) for key, term in terms.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0]["consistency"] > 0


def test_the_tree_of_contributing_names_every_part_of_the_package() -> None:
    tree = re.search(r"```text\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    assert tree
    named = {line.split()[0] for line in tree[1].splitlines() if line.startswith("  ")}
    parts = {path.name for path in (ROOT / "nnssl").glob("*.py")} - {"__init__.py"}
    parts |= {f"{path.parent.name}/" for path in (ROOT / "nnssl").glob("*/__init__.py")}
    assert parts <= named


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in read("CITATION.cff")
    assert read("CHANGELOG.md").partition("\n## ")[2].startswith(__version__)


def test_every_picture_of_a_page_exists() -> None:
    shown = [
        (page, path)
        for page in PROSE
        for path in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text("utf-8"))
    ]
    assert len(shown) > 20
    local = [(page, path) for page, path in shown if not path.startswith("http")]
    assert not [f"{page.name}: {path}" for page, path in local if not (page.parent / path).is_file()]


def test_tests_and_files_that_pages_name_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PROSE)
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    files = set(re.findall(r"`((?:benchmarks|docs|nnssl|tests)/[\w/.]+)`", text))
    assert len(tests) > 20 and len(files) > 10
    assert not [name for name in tests if f"def {name}(" not in code]
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_committed_picture_is_shown_by_a_page_or_by_the_table_beside_it() -> None:
    """The strips in `panels` are what `report` makes the overlays of."""
    shown = "".join(page.read_text(encoding="utf-8") for page in PROSE)
    pictures = [path for path in (ROOT / "benchmarks").glob("*/results/*.png")]
    assert len(pictures) > 5
    tables = {
        folder: "".join(page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
        for folder in {path.parent for path in pictures}
    }
    assert not [
        path.name
        for path in pictures
        if f"results/{path.name})" not in shown and f"({path.name})" not in tables[path.parent]
    ]
