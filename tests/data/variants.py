"""Image files as they come: odd but sound, cut short, damaged, or not what their names say.

`docs/reference/files.md` is written from this table (docs/generate_reference.py).
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import nibabel as nib
import numpy as np
import SimpleITK as sitk
import tifffile

Make = Callable[[Path], Any]
ITK, NIBABEL, REORIENT, NATURAL, TIFF = (
    *("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"),
    *("NaturalImage2DIO", "Tiff3DIO"),
)
VOXELS = (100 + 50 * np.random.default_rng(0).normal(size=(7, 9, 11))).astype(np.float32)  # z, y, x
VOXELS_XYZ = VOXELS.transpose(2, 1, 0)
BYTES = VOXELS.clip(0, 255).astype(np.uint8)
AFFINE = np.diag([0.8, 0.9, 2.0, 1.0])
START = 352  # of the voxels in the NIfTI files below
DATATYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16")
FINITE, TOO_SHORT = "NaN or infinite voxels", "truncated, "
NOT_3D = "only 3d images are supported by NibabelIO"


@dataclass(frozen=True)
class Variant:
    """One file: read exactly as nnU-Net's reader does, or refused with the reason."""

    name: str
    reader: str
    ending: str
    make: Make
    refused: str = ""  # part of the message; empty: read
    stock_reads: bool = True  # whether nnU-Net's own reader returns an image
    channels: int = 1


def nifti(image: np.ndarray = VOXELS_XYZ, image_class: Any = nib.Nifti1Image, order: str = "<") -> bytes:
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(image.dtype.newbyteorder(order))  # type: ignore[arg-type]
    return image_class(image, AFFINE, header).to_bytes()


def of_type(dtype: Any) -> bytes:
    return nifti(VOXELS_XYZ.clip(0, 100).astype(dtype))


def color(channels: str) -> bytes:
    packed = np.stack([BYTES.transpose(2, 1, 0)] * len(channels), -1)
    return nifti(packed.view([(name, "u1") for name in channels])[..., 0])


def put(content: bytes, position: int, kind: str, *values: Any) -> bytes:
    changed = bytearray(content)
    struct.pack_into("<" + kind, changed, position, *values)
    return bytes(changed)


def sform(*rows: float) -> bytes:
    return put(put(nifti(), 252, "hh", 0, 1), 280, "12f", *rows)


def with_extension() -> bytes:
    image = nib.Nifti1Image(VOXELS_XYZ, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"acquired upside down"))
    return image.to_bytes()


def packed_in_blocks(content: bytes) -> bytes:
    """Many gzip streams one after the other, as bgzip writes them."""
    return b"".join(gzip.compress(content[i : i + 500]) for i in range(0, len(content), 500))


