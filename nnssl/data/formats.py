"""Files cut short or damaged, which readers take for whole: they fill in zeros, or what the memory held.

Every check looks at a file as nnU-Net's reader of its format does, and refuses nothing that is all there.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from nnssl.data.findings import printable

CHUNK = 1 << 20  # bytes
GIPL_BITS = {1: 1, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}  # by type of image
META_BYTES = {
    **{"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4},
    **{"MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8},
}
NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "uchar", "unsigned char", "uint8"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "uint", "unsigned int", "uint32", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "double"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64"), 8),
}
TIFF_BYTES = {  # by type of value
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4},
    **{16: 8, 17: 8, 18: 8},
}
KINDS = {  # how files begin that are often saved under the name of another format
    b"\x5c\x01\0\0": "NIfTI",
    b"\0\0\x01\x5c": "NIfTI",
    b"\x1c\x02\0\0": "NIfTI-2",
    b"\0\0\x02\x1c": "NIfTI-2",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip archive",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"NRRD": "NRRD",
    b"ObjectType": "MetaImage",
    b"\x93NUMPY": "NumPy array",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
    b"<": "HTML or XML",
    b"version https://git-lfs": "pointer of Git LFS: run `git lfs pull`",
}


NOT_UTF8 = "its name is not UTF-8, on which nnU-Net's readers abort"
NOT_UTF8_REMEDY = "Rename it (convmv does many at once)"


class SourceError(ValueError):
    """A raw file cannot be used; the message names it and says what to do."""


def inspect_file(file: str, strict: bool) -> None:
    """SourceError naming a file that is empty, cut short or damaged, that has a name on which readers abort
    and, where `strict`, a NIfTI file with voxels that are not finite."""
    if not is_utf8(file):
        raise SourceError(f"{printable(file)}: {NOT_UTF8}. {NOT_UTF8_REMEDY}.")
    lower = file.lower()
    check = next((check for ending, check in CHECKS.items() if lower.endswith(ending)), None)
    try:
        if os.path.isdir(file):
            raise SourceError(f"{file}: a folder, expected a file. Rename or remove it.")
        if os.path.getsize(file) == 0:
            raise EOFError("the file is empty")
        if check is not None:
            check(file, strict)
    except FileNotFoundError as error:
        what = "dangling link" if os.path.islink(file) else "missing"
        raise SourceError(f"{file}: {what}. Restore it, or remove the case.") from error
    except _CutShortError as error:
        raise SourceError(f"{file}: truncated, {error}. Copy or download it again, or remove it.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError):
            raise SourceError(f"{file}: cannot be opened ({reason}). Correct its permissions.") from error
        raise SourceError(
            f"{file}: truncated or damaged ({reason}). Copy or download it again, or remove it."
        ) from error


def is_utf8(file: str) -> bool:
    """Whether a path can be handed to a reader: SimpleITK ends the whole process on others."""
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(file: str) -> str:
    """What the first bytes of a file, uncompressed, say that it is; empty where they say nothing."""
    try:
        head = next(_chunks(file), b"")[:400]
    except (OSError, EOFError, zlib.error):
        return ""
    if head[128:132] == b"DICM":
        return "DICOM"
    found = next((kind for start, kind in KINDS.items() if head.lstrip().startswith(start)), "")
    return found or ("text" if head and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head) else "")


class _CutShortError(Exception):
    """Fewer bytes are there than the header says."""

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(f"{found} of {expected} bytes are there")


def not_finite(files: Sequence[str]) -> SourceError:
    return SourceError(
        f"{', '.join(files)}: NaN or infinite voxels. Replace them with finite values, or remove the case."
    )


def _chunks(file: str) -> Iterator[bytes]:
    """Content of a file, of ``.gz`` as zlib's gzread gives it to the readers: stream after stream; bytes
    behind the last one do not count, and a file that is not compressed is taken as it is."""
    magic = b"\x1f\x8b"
    with open(file, "rb") as stream:
        packed = stream.read(CHUNK)
        if not (file.lower().endswith(".gz") and packed.startswith(magic)):
            while packed:
                yield packed
                packed = stream.read(CHUNK)
            return
        while packed.startswith(magic):
            unpack = zlib.decompressobj(wbits=31)  # gzip
            while not unpack.eof:
                if not packed:
                    raise EOFError("the compressed stream ends too early")
                yield unpack.decompress(packed)
                packed = stream.read(CHUNK) if not unpack.eof else unpack.unused_data
            if len(packed) < len(magic):
                packed += stream.read(CHUNK)


def _inspect_gzip(file: str, strict: bool) -> None:
    _to_the_end(_chunks(file))


def _inspect_nifti(file: str, strict: bool) -> None:
    """Bytes as the header says, no imaginary part (readers drop it) and, where `strict`, finite numbers."""
    chunks, head = _chunks(file), b""
    for chunk in chunks:
        head += chunk
        if len(head) >= Nifti2Header.sizeof_hdr:
            break
    if not head:
        raise EOFError("nothing is in the compressed stream")
    voxels = _nifti_voxels(head)
    if voxels is None:  # the reader knows more
        _to_the_end(chunks)
        return
    start, count, dtype = voxels
    end = start + count * dtype.itemsize
    is_complex = dtype.kind == "c"
    look = is_complex or (strict and dtype.kind == "f")
    found, finite, rest = 0, True, b""  # rest: of a number that lies in two chunks
    for chunk in itertools.chain([head], chunks):
        if look:
            rest += chunk[max(0, start - found) : max(0, end - found)]
            numbers = np.frombuffer(rest[: len(rest) // dtype.itemsize * dtype.itemsize], dtype)
            finite = finite and not (strict and not np.isfinite(numbers).all())
            if is_complex and numbers.imag.any():
                raise SourceError(
                    f"{file}: complex numbers, whose imaginary part readers drop; expected real ones. Save "
                    "their magnitude, or remove the case."
                )
            rest = rest[numbers.nbytes :]
        found += len(chunk)
    if found < start:
        raise SourceError(
            f"{file}: vox_offset of its header is {start}, but only {found} bytes are there. Correct the "
            "header, or copy or download the file again."
        )
    if found < end:
        raise _CutShortError(found, end)
    if not finite:
        raise not_finite([file])


def _to_the_end(chunks: Iterator[bytes]) -> None:
    """Damage shows on the way."""
    for _ in chunks:
        pass


def _nifti_voxels(content: bytes) -> tuple[int, int, np.dtype] | None:
    """Start, number and type of the voxels as SimpleITK finds them by a NIfTI-1 or -2 header: their size by
    the type alone, their start behind the header. None for other headers and types."""
    header_class = _nifti_version(content)
    if header_class is None:
        return None
    size = header_class.sizeof_hdr
    if len(content) < size:
        raise EOFError(f"{len(content)} of the {size} bytes of its header are there")
    try:
        header = header_class(content[:size], check=False)
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):  # an unknown type of voxels or byte order
        return None
    dims = [int(n) for n in header["dim"]]
    offset = float(header["vox_offset"])  # 0, -1 and NaN occur, and mean the same
    start = int(offset) if size <= offset < math.inf else size
    return start, math.prod(max(n, 1) for n in dims[1 : dims[0] + 1]), dtype


def _nifti_version(content: bytes) -> type[Nifti1Header] | None:
    sizes = int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")
    if Nifti2Header.sizeof_hdr in sizes and content[4:8] in (b"n+2\0", b"ni2\0"):
        return Nifti2Header
    first = Nifti1Header.sizeof_hdr in sizes or content[344:348] in (b"n+1\0", b"ni1\0")
    return Nifti1Header if first else None


def nifti_problem(file: str) -> str:
    """What in a NIfTI header no reader can make sense of; empty where it is none of dim and datatype."""
    content = next(_chunks(file), b"")
    header_class = _nifti_version(content)
    if header_class is None:
        return "its content is not NIfTI"
    if len(content) < (size := header_class.sizeof_hdr):
        return ""
    headers = [header_class(content[:size], order, check=False) for order in "<>"]
    possible = [h for h in headers if 1 <= h["dim"][0] <= 7]
    header = next(iter(possible or [h for h in headers if h["sizeof_hdr"] == size] or headers))
    dims = [int(n) for n in header["dim"]]
    if not possible:
        return f"dim[0] of its header is {dims[0]}, expected 1 to 7"
    if min(dims[1 : dims[0] + 1]) < 1:
        return f"dim of its header is {', '.join(map(str, dims[: dims[0] + 1]))}"
    try:
        known = header.get_data_dtype().itemsize > 0
    except (HeaderDataError, KeyError):
        known = False
    return "" if known else f"datatype of its header is {int(header['datatype'])}, which no reader knows"


def _inspect_gipl(file: str, strict: bool) -> None:
    """A header of 256 bytes, then the voxels."""
    with open(file, "rb") as stream:
        head = stream.read(256)
    found = os.path.getsize(file)
    if len(head) < 256:
        raise _CutShortError(found, 256)
    *dims, kind = struct.unpack_from(">5H", head)
    bits = math.prod(max(n, 1) for n in dims) * GIPL_BITS.get(kind, 0)
    if found < 256 + bits // 8:
        raise _CutShortError(found, 256 + bits // 8)


def _inspect_nrrd(file: str, strict: bool) -> None:
    """Voxels as many as the header says, or the whole of a compressed stream."""
    with open(file, "rb") as stream:
        fields = {}
        while (line := stream.readline(CHUNK)).strip():
            key, _, value = line.decode("latin-1").lower().partition(":")
            fields[key.strip()] = value.strip().strip("=").strip()
        encoding, kind = fields.get("encoding"), fields.get("type", "").replace("_t", "")
        if not fields or "data file" in fields or "datafile" in fields:
            return
        expected = _voxel_bytes(fields.get("sizes", "").split(), NRRD_BYTES.get(kind, 0))
        if encoding in ("gz", "gzip"):
            _inflate(stream, 31, expected)
        if encoding == "raw":
            _compare(stream, expected)


def _inspect_metaimage(file: str, strict: bool) -> None:
    """As for NRRD; a compressed stream is of zlib."""
    with open(file, "rb") as stream:
        fields = {}
        while b"=" in (line := stream.readline(CHUNK)):
            key, _, value = line.decode("latin-1").lower().partition("=")
            fields[key.strip()] = value.strip()
            if key.strip() == "elementdatafile":
                break
        packed, binary = (  # as MetaIO reads them
            fields.get(key, default)[:1] in ("t", "1")
            for key, default in (("compresseddata", ""), ("binarydata", "true"))
        )
        if fields.get("elementdatafile") != "local" or not binary:
            return
        sizes = [*fields.get("dimsize", "").split(), fields.get("elementnumberofchannels", "1")]
        expected = _voxel_bytes(sizes, META_BYTES.get(fields.get("elementtype", "").upper(), 0))
        if not packed:
            _compare(stream, expected)
            return
        consumed = _inflate(stream, 47, expected)
        declared = fields.get("compresseddatasize", "absent")
        if not _is_number(declared) or int(declared) < consumed:
            raise SourceError(
                f"{file}: CompressedDataSize of its header is {declared}, expected {consumed}. Write the "
                "file anew, e.g. with SimpleITK."
            )


def _voxel_bytes(sizes: Sequence[str], width: int) -> int:
    """0 where header or type of voxels are unknown: the reader decides."""
    return math.prod(map(int, sizes)) * width if all(map(_is_number, sizes)) else 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _inflate(stream: BinaryIO, wbits: int, expected: int) -> int:
    """The compressed stream to its end, which must give so many bytes; returns its length."""
    unpack = zlib.decompressobj(wbits=wbits)
    consumed = found = 0
    while not unpack.eof:
        chunk = stream.read(CHUNK)
        if not chunk:
            raise EOFError("the compressed stream ends too early")
        found += len(unpack.decompress(chunk))
        consumed += len(chunk) - len(unpack.unused_data)
    if found < expected:
        raise _CutShortError(found, expected)
    return consumed


def _compare(stream: BinaryIO, voxels: int) -> None:
    """Whether the voxels lie behind the header."""
    found, expected = os.fstat(stream.fileno()).st_size, stream.tell() + voxels
    if found < expected:
        raise _CutShortError(found, expected)


def _inspect_bmp(file: str, strict: bool) -> None:
    """Rows of whole words behind the header."""
    with open(file, "rb") as stream:
        head = stream.read(34)
    found = os.path.getsize(file)
    if len(head) < 34:
        raise _CutShortError(found, 34)
    start, width, height, _, bits, compression = struct.unpack_from("<I4xiiHHI", head, 10)
    rows = abs(height) * ((bits * width + 31) // 32 * 4) if compression in (0, 3) and width > 0 else 0
    if found < start + rows:
        raise _CutShortError(found, start + rows)


def _inspect_png(file: str, strict: bool) -> None:
    """Piece after piece to the last, which says that it is the last."""
    found = os.path.getsize(file)
    with open(file, "rb") as stream:
        if stream.read(8) != b"\x89PNG\r\n\x1a\n":
            return
        while (head := stream.read(8))[4:] != b"IEND":
            if len(head) < 8:
                raise EOFError("its last piece, IEND, is missing")
            stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        if found < stream.tell() + 4:
            raise _CutShortError(found, stream.tell() + 4)


def _inspect_tiff(file: str, strict: bool) -> None:
    """Every page and all its pieces lie within the file."""
    import tifffile

    found = os.path.getsize(file)
    try:
        for end in _tiff_ends(file):
            if end > found:
                raise _CutShortError(found, end)
        with tifffile.TiffFile(file) as tiff:
            ends = [
                offset + count
                for page in tiff.pages
                for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
            ]
            # a series in one block, of which ImageJ describes the first page only
            ends += [s.dataoffset + s.nbytes for s in tiff.series if s.dataoffset is not None]
    except _CutShortError:
        raise
    except Exception:  # no sound TIFF: the reader says why
        return
    if ends and max(ends) > found:
        raise _CutShortError(found, max(ends))


def _tiff_ends(file: str) -> Iterator[int]:
    """Where the list of every page, and what its entries point to, ends; a chain that is broken goes on
    behind the end of the file."""
    with open(file, "rb") as stream:
        head = stream.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None:
            return
        big = struct.unpack_from(order + "H", head, 2)[0] == 43
        number, pointer = ("Q", "Q") if big else ("H", "I")
        entry = struct.Struct(order + "HH" + pointer * 2)
        offset, seen = struct.unpack_from(order + pointer, head, 8 if big else 4)[0], set()
        while offset and offset not in seen:
            seen.add(offset)
            stream.seek(offset)
            start = stream.read(struct.calcsize(number))
            yield offset + struct.calcsize(number)
            size = struct.unpack(order + number, start)[0] * entry.size
            entries = stream.read(size + struct.calcsize(pointer))
            yield offset + len(start) + size + struct.calcsize(pointer)
            for _, kind, count, place in entry.iter_unpack(entries[:size]):
                if (values := count * TIFF_BYTES.get(kind, 0)) > struct.calcsize(pointer):
                    yield place + values
            offset = struct.unpack_from(order + pointer, entries, size)[0]


CHECKS: dict[str, Callable[[str, bool], None]] = {
    ".nii": _inspect_nifti,
    ".nii.gz": _inspect_nifti,
    ".gz": _inspect_gzip,
    ".gipl": _inspect_gipl,
    ".nrrd": _inspect_nrrd,
    ".mha": _inspect_metaimage,
    ".bmp": _inspect_bmp,
    ".png": _inspect_png,
    ".tif": _inspect_tiff,
    ".tiff": _inspect_tiff,
}
