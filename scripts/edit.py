"""Edit a clip from the command line: a real ComfyUI, the pack in it, and workflow 1.

    nox -s edit -- --clip clip.mp4 --checkpoint model.safetensors --prompt "a boat in the snow"

Without a checkpoint it makes a small random one, without a clip it renders one, and says so: that shows that
everything runs, not what the method can do.
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

STEPS = {"steps", "sampling_steps", "feature_steps", "resnet_steps", "attention_steps"}  # they go together
WORKFLOW = PACK / "workflows" / "api" / "1_edit_a_clip.json"
BASE = PACK / ".edit"
TRIAL = {"steps": 10, "frames": 6, "size": (256, 160)}  # where a random model makes more a waste


def main() -> None:
    arguments = parse_arguments()
    if arguments.check_only:
        return
    host = provide_host()
    base = lay_out(BASE)
    clip, checkpoint = provide_clip(arguments, base), provide_checkpoint(arguments, base)
    shutil.copy2(clip, base / "input" / clip.name)
    places = base / "checkpoint_folder.yaml"  # JSON is YAML too
    places.write_text(json.dumps({"cove": {"base_path": str(checkpoint.parent), "checkpoints": "."}}))

    print(f"starting ComfyUI from {host}; its log is {base / 'server.log'}", flush=True)
    with Server(host, base, "--extra-model-paths-config", str(places)) as server:
        prompt = fill_in(json.loads(WORKFLOW.read_text(encoding="utf-8")), clip.name, checkpoint.name, arguments)
        threading.Thread(target=show_progress, args=(server, prompt), daemon=True).start()
        outputs = server.queue(prompt, math.inf)
        video = find_video(server, outputs)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(video, arguments.output)
    print(f"\nthe edited clip: {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    """What the user asked for, with every path checked before anything long begins."""
    parser = argparse.ArgumentParser(
        prog="nox -s edit --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=Path, help="video to edit; none: one is rendered")
    parser.add_argument("--checkpoint", type=Path, help="an SD1.5, SD2.x or SDXL checkpoint; none: a random one")
    parser.add_argument("--prompt", help="what the clip shall show")
    parser.add_argument("--source-prompt", help="what it shows now")
    parser.add_argument("--steps", type=int, help="sampling steps; inversion keeps its proportion to them")
    parser.add_argument("--frames", type=int, help="frames to edit, from the clip's first")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels, multiples of 8; 0 follows from the other")
    parser.add_argument("--output", type=Path, help="file to write; none: <clip>-edited.mp4 here")
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
    if not WORKFLOW.is_file():
        parser.error(f"{WORKFLOW} is missing from this checkout")
    if arguments.checkpoint is None:
        for name, value in TRIAL.items():
            setattr(arguments, name, getattr(arguments, name) or value)
    stem = arguments.clip.stem if arguments.clip else "rendered"
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


def provide_clip(arguments: argparse.Namespace, base: Path) -> Path:
    if arguments.clip:
        return arguments.clip
    from scripts.clip import render_clip

    print("no --clip: rendering one", flush=True)
    return render_clip(base / "rendered.mp4", max(arguments.frames or 0, 16), 512, 320)


def provide_checkpoint(arguments: argparse.Namespace, base: Path) -> Path:
    if arguments.checkpoint:
        return arguments.checkpoint
    from scripts.random_models import write_checkpoint

    width, height = arguments.size
    print(
        f"no --checkpoint: making a small random one. Nobody trained it: it follows no prompt, and the result only "
        f"shows that everything runs. Settings are small too ({arguments.steps} steps, {arguments.frames} frames, "
        f"{width}x{height}) unless you gave others.",
        flush=True,
    )
    return write_checkpoint(base / "models/checkpoints/random_sd15.ckpt", "sd15")


def fill_in(prompt: dict, clip: str, checkpoint: str, arguments: argparse.Namespace) -> dict:
    """Workflow 1 with the user's wishes in it; what they left open stays as the workflow has it."""
    for node in prompt.values():
        inputs, title = node["inputs"], node.get("_meta", {}).get("title", "")
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = checkpoint
        elif node["class_type"] == "CoveLoadFrames":
            inputs |= {"file": clip}
            inputs |= {"count": arguments.frames} if arguments.frames else {}
            inputs |= dict(zip(("width", "height"), arguments.size, strict=True)) if arguments.size else {}
        elif title == "Edit prompt" and arguments.prompt is not None:
            inputs["text"] = arguments.prompt
        elif title == "Source prompt" and arguments.source_prompt is not None:
            inputs["text"] = arguments.source_prompt
    if arguments.steps:
        full = min(node["inputs"]["steps"] for node in prompt.values() if "steps" in node["inputs"])
        for node in prompt.values():
            for name in STEPS & node["inputs"].keys():
                node["inputs"][name] = round(node["inputs"][name] / full * arguments.steps)
    return prompt


def find_video(server: Server, outputs: dict) -> Path:
    for output in outputs.values():
        for entries in output.values():
            for entry in entries:
                if isinstance(entry, dict) and str(entry.get("filename", "")).endswith(".mp4"):
                    return server.path_of(entry)
    raise RuntimeError(f"{WORKFLOW.name} gave back no video; the log is {server.log}")


def show_progress(server: Server, prompt: dict) -> None:
    """Print what ComfyUI's websocket tells: the node that runs and how far it is."""
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

    with contextlib.suppress(aiohttp.ClientError):  # the server is gone: whoever waits for the prompt says why
        asyncio.run(listen())


if __name__ == "__main__":
    try:
        main()
    except (PromptFailed, OSError, RuntimeError) as failure:
        sys.exit(f"\n{failure}")
