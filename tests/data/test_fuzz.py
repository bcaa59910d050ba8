"""Odd and damaged input of every kind: our own errors come out and nothing else, and nothing is written
outside the folders that nnU-Net was given.

A few hundred inputs in `make test`, more than 30,000 by night.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from benchmarks.leaderboard.suite import SuiteError, load_suite
from nnssl.commands.cli import main
from nnssl.config import resolve
from nnssl.data.dataset_json import declared_labels, inspect_case_name
from nnssl.data.findings import Finding, errors_of
from nnssl.data.inspection import inspect_files, inspect_split
from nnssl.data.names import inspect_names
from nnssl.data.raw import CheckedPlans, SourceError, num_channels, training_files
from nnssl.data.split import hidden_cases, load_splits, make_splits
from nnssl.data.unlabeled import find_unlabeled_images
from nnssl.methods import method_classes
from tests.data.variants import (
    BYTES,
    GRAY,
    ITK,
    NATURAL,
    NIBABEL,
    TIFF,
    VOXELS,
    nifti,
    picture,
    tiff,
    written,
)
from tests.raw_dataset import plans

SECTIONS = {name: method.config_class for name, method in method_classes().items()}
CASES = [f"lab_{index}" for index in range(6)]
MEMORY = 3 << 30  # bytes that a damaged header may make a reader ask for
Check = Callable[[Any, Path], None]

# values


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", ".", "..", "../../x", "/etc/passwd", "a" * 300, "a\nb", "a\0b", "con", "_seg", "é", "\ud800"]
    ),
)
NUMBERS = st.one_of(st.integers(-3, 9), st.integers(), st.floats())
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@st.composite
def mutated(draw: Any, valid: Any) -> Any:
    """Valid content with one to three places changed, removed, renamed or doubled."""
    content = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(("replace", "remove", "rename", "swap")))
        if action == "replace":
            container[key] = draw(JUNK)
        elif action == "remove":
            del container[key]
        elif isinstance(container, dict) and action == "rename":
            container[draw(TEXTS)] = container.pop(key)
        else:
            other, place = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[place]) if place in keys(other) else None
    return content


def keys(container: Any) -> Any:
    return container.keys() if isinstance(container, dict) else range(len(container))


# what is done with them


def told(findings: Iterator[Finding]) -> list[Finding]:
    """All findings, each on one line that every terminal takes."""
    found = list(findings)
    for finding in found:
        line = str(finding)
        assert line.isprintable() and line.encode()
    return found


SECTION = [
    {"num_epochs": 3, "seed": 0, "mirror_axes": [0, 1], "amp": "float32", "deploy": "student"},
    *({name: {key: 1 for key in cls.__dataclass_fields__}} for name, cls in SECTIONS.items()),
]


def check_section(section: Any, workspace: Path) -> None:
    for method, config_class in [(None, None), *SECTIONS.items()]:
        try:
            resolve(section, method, config_class, set(SECTIONS))
        except ValueError as error:
            assert str(error)
    folder = workspace / "preprocessed" / "Dataset777_Tiny"
    (folder / "nnUNetPlans.json").write_text(json.dumps({**plans(), "nnssl": section}))
    told(inspect_files(str(workspace / "nowhere"), str(folder), sections=SECTIONS))
    (folder / "nnUNetPlans.json").unlink()


SPLITS = [
    [{"train": CASES[:4], "val": CASES[4:5], "unlabeled": CASES[5:]}, {"train": CASES[2:], "val": CASES[:2]}],
    [{"train": CASES[1:], "val": CASES[:1]}],
]


def check_splits(content: Any, workspace: Path) -> None:
    file = workspace / "preprocessed" / "Dataset777_Tiny" / "splits_final.json"
    file.write_text(json.dumps(content))
    sound = not errors_of(told(inspect_split(str(file), CASES)))
    for fold in (0, 1, "all"):
        try:
            hidden = hidden_cases(str(file), fold, CASES)
            assert set(hidden) <= set(CASES)
        except ValueError as error:
            assert str(file) in str(error)
            assert not (sound and fold == 0)
    if sound:
        assert load_splits(str(file)) == content
    file.unlink()


DATASET = {
    "channel_names": {"0": "MR", "1": "CT"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 6,
    "file_ending": ".nii.gz",
}
ENTRY = {
    "images": ["imagesTr/lab_0_0000.nii.gz", "imagesTr/lab_0_0001.nii.gz"],
    "label": "labelsTr/lab_0.nii.gz",
}
DATASETS = [
    DATASET,
    {
        **DATASET,
        "labels": {"background": 0, "whole": [1, 2], "b": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
    {**DATASET, "dataset": {"lab_0": ENTRY, "lab_1": ENTRY}, "overwrite_image_reader_writer": "NibabelIO"},
    {
        "modality": {"0": "MR"},
        "labels": {"0": "background", "1": "a"},
        "numTraining": 6,
        "training": [],
        "test": [],
    },
]


def check_dataset_json(content: Any, workspace: Path) -> None:
    raw, preprocessed = (workspace / name / "Dataset777_Tiny" for name in ("raw", "preprocessed"))
    (raw / "dataset.json").write_text(json.dumps(content))
    findings = told(inspect_files(str(raw), str(preprocessed)))
    run("split", "-d", "777", "--labeled", "1")
    if errors_of(findings):
        return
    assert num_channels(content) >= 1 and 0 in declared_labels(content)
    for case, (images, label) in training_files(str(raw), content).items():
        assert inside(preprocessed / "x", case) and images and label


def run(*arguments: str) -> None:
    """A command ends with 0, or with 1 and one message."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    assert status in (0, 1) and bool(status) == bool(err.getvalue()), err.getvalue()
    assert "was not foreseen" not in err.getvalue() and "Traceback" not in err.getvalue()


