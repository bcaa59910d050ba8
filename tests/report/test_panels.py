from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnssl.report.panels import (
    ERRORS,
    LOSS,
    Panel,
    Strip,
    case_strip,
    data_uri,
    draw_strip,
    errors,
    grey,
    rgb,
)
from nnssl.report.pictures import shade

FOUND = {"a": (1,), "b": (2,)}


def decoded(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("colors", [8, 250_000])
def test_a_panel_keeps_its_colors(colors: int) -> None:
    pixels = np.random.default_rng(0).integers(0, colors, (60, 50, 1)) % np.array([256, 251, 241])
    found = decoded(data_uri(pixels.astype(np.uint8)))
    assert found.shape == (60, 50, 3) and np.abs(found.astype(int) - pixels).max() <= LOSS


def test_errors_are_filled_by_kind_and_ignored_voxels_are_not() -> None:
    truth, called = np.zeros((8, 32), int), np.zeros((8, 32), int)
    truth[:, 0:8] = 1  # missed
    called[:, 8:16] = 1  # added
    truth[:, 16:24], called[:, 16:24] = 1, 2  # another structure
    truth[:, 24:28] = 1  # missed, but ignored
    known = np.ones(truth.shape, bool)
    known[:, 24:28] = False
    base = np.zeros((8, 32, 3))
    errors(base, called, truth, known)
    for start, color in zip((0, 8, 16), ERRORS.values(), strict=True):
        cut = base[:, start : start + 8].reshape(-1, 3)
        painted = cut.any(1)
        assert (cut[painted] == 0.75 * rgb(color)).all()
        assert painted.mean() == 1 if start == 0 else 0.5 < painted.mean() < 1  # stripes
    assert not base[:, 24:].any()


def test_planes_go_through_the_structure_and_show_every_model() -> None:
    truth = np.zeros((12, 14, 16), np.int32)
    truth[5, 3:6, 8:11], truth[2:4, 9, 4] = 1, 2
    strip = case_strip("title", None, truth, {"A": truth, "B": 0 * truth}, (2, 1, 1), FOUND, "b")
    assert list(strip.rows) == ["z = 2", "y = 9", "x = 4"]
    for panels in strip.rows.values():
        assert [panel.caption for panel in panels] == ["labels", "A", "B"]
        labels, same, nothing = (panel.pixels for panel in panels)
        assert (labels == same).all() and (nothing != labels).any()
        assert (nothing == (0.75 * rgb(ERRORS["missed"])).astype(int)).all(-1).any()


@pytest.mark.parametrize("columns", [1, 3])
def test_long_titles_stay_within_the_picture(columns: int, tmp_path: Path) -> None:
    title = "Worst case: HIPPOCAMPUS_056 (Dice Supervised, nnUNetPlans_mirrored 0.540, WWWWW 0.673 / 0.512)"
    panels = [Panel("Supervised, nnUNetPlans_mirrored, 3d", np.full((20, 20, 3), 128, np.uint8))] * columns
    draw_strip(Strip(title, {"x = 4": panels}), tmp_path / "strip.png")
    found = np.asarray(Image.open(tmp_path / "strip.png").convert("L"))
    assert (found < 100).any()
    for edge in (found[:2], found[-2:], found[:, :2], found[:, -2:]):
        assert (edge == 255).all()


def test_a_picture_and_a_case_without_any_structure_are_shown_too() -> None:
    flat = np.zeros((1, 20, 30), np.int32)
    strip = case_strip("title", np.ones(flat.shape), flat, {"A": flat}, (999, 1, 1), FOUND, "a")
    [(name, panels)] = strip.rows.items()
    assert name == "picture" and panels[0].pixels.shape[:2] == (167, 250)
    assert isinstance(panels[0], Panel)


def test_greys_are_cut_at_percentiles_and_confidence_runs_from_blue_to_yellow() -> None:
    image = np.concatenate([np.linspace(0, 1, 1000), [1e6]])
    assert grey(image)[[0, -2, -1]] == pytest.approx([0, 1, 1], abs=0.01)
    low, half, high = shade(np.array([[0.2, 0.75, 1.0]]))[0]
    assert (low == rgb("#00204d")).all() and (half == rgb("#7c7b78")).all() and (high == rgb("#ffea46")).all()
