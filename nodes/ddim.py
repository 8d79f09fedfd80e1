"""DDIM Inversion and DDIM Sampler: from a clip to its noise, and back with another prompt."""

from __future__ import annotations

from functools import partial

from comfy.samplers import KSAMPLER
from comfy_api.v0_0_2 import io

from ..cove import ddim
from ..cove.schedule import MAX_STEPS, Schedule
from . import host

NOISE_TOOLTIP = "From DDIM Inversion or Load Inversion. Its schedule sets the number of steps."


class DDIMInversion(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.1, Eq. 3, with fixed-point refinement of every step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMInversion",
            display_name="COVE DDIM Inversion",
            category="COVE/edit",
            description="Computes the noise from which DDIM sampling returns the clip, with the same model and prompt "
            "at cfg 1.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample, with Correspondence Attention."),
                io.Conditioning.Input("conditioning", tooltip="Source prompt: what the clip shows. It can be empty."),
                io.Latent.Input("latent", tooltip="The clip's frames from VAE Encode."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Sampling steps, also for the sampler, Feature Injection and TokenFlow. More steps return "
                    "the clip more exactly and take longer. The paper uses 50.",
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
                    tooltip="Additional model evaluations per step; each costs as much time as the inversion without "
                    "any. A refinement that makes a step less exact is undone. The paper uses 0.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise"),
                host.wires.Inversion.Output(
                    display_name="inversion", tooltip="For Feature Injection, TokenFlow and Save Inversion."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(cls, model, conditioning, latent, steps, multiple, refinements) -> io.NodeOutput:
        host.unet.unet_of(model)
        host.checks.check_without(model, host.options.INJECTION, host.options.TOKENFLOW)
        host.checks.check_no_step_cache(model.wrappers)
        schedule = Schedule(steps, multiple)
        host.checks.check_channels(model, latent["samples"])
        host.checks.check_unmasked(latent)
        host.checks.check_conditioning(conditioning, len(latent["samples"]))
        return io.NodeOutput(*host.inversion.invert(model, conditioning, latent, schedule, refinements, cls))


class DDIMSampler(io.ComfyNode):
    """DDIM (arXiv 2010.02502) with eta = 0 from inverted noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSampler",
            display_name="COVE DDIM Sampler",
            category="COVE/edit",
            description="Samples the edited clip from the noise of DDIM Inversion.",
            inputs=[
                io.Model.Input("model", tooltip="The same patched model as in DDIM Inversion."),
                io.Conditioning.Input("positive", tooltip="Edit prompt: what the clip should show."),
                io.Conditioning.Input("negative", tooltip="What the clip should not show. Not used at cfg 1."),
                io.Latent.Input("noise", tooltip=NOISE_TOOLTIP),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance. A larger value follows the edit prompt more closely and keeps "
                    "less of the clip. 1 with the source prompt returns the clip, in half the time.",
                ),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(cls, model, positive, negative, noise, cfg) -> io.NodeOutput:
        sigmas = _sigmas(cls, model, noise)
        host.checks.check_conditioning([*positive, *negative], len(noise["samples"]))
        preview = host.status.preview(model, len(sigmas) - 1)
        prompts = {"positive": positive, "negative": negative, "cfg": cfg}
        return io.NodeOutput(host.run.run_sampler(model, ddim.sample, noise, sigmas, **prompts, callback=preview))


class DDIMSamplerSelect(io.ComfyNode):
    """The step function of DDIM Sampler for the stock SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDDIMSamplerSelect",
            display_name="COVE DDIM Sampler (for SamplerCustomAdvanced)",
            category="COVE/edit",
            description="The sampler and the sigmas of DDIM Sampler, for SamplerCustomAdvanced with any guider. "
            "Connect DisableNoise and the noise of DDIM Inversion to that node.",
            inputs=[
                io.Model.Input("model", tooltip="The model of the guider."),
                io.Latent.Input("noise", tooltip=NOISE_TOOLTIP),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @host.errors.named
    def execute(cls, model, noise) -> io.NodeOutput:
        sigmas = _sigmas(cls, model, noise)
        return io.NodeOutput(KSAMPLER(partial(host.noise.sample_from_noise, cls)), sigmas)


def _sigmas(node, model, noise):
    """Return the sigmas of sampling, descending, after checking that MODEL can sample from the noise."""
    host.unet.unet_of(model)
    sigmas = host.noise.sampling_sigmas(model, noise)
    host.checks.check_channels(model, noise["samples"])
    host.noise.warn_of_start(model, noise, sigmas[0], node)
    return sigmas


NODES = [DDIMInversion, DDIMSampler, DDIMSamplerSelect]
