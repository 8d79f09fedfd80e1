"""Correspondence Attention: a MODEL with spatial-temporal and correspondence-guided self-attention."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import host


def _percent(name: str, default: float, what: str) -> io.Float.Input:
    tooltip = (
        f"Share of sampling at which the patch {what}. 0 = first step, 1 = after the last; the paper uses 0 and 1."
    )
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class CorrespondenceAttention(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.3, Eq. 11-14, as a patch on a clone of the MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveCorrespondenceAttention",
            display_name="COVE Correspondence Attention",
            category="COVE/edit",
            description="Patches MODEL: every token attends to all frames, then to its matches. Use the same patched "
            "model for DDIM Inversion and for sampling.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2.x or SDXL model. The patch goes on a copy."),
                io.Float.Input(
                    "merge_ratio",
                    default=0.5,
                    min=0.0,
                    max=0.5,
                    step=0.05,
                    tooltip="Share of a token's matches that are merged into similar ones before it attends to them. A "
                    "larger value smooths more. 0 keeps all; the paper uses 0.5.",
                ),
                io.Combo.Input(
                    "spatial_temporal",
                    options=list(host.attention.STRIDES),
                    default=host.attention.ALL_FRAMES,
                    tooltip="The frames that every token attends to first, beside its own. The paper uses all; time "
                    "grows with their number times the number of frames. Fewer are faster and less consistent.",
                ),
                _percent("start_percent", 0.0, "starts; a larger value leaves the noisiest steps unchanged"),
                _percent("end_percent", 1.0, "ends; a smaller value leaves the last steps, the details, unchanged"),
                io.Boolean.Input(
                    "include_self",
                    default=False,
                    tooltip="Include the token itself in its matches, as FLATTEN does: it keeps more of its own value. "
                    "The paper leaves it out.",
                ),
                host.wires.Correspondence.Input(
                    "correspondence",
                    optional=True,
                    tooltip="From Correspondence, of the same frames at the same size. Without it, only the "
                    "spatial-temporal attention is on, as a baseline.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @host.errors.named
    def execute(
        cls, model, merge_ratio, spatial_temporal, start_percent, end_percent, include_self, correspondence=None
    ) -> io.NodeOutput:
        stride = host.attention.STRIDES[spatial_temporal]
        settings = (merge_ratio, stride, start_percent, end_percent, include_self)
        return io.NodeOutput(host.attention.guide_self_attention(model, correspondence, *settings, cls))


NODES = [CorrespondenceAttention]
