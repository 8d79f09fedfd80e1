"""Edit a clip from the command line, by running a workflow of the pack in a real ComfyUI.

    nox -s edit -- --clip clip.mp4 --checkpoint model.safetensors --prompt "a boat in the snow"

With a checkpoint, workflow 1 runs; without a clip, one is rendered. Without a checkpoint, workflow 0 runs with the demo
model, which knows only drawn shapes, and with the demo clip unless you pass another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import shutil
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.host import PACK, PromptFailed, Server, lay_out, provide_host

WORKFLOWS = PACK / "workflows" / "api"
DEMO, EDIT = WORKFLOWS / "0_demo.json", WORKFLOWS / "1_edit_a_clip.json"
BASE = PACK / ".edit"
AUDIO = 4  # index of this output of Load Frames
DEMO_SIZE, DEMO_FRAMES = (128, 128), 8  # size the demo model was trained on; length of the demo clip


def main() -> None:
    arguments = parse_arguments()
    if arguments.check_only:
        return
    host = provide_host()
    base = lay_out(BASE)
    clip, options = provide_clip(arguments, base), []
    if clip:
        shutil.copy2(clip, base / "input" / clip.name)
    if arguments.checkpoint:
        places = base / "checkpoint_folder.yaml"  # JSON is YAML too
        places.write_text(json.dumps({"cove": {"base_path": str(arguments.checkpoint.parent), "checkpoints": "."}}))
        options = ["--extra-model-paths-config", str(places)]
    prompt = fill_in(read(EDIT if arguments.checkpoint else DEMO), clip, arguments)

    print(f"starting ComfyUI from {host}; its log is {base / 'server.log'}", flush=True)
    with Server(host, base, *options) as server:
        threading.Thread(target=show_progress, args=(server, prompt), daemon=True).start()
        outputs = server.queue(prompt, math.inf)
        video = find_video(server, outputs)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(video, arguments.output)
    print(f"\nthe edited clip: {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments, after checking every path before a long run starts."""
    parser = argparse.ArgumentParser(
        prog="nox -s edit --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clip", type=Path, help="video to edit; default: the demo clip, or with --checkpoint a rendered one"
    )
    parser.add_argument("--checkpoint", type=Path, help="SD1.5, SD2.x or SDXL checkpoint; default: the demo model")
    parser.add_argument("--prompt", help="what the clip should show")
    parser.add_argument("--source-prompt", help="what the clip shows now; default: empty, or the demo clip's prompt")
    parser.add_argument("--steps", type=int, help="sampling steps; inversion steps scale with them")
    parser.add_argument("--frames", type=int, help="number of frames to edit, from the first one on")
    parser.add_argument(
        "--size", type=size, metavar="WxH", help="size in pixels, multiples of 8; 0 is computed from the other side"
    )
    parser.add_argument("--output", type=Path, help="file to write; default: <clip>-edited.mp4 in the current folder")
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    for name in ("clip", "checkpoint"):
        path = getattr(arguments, name)
        if path and not path.expanduser().is_file():
            parser.error(f"--{name}: there is no file {path}")
        setattr(arguments, name, path and path.expanduser().resolve())
    for name in ("steps", "frames"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected 1 or more, got {value}")
    for workflow in (DEMO, EDIT):
        if not workflow.is_file():
            parser.error(f"{workflow} is missing from this checkout")
    if arguments.clip is None and arguments.checkpoint is None and (arguments.frames or arguments.size):
        parser.error("--frames, --size: the demo clip is taken as it is; give a --clip or a --checkpoint")
    if arguments.clip and arguments.checkpoint and not arguments.prompt:
        parser.error('--prompt: say what the clip should show, such as --prompt "a boat in the snow"')
    stem = arguments.clip.stem if arguments.clip else "rendered" if arguments.checkpoint else "demo"
    arguments.output = (arguments.output or Path(f"{stem}-edited.mp4")).expanduser().resolve()
    if arguments.output.suffix.lower() != ".mp4":
        parser.error(f"--output: expected a name ending in .mp4, got {arguments.output.name}")
    if arguments.output == arguments.clip:
        parser.error("--output: this is the clip itself")
    return arguments


def size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WxH such as 512x320, got {text}") from None
    if min(width, height) < 0 or width % 8 or height % 8 or width + height == 0:
        raise argparse.ArgumentTypeError(f"expected multiples of 8, got {text}")
    return width, height


def provide_clip(arguments: argparse.Namespace, base: Path) -> Path | None:
    """Return the clip to copy to ComfyUI's input folder; None for the demo clip, which has its own node."""
    if arguments.checkpoint is None:
        print(
            "no --checkpoint: using the demo model. It knows only drawn shapes on plain, cloudy and tiled grounds, and "
            "cannot draw anything else.",
            flush=True,
        )
        return arguments.clip
    if arguments.clip:
        return arguments.clip
    from scripts.clip import render_clip

    print("no --clip: rendering one", flush=True)
    return render_clip(base / "rendered.mp4", max(arguments.frames or 0, 16), 512, 320)


def read(workflow: Path) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def fill_in(prompt: dict, clip: Path | None, arguments: argparse.Namespace) -> dict:
    """Return the workflow with the arguments filled in; options that were not passed keep the workflow's values."""
    size, frames, source = arguments.size, arguments.frames, arguments.source_prompt
    if clip and source is None:
        source = ""  # the workflow's prompt describes another clip
    for node_id, node in prompt.items():
        if node["class_type"] == "CoveLoadDemoClip" and clip:
            # Load Frames has the same outputs, so the rest of the workflow stays unchanged.
            (load,) = [other for other in read(EDIT).values() if other["class_type"] == "CoveLoadFrames"]
            prompt[node_id] = load
            for video in [other for other in prompt.values() if other["class_type"] == "CreateVideo"]:
                video["inputs"]["audio"] = [node_id, AUDIO]  # the demo clip has none
            size, frames = size or DEMO_SIZE, frames or DEMO_FRAMES
    for node in prompt.values():
        inputs, title = node["inputs"], node.get("_meta", {}).get("title", "")
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = arguments.checkpoint.name
        elif node["class_type"] == "CoveLoadFrames":
            inputs |= {"file": clip.name}
            inputs |= {"count": frames} if frames else {}
            inputs |= dict(zip(("width", "height"), size, strict=True)) if size else {}
        elif title == "Edit prompt" and arguments.prompt is not None:
            inputs["value"] = arguments.prompt
        elif title == "Source prompt" and source is not None:
            inputs["value"] = source
    if arguments.steps:
        for node in prompt.values():
            if node["class_type"] == "CoveDDIMInversion":
                node["inputs"]["steps"] = arguments.steps
    return prompt


def find_video(server: Server, outputs: dict) -> Path:
    for output in outputs.values():
        for entries in output.values():
            for entry in entries:
                if isinstance(entry, dict) and str(entry.get("filename", "")).endswith(".mp4"):
                    return server.path_of(entry)
    raise RuntimeError(f"the workflow returned no video; the log is {server.log}")


def show_progress(server: Server, prompt: dict) -> None:
    """Print the running node and its progress, from ComfyUI's websocket."""
    import aiohttp

    def name(node_id: str) -> str:
        node = prompt.get(node_id, {})
        return node.get("_meta", {}).get("title") or node.get("class_type", node_id)

    async def listen() -> None:
        address = f"{server.url}/ws?clientId={server.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                data = event["data"]
                if event["type"] == "executing" and data.get("node"):
                    print(f"\n{name(data['node'])}", end="", flush=True)
                elif event["type"] == "progress":
                    print(f"\r{name(data['node'])}: {data['value']} of {data['max']}", end="", flush=True)

    with contextlib.suppress(aiohttp.ClientError):  # the server has stopped; waiting for the prompt reports why
        asyncio.run(listen())


if __name__ == "__main__":
    try:
        main()
    except (PromptFailed, OSError, RuntimeError) as failure:
        sys.exit(f"\n{failure}")
