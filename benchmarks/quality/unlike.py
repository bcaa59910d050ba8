"""How well does the inspection know scans unlike the labeled ones? Warnings about the other scans of a
dataset (false ones), and about the same scans with a planted fault (true ones).

    python -m benchmarks.quality.unlike RAW_DATASET_FOLDER ...

A few cases of imagesTr are drawn as the labeled ones, `DRAWS` times; the others are taken for unlabeled.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnssl.data.raw import training_files
from nnssl.data.scans import Scan, Statistics, image_statistics, inspect_scans
from nnssl.files import read_json

LABELED, DRAWS, PLANTED = (2, 4, 8, 16), 10, 20
Image: TypeAlias = np.ndarray  # (C, z, y, x)
Spacing: TypeAlias = np.ndarray
Fault = Callable[[Image, Spacing], tuple[Image, Spacing]]


def crop(image: Image, part: int) -> Image:
    """The middle, `part` times smaller along each axis."""
    middle = [slice((n - max(2, n // part)) // 2, (n + max(2, n // part)) // 2) for n in image.shape[1:]]
    return image[:, middle[0], middle[1], middle[2]]


def as_ct(image: Image) -> Image:
    """Air of -1000, and tissue from -100 to 300."""
    low, middle, high = np.percentile(image, (1, 30, 99))
    tissue = -100 + 400 * (image - low) / max(high - low, 1e-6)
    return np.where(image < middle, -1000.0, tissue).astype(np.float32)


def levels(image: Image, number: int) -> Image:
    low, high = image.min(), image.max()
    return np.floor((image - low) / max(high - low, 1e-6) * (number - 1e-3)).astype(np.float32)


FAULTS: dict[str, Fault] = {
    "spacing in metres": lambda image, spacing: (image, spacing / 1000),
    "spacing times ten": lambda image, spacing: (image, spacing * 10),
    "one slice (scout)": lambda image, spacing: (image[:, :1], spacing),
    "an eighth of the field of view": lambda image, spacing: (crop(image, 8), spacing),
    "CT among MR": lambda image, spacing: (as_ct(image), spacing),
    "constant": lambda image, spacing: (np.full_like(image, 7), spacing),
    "saturated": lambda image, spacing: (np.minimum(image, np.percentile(image, 85)), spacing),
    "label map": lambda image, spacing: (levels(image, 4), spacing),
    "8 gray levels": lambda image, spacing: (levels(image, 8), spacing),
    "one voxel of 10^7": lambda image, spacing: (with_spike(image), spacing),
}


def with_spike(image: Image) -> Image:
    changed = image.copy()
    changed[:, 0, 0, 0] = 1e7 * max(1.0, float(np.abs(image).max()) / 1000)
    return changed


def statistics(image: Image, spacing: Spacing) -> Statistics:
    return image_statistics(image, {"spacing": spacing})


def read(folder: Path) -> tuple[dict[str, tuple[Image, Spacing]], list[str]]:
    """Every image of imagesTr, and the normalization of the channels."""
    content = read_json(folder / "dataset.json")
    files = {case: images for case, (images, _) in training_files(str(folder), content).items()}
    example = next(iter(files.values()))[0]
    reader = determine_reader_writer_from_dataset_json(content, example, verbose=False)()
    images = {}
    for case in sorted(files):
        image, properties = reader.read_images(files[case])
        images[case] = image, np.array(properties["spacing"])
    names = content.get("channel_names") or content["modality"]
    return images, [get_normalization_scheme(name).__name__ for name in names.values()]


def warned(
    labeled: Mapping[str, Statistics], scans: Mapping[str, Statistics], schemes: list[str]
) -> set[str]:
    """Names of the scans of which a finding tells, but for those that are there twice."""
    measured = {Scan(name, "imagesTr", (name,)): found for name, found in labeled.items()}
    measured |= {Scan(name, "imagesUn", (name,)): found for name, found in scans.items()}
    findings = [finding for finding in inspect_scans(measured, schemes) if "same image" not in finding.found]
    return {finding.place for finding in findings} & set(scans)


def count(images: dict[str, tuple[Image, Spacing]], schemes: list[str], labeled: int) -> dict[str, Any]:
    """{fault: (warnings, scans)} over all draws; the key "" stands for scans as they are."""
    sound = {case: statistics(*content) for case, content in images.items()}
    planted: dict[tuple[str, str], Statistics] = {}
    counts = {fault: [0, 0] for fault in ("", *FAULTS)}
    for draw in range(DRAWS):
        generator = random.Random(draw)
        chosen = set(generator.sample(sorted(images), labeled))
        usual = {case: sound[case] for case in chosen}
        others = {case: found for case, found in sound.items() if case not in chosen}
        some = generator.sample(sorted(others), min(PLANTED, len(others)))
        for fault in counts:
            scans = others
            if fault:
                for case in some:
                    if (fault, case) not in planted:
                        planted[fault, case] = statistics(*FAULTS[fault](*images[case]))
                scans = {case: planted[fault, case] for case in some}
            counts[fault][0] += len(warned(usual, scans, schemes))
            counts[fault][1] += len(scans)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="+", type=Path, help="raw dataset with imagesTr and dataset.json")
    for folder in parser.parse_args().folder:
        images, schemes = read(folder)
        columns = {n: count(images, schemes, n) for n in LABELED if n < len(images)}
        print(f"\n{folder.name}\n\n| labeled | {' | '.join(map(str, columns))} |")
        print(f"|---|{'---|' * len(columns)}")
        for fault in ("", *FAULTS):
            cells = [f"{found[fault][0]} of {found[fault][1]}" for found in columns.values()]
            print(f"| {fault or 'as they are'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