def stored(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def packed(content: bytes) -> Make:
    return lambda path: path.write_bytes(gzip.compress(content, 1))


NAN, INF = math.nan, math.inf
NIFTI: dict[str, bytes] = {  # what both readers of NIfTI are asked to read
    **{f"datatype {np.dtype(name).name}": of_type(name) for name in DATATYPES},
    "big endian, float32": nifti(order=">"),
    "big endian, int16": nifti(VOXELS_XYZ.astype(np.int16), order=">"),
    **{f"bitpix {bits} for float32": put(nifti(), 72, "h", bits) for bits in (0, 1, 16, 64, -8)},
    **{f"scl_slope {v:g} for int16": put(of_type("i2"), 112, "f", v) for v in (0, 2, -1, NAN, INF, 1e-30)},
    "scl_slope NaN for float32": put(nifti(), 112, "f", NAN),
    "scl_slope 2, scl_inter 5": put(of_type("i2"), 112, "ff", 2, 5),
    "scl_slope 0, scl_inter 5": put(of_type("i2"), 112, "ff", 0, 5),
    "vox_offset 352": nifti(),
    "vox_offset 368 and 16 bytes more": put(nifti()[:START] + bytes(16) + nifti()[START:], 108, "f", 368),
    "vox_offset 360 and 8 bytes more": put(nifti()[:START] + bytes(8) + nifti()[START:], 108, "f", 360),
    "header extension": with_extension(),
    "extension announced, but absent": put(nifti(), 348, "b", 1),
    "bytes behind the voxels": nifti() + bytes(1000),
    "pixdim 0": put(nifti(), 80, "f", 0),
    "pixdim 0 0 0": put(nifti(), 80, "fff", 0, 0, 0),
    "pixdim negative": put(nifti(), 80, "f", -0.8),
    **{f"qfac {v:g}": put(nifti(), 76, "f", v) for v in (0, 5, -1)},
    "qform and sform absent": put(nifti(), 252, "hh", 0, 0),
    "qform_code 99, sform_code -1": put(nifti(), 252, "hh", 99, -1),
    "sform with other spacings than pixdim": sform(1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0),
    "sform that flips two axes": sform(-0.8, 0, 0, 0, 0, -0.9, 0, 0, 0, 0, 2, 0),
    "cal_min, cal_max NaN": put(nifti(), 124, "ff", NAN, NAN),
    "xyzt_units 77": put(nifti(), 123, "b", 77),
    "sizeof_hdr 0": put(nifti(), 0, "i", 0),
    "magic ni1 in a single file": put(nifti(), 344, "4s", b"ni1"),
    "one slice": nifti(VOXELS_XYZ[:, :, :1]),
    "one voxel along x": nifti(VOXELS_XYZ[:1]),
    "a single voxel": nifti(VOXELS_XYZ[:1, :1, :1]),
}
REFUSED_NIFTI: dict[str, tuple[bytes, str, bool, bool]] = {  # reason, whether SimpleITK, nibabel read it
    "datatype 0": (put(nifti(), 70, "h", 0), "datatype of its header is 0, which no reader", False, False),
    "datatype 1": (put(nifti(), 70, "h", 1), "datatype of its header is 1, which no reader", False, False),
    "datatype 9999": (put(nifti(), 70, "h", 9999), "datatype of its header is 9999", False, False),
    "dim[0] 0": (put(nifti(), 40, "h", 0), "dim", False, False),
    "dim[0] 8": (put(nifti(), 40, "h", 8), "dim[0] of its header is 8, expected 1 to 7", False, False),
    "dim[1] -11": (put(nifti(), 42, "h", -11), "dim of its header is 3, -11, 9, 7", False, False),
    "dim[1] 32767": (put(nifti(), 42, "h", 32767), TOO_SHORT + "3124 of 8257636 bytes", True, False),
    "vox_offset 10^9": (put(nifti(), 108, "f", 1e9), "vox_offset of its header is 1000000000", True, False),
    "vox_offset 353, a byte missing": (put(nifti(), 108, "f", 353), "3124 of 3125 bytes", True, False),
    "truncated, sizeof_hdr 0": (put(nifti(), 0, "i", 0)[:-40], "3084 of 3124 bytes", True, False),
    "truncated, bitpix 8": (put(nifti(), 72, "h", 8)[:-40], "3084 of 3124 bytes", True, False),
    "truncated in the voxels": (nifti()[:-1], "3123 of 3124 bytes", True, False),
    "truncated at the start of the voxels": (nifti()[:START], "352 of 3124 bytes", True, False),
    "truncated in the header": (nifti()[:200], "200 of the 348 bytes of its header", False, False),
    "scl_slope 10^38": (put(of_type("i2"), 112, "f", 1e38), FINITE, True, True),
    "one voxel NaN": (put(nifti(), START + 40, "f", NAN), FINITE, True, True),
    "one voxel infinite": (put(nifti(), START + 40, "f", INF), FINITE, True, True),
    "complex64, imaginary part not 0": (
        of_type("c8")[:-4] + b"\0\0\x80?",
        "complex numbers, whose",
        True,
        True,
    ),
    "lowest float32 as no data": (put(nifti(), START + 40, "f", -3.4e38), "values of 3.4e+38", True, True),
    "two volumes (4D)": (nifti(np.stack([VOXELS_XYZ] * 2, -1)), "", True, False),
    "sform of zeros": (sform(*[0] * 12), "", False, True),
    "text": (b"downloading failed, try again later\n" * 20, "its content is text, not NIfTI", False, False),
    "HTML": (b"<!DOCTYPE html><html>404</html>" + bytes(400), "its content is HTML", False, False),
    "DICOM": (bytes(128) + b"DICM" + bytes(400), "its content is DICOM", False, False),
    "zip archive": (b"PK\x03\x04" + bytes(500), "its content is zip archive", False, False),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "run `git lfs pull`",
        False,
        False,
    ),
    "zeros": (bytes(4000), "its content is not NIfTI", False, False),
    "348 zeros": (bytes(348), "its content is not NIfTI", False, False),
}


