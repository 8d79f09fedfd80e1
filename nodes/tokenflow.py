"""TokenFlow: keyframes are edited jointly, and all frames take their tokens."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import host


class TokenFlow(io.ComfyNode):
    """TokenFlow (arXiv 2307.10373), section 4, Eq. 3-6; with Feature Injection beside it for its frame editing part."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveTokenFlow",
            display_name="COVE TokenFlow",
            category="COVE/edit",
            description="An alternative to Correspondence Attention: keyframes attend to one another, and every frame "
            "takes its tokens from the keyframes around it, by the nearest tokens of the source.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model of DDIM Inversion; with Feature Injection, it keeps the source's layout. Use "
                    "the result for sampling only.",
                ),
                host.wires.Inversion.Input("inversion", tooltip="From DDIM Inversion or Load Inversion."),
                io.Int.Input(
                    "every",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="One random keyframe in every n frames, redrawn at each step. A larger value takes less "
                    "time and memory; a smaller one keeps fast motion better. The paper uses 8.",
                ),
                io.Boolean.Input(
                    "blend_keyframes",
                    default=True,
                    tooltip="On: keyframes also take tokens from the keyframe before them, as in the paper. Off: "
                    "faster, but keyframes may stand out.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="A different seed gives different keyframes.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The source prompt of DDIM Inversion. Needed only if that prompt had a ControlNet.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(cls, model, inversion, every, blend_keyframes, seed, conditioning=None) -> io.NodeOutput:
        host.unet.unet_of(model)
        host.identity.check_fits(inversion, model)
        source = host.identity.conditioning_of(inversion) if conditioning is None else conditioning
        patched = host.tokenflow.flow_tokens(model, inversion, every, blend_keyframes, seed, source, cls)
        return io.NodeOutput(patched)


NODES = [TokenFlow]
