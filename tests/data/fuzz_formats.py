"""Fuzzing of `nnssl.data.formats` by coverage, with atheris (`pip install atheris`): sound files of every
format, changed at random until they reach new lines. Only `SourceError` may come out.

    python -m tests.data.fuzz_formats -runs=20000
"""

from __future__ import annotations

import gzip
import logging
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nnssl.data.formats"]):
    from nnssl.data.formats import SourceError, inspect_file, kind_of, nifti_problem

from tests.data.variants import BYTES, GRAY, nifti, picture, tiff, written

SEEDS = {
    ".nii": nifti(),
    ".nii.gz": gzip.compress(nifti()),
    ".mha": written(".mha", True),
    ".nrrd": written(".nrrd"),
    ".gipl": written(".gipl"),
    ".png": picture(GRAY),
    ".bmp": picture(GRAY, ".bmp"),
    ".tif": tiff(BYTES[:2]),
}


def main() -> None:
    logging.disable()  # tifffile tells what it finds
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for index, (ending, content) in enumerate(SEEDS.items()):
            (corpus / ending).write_bytes(bytes([index]) + content)

        def one(data: bytes) -> None:
            """The first byte chooses the format."""
            file = os.path.join(folder, "a" + list(SEEDS)[data[0] % len(SEEDS)] if data else "a.nii")
            Path(file).write_bytes(data[1:])
            try:
                inspect_file(file, strict=True)
                kind_of(file)
                if ".nii" in file:
                    nifti_problem(file)
            except SourceError as error:
                assert file in str(error)

        atheris.Setup([sys.argv[0], "-max_len=6000", "-rss_limit_mb=4000", *sys.argv[1:], str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
