"""DDIM Inversion and DDIM Sampler: from a clip to the noise behind it, and back with another prompt."""

from __future__ import annotations

from functools import partial

import torch
from comfy.samplers import KSAMPLER
from comfy_api.v0_0_2 import io

from ..cove import ddim
from . import _host
from .injection import ATTENTION_TOOLTIP, AUTO, RESNET_TOOLTIP

STEPS_TOOLTIP = (
    "The same number as sampling_steps of DDIM Inversion. More steps follow the model more closely and take more time. "
    "The paper uses 50."
)


class DDIMInversion(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.1, Eq. 3, with fixed-point refinement of every step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMInversion",
            display_name="DDIM Inversion",
            category="COVE",
            description="Finds the noise from which DDIM sampling, with the same model and prompt at cfg 1, gives the "
            "clip back.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample: with Correspondence Attention for COVE."),
                io.Conditioning.Input("conditioning", tooltip="The source prompt: what the clip shows. May be empty."),
                io.Latent.Input("latent", tooltip="The clip's frames from VAE Encode."),
                io.Int.Input(
                    "steps",
                    default=100,
                    min=1,
                    max=999,
                    tooltip="More steps invert more exactly and take more time. The same as sampling_steps or a "
                    "multiple of it that passes through its timesteps: 100 for 50, of which 99 are run. The paper uses "
                    "100; half as many with one refinement cost the same and lose less.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=50,
                    min=1,
                    max=999,
                    tooltip="The same number as in DDIM Sampler: inversion ends where sampling begins.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=10,
                    tooltip="More makes the clip come back more exactly; each takes as long as the inversion without "
                    "any. 0 = as diffusers does it.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(_host.STORAGES),
                    default=_host.RECOMPUTE,
                    tooltip="For Feature Injection. recompute: keep the latents only and run the source again beside "
                    "each edit; nothing to store, half as much time again in sampling. memory, disk: keep the features "
                    "of the first feature_steps steps; worth it for many edits of a short clip. The node shows how "
                    "much it will be. disk is ComfyUI's temp folder: Save Inversion keeps them.",
                ),
                io.Int.Input(
                    "feature_steps",
                    default=40,
                    min=0,
                    max=1000,
                    tooltip="More stores features for more of the first sampling steps: as many as Feature Injection "
                    "uses. Not used by recompute. The paper uses 40 of 50.",
                ),
                io.String.Input("resnet_blocks", default=AUTO, tooltip=f"To store. {RESNET_TOOLTIP}"),
                io.String.Input("attention_blocks", default=AUTO, tooltip=f"To store. {ATTENTION_TOOLTIP}"),
            ],
            outputs=[
                io.Latent.Output(display_name="noise"),
                _host.InversionType.Output(display_name="inversion", tooltip="For Feature Injection, and to save."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        conditioning,
        latent,
        steps,
        sampling_steps,
        refinements,
        storage,
        feature_steps,
        resnet_blocks,
        attention_blocks,
    ) -> io.NodeOutput:
        node = "DDIM Inversion"
        _host.unet_of(model, node)
        _host.check_without(model, _host.INJECTION_KEY, "Feature Injection", node)
        _host.check_without(model, _host.TOKENFLOW_KEY, "TokenFlow", node)
        _host.check_no_step_cache(model.wrappers, node)
        try:
            timesteps = ddim.inversion_timesteps(steps, sampling_steps)
        except ValueError as error:
            raise ValueError(f"{node}: {error}") from error
        sigmas = torch.cat((torch.zeros(1), _host.sigmas_at(model, timesteps, node)))
        _host.check_channels(model, latent["samples"], node)
        _host.check_unmasked(latent, node)
        _host.check_conditioning(conditioning, latent, node)
        sites = _host.sites_of(model, resnet_blocks, attention_blocks, node)
        kept = sampling_sigmas(model, sampling_steps, node)[:-1][:feature_steps]
        plan, size = _host.plan_storage(model, storage, sites, sigmas, kept, latent["samples"].shape, node)
        tell = partial(_host.say, cls)
        options = {"node": node, "line": size, "tell": tell}
        noise, inversion = _host.invert(model, conditioning, latent, sigmas, refinements, plan, **options)
        tell("; ".join([inversion.quality(), size, *_host.left_unfinished()]))
        return io.NodeOutput(noise, inversion)


class DDIMSampler(io.ComfyNode):
    """DDIM (arXiv 2010.02502) with eta = 0 from inverted noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSampler",
            display_name="DDIM Sampler",
            category="COVE",
            description="Samples the edited clip from the noise that DDIM Inversion found.",
            inputs=[
                io.Model.Input("model", tooltip="The same patched model as in DDIM Inversion."),
                io.Conditioning.Input("positive", tooltip="The edit prompt: what the clip should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show. Not used at cfg 1."),
                io.Latent.Input("noise", tooltip="From DDIM Inversion."),
                io.Int.Input("steps", default=50, min=1, max=999, tooltip=STEPS_TOOLTIP),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="More follows the edit prompt harder and keeps less of the clip. 1 with the source prompt "
                    "gives the clip back, in half the time.",
                ),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, noise, steps, cfg) -> io.NodeOutput:
        node = "DDIM Sampler"
        _host.unet_of(model, node)
        sigmas = sampling_sigmas(model, steps, node)
        _host.check_start(noise, sigmas, node)
        _host.check_conditioning([*positive, *negative], noise, node)
        _host.check_channels(model, noise["samples"], node)
        _host.warn_of_start(model, noise, sigmas[0], partial(_host.say, cls))
        options = {"node": node, "callback": _host.preview(model, steps)}
        return io.NodeOutput(_host.run(model, ddim.sample, noise, sigmas, positive, negative, cfg, **options))


class DDIMSamplerSelect(io.ComfyNode):
    """The step function of DDIM Sampler for the stock SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSamplerSelect",
            display_name="DDIM Sampler (for SamplerCustomAdvanced)",
            category="COVE",
            description="The sampler and the sigmas of DDIM Sampler, for SamplerCustomAdvanced with any guider. Give "
            "that node DisableNoise and the noise from DDIM Inversion.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the guider has."),
                io.Int.Input("steps", default=50, min=1, max=999, tooltip=STEPS_TOOLTIP),
                io.Latent.Input(
                    "noise",
                    optional=True,
                    tooltip="From DDIM Inversion: if given, it is checked that the inversion ended where these "
                    "sigmas begin.",
                ),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, steps, noise=None) -> io.NodeOutput:
        node = "DDIM Sampler (for SamplerCustomAdvanced)"
        _host.unet_of(model, node)
        sigmas = sampling_sigmas(model, steps, node)
        tell = partial(_host.say, cls)
        if noise is not None:
            _host.check_start(noise, sigmas, node)
            _host.check_channels(model, noise["samples"], node)
            _host.warn_of_start(model, noise, sigmas[0], tell)
        return io.NodeOutput(KSAMPLER(partial(_host.sample_from_noise, tell)), sigmas)


def sampling_sigmas(model, steps: int, node: str) -> torch.Tensor:
    """The model's sigmas from the noisiest timestep of the grid down to 0, [steps + 1]."""
    return torch.cat((_host.sigmas_at(model, ddim.sampling_timesteps(steps), node).flip(0), torch.zeros(1)))


NODES = [DDIMInversion, DDIMSampler, DDIMSamplerSelect]