def nifti_variants() -> Iterator[Variant]:
    differing = {  # read by SimpleITK, refused by nibabel
        **{f"vox_offset {v:g}": (put(nifti(), 108, "f", v), "vox offset") for v in (1, -1, -352, 348)},
        "vox_offset NaN": (put(nifti(), 108, "f", NAN), "cannot convert float NaN to integer"),
        "scl_inter NaN": (put(of_type("i2"), 112, "ff", 1, NAN), "Valid slope but invalid intercept nan"),
        "one volume (4D)": (nifti(VOXELS_XYZ[..., None]), NOT_3D),
        "one volume (5D)": (nifti(VOXELS_XYZ[..., None, None]), NOT_3D),
        "dim[4] 0 in 4D": (put(nifti(), 40, "5h", 4, 11, 9, 7, 0), "4, 11, 9, 7, 0"),
        "2D": (nifti(VOXELS_XYZ[:, :, 0]), NOT_3D),
        "quaternion longer than 1": (put(put(nifti(), 252, "hh", 1, 0), 256, "3f", 3, 3, 3), "w2 should be"),
        "no magic (Analyze)": (put(nifti(), 344, "4s", b""), "Cannot work out file type"),
    }
    for name, content in NIFTI.items():
        yield Variant(name, ITK, ".nii.gz", packed(content))
        yield Variant(name, NIBABEL, ".nii", stored(content))
    for name, (content, reason) in differing.items():
        yield Variant(name, ITK, ".nii.gz", packed(content))
        yield Variant(name, NIBABEL, ".nii", stored(content), reason, False)
    for name, (content, reason, itk, nibabel) in REFUSED_NIFTI.items():
        by_itk = reason or (
            "2 channel(s)" if name.startswith("two") else "only supports orthonormal direction"
        )
        yield Variant(name, ITK, ".nii.gz", packed(content), by_itk, itk)
        if name != "sform of zeros":
            yield Variant(name, NIBABEL, ".nii", stored(content), reason or NOT_3D, nibabel)
    two = packed(nifti(np.stack([VOXELS_XYZ] * 2, -1)))
    yield Variant("two volumes (4D), two channels", ITK, ".nii.gz", two, "2 volumes in one file", channels=2)
    both = nifti(image_class=nib.Nifti2Image), nifti(image_class=nib.Nifti2Image, order=">")
    for name, content in zip(("NIfTI-2", "NIfTI-2, big endian"), both, strict=True):
        yield Variant(name, ITK, ".nii.gz", packed(content), "NIfTI-2, which SimpleITK does not read", False)
        yield Variant(name, NIBABEL, ".nii.gz", packed(content))
        yield Variant(f"{name}, truncated", NIBABEL, ".nii.gz", packed(content[:-9]), TOO_SHORT, False)
    yield Variant("datatype RGB24", ITK, ".nii.gz", packed(color("RGB")), "3 axes, but 2 spacings")
    yield Variant("datatype RGB24", NIBABEL, ".nii", stored(color("RGB")), "cannot be read", False)
    yield Variant(
        "sheared sform", ITK, ".nii.gz", packed(SHEARED), "only supports orthonormal direction", False
    )
    for reader in (NIBABEL, REORIENT):
        yield Variant("sheared sform", reader, ".nii", stored(SHEARED))
    for value in (NAN, INF):
        content = put(nifti(), 80, "f", value)
        yield Variant(f"pixdim {value}", ITK, ".nii.gz", packed(content))
        yield Variant(f"pixdim {value}", NIBABEL, ".nii", stored(content), "spacing 2 x 0.9 x")
    for axis in (1, 3):
        content = put(nifti(), 40 + 2 * axis, "h", 0)
        yield Variant(f"dim[{axis}] 0", NIBABEL, ".nii", stored(content), "no voxels, its shape is")
    for name in ("datatype float32", "sform that flips two axes", "big endian, int16", "qfac -1"):
        yield Variant(name, REORIENT, ".nii.gz", packed(NIFTI[name]))
    yield Variant("truncated", REORIENT, ".nii", stored(nifti()[:-4]), TOO_SHORT, False)


SHEARED = sform(0.8, 0.5, 0, 0, 0, 0.9, 0.4, 0, 0.3, 0, 2, 0)


