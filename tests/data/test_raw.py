from __future__ import annotations

import gzip
import math
import os
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.formats import inspect_file
from nnssl.data.freshness import digest
from nnssl.data.raw import CheckedPlans, SourceError, channel_files, training_files
from tests.raw_dataset import plans, write_dataset, write_image


def read(*files: Path, channels: int = 1, strict: bool = True) -> np.ndarray:
    names = [str(file) for file in files]
    return CheckedPlans(plans(), names, channels, strict).image_reader_writer_class().read_images(names)[0]


def test_a_sound_image_reads_as_by_nnunet(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    for name, array in (
        ("a.nii.gz", image),
        ("b.nii", image),
        ("c.mha", image),
        ("d.nii.gz", (image * 100).astype(np.int16)),
    ):
        write_image(tmp_path / name, array)
        expected = PlansManager(plans()).image_reader_writer_class().read_images([str(tmp_path / name)])[0]
        np.testing.assert_array_equal(read(tmp_path / name), expected)


@pytest.mark.parametrize("cut", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_truncated_nifti_is_refused_which_simpleitk_fills_with_zeros(
    tmp_path: Path, cut: int, dtype: type
) -> None:
    file = tmp_path / "a.nii"
    write_image(file, np.full((10, 28, 26), 7, dtype))
    file.write_bytes(file.read_bytes()[:-cut])
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) != 7).any()
    with pytest.raises(SourceError, match=r"a\.nii: truncated, \d+ of \d+ bytes are there"):
        read(file)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_headers_of_both_nifti_versions_and_byte_orders_are_understood(
    tmp_path: Path, image_class: Any, order: Any
) -> None:
    def write(data: np.ndarray) -> bytes:
        header = image_class.header_class(endianness=order)
        header.set_data_dtype(np.dtype("f8").newbyteorder(order))
        nib.save(image_class(data, np.eye(4), header), file)
        return file.read_bytes()

    file = tmp_path / "a.nii"
    data = np.random.default_rng(0).normal(size=(4, 5, 6))
    content = write(data)
    inspect_file(str(file), strict=True)
    file.write_bytes(content[:-8])
    with pytest.raises(SourceError, match=f"truncated, {len(content) - 8} of {len(content)} bytes"):
        inspect_file(str(file), strict=True)
    data[2, 2, 2] = np.inf
    write(data)
    with pytest.raises(SourceError, match="NaN or infinite"):
        inspect_file(str(file), strict=True)


def packed_in_blocks(content: bytes) -> bytes:
    """Many gzip streams one after the other, as bgzip writes them."""
    return b"".join(gzip.compress(content[i : i + 5000]) for i in range(0, len(content), 5000))


PACKINGS = {
    "not compressed": lambda content: content,
    "bytes behind the stream": lambda content: gzip.compress(content) + b"PADDING",
    "one byte behind the stream": lambda content: gzip.compress(content) + b"\x1f",
    "zeros behind the stream": lambda content: gzip.compress(content) + bytes(512),
    "many streams": packed_in_blocks,
}