def inside(folder: Path, case: str) -> bool:
    """What would be written for a case lies in the folder itself."""
    return os.path.dirname(os.path.normpath(os.path.join(folder, f"{case}.pkl"))) == str(folder)


SUITES: list[dict[str, Any]] = [
    {
        "title": "Tiny",
        "dataset": "Dataset501_LeftAtrium",
        "configuration": "3d_fullres",
        "validation": 2,
        "budgets": [2, 4],
        "seeds": [0],
        "methods": ["supervised", "supervised_all", "self_training", "nnUNetTrainerFixMatch"],
        "plan": {"spacing": [2.5, 2.5, 2.5], "features_divisor": 4},
        "schedule": {"num_epochs": 3, "num_iterations_per_epoch": 5},
        "method": {"nnUNetTrainerFixMatch": {"seeds": {"2": [0, 1]}, "budgets": [2], "options": {}}},
        "published": [{"method": "X", "labeled": 2, "source": "a paper", "dice": 80.0}],
        "environment": {"nnUNet_n_proc_DA": "0"},
    }
]


def as_toml(value: Any) -> str:
    """A value as TOML writes it inline; what TOML has no word for becomes text."""
    if isinstance(value, dict):
        pairs = (
            f"{json.dumps(str(k).encode(errors='replace').decode())} = {as_toml(v)}" for k, v in value.items()
        )
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value).encode(errors="replace").decode())


def check_suite(content: Any, workspace: Path) -> None:
    file = workspace / "tiny.toml"
    lines = (
        f"{json.dumps(str(k).encode(errors='replace').decode())} = {as_toml(v)}" for k, v in content.items()
    )
    file.write_text("\n".join(lines), encoding="utf-8")
    try:
        suite = load_suite(str(file))
    except SuiteError as error:
        assert str(file) in str(error)
        return
    finally:
        file.unlink()
    assert suite.iterations >= 1
    for row in suite.rows():
        assert inside(workspace / "x", row.name)


NAMES = st.one_of(
    st.binary(min_size=1, max_size=20).map(os.fsdecode),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from(
        ["..", ".", "a_seg", " ", "a\nb", "A", "a", "con", "-rf", "~", "$HOME", "%s{0}", "a" * 240, "é"]
    ),
)
ENDINGS = st.sampled_from(
    ["_0000.nii.gz", "_0001.nii.gz", ".nii.gz", "_0000.NII.GZ", "_00000.nii.gz", "", "_0000.mha"]
)


