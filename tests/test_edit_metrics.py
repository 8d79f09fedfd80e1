"""Measures of an edit on a texture with known motion, and their table and plot."""

import math

import pytest
import torch
import torch.nn.functional as F

from cove import metrics
from cove.draw import plot
from cove.metrics import format_table, measure_edit, summarize_edit
from tests.method_helpers import randn

pytest.importorskip("cv2")
FRAMES, HEIGHT, WIDTH = 4, 67, 91
NOISE = 0.02


@pytest.fixture(scope="module")
def moving():
    """A smooth random texture that moves three pixels per frame."""
    texture = F.interpolate(randn(1, 3, 37, 41), size=(HEIGHT, WIDTH + 20), mode="bicubic")[0].movedim(0, -1)
    texture = (0.5 + 0.1 * texture).clamp(0.1, 0.9)
    return torch.stack([texture[:, 3 * frame : 3 * frame + WIDTH] for frame in range(FRAMES)])


@pytest.fixture(scope="module")
def noise():
    return NOISE * randn(FRAMES, HEIGHT, WIDTH, 3, seed=3)


def test_measure_edit_rates_an_edit_that_moves_with_the_source_as_steady(moving):
    columns = measure_edit(moving, 1 - moving)
    assert summarize_edit(columns) == "Motion taken out, frames differ 1.00 times as much as the source's own do."
    assert list(columns) == ["PSNR", "SSIM", "warping error", "of the source"]
    assert all(len(column) == FRAMES for column in columns.values())
    assert math.isnan(columns["warping error"][-1]) and not math.isnan(columns["warping error"][-2])
    assert columns["of the source"][0] < 1e-4 < (moving[1] - moving[0]).square().mean()


def test_measure_edit_measures_independent_noise(moving, noise):
    columns = measure_edit(moving, moving + noise)
    # The variance of two draws. One is interpolated, but the flow is nearly integer, which keeps its variance.
    assert columns["warping error"][0] == pytest.approx(2 * NOISE**2, rel=0.25)
    assert columns["PSNR"][1] == pytest.approx(-20 * math.log10(NOISE), abs=0.2)
    assert columns["warping error"][0] > 5 * columns["of the source"][0]


def test_summarize_edit_divides_the_means():
    columns = {"warping error": [0.3, 0.1, math.nan], "of the source": [0.05, 0.11, math.nan]}
    assert "2.50 times as much" in summarize_edit(columns)
    still = columns | {"of the source": [0.0, 0.0, math.nan]}
    text = "The source's frames do not differ, motion taken out; those of the edit do by 0.200000."
    assert summarize_edit(still) == text


def test_check_libraries_names_every_missing_library(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless matplotlib"):
        metrics.check_libraries()


def test_measure_edit_reports_progress_in_pairs(moving):
    seen = []
    measure_edit(moving, moving, lambda *counted: seen.append(counted))
    assert seen == [(i + 1, FRAMES - 1) for i in range(FRAMES - 1)]


def test_format_table_aligns_columns():
    lines = format_table({"a PSNR": [12.34, math.inf], "share": [0.5, math.nan]}).splitlines()
    assert "0.000123" in format_table({"warping error": [0.0001234]})
    assert lines == [
        "frame  a PSNR   share",
        "    0    12.3  0.5000",
        "    1     inf       -",
        " mean     inf  0.5000",
    ]


def test_measure_edit_of_one_frame_has_nothing_to_compare(moving):
    columns = measure_edit(moving[:1], moving[:1])
    assert math.isnan(columns["warping error"][0]) and summarize_edit(columns).startswith("Nothing to compare")
    assert format_table(columns).splitlines()[-1].split()[-1] == "-"


def test_plot_shows_every_curve():
    pytest.importorskip("matplotlib")
    one = plot({"first": {"a": [1, 2, math.nan]}})
    two = plot({"first": {"a": [1, 2, math.nan]}, "second": {"b": [1, 2, 3], "c": [3, 2, 1]}})
    assert one.shape[0] == 1 and one.shape[3] == 3 and two.shape[1] == 2 * one.shape[1]
    assert one.min() >= 0 and one.max() == 1
    blue, orange = (torch.tensor(colour) / 255 for colour in ((31, 119, 180), (255, 127, 14)))  # the first two curves
    for colour, drawn in ((blue, (one, two)), (orange, (two,))):
        assert all(((picture - colour).abs().amax(-1) < 0.02).sum() > 50 for picture in drawn)
    assert not ((one - orange).abs().amax(-1) < 0.02).any()