def stock(file: Path) -> np.ndarray:
    return PlansManager(plans()).image_reader_writer_class().read_images([str(file)])[0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_gz_files_that_are_odd_but_sound_read_as_by_nnunet_and_truncated_ones_are_refused(
    tmp_path: Path, packing: str
) -> None:
    image = np.random.default_rng(0).normal(size=(10, 28, 26)).astype(np.float32)
    write_image(tmp_path / "a.nii", image)
    content = (tmp_path / "a.nii").read_bytes()
    file = tmp_path / "a.nii.gz"
    file.write_bytes(PACKINGS[packing](content))
    np.testing.assert_array_equal(read(file)[0], image)
    np.testing.assert_array_equal(read(file), stock(file))
    file.write_bytes(PACKINGS[packing](content[:-1000]))
    with pytest.raises(SourceError, match=rf"truncated, {len(content) - 1000} of {len(content)} bytes"):
        read(file)


def test_a_gzip_stream_that_ends_early_or_is_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.nii.gz"
    write_image(file, np.random.default_rng(0).normal(size=(10, 28, 26)).astype(np.float32))
    content = file.read_bytes()
    for end in (5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(SourceError, match=r"a\.nii\.gz: truncated or damaged \(.*ends too early"):
            read(file)
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(SourceError, match=r"a\.nii\.gz: truncated or damaged"):
        read(file)


HEADERS: dict[str, tuple[type, dict[int, tuple[str, float]]]] = {
    "int16 with bitpix 32": (np.int16, {72: ("<h", 32)}),
    "float32 with vox_offset 0 and scl_slope NaN": (np.float32, {108: ("<f", 0), 112: ("<f", math.nan)}),
    "float32 with vox_offset NaN": (np.float32, {108: ("<f", math.nan)}),
    "float32 with vox_offset -1": (np.float32, {108: ("<f", -1)}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_fields_that_simpleitk_repairs_are_repaired_alike(tmp_path: Path, case: str) -> None:
    dtype, fields = HEADERS[case]
    image: np.ndarray = (100 * np.random.default_rng(0).normal(size=(26, 28, 10))).astype(dtype)
    nib.save(nib.Nifti1Image(image, np.diag([1, 1, 1.5, 1])), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    for position, (kind, value) in fields.items():
        struct.pack_into(kind, content, position, value)
    file = tmp_path / "a.nii.gz"
    file.write_bytes(gzip.compress(bytes(content)))
    np.testing.assert_array_equal(read(file), stock(file))
    file.write_bytes(gzip.compress(bytes(content[:-100])))
    with pytest.raises(SourceError, match=rf"a\.nii\.gz: truncated, {len(content) - 100} of \d+ bytes"):
        read(file)


def test_a_file_cut_within_its_header_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.nii"
    write_image(file, np.ones((4, 4, 4), np.float32))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"a\.nii: truncated.*200 of the 348 bytes of its header"):
        read(file)


def test_nan_that_the_reader_turns_into_zero_is_refused_only_where_strict(tmp_path: Path) -> None:
    image = np.ones((6, 5, 4), np.float32)
    image[0, 0, 0] = np.nan
    write_image(tmp_path / "a.nii.gz", image)
    assert np.isfinite(read(tmp_path / "a.nii.gz", strict=False)).all()
    with pytest.raises(SourceError, match=r"a\.nii\.gz: NaN or infinite"):
        read(tmp_path / "a.nii.gz")


def test_nan_that_the_reader_hands_on_is_refused_and_its_channel_named(tmp_path: Path) -> None:
    image = np.ones((6, 5, 4), np.float32)
    write_image(tmp_path / "a.mha", image)
    image[0, 0, 0] = np.nan
    write_image(tmp_path / "b.mha", image)
    with pytest.raises(SourceError, match=r"b\.mha: NaN") as error:
        read(tmp_path / "a.mha", tmp_path / "b.mha", channels=2, strict=False)
    assert "a.mha" not in str(error.value)


def test_wrong_number_of_channels_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", np.ones((6, 5, 4), np.float32))
    with pytest.raises(SourceError, match=r"1 channel\(s\), but dataset\.json declares 3"):
        read(tmp_path / "a.nii.gz", channels=3)


def test_labels_may_have_other_channels_than_images_but_not_be_damaged(tmp_path: Path) -> None:
    label = tmp_path / "label.nii.gz"
    write_image(label, np.ones((6, 5, 4), np.uint8))
    reader = CheckedPlans(
        plans(), ["image_0000.nii.gz", "image_0001.nii.gz"], 2, True
    ).image_reader_writer_class()
    assert reader.read_seg(str(label))[0].shape == (1, 6, 5, 4)
    label.write_bytes(label.read_bytes()[:-5])
    with pytest.raises(SourceError, match=r"label\.nii\.gz: truncated"):
        reader.read_seg(str(label))


@pytest.mark.parametrize(
    ("name", "reader", "vector", "shape", "channels"),
    [
        ("one_hot.nii.gz", "SimpleITKIO", False, (2, 6, 5, 4), 2),
        ("layers.nrrd", "SimpleITKIO", True, (6, 5, 4, 2), 2),
        ("rgb.png", "NaturalImage2DIO", True, (6, 5, 3), 3),
    ],
)
def test_a_label_map_of_several_channels_is_refused(
    tmp_path: Path, name: str, reader: str, vector: bool, shape: tuple[int, ...], channels: int
) -> None:
    file = str(tmp_path / name)
    sitk.WriteImage(sitk.GetImageFromArray(np.ones(shape, np.uint8), isVector=vector), file)
    checked = CheckedPlans({"image_reader_writer": reader}, [], 1, True, declared={0, 1})
    with pytest.raises(SourceError, match=rf"{name}: {channels} channels .*expected one label map"):
        checked.image_reader_writer_class().read_seg(file)


def test_a_name_that_is_not_utf8_is_refused_before_any_reader_sees_it(tmp_path: Path) -> None:
    file = os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller_0000.nii.gz")
    write_image(tmp_path / "a.nii.gz", np.ones((6, 5, 4), np.float32))
    os.rename(tmp_path / "a.nii.gz", file)
    with pytest.raises(
        SourceError, match=r"M\\xfcller_0000\.nii\.gz: its name is not UTF-8.*Rename"
    ) as error:
        inspect_file(file, strict=True)
    assert str(error.value).isprintable()
    print(error.value)


def test_channel_files_are_grouped_and_foreign_files_left_out(tmp_path: Path) -> None:
    for name in (
        "a_0001.nii.gz",
        "a_0000.nii.gz",
        "b_c_0000.nii.gz",
        "._a_0000.nii.gz",
        "notes.txt",
        "odd.nii.gz",
        "b_00.nii.gz",
    ):
        (tmp_path / name).write_bytes(b"")
    cases, odd = channel_files(str(tmp_path), ".nii.gz")
    assert {case: sorted(files) for case, files in cases.items()} == {"a": [0, 1], "b_c": [0]}
    assert odd == ["b_00.nii.gz", "odd.nii.gz"]
    assert channel_files(str(tmp_path / "absent"), ".nii.gz") == ({}, [])


def test_training_files_agree_with_nnunet(tmp_path: Path) -> None:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = write_dataset(tmp_path, labeled=3, unlabeled=0)
    listed = {"x": {"images": ["imagesTr/lab_00_0000.nii.gz"], "label": str(tmp_path / "somewhere.nii.gz")}}
    for content in ({"file_ending": ".nii.gz"}, {"file_ending": ".nii.gz", "dataset": listed}):
        ours = training_files(str(folder), content)
        theirs = get_filenames_of_train_images_and_targets(str(folder), content)
        assert ours == {str(case): (files["images"], files["label"]) for case, files in theirs.items()}


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", b"1" * 10), ("b", b"1" * 10), ("c", b"1" * 11)):
        (tmp_path / name).write_bytes(content)
    assert digest(str(tmp_path / "a")) == digest(str(tmp_path / "b")) != digest(str(tmp_path / "c"))