def check_names(names: list[tuple[str, str, str]], workspace: Path) -> None:
    raw = workspace / "raw" / "Dataset777_Tiny"
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    made = []
    for folder, stem, ending in names:
        file = os.path.join(raw, folder, stem.replace("/", "_").replace("\0", "_") + ending)
        if len(os.fsencode(os.path.basename(file))) > 255 or os.path.lexists(file):
            continue
        made.append(file)
        if ending == "":
            os.symlink("nowhere", file)
        else:
            Path(file).touch()
    findings = told(inspect_names(str(raw), DATASET))
    try:
        taken = find_unlabeled_images(str(raw), DATASET)
        assert all(inside(workspace / "x", case) for case in taken)
        assert not any(case.endswith("_seg") for case in taken)
    except ValueError as error:
        assert errors_of(findings) and str(raw) in str(error)
    for _, stem, _ in names:
        wrong = errors_of(told(inspect_case_name(stem, "key")))
        assert wrong or inside(workspace / "x", stem)
    for file in made:
        os.unlink(file)


@st.composite
def headers(draw: Any) -> tuple[str, bytes]:
    """A NIfTI file with some bytes of its header drawn at random, perhaps cut short."""
    content = bytearray(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.sampled_from(FIELDS) | st.integers(0, 347))
        size = draw(st.sampled_from((1, 2, 4)))
        content[position : position + size] = draw(st.binary(min_size=size, max_size=size))
    if draw(st.integers(0, 3)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    return draw(st.sampled_from((ITK, NIBABEL))), bytes(content)


SOUND = [nifti(), nifti(VOXELS.transpose(2, 1, 0).astype(np.int16)), nifti(order=">")]
FIELDS = (
    0,
    40,
    42,
    44,
    46,
    48,
    70,
    72,
    76,
    80,
    84,
    88,
    108,
    112,
    116,
    123,
    252,
    254,
    256,
    280,
    344,
    345,
    346,
)


def check_header(value: tuple[str, bytes], workspace: Path) -> None:
    reader, content = value
    packed = gzip.compress(content, 1) if reader == ITK else content
    compare(reader, workspace / ("a_0000.nii.gz" if reader == ITK else "a_0000.nii"), packed)


def compare(reader: str, file: Path, content: bytes) -> None:
    """Refused by name, or read as nnU-Net's reader does."""
    file.write_bytes(content)
    plan = {"image_reader_writer": reader}
    with redirect_stdout(io.StringIO()):
        try:
            image, properties = (
                CheckedPlans(plan, [str(file)], 1, True).image_reader_writer_class().read_images([str(file)])
            )
        except SourceError as error:
            assert str(file) in str(error)
            return
        finally:
            file.unlink()
        file.write_bytes(content)
        theirs, others = PlansManager(plan).image_reader_writer_class().read_images([str(file)])
    file.unlink()
    np.testing.assert_array_equal(image, theirs)
    assert repr(properties) == repr(others) and np.isfinite(image).all()


OTHERS: list[tuple[str, str, bytes]] = [
    *(
        (ITK, ending, written(ending, compressed))
        for ending in (".mha", ".nrrd")
        for compressed in (False, True)
    ),
    (ITK, ".gipl", written(".gipl")),
    (NATURAL, ".png", picture(GRAY)),
    (NATURAL, ".bmp", picture(GRAY, ".bmp")),
    (TIFF, ".tif", tiff(BYTES)),
    (TIFF, ".tif", tiff(BYTES, compression="zlib")),
]


def damaged(seed: int) -> tuple[str, str, bytes]:
    """A file of another format with a few bytes changed, most of them near its start, or cut short."""
    generator = random.Random(seed)
    reader, ending, whole = generator.choice(OTHERS)
    content = bytearray(whole)
    for _ in range(generator.randint(1, 5)):
        content[min(int(generator.expovariate(1 / 80)), len(content) - 1)] = generator.randrange(256)
    if generator.random() < 0.3:
        content = content[: generator.randrange(len(content))]
    return reader, ending, bytes(content)


def check_other(value: tuple[str, str, bytes], workspace: Path) -> None:
    reader, ending, content = value
    compare(reader, workspace / f"a_0000{ending}", content)


FEW = {"first": st.booleans(), "seed": st.integers(0, 9)}
NUMBER = st.none() | st.integers(-2, 8)
SPLIT_OPTIONS = st.fixed_dictionaries(
    {
        "cases": st.lists(TEXTS.filter(lambda text: "\0" not in text), max_size=8, unique=True),
        "labeled": st.integers(-2, 8),
        "unlabeled": NUMBER,
        "val": st.none() | st.lists(TEXTS | st.sampled_from(CASES), max_size=3),
        **FEW,
    }
)


def check_split_options(options: dict[str, Any], workspace: Path) -> None:
    try:
        folds = make_splits(**options)
    except ValueError as error:
        assert str(error)
        return
    for fold in folds:
        assert len(fold["train"]) == options["labeled"]
        used = [*fold["train"], *fold["val"], *fold["unlabeled"]]
        assert len(used) == len(set(used)) and set(used) <= set(options["cases"])


KINDS: dict[str, tuple[Any, Check, int]] = {  # inputs, what is done with them, number by night
    "section nnssl of the plan": (JUNK | mutated(SECTION), check_section, 4000),
    "splits": (JUNK | mutated(SPLITS), check_splits, 6000),
    "options of nnssl split": (SPLIT_OPTIONS, check_split_options, 3000),
    "dataset.json": (JUNK | mutated(DATASETS), check_dataset_json, 4000),
    "suites": (mutated(SUITES), check_suite, 4000),
    "file names": (
        st.lists(
            st.tuples(st.sampled_from(["imagesTr", "imagesUn", "labelsTr"]), NAMES, ENDINGS), max_size=5
        ),
        check_names,
        4000,
    ),
    "NIfTI headers": (headers(), check_header, 6000),
    "files of other formats": (st.integers(0, 2**32).map(damaged), check_other, 2000),
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nnU-Net's folders, and around them what must stay as it is; no reader gets all memory."""
    inner = tmp_path / "outer" / "work"
    for name in ("raw", "preprocessed", "results"):
        (inner / name / "Dataset777_Tiny").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(inner / name))
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        (inner / "raw" / "Dataset777_Tiny" / folder).mkdir()
    (tmp_path / "outer" / "precious").write_text("stay")
    monkeypatch.chdir(tmp_path / "outer")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    yield inner
    sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    resource.setrlimit(resource.RLIMIT_AS, before)


def outside(workspace: Path) -> dict[str, bytes]:
    """Every file and folder around the workspace."""
    around = [path for path in workspace.parents[1].rglob("*") if workspace not in (path, *path.parents)]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in around}


def at_home() -> set[str]:
    """Names in the home folder, but for imageio's, which any test that runs beside may make."""
    return set(os.listdir(Path.home())) - {".imageio"}


def fuzz(kind: str, number: int, workspace: Path, derandomize: bool) -> None:
    inputs, check, _ = KINDS[kind]
    seen, before, home = 0, outside(workspace), at_home()

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        nonlocal seen
        seen += 1
        check(value, workspace)

    one()
    assert seen >= number
    assert outside(workspace) == before and at_home() == home


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_only_our_errors_come_out_of_odd_input(kind: str, workspace: Path) -> None:
    fuzz(kind, 50, workspace, derandomize=True)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_only_our_errors_come_out_of_thousands_of_odd_inputs(kind: str, workspace: Path) -> None:
    fuzz(kind, KINDS[kind][2], workspace, derandomize=False)


def test_more_than_thirty_thousand_inputs_are_tried_by_night() -> None:
    assert sum(number for _, _, number in KINDS.values()) >= 30_000
