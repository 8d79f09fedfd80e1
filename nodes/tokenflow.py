"""TokenFlow: keyframes edited together, and all other frames made of their tokens."""

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
            description="In place of Correspondence Attention: a few keyframes see one another, and every frame takes "
            "its tokens from the keyframes around it, as they belong together in the source.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SD2.x or SDXL, as DDIM Inversion had it; with Feature Injection to keep the "
                    "source's layout. The result is for sampling.",
                ),
                host.types.Inversion.Input("inversion", tooltip="From DDIM Inversion or Load Inversion."),
                io.Int.Input(
                    "every",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="One random keyframe in so many frames, drawn anew at each step. More takes less time and "
                    "memory; less keeps fast motion better. 8 = the paper.",
                ),
                io.Boolean.Input(
                    "blend_keyframes",
                    default=True,
                    tooltip="On: keyframes, too, take from the keyframe before them (the paper). Off: they stay as "
                    "they are; faster, and they may stand out.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Another number draws other keyframes.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The source prompt that DDIM Inversion had. Only needed when that prompt had a ControlNet.",
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
