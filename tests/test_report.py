"""Measures of an edit: known answers on a texture that moves by a known step; the table; the plot."""

import math

import pytest
import torch
import torch.nn.functional as F

from cove import report
from cove.report import edit_columns, plot, summary, table
from tests.method_helpers import randn

pytest.importorskip("cv2")
FRAMES, HEIGHT, WIDTH = 4, 67, 91
NOISE = 0.02


@pytest.fixture(scope="module")
def moving():
    """A smooth random texture that moves by three pixels a frame."""
    texture = F.interpolate(randn(1, 3, 37, 41), size=(HEIGHT, WIDTH + 20), mode="bicubic")[0].movedim(0, -1)
    texture = (0.5 + 0.1 * texture).clamp(0.1, 0.9)
    return torch.stack([texture[:, 3 * frame : 3 * frame + WIDTH] for frame in range(FRAMES)])


@pytest.fixture(scope="module")
def noise():
    return NOISE * randn(FRAMES, HEIGHT, WIDTH, 3, seed=3)


def test_an_edit_that_moves_with_the_source_is_as_steady(moving):
    columns = edit_columns(moving, 1 - moving)
    assert summary(columns) == "Motion taken out, frames differ 1.00 times as much as the source's own do."
    assert list(columns) == ["PSNR", "SSIM", "warping error", "of the source"]
    assert all(len(column) == FRAMES for column in columns.values())
    assert math.isnan(columns["warping error"][-1]) and not math.isnan(columns["warping error"][-2])
    assert columns["of the source"][0] < 1e-4 < (moving[1] - moving[0]).square().mean()


def test_noise_of_its_own_in_each_frame_is_what_is_found(moving, noise):
    columns = edit_columns(moving, moving + noise)
    # Two draws, one of them interpolated; whole steps leave it as it is, and the flow is near them.
    assert columns["warping error"][0] == pytest.approx(2 * NOISE**2, rel=0.25)
    assert columns["PSNR"][1] == pytest.approx(-20 * math.log10(NOISE), abs=0.2)
    assert columns["warping error"][0] > 5 * columns["of the source"][0]


def test_summary_divides_the_means():
    columns = {"warping error": [0.3, 0.1, math.nan], "of the source": [0.05, 0.11, math.nan]}
    assert "2.50 times as much" in summary(columns)
    still = columns | {"of the source": [0.0, 0.0, math.nan]}
    assert summary(still) == "The source's frames do not differ, motion taken out; those of the edit do by 0.200000."


def test_missing_libraries_are_named_together(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless matplotlib"):
        report.check_libraries()


def test_progress_counts_pairs(moving):
    seen = []
    edit_columns(moving, moving, lambda *counted: seen.append(counted))
    assert seen == [(i + 1, FRAMES - 1) for i in range(FRAMES - 1)]


def test_table_lines_up():
    lines = table({"a PSNR": [12.34, math.inf], "share": [0.5, math.nan]}).splitlines()
    assert "0.000123" in table({"warping error": [0.0001234]})
    assert lines == [
        "frame  a PSNR   share",
        "    0    12.3  0.5000",
        "    1     inf       -",
        " mean     inf  0.5000",
    ]


def test_one_frame_has_no_next(moving):
    columns = edit_columns(moving[:1], moving[:1])
    assert math.isnan(columns["warping error"][0]) and summary(columns).startswith("Nothing to compare")
    assert table(columns).splitlines()[-1].split()[-1] == "-"


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
