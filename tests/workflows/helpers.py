"""What the tests of the workflows share: the files, a clip, and settings under which each runs in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from cove.frames import read_frames
from scripts.clip import render_clip
from scripts.host import PACK
from tests.clip_files import tone, write

FRAMES, WIDTH, HEIGHT, FPS, STEPS = 5, 128, 80, 12, 6
FILES = ("ckpt_name", "control_net_name", "file")  # inputs that name the user's own
NAMES = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
ONE_NODE = NAMES[:2]  # their graph is inside one node, and no note explains it
BLUEPRINT = "Edit a Clip"
NO_BLUEPRINTS = "this ComfyUI serves no blueprints of node packs (0.3.60 does not)"

LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")

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


def blueprint() -> dict[str, Any]:
    """The subgraph blueprint as the host serves it."""
    return json.loads((PACK / "subgraphs" / f"{BLUEPRINT}.json").read_text(encoding="utf-8"))


def served_blueprints(server) -> dict[str, dict] | None:
    """The host's list of subgraph blueprints, or None where it serves none."""
    try:
        return server._request("/global_subgraphs")
    except HTTPError as error:
        assert error.code == 404
        return None


def subgraphs_of(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Subgraph definitions by id, which is the type of the nodes that show them."""
    return {found["id"]: found for found in workflow.get("definitions", {}).get("subgraphs", [])}


def unpack(workflow: dict[str, Any]) -> tuple[dict[str, dict], dict[tuple[str, str], list]]:
    """Nodes and wires of a workflow without its subgraphs, as a page queues it.

    Returns:
        Id -> node. A node inside a subgraph has the id of the node that shows it in front, such as "16:5".
        (Id of a node, name of its input) -> [id of the source node, output].
    """
    definitions, nodes, inside = subgraphs_of(workflow), {}, {}
    outer = {node["id"]: node for node in workflow["nodes"]}
    links = [dict(zip(LINK, link, strict=True)) for link in workflow["links"]]
    wires = []  # (prefix of both ids, nodes by id, link)
    for key, node in outer.items():
        if node["type"] not in definitions:
            nodes[str(key)] = node
            continue
        definition = definitions[node["type"]]
        inner = {one["id"]: one for one in definition["nodes"]}
        nodes |= {f"{key}:{one}": found for one, found in inner.items()}
        for link in definition["links"]:
            if link["target_id"] == -20:
                inside[key, link["target_slot"]] = [f"{key}:{link['origin_id']}", link["origin_slot"]]
            elif link["origin_id"] != -10:
                wires.append((f"{key}:", inner, link))
    wires += [("", outer, link) for link in links]
    found = {}
    for prefix, group, link in wires:
        source = [f"{prefix}{link['origin_id']}", link["origin_slot"]]
        name = group[link["target_id"]]["inputs"][link["target_slot"]]["name"]
        found[f"{prefix}{link['target_id']}", name] = inside.get((link["origin_id"], source[1]), source)
    return nodes, found


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
