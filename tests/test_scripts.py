"""Commands for users: filling in workflows and measuring clips."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cove.encode import write_frames
from scripts import edit
from tests.method_helpers import ROOT

NOTHING = {"clip": None, "checkpoint": None, "prompt": None, "source_prompt": None, "steps": None, "frames": None}
NOTHING |= {"size": None}


def filled(workflow, clip=None, **wishes):
    return edit.fill_in(edit.read(workflow), clip and Path(clip), argparse.Namespace(**NOTHING | wishes))


def the(prompt, node_class):
    (found,) = [node for node in prompt.values() if node["class_type"] == node_class]
    return found["inputs"]


def texts(prompt):
    return {node["_meta"]["title"]: node["inputs"]["value"] for node in prompt.values() if "value" in node["inputs"]}


# ---- nox -s edit ----


def test_edit_without_options_keeps_the_workflow():
    assert filled(edit.DEMO) == edit.read(edit.DEMO)


def test_edit_puts_checkpoint_and_clip_into_workflow_1():
    wishes = {"prompt": "snow", "source_prompt": "a boat", "frames": 5, "size": (256, 160), "steps": 10}
    prompt = filled(edit.EDIT, "boat.mp4", checkpoint=Path("a/model.ckpt"), **wishes)
    assert the(prompt, "CheckpointLoaderSimple") == {"ckpt_name": "model.ckpt"}
    frames = the(prompt, "CoveLoadFrames")
    assert [frames[name] for name in ("file", "count", "width", "height")] == ["boat.mp4", 5, 256, 160]
    assert texts(prompt)["Edit prompt"] == "snow" and texts(prompt)["Source prompt"] == "a boat"
    assert the(prompt, "CoveDDIMInversion")["steps"] == 10


def test_edit_replaces_the_demo_clip():
    before, prompt = edit.read(edit.DEMO), filled(edit.DEMO, "boat.mp4")
    (place,) = [key for key, node in before.items() if node["class_type"] == "CoveLoadDemoClip"]
    assert prompt[place]["class_type"] == "CoveLoadFrames"
    frames = the(prompt, "CoveLoadFrames")
    assert [frames[name] for name in ("file", "count", "width", "height")] == ["boat.mp4", 8, 128, 128]
    assert texts(prompt)["Source prompt"] == ""  # the demo clip's source prompt does not apply
    assert texts(filled(edit.EDIT, "boat.mp4", checkpoint=Path("a"), prompt="snow"))["Source prompt"] == ""
    assert the(prompt, "CreateVideo").pop("audio") == [place, 4]
    assert {key: node for key, node in prompt.items() if key != place and "value" not in node["inputs"]} == {
        key: node for key, node in before.items() if key != place and "value" not in node["inputs"]
    }


def test_edit_refuses_a_clip_without_a_prompt(clips):
    """The workflow's own prompt describes another clip."""
    command = [sys.executable, ROOT / "scripts" / "edit.py", "--clip", clips / "source.mp4"]
    ended = subprocess.run([*command, "--checkpoint", clips / "source.mp4"], capture_output=True, text=True)
    assert ended.returncode == 2 and "--prompt: say what the clip should show" in ended.stderr


# ---- nox -s measure ----


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from evidence.shapes.clips import demo_clip

    folder = tmp_path_factory.mktemp("clips")
    pictures = demo_clip().draw(128)
    write_frames(folder / "source.mp4", pictures, fps=8)
    write_frames(folder / "edited.mp4", 1 - pictures[1::2], fps=4)
    return folder


def measure(*arguments):
    command = [sys.executable, ROOT / "scripts" / "measure.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_measure_compares_the_edit_with_the_selected_frames(clips):
    pytest.importorskip("cv2")
    ended = measure(clips / "source.mp4", clips / "edited.mp4", "--start=1", "--stride=2", "--plot", clips / "plot.png")
    assert ended.returncode == 0, ended.stderr
    first, _, heads, *lines, plot = ended.stdout.strip().splitlines()
    assert first.startswith("4 frames of 128x128. Motion taken out, frames differ 1.")
    assert heads.split()[:3] == ["frame", "PSNR", "SSIM"] and len([line for line in lines if line]) == 5
    assert plot == f"the plot: {clips / 'plot.png'}" and (clips / "plot.png").stat().st_size > 5000


def test_measure_reports_errors_in_one_line(clips):
    for arguments, stated in (
        ((clips / "source.mp4", clips / "none.mp4"), "there is no file"),
        ((clips / "edited.mp4", clips / "source.mp4"), "frames"),
    ):
        ended = measure(*arguments)
        assert ended.returncode and stated in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr
