"""What `pip install .` and `pip install -e .` put on a machine, built without network in a copy of the
tree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

from nnssl import __version__

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = sorted(f.name for f in (ROOT / "nnssl_trainers").glob("nnUNetTrainer*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUPTOOLS = (77, 0)  # as pyproject.toml requires; pip fetches it, these tests take what is there

pytestmark = [
    pytest.mark.skipif(
        tuple(int(n) for n in setuptools.__version__.split(".")[:2]) < SETUPTOOLS,
        reason=f"setuptools {setuptools.__version__} is older than {SETUPTOOLS}, which the build needs",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what git ignores."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = (
        ".git",
        ".venv",
        "build",
        "dist",
        "demo",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
    )
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda folder, names: shutil.ignore_patterns(*ignored)(
            folder, [n for n in names if n != "demo.py"]
        ),
    )
    return copy


def build(source: Path, kind: str, into: Path) -> Path:
    code = (
        f"import sys, setuptools.build_meta as b; open(sys.argv[2], 'w').write(b.build_{kind}(sys.argv[1]))"
    )
    name = into / "name"
    subprocess.run(
        [sys.executable, "-c", code, str(into), str(name)],
        cwd=source,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return into / name.read_text(encoding="utf-8")


def trainers_path(site: Path) -> Path:
    """`nnssl trainers --path` in an interpreter where the project is installed in `site` and nowhere else."""
    # -S keeps .pth files of this environment out, so that an installed copy of the project cannot answer
    # instead
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2]); "
        "from nnssl.commands.cli import main; main(sys.argv[3:])"
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        code,
        str(site),
        sysconfig.get_path("purelib"),
        "trainers",
        "--path",
    ]
    return Path(
        subprocess.run(command, cwd=site, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    )


def test_wheel_holds_packages_trainers_licence_and_command_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    wheel = build(source, "wheel", tmp_path)
    assert wheel.name == f"nnunet_semi-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"nnunet_semi-{__version__}.dist-info"
        assert "nnssl = nnssl.commands.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    modules = {
        str(f.relative_to(source))
        for package in ("nnssl", "nnssl_trainers")
        for f in (source / package).rglob("*.py")
    }
    assert {*modules, "nnssl/py.typed", "nnssl/commands/measured.json"} <= names
    assert {n.split("/")[0] for n in names} == {"nnssl", "nnssl_trainers", info}
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_project_finds_its_trainers(source: Path, tmp_path: Path, kind: str) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(build(source, kind, tmp_path)) as archive:
        archive.extractall(site)
    folder = trainers_path(site)
    assert folder == (site if kind == "wheel" else source) / "nnssl_trainers"
    assert sorted(f.name for f in folder.glob("nnUNetTrainer*.py")) == TRAINERS


def test_sdist_holds_tests_and_licence_and_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build(source, "sdist", tmp_path)) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path / "unpacked")
    tree = tmp_path / "unpacked" / f"nnunet_semi-{__version__}"
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "tests/test_packaging.py",
        "tests/conftest.py",
    ):
        assert (tree / name).is_file(), name
    wheels = []
    for start, folder in ((source, tmp_path / "a"), (tree, tmp_path / "b")):
        folder.mkdir()
        with zipfile.ZipFile(build(start, "wheel", folder)) as archive:
            wheels.append({n: archive.read(n) for n in archive.namelist() if not n.endswith("RECORD")})
    assert wheels[0] == wheels[1]


def test_every_package_that_nnssl_imports_is_a_declared_dependency() -> None:
    """What another dependency happens to bring along may be gone with its next release."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert block
    declared = {plain(name) for name in re.findall(r'^ +"([\w-]+)', block[1], re.MULTILINE)}
    distributions, imported = importlib.metadata.packages_distributions(), set()
    for file in [f for package in ("nnssl", "nnssl_trainers") for f in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"nnssl", "nnssl_trainers"}
    assert {"torch", "tifffile"} <= foreign
    assert not [name for name in foreign if not declared & set(map(plain, distributions.get(name, [name])))]


def plain(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search("^make test", README, re.MULTILINE)


def test_readme_is_one_page_and_names_every_trainer() -> None:
    assert not [name for name in TRAINERS if f"`{name.removesuffix('.py')}`" not in README]
    lines = README.splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 110


def test_links_of_the_readme_lead_somewhere() -> None:
    inline = re.findall(r"\]\((?!https?:)([^)#\s]+)", README)
    references = re.findall(r"^\[[^\]]+\]: (?!https?:)(\S+)", README, re.MULTILINE)
    assert len(inline) > 5
    assert not [target for target in [*inline, *references] if not (ROOT / target).exists()]
