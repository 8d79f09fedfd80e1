"""Correspondence: matches between the tokens of frames; saving and loading them."""

from __future__ import annotations

import comfy.model_management
from comfy_api.v0_0_2 import io

from ..cove.correspondence import Correspondence, find_correspondence
from ..cove.refine import refine as refined
from . import host

PRESET = "preset"


class FindCorrespondence(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.2, "Sliding-window Strategy", Eq. 7-10."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveCorrespondence",
            display_name="COVE Correspondence",
            category="COVE/match",
            description="Finds the most similar tokens of every token in the frames before and after, within a sliding "
            "window. Needed once per clip: edits with other prompts use the same correspondence.",
            inputs=[
                host.wires.Features.Input("features", tooltip="From Diffusion Features."),
                io.Int.Input(
                    "window",
                    default=9,
                    min=1,
                    max=255,
                    step=2,
                    tooltip="Side of the search window in tokens (8 pixels each for SD1.5 and SD2, 16 for SDXL), odd. "
                    "Larger windows follow faster motion, take longer and find more wrong matches. The paper uses 9.",
                ),
                io.Int.Input(
                    "k",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Matches per token in each other frame. A larger value makes the edit smoother and takes "
                    "longer. The paper uses 3.",
                ),
                io.Combo.Input(
                    "refine",
                    options=[PRESET, "on", "off"],
                    default=PRESET,
                    tooltip="Compare each token again with candidates in every frame, so that matches between distant "
                    "frames do not drift. preset: as set in Diffusion Features. off: follow matches from frame to "
                    "frame only, as in the paper.",
                ),
            ],
            outputs=[host.wires.Correspondence.Output(display_name="correspondence")],
        )

    @classmethod
    @host.errors.named
    def execute(cls, features, window, k, refine) -> io.NodeOutput:
        tokens, refine = features.tokens, features.preset.refine if refine == PRESET else refine == "on"
        pairs = len(tokens) - 1
        progress = host.status.progress_bar(pairs + (len(tokens) if refine else 0))
        device = comfy.model_management.get_torch_device()
        found = find_correspondence(tokens, window, k, progress, device)
        if refine:
            found = refined(found, tokens, lambda done, total: progress(pairs + done, total), device)
        return io.NodeOutput(found)


class SaveCorrespondence(io.ComfyNode):
    """`Correspondence.save`: the matches as one safetensors file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveSaveCorrespondence",
            display_name="COVE Save Correspondence",
            category="COVE/load",
            description="Saves a correspondence to ComfyUI's output folder.",
            inputs=[
                host.wires.Correspondence.Input("correspondence", tooltip="From Correspondence."),
                host.files.prefix_input("Load Correspondence"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, correspondence, filename_prefix) -> io.NodeOutput:
        host.files.save(correspondence, "correspondence", filename_prefix, cls)
        return io.NodeOutput()


class LoadCorrespondence(io.ComfyNode):
    """`Correspondence.load`. Correspondence Attention checks that it fits the latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadCorrespondence",
            display_name="COVE Load Correspondence",
            category="COVE/load",
            description="Loads a file of Save Correspondence, instead of running Diffusion Features and Correspondence "
            "again.",
            inputs=[host.files.saved_input("correspondence")],
            outputs=[host.wires.Correspondence.Output(display_name="correspondence")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return host.files.check_name(file, cls)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others) -> str:
        return host.files.state_of(file)

    @classmethod
    @host.errors.named
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(Correspondence.load(host.files.path_of(file)))


NODES = [FindCorrespondence, SaveCorrespondence, LoadCorrespondence]
