"""Every file of the table is read exactly as by nnU-Net's own reader, or refused with the true reason."""

from __future__ import annotations

import io
import runpy
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.raw import CheckedPlans, SourceError
from tests.data.variants import (
    BYTES,
    GRAY,
    ITK,
    NATURAL,
    TIFF,
    VOXELS,
    Variant,
    nifti,
    picture,
    tiff,
    variants,
)
from tests.data.variants import written as by_itk

TABLE = variants()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Readers print and warn of what the table is full of."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
    sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def stock(reader: str, file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    plans = PlansManager({"image_reader_writer": reader})
    return plans.image_reader_writer_class().read_images([str(file)])


def ours(reader: str, file: Path, channels: int = 1) -> tuple[np.ndarray, dict[str, Any]]:
    plans = CheckedPlans({"image_reader_writer": reader}, [str(file)], channels, strict=True)
    return plans.image_reader_writer_class().read_images([str(file)])


@pytest.mark.parametrize("variant", TABLE, ids=lambda v: f"{v.reader}-{v.ending}-{v.name}")
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_read_as_by_nnunet_or_refused_with_the_reason(variant: Variant, tmp_path: Path) -> None:
    file = tmp_path / f"case_0000{variant.ending}"
    variant.make(file)
    theirs = None
    try:
        theirs = stock(variant.reader, file)
    except Exception:
        assert variant.refused
    assert variant.stock_reads == (theirs is not None)
    if not variant.refused:
        image, properties = ours(variant.reader, file, variant.channels)
        assert theirs is not None
        np.testing.assert_array_equal(image, theirs[0])
        assert repr(properties) == repr(theirs[1])
        return
    with pytest.raises(SourceError) as error:
        ours(variant.reader, file, variant.channels)
    assert str(error.value).startswith(f"{file}: ")
    assert variant.refused in str(error.value)


def test_the_table_is_long_and_says_nothing_twice() -> None:
    keys = {(v.reader, v.ending, v.name) for v in TABLE}
    assert len(keys) == len(TABLE) >= 300
    assert sum(not v.refused for v in TABLE) >= 150


FORMATS: dict[str, tuple[str, bytes]] = {
    ".nii": (ITK, nifti()),
    ".nii.gz": (ITK, by_itk(".nii.gz", True)),
    ".mha": (ITK, by_itk(".mha")),
    "-compressed.mha": (ITK, by_itk(".mha", True)),
    ".nrrd": (ITK, by_itk(".nrrd")),
    "-compressed.nrrd": (ITK, by_itk(".nrrd", True)),
    ".gipl": (ITK, by_itk(".gipl")),
    ".png": (NATURAL, picture(GRAY)),
    ".bmp": (NATURAL, picture(GRAY, ".bmp")),
    ".tif": (TIFF, tiff(metadata=None)),
    "-lzw.tif": (TIFF, tiff(compression="lzw")),
    "-float.tiff": (TIFF, tiff(VOXELS, byteorder=">")),
    "-tiles.tif": (TIFF, tiff(np.tile(BYTES, (1, 4, 4)), tile=(16, 16))),
    "-2d.tif": (NATURAL, tiff(GRAY)),
}


def needed(file: Path) -> int:
    """Bytes up to the last that belongs to the image: tifffile leaves some behind that nothing points to."""
    if file.suffix not in (".tif", ".tiff"):
        return file.stat().st_size
    ends = []
    with tifffile.TiffFile(file) as opened:
        for page in opened.pages:
            assert isinstance(page, tifffile.TiffPage)
            ends += [tag.valueoffset + tag.valuebytecount for tag in page.tags]
            ends += [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
            ends.append(page.offset + 2 + 12 * len(page.tags) + 4)
    return max(ends)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_refused_by_name(name: str, tmp_path: Path) -> None:
    reader, content = FORMATS[name]
    whole = tmp_path / f"whole{name}"
    whole.write_bytes(content)
    np.testing.assert_array_equal(ours(reader, whole)[0], stock(reader, whole)[0])
    end = needed(whole)
    ends = {
        0,
        1,
        2,
        5,
        20,
        100,
        255,
        256,
        347,
        348,
        351,
        352,
        *range(0, end, end // 20),
        *range(end - 20, end),
    }
    file = tmp_path / f"case_0000{name}"
    for cut in sorted(cut for cut in ends if 0 <= cut < end):
        file.write_bytes(content[:cut])
        with pytest.raises(SourceError, match=r"case_0000"):
            ours(reader, file)


def test_the_committed_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["files_page"]()
    written = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    assert written == page, "run python docs/generate_reference.py"
