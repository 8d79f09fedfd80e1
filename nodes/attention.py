"""Correspondence Attention: the MODEL with spatial-temporal and correspondence-guided self-attention."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import host

ALL_FRAMES, OWN_FRAME = "all frames", "own frame"


class CorrespondenceAttention(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.3, Eq. 11-14, as a patch on a clone of the MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveCorrespondenceAttention",
            display_name="COVE Correspondence Attention",
            category="COVE/edit",
            description="Lets the frames of a clip see one another: every token attends to all frames, then to its own "
            "matches. Use the same patched model for DDIM Inversion and for sampling.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL. The model that comes in stays as it is."),
                io.Float.Input(
                    "merge_ratio",
                    default=0.5,
                    min=0.0,
                    max=0.5,
                    step=0.05,
                    tooltip="More averages more of a token's matches into one another before it attends to them. "
                    "0 = keep all, 0.5 = half (the paper).",
                ),
                io.Combo.Input(
                    "spatial_temporal",
                    options=[ALL_FRAMES, OWN_FRAME],
                    default=ALL_FRAMES,
                    tooltip=f"'{ALL_FRAMES}': every token sees every frame (the paper; time grows with the square of "
                    f"the frames). '{OWN_FRAME}': tokens see their own frame and their matches; faster, less alike.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling the patch begins: 0 = first step, 1 = end. More leaves the noisiest "
                    "part as it is without this node.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling the patch ends: 1 = after the last step. Less leaves the details as "
                    "they are without this node.",
                ),
                io.Boolean.Input(
                    "include_self",
                    default=False,
                    tooltip="Puts the token itself among its matches: it keeps more of its own (FLATTEN). The paper "
                    "leaves it out.",
                ),
                host.types.Correspondence.Input(
                    "correspondence",
                    optional=True,
                    tooltip="Of the same frames, at the same size. Without it, tokens see all frames but are not "
                    "guided to their matches: for comparison.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @host.errors.named
    def execute(
        cls, model, merge_ratio, spatial_temporal, start_percent, end_percent, include_self, correspondence=None
    ) -> io.NodeOutput:
        all_frames = spatial_temporal == ALL_FRAMES
        settings = (merge_ratio, all_frames, start_percent, end_percent, include_self)
        return io.NodeOutput(host.attention.guide_self_attention(model, correspondence, *settings, cls))


NODES = [CorrespondenceAttention]
