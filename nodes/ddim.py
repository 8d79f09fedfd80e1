"""DDIM Inversion and DDIM Sampler: from a clip to the noise behind it, and back with another prompt."""

from __future__ import annotations

from functools import partial

from comfy.samplers import KSAMPLER
from comfy_api.v0_0_2 import io

from ..cove import ddim
from ..cove.schedule import MAX_STEPS, Schedule
from . import _host

NOISE_TOOLTIP = "From DDIM Inversion or Load Inversion. Its schedule sets the number of steps."


class DDIMInversion(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.1, Eq. 3, with fixed-point refinement of every step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMInversion",
            display_name="COVE DDIM Inversion",
            category="COVE/edit",
            description="Finds the noise from which DDIM sampling, with the same model and prompt at cfg 1, returns "
            "the clip.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample: with Correspondence Attention for COVE."),
                io.Conditioning.Input("conditioning", tooltip="The source prompt: what the clip shows. May be empty."),
                io.Latent.Input("latent", tooltip="The clip's frames from VAE Encode."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Sampling steps. The sampler, Feature Injection and TokenFlow use the same number. More "
                    "steps take longer and follow the model more closely. The paper uses 50.",
                ),
                io.Int.Input(
                    "multiple",
                    default=1,
                    min=1,
                    max=20,
                    tooltip="Inversion steps per sampling step. 1 inverts exactly the steps that sampling takes. The "
                    "paper uses 2: 100 inversion steps for 50 sampling steps.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=10,
                    tooltip="Further model evaluations in each step; each takes as long as an inversion without any. "
                    "One that makes a step less exact is undone. 0 is the paper's inversion.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise"),
                _host.InversionType.Output(display_name="inversion", tooltip="For Feature Injection, and to save."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, conditioning, latent, steps, multiple, refinements) -> io.NodeOutput:
        node = "DDIM Inversion"
        _host.unet_of(model, node)
        _host.check_without(model, _host.INJECTION_KEY, "Feature Injection", node)
        _host.check_without(model, _host.TOKENFLOW_KEY, "TokenFlow", node)
        _host.check_no_step_cache(model.wrappers, node)
        try:
            schedule = Schedule(steps, multiple)
        except ValueError as error:
            raise ValueError(f"{node}: {error}") from error
        _host.check_channels(model, latent["samples"], node)
        _host.check_unmasked(latent, node)
        _host.check_conditioning(conditioning, latent, node)
        report = partial(_host.report_status, cls)
        noise, inversion = _host.invert(model, conditioning, latent, schedule, refinements, node=node, report=report)
        report("; ".join([inversion.quality(), *_host.left_unfinished()]))
        return io.NodeOutput(noise, inversion)


class DDIMSampler(io.ComfyNode):
    """DDIM (arXiv 2010.02502) with eta = 0 from inverted noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSampler",
            display_name="COVE DDIM Sampler",
            category="COVE/edit",
            description="Samples the edited clip from the noise that DDIM Inversion found.",
            inputs=[
                io.Model.Input("model", tooltip="The same patched model as in DDIM Inversion."),
                io.Conditioning.Input("positive", tooltip="The edit prompt: what the clip should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show. Not used at cfg 1."),
                io.Latent.Input("noise", tooltip=NOISE_TOOLTIP),
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
    def execute(cls, model, positive, negative, noise, cfg) -> io.NodeOutput:
        node = "DDIM Sampler"
        _host.unet_of(model, node)
        sigmas = _host.sampling_sigmas(model, noise, node)
        _host.check_conditioning([*positive, *negative], noise, node)
        _host.check_channels(model, noise["samples"], node)
        _host.warn_of_start(model, noise, sigmas[0], partial(_host.report_status, cls))
        options = {"node": node, "callback": _host.preview(model, len(sigmas) - 1)}
        return io.NodeOutput(_host.run(model, ddim.sample, noise, sigmas, positive, negative, cfg, **options))


class DDIMSamplerSelect(io.ComfyNode):
    """The step function of DDIM Sampler for the stock SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSamplerSelect",
            display_name="COVE DDIM Sampler (for SamplerCustomAdvanced)",
            category="COVE/edit",
            description="The sampler and the sigmas of DDIM Sampler, for SamplerCustomAdvanced with any guider. Give "
            "that node DisableNoise and the noise from DDIM Inversion.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the guider has."),
                io.Latent.Input("noise", tooltip=NOISE_TOOLTIP),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, noise) -> io.NodeOutput:
        node = "DDIM Sampler (for SamplerCustomAdvanced)"
        _host.unet_of(model, node)
        sigmas = _host.sampling_sigmas(model, noise, node)
        _host.check_channels(model, noise["samples"], node)
        report = partial(_host.report_status, cls)
        _host.warn_of_start(model, noise, sigmas[0], report)
        return io.NodeOutput(KSAMPLER(partial(_host.sample_from_noise, report)), sigmas)


NODES = [DDIMInversion, DDIMSampler, DDIMSamplerSelect]
