"""Correspondence: which token of one frame is which token of the next."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.v0_0_2 import io

from ..cove.correspondence import find_correspondence
from . import _host


class FindCorrespondence(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.2, "Sliding-window Strategy", Eq. 7-10."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveCorrespondence",
            display_name="Correspondence",
            category="COVE",
            description="Finds, for every token of every frame, the most similar tokens nearby in the frames before "
            "and after. Once a clip; edits with other prompts use the same one.",
            inputs=[
                _host.FeaturesType.Input("features", tooltip="Out of Diffusion Features."),
                io.Int.Input(
                    "window",
                    default=9,
                    min=1,
                    max=255,
                    step=2,
                    tooltip="More follows faster motion, with more wrong matches and more time. Side of the search "
                    "square in tokens (8 pixels each for SD1.5 and SD2, 16 for SDXL); odd. The paper uses 9.",
                ),
                io.Int.Input(
                    "k",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="More lets each token attend to more matches in each other frame: smoother, slower. "
                    "The paper uses 3.",
                ),
            ],
            outputs=[_host.CorrespondenceType.Output(display_name="correspondence")],
        )

    @classmethod
    def execute(cls, features, window, k) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(max(1, len(features) - 1))

        def progress(done: int, total: int) -> None:
            bar.update_absolute(done, total)
            comfy.model_management.throw_exception_if_processing_interrupted()

        device = comfy.model_management.get_torch_device()
        try:
            found = find_correspondence(features.to(device), window, k, progress)
        except ValueError as error:
            raise ValueError(f"Correspondence: {error}") from error
        return io.NodeOutput(found.to(comfy.model_management.intermediate_device()))


NODES = [FindCorrespondence]
