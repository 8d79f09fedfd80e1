"""What the tests of the workflows share: the files, a clip, and settings under which each runs in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cove.frames import read_frames
from scripts.clip import render_clip
from scripts.host import PACK
from tests.clip_files import tone, write

FRAMES, WIDTH, HEIGHT, FPS, STEPS = 5, 128, 80, 12, 6
FILES = ("ckpt_name", "control_net_name", "file")  # inputs that name the user's own
NAMES = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))

# Node class -> what differs from the workflow as it is saved.
SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": "sd15.ckpt"},
    "ControlNetLoader": {"control_net_name": "control_sd15.pth"},
    "CoveLoadFrames": {"count": FRAMES, "width": WIDTH, "height": HEIGHT},
    "CoveCorrespondence": {"window": 5},
    "CoveDDIMInversion": {"steps": STEPS},
}


def editor_form(name: str) -> dict[str, Any]:
    """The workflow as the editor saves it."""
    return json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def api_form(name: str) -> dict[str, Any]:
    """The workflow as scripts queue it."""
    return json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def choices_of(slot: list) -> list | None:
    """What an input in /object_info can be chosen from; newer hosts have combos that bring inputs of their own."""
    kind, options = (*slot, {})[:2]
    if isinstance(kind, list):
        return kind
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return [option["key"] for option in options["options"]]
    return options["options"] if kind == "COMBO" else None


def place_clip(base: Path) -> None:
    """Render a clip of 12 frames per second, with sound, where the workflows look for it."""
    path = base / "input" / "clip.mp4"
    images = read_frames(render_clip(path, fps=FPS)).images
    stereo = tone(len(images) / FPS, 48000).repeat(2, 0)  # ComfyUI saves one channel as two, 3 dB lower
    write(path, images, rate=FPS, sound=(stereo, 48000), options={"crf": "12"})
