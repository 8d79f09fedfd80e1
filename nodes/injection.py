"""Feature Injection and Store Features: the edit keeps the structure of its source."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cove.injection import ATTENTION, AUTO, RESNET
from . import host

SHARE_TOOLTIP = (
    "Share of the sampling steps, from the first one on. A larger share keeps more of the source's {}; a smaller one "
    "lets the prompt change more. 0 turns it off; the paper uses 0.8 (40 of 50 steps)."
)
BLOCKS_TOOLTIP = (
    'Decoder blocks, such as "3, 4, 6" or "4-9". More blocks keep more of the source. {} = those of FLATTEN ({}); '
    "none = no block."
)
CONDITIONING_TOOLTIP = "The source prompt of DDIM Inversion. Needed only if that prompt had a ControlNet{}."


def _share(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=0.8, min=0.0, max=1.0, step=0.05, round=0.001, tooltip=tooltip)


class FeatureInjection(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 4.1, "first 40 timesteps", at FLATTEN's sites (arXiv 2310.05922)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveFeatureInjection",
            display_name="COVE Feature Injection",
            category="COVE/edit",
            description="Keeps the layout and the shapes of the source: in the first sampling steps, features of the "
            "inverted clip replace those of the edit.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The patched model of DDIM Inversion. Use the result for sampling only."
                ),
                host.wires.Inversion.Input("inversion", tooltip="From DDIM Inversion or Load Inversion."),
                _share("resnet_share", SHARE_TOOLTIP.format("shapes and positions")),
                _share("attention_share", SHARE_TOOLTIP.format("layout")),
                io.String.Input(
                    "resnet_blocks",
                    default=AUTO,
                    tooltip=BLOCKS_TOOLTIP.format(AUTO, "3, 4, 6 in SD1.5 and SD2, 0, 1, 3 in SDXL"),
                ),
                io.String.Input(
                    "attention_blocks",
                    default=AUTO,
                    tooltip=BLOCKS_TOOLTIP.format(AUTO, "4-9 in SD1.5 and SD2, 1-5 in SDXL"),
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=CONDITIONING_TOOLTIP.format(" and its features are not stored"),
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(
        cls, model, inversion, resnet_share, attention_share, resnet_blocks, attention_blocks, conditioning=None
    ) -> io.NodeOutput:
        sites = host.injection.sites_of(model, resnet_blocks, attention_blocks)
        host.identity.check_fits(inversion, model)
        source = host.identity.conditioning_of(inversion) if conditioning is None else conditioning
        shares = {RESNET: resnet_share, ATTENTION: attention_share}
        return io.NodeOutput(host.injection.inject(model, inversion, sites, shares, source, cls))


class StoreFeatures(io.ComfyNode):
    """Features of the source at FLATTEN's sites, computed once for many edits of one clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveStoreFeatures",
            display_name="COVE Store Features",
            category="COVE/edit",
            description="Stores the features that Feature Injection injects, so that many prompts can be tried on one "
            "clip without running the source beside each edit. The node shows their size before it runs.",
            inputs=[
                io.Model.Input("model", tooltip="The patched model of DDIM Inversion."),
                host.wires.Inversion.Input("inversion", tooltip="From DDIM Inversion or Load Inversion."),
                _share(
                    "share",
                    "Share of the sampling steps whose features are stored, from the first one on: the larger share of "
                    "Feature Injection. A larger one takes more memory.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(host.storage.STORAGES),
                    default=host.storage.MEMORY,
                    tooltip="memory: until the inversion is no longer used. disk: ComfyUI's temp folder; Save "
                    "Inversion keeps them.",
                ),
                io.Conditioning.Input("conditioning", optional=True, tooltip=CONDITIONING_TOOLTIP.format("")),
            ],
            outputs=[host.wires.Inversion.Output(display_name="inversion", tooltip="With features.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(cls, model, inversion, share, storage, conditioning=None) -> io.NodeOutput:
        sites = host.injection.sites_of(model, AUTO, AUTO)
        host.checks.check_without(model, host.options.INJECTION, host.options.TOKENFLOW)
        host.checks.check_no_step_cache(model.wrappers)
        host.identity.check_fits(inversion, model)
        source = host.identity.conditioning_of(inversion) if conditioning is None else conditioning
        steps = inversion.schedule.share(share)
        return io.NodeOutput(host.storage.store_features(model, inversion, sites, steps, storage, source, cls))


NODES = [FeatureInjection, StoreFeatures]
