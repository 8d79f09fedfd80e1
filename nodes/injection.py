"""Feature Injection: what the source had in the decoder, put back while the edit is sampled."""

from __future__ import annotations

from functools import partial

from comfy_api.v0_0_2 import io

from ..cove.injection import AUTO
from . import _host

STEPS_TOOLTIP = (
    "More keeps more of the source's {}, less lets the prompt change more. The first so many steps of sampling; "
    "0 = none, the paper: 40 of 50."
)
BLOCKS_TOOLTIP = (
    'Decoder blocks, such as "3, 4, 6" or "4-9". More keeps more of the source. {} = those of FLATTEN ({}); none = no '
    "block."
)
RESNET_TOOLTIP = BLOCKS_TOOLTIP.format(AUTO, "3, 4, 6 in SD1.5 and SD2, 0, 1, 3 in SDXL")
ATTENTION_TOOLTIP = BLOCKS_TOOLTIP.format(AUTO, "4-9 in SD1.5 and SD2, 1-5 in SDXL")


class FeatureInjection(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 4.1, "first 40 timesteps", at FLATTEN's sites (arXiv 2310.05922)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveFeatureInjection",
            display_name="Feature Injection",
            category="COVE",
            description="Keeps the layout and the shapes of the source: in the first steps of sampling, the features "
            "of the inverted clip take the place of the edit's.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The patched model that DDIM Inversion had. The result is for sampling."
                ),
                _host.InversionType.Input("inversion", tooltip="From DDIM Inversion or Load Inversion."),
                io.Int.Input(
                    "resnet_steps", default=40, min=0, max=1000, tooltip=STEPS_TOOLTIP.format("shapes and places")
                ),
                io.Int.Input("attention_steps", default=40, min=0, max=1000, tooltip=STEPS_TOOLTIP.format("layout")),
                io.String.Input("resnet_blocks", default=AUTO, tooltip=RESNET_TOOLTIP),
                io.String.Input("attention_blocks", default=AUTO, tooltip=ATTENTION_TOOLTIP),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The source prompt that DDIM Inversion had. Only needed with storage recompute, when that "
                    "prompt had a ControlNet.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        inversion,
        resnet_steps,
        attention_steps,
        resnet_blocks,
        attention_blocks,
        conditioning=None,
    ) -> io.NodeOutput:
        node = "Feature Injection"
        sites = _host.sites_of(model, resnet_blocks, attention_blocks, node)
        _host.check_fits(inversion, model, node)
        source = _host.conditioning_of(inversion) if conditioning is None else conditioning
        patched = _host.inject(
            model, inversion, sites, resnet_steps, attention_steps, source, node, partial(_host.say, cls)
        )
        return io.NodeOutput(patched)


NODES = [FeatureInjection]