def gzip_variants() -> Iterator[Variant]:
    whole = gzip.compress(nifti(), 1)
    packings: dict[str, bytes] = {
        "not compressed": nifti(),
        "bytes behind the stream": whole + b"PADDING",
        "one byte behind the stream": whole + b"\x1f",
        "zeros behind the stream": whole + bytes(512),
        "many streams (bgzip)": packed_in_blocks(nifti()),
        "an empty stream before the first": gzip.compress(b"") + whole,
        "stored without compression": gzip.compress(nifti(), 0),
        "name and comment in the gzip header": whole[:3] + b"\x18" + whole[4:10] + b"a.nii\0c\0" + whole[10:],
    }
    for name, content in packings.items():
        yield Variant(name, ITK, ".nii.gz", stored(content))
    for name in ("zeros behind the stream", "many streams (bgzip)", "stored without compression"):
        yield Variant(name, NIBABEL, ".nii.gz", stored(packings[name]))
    yield Variant("not compressed", NIBABEL, ".nii.gz", stored(nifti()), "cannot be read", False)
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :]
    broken: dict[str, tuple[bytes, str, bool]] = {
        "gzip stream cut in the middle": (
            whole[: len(whole) // 2],
            "the compressed stream ends too early",
            True,
        ),
        "gzip stream cut in its checksum": (whole[:-3], "the compressed stream ends too early", True),
        "gzip stream cut in its header": (whole[:5], "the compressed stream ends too early", False),
        "gzip stream with a flipped byte": (flipped, "truncated or damaged", False),
        "wrong checksum": (whole[:-8] + bytes(4) + whole[-4:], "incorrect data check", False),
        "the last of many streams missing": (packed_in_blocks(nifti())[:-50], "truncated", True),
        "compressed twice": (gzip.compress(whole), "its content is gzip, not NIfTI", False),
        "an empty stream": (gzip.compress(b""), "nothing is in the compressed stream", False),
    }
    for name, (content, reason, reads) in broken.items():
        yield Variant(name, ITK, ".nii.gz", stored(content), reason, reads)


def written(ending: str, compressed: bool = False, image: np.ndarray = VOXELS) -> bytes:
    """By SimpleITK."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        picture = sitk.GetImageFromArray(image)
        picture.SetSpacing((0.8, 0.9, 2.0)[: image.ndim])
        sitk.WriteImage(picture, str(path), compressed)
        return path.read_bytes()


def tiff(image: np.ndarray = BYTES, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, image, **options)
    return stream.getvalue()


def picture(image: np.ndarray, ending: str = ".png") -> bytes:
    return bytes(imageio.imwrite("<bytes>", image, extension=ending))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


GRAY = np.random.default_rng(1).integers(0, 255, (40, 50), np.uint8)
RGB = np.stack([GRAY, GRAY.T[:40, :40].repeat(2, 1)[:, :50], 255 - GRAY], -1)


CHECKSUM_CUT = written(".nrrd", True)[:-4]


def other_variants() -> Iterator[Variant]:
    for ending in (".nrrd", ".mha", ".gipl"):
        for dtype in (np.uint8, np.int16, np.float32):
            content = written(ending, image=VOXELS.clip(0, 255).astype(dtype))
            yield Variant(f"{np.dtype(dtype).name}, not compressed", ITK, ending, stored(content))
            yield Variant(
                f"{np.dtype(dtype).name}, truncated",
                ITK,
                ending,
                stored(content[:-1]),
                TOO_SHORT,
                ending == ".gipl",
            )
    for ending in (".nrrd", ".mha"):
        content = written(ending, True)
        yield Variant("compressed", ITK, ending, stored(content))
        yield Variant("compressed, truncated", ITK, ending, stored(content[:-30]), "ends too early", False)
        yield Variant("text", ITK, ending, stored(b"no image\n" * 99), "its content is text", False)
    packed_mha = written(".mha", True)
    size = b"CompressedDataSize = %d" % int(packed_mha.split(b"CompressedDataSize = ")[1].split(b"\n")[0])
    headers: dict[str, tuple[bytes, bytes, str]] = {
        "compressed, its size absent": (size + b"\n", b"", "CompressedDataSize of its header is absent"),
        "compressed, its size too small": (size, size[:-2], "CompressedDataSize of its header is"),
        "compressed, more voxels declared": (b"11 9 7", b"11 9 9", TOO_SHORT),
    }
    for name, (old, new, reason) in headers.items():
        yield Variant(name, ITK, ".mha", stored(packed_mha.replace(old, new)), reason)
    yield Variant("BinaryData = T", ITK, ".mha", stored(packed_mha.replace(b"Data = True", b"Data = T")))
    yield Variant("compressed, checksum cut off", ITK, ".nrrd", stored(CHECKSUM_CUT), "ends too early")
    yield Variant("NIfTI under another name", ITK, ".nrrd", stored(nifti()), "its content is NIfTI", False)
    nan = VOXELS.copy()
    nan[0, 0, 0] = NAN
    for ending in (".nrrd", ".mha"):
        yield Variant("one voxel NaN", ITK, ending, stored(written(ending, image=nan)), FINITE)
    pictures = {"gray": GRAY, "gray, 16 bit": GRAY.astype(np.uint16) * 200, "RGB": RGB}
    for name, image in pictures.items():
        channels = 3 if name == "RGB" else 1
        yield Variant(name, NATURAL, ".png", stored(picture(image)), channels=channels)
    yield Variant("RGBA", NATURAL, ".png", stored(picture(np.dstack([RGB, GRAY]))), channels=4)
    yield Variant("RGB where one channel is declared", NATURAL, ".png", stored(picture(RGB)), "3 channel(s)")
    comment = png_chunk(b"tEXt", b"Comment\0scanned")
    gray = picture(GRAY)
    yield Variant("gray with a comment", NATURAL, ".png", stored(gray[:33] + comment + gray[33:]))
    yield Variant("bytes behind the end", NATURAL, ".png", stored(gray + b"PADDING"))
    yield Variant("truncated in the pixels", NATURAL, ".png", stored(gray[:-200]), "truncated", False)
    yield Variant("last piece missing", NATURAL, ".png", stored(gray[:-12]), "its last piece, IEND", True)
    yield Variant("last bytes missing", NATURAL, ".png", stored(gray[:-2]), TOO_SHORT, True)
    yield Variant("JPEG under another name", NATURAL, ".png", stored(picture(GRAY, ".jpg")))
    yield Variant("gray", NATURAL, ".bmp", stored(picture(GRAY, ".bmp")))
    yield Variant("RGB", NATURAL, ".bmp", stored(picture(RGB, ".bmp")), channels=3)
    yield Variant("truncated", NATURAL, ".bmp", stored(picture(GRAY, ".bmp")[:-1]), TOO_SHORT)
    yield Variant("gray", NATURAL, ".tif", stored(tiff(GRAY)))
    yield Variant("truncated", NATURAL, ".tif", stored(tiff(GRAY)[:-1]), TOO_SHORT, False)
    kinds: dict[str, dict[str, Any]] = {
        "as tifffile writes it": {},
        "deflate": {"compression": "zlib"},
        "LZW": {"compression": "lzw"},
        "tiles": {"tile": (16, 16)},
        "BigTIFF": {"bigtiff": True},
        "big endian": {"byteorder": ">"},
        "ImageJ": {"imagej": True},
        "OME": {"ome": True},
        "a page per slice, no description": {"metadata": None},
    }
    for name, options in kinds.items():
        content, reads = tiff(**options), name in ("as tifffile writes it", "BigTIFF", "big endian")
        yield Variant(name, TIFF, ".tif", stored(content))
        yield Variant(
            f"{name}, half of it", TIFF, ".tif", stored(content[: len(content) // 2]), TOO_SHORT, reads
        )
    yield Variant("float32", TIFF, ".tiff", stored(tiff(VOXELS)))
    yield Variant("2D", TIFF, ".tif", stored(tiff(GRAY)), "Only 3D images are supported", False)
    yield Variant("one voxel NaN", TIFF, ".tif", stored(tiff(nan)), FINITE)
    for reader, ending in (
        (ITK, ".nii.gz"),
        (NIBABEL, ".nii"),
        (ITK, ".mha"),
        (NATURAL, ".png"),
        (TIFF, ".tif"),
    ):
        yield Variant("empty file", reader, ending, stored(b""), "the file is empty", False)
        yield Variant("folder", reader, ending, lambda path: path.mkdir(), "a folder, expected a file", False)
        yield Variant("dangling link", reader, ending, dangling, "dangling link", False)
        yield Variant("link to a sound file", reader, ending, linked)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def linked(path: Path) -> None:
    ending = path.name[path.name.index(".") :]
    content = {
        ".nii.gz": gzip.compress(nifti()),
        ".nii": nifti(),
        ".mha": written(".mha"),
        ".png": picture(GRAY),
        ".tif": tiff(),
    }
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / path.name).write_bytes(content[ending])
    os.symlink(path.parent / "elsewhere" / path.name, path)


def variants() -> list[Variant]:
    return [*nifti_variants(), *gzip_variants(), *other_variants()]
