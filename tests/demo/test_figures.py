from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from nnssl.demo.figures import draw_curve, draw_overlay


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    header = path.read_bytes()
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_overlay_has_a_row_per_case_and_survives_a_case_without_any_structure(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(100, 10, (5, 12, 14))
    truth = np.zeros((5, 12, 14), np.uint8)
    truth[2, 3:7, 3:7], truth[2, 4, 4] = 1, 2
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_overlay({"case": (image, truth, truth)}, ["organ", "lesion"], one)
    draw_overlay(
        {"case": (image, truth, np.zeros_like(truth)), "empty": (image, np.zeros_like(truth), truth)},
        ["organ", "lesion"],
        two,
    )
    assert size(one)[0] == size(two)[0]
    assert size(two)[1] > 1.5 * size(one)[1]


def test_overlay_shows_the_slice_with_most_of_the_smallest_structure_and_its_error_in_red(
    tmp_path: Path,
) -> None:
    image = np.zeros((4, 10, 10))
    truth = np.zeros((4, 10, 10), np.uint8)
    truth[1], truth[3, 2:8, 2:8] = 1, 2  # label 1 fills slice 1, label 2 is smaller and in slice 3
    wrong, right = tmp_path / "wrong.png", tmp_path / "right.png"
    prediction = truth.copy()
    prediction[3] = 0
    for path, mask in ((wrong, prediction), (right, truth)):
        draw_overlay({"case": (image, truth, mask)}, ["organ", "lesion"], path)

    def red(path: Path) -> int:
        pixels = matplotlib.image.imread(path)[..., :3]
        return int(((pixels[..., 0] > 0.4) & (pixels[..., 1] < 0.2) & (pixels[..., 2] < 0.3)).sum())

    assert red(wrong) > red(right) + 1000


def test_curve_is_drawn_from_rows_of_losses_csv(tmp_path: Path) -> None:
    rows = [
        {"epoch": float(e), "lr": 0.01, "loss/supervised": 1 / (e + 1), "weight/supervised": 1.0}
        for e in range(3)
    ]
    draw_curve(
        rows, [[0.1, float("nan")], [0.5, 0.2], [0.6, 0.4]], ["organ", "lesion"], tmp_path / "curve.png"
    )
    assert min(size(tmp_path / "curve.png")) > 300
