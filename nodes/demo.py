"""Load Demo Model and Load Demo Clip: for a first edit without a download."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ..cove import frames
from . import _host

FOLDER = Path(__file__).parent.parent / "demo"


class LoadDemoModel(io.ComfyNode):
    """A latent diffusion UNet in SD1.5's topology, narrow, trained by `evidence/shapes/` on drawn shapes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadDemoModel",
            display_name="COVE Load Demo Model",
            category="COVE/load",
            description="Loads a small model that comes with the pack and knows flat shapes on plain, cloudy and tiled "
            "grounds. It shows how an edit works, on any computer and without a download; for clips of your own, load "
            "a checkpoint.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=sorted(path.name for path in FOLDER.glob("*.safetensors")),
                    default="shapes.safetensors",
                    tooltip="What the model was trained on. shapes: frames of 128x128 pixels; prompts "
                    'like "a striped red star on a cloudy blue ground".',
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(*_host.load_demo(FOLDER / file))


class LoadDemoClip(io.ComfyNode):
    """Drawn by `evidence/shapes/clips.py`: a striped red star that moves and turns on a cloudy blue ground."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadDemoClip",
            display_name="COVE Load Demo Clip",
            category="COVE/load",
            description="Loads a clip that the demo model understands: a striped red star on a cloudy blue ground, "
            "8 frames of 128x128 pixels.",
            outputs=[
                io.Image.Output(display_name="images"),
                io.Float.Output(display_name="fps"),
                io.Int.Output(display_name="frame count"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        images, _, fps, *_ = frames.read_frames(FOLDER / "clip.mp4")
        return io.NodeOutput(images, fps, len(images))


NODES = [LoadDemoModel, LoadDemoClip]
