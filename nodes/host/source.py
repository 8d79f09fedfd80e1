"""The source branch: the inverted clip runs through the UNet beside the edit, with its own latents and prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor

from ...cove.inversion import Inversion
from . import options
from .batch import cut_conds
from .checks import check_conditioning, check_no_reference, check_no_step_cache, check_not_compiled
from .errors import NodeError
from .noise import start_warnings
from .options import frames_in, options_with
from .status import format_sigmas, report_status


@dataclass(frozen=True, eq=False)
class SourceBranch:
    """What a node needs to run the source. Nothing in it changes in a run.

    conditioning: the source prompt; None if there is none.
    key: of the node's wrappers; the prompt made ready for a run is published under it.
    node: the node's class.
    """

    inversion: Inversion
    conditioning: list | None
    key: str
    node: type

    def __deepcopy__(self, memo: dict) -> SourceBranch:
        """Itself: MODEL.clone() copies its options deeply, and an inversion is large."""
        return self

    def load_with(self, model) -> None:
        """Load the ControlNets of the prompt whenever this clone of MODEL is loaded."""
        if self.conditioning is not None:
            conds = {"source": comfy.sampler_helpers.convert_cond(self.conditioning)}
            nets, _ = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
            model.set_additional_models(self.key, nets)

    def check_run(self, guider, noise: Tensor, sigmas: list[float], computed: bool) -> None:
        """Raise before a run in which the source cannot run beside the edit.

        Args:
            sigmas: at which the source's features are needed.
            computed: whether the source runs; otherwise its features are stored.
        """
        check_not_compiled(guider.model_patcher)
        check_no_step_cache(guider.model_options["transformer_options"].get("wrappers", {}))
        if noise.shape != self.inversion.clip.shape:
            raise NodeError(
                self.node,
                f"the inversion is of latents {list(self.inversion.clip.shape)}, but {list(noise.shape)} are sampled. "
                f"Connect the noise of the same inversion to the sampler.",
            )
        self.check_meets(sigmas)
        if not computed:
            return
        check_source_prompt(self.inversion, self.conditioning)
        if any(extras.get("hooks") for _, extras in self.conditioning):
            raise ValueError(
                "the source prompt carries hooks (a LoRA on the prompt), which ComfyUI does not load for a source that "
                "runs beside the edit. Put the LoRA on the model."
            )

    def warn_of_start(self, guider, sigma: Tensor, noise: Tensor, latent_image: Tensor) -> None:
        """Warn when a run starts at `sigma` from other latents than this inversion's noise, or with other attention."""
        start = guider.inner_model.model_sampling.noise_scaling(sigma, noise, latent_image, False)
        warnings = start_warnings(start, float(sigma), self.inversion.about, guider.model_options)
        inverted = self.inversion.noise.to(start)
        ends_here = self.inversion.step_at(float(sigma)) == self.inversion.schedule.steps - 1
        if not warnings and ends_here and (start - inverted).norm() > 0.05 * inverted.norm():
            warnings.append("sampling starts from other latents than the noise of this inversion")
        if warnings:
            report_status(self.node, "; ".join(warnings), logging.WARNING)

    @contextmanager
    def ready(self, guider, extra_args: dict[str, Any], noise: Tensor) -> Iterator[dict[str, Any]]:
        """Yield the extra_args of a run with the prompt made ready as the host prepares those of the guider."""
        conds = {"positive": comfy.sampler_helpers.convert_cond(self.conditioning)}
        try:
            # Inpainting models look at the latents for their size, as they did in the inversion.
            options = {"latent_image": self.inversion.clip.to(noise), "seed": extra_args.get("seed")}
            comfy.samplers.process_conds(guider.inner_model, noise, conds, noise.device, **options)
            published = options_with(extra_args["model_options"], **{self.key: tuple(conds["positive"])})
            yield {**extra_args, "model_options": published}
        finally:
            comfy.sampler_helpers.cleanup_models(conds, [])

    def step_at(self, sigma: float) -> int:
        """Return the sampling step at `sigma`; raise for a sampler that evaluates the model elsewhere."""
        self.check_meets([sigma])
        return self.inversion.step_at(sigma)

    def check_meets(self, sigmas: list[float]) -> None:
        """Raise when sampling evaluates the model where the source is not known."""
        missed = [sigma for sigma in sigmas if self.inversion.step_at(sigma) is None]
        if missed:
            known = self.inversion.sigmas[1:].flip(0).tolist()
            raise NodeError(
                self.node,
                f"expected the sigmas of the inversion ({format_sigmas(known)}), got {format_sigmas(sigmas)}; "
                f"{len(missed)} of {len(sigmas)} do not match. Sample with DDIM Sampler, or with the sampler and the "
                f"sigmas of DDIM Sampler (for SamplerCustomAdvanced).",
            )

    def run(self, executor, model, step: int, x_in: Tensor, timestep: Tensor, model_options, **published) -> None:
        """Evaluate the source at a step of its inversion, on the frames in the batch, with `executor`."""
        latents, prompt = self.inversion.latents[step], [list(model_options["transformer_options"][self.key])]
        frames, clip = frames_in(model_options["transformer_options"]), len(latents)
        if frames is not None:
            latents, prompt = latents[list(frames)], cut_conds(prompt, range(clip), frames, clip)
        # Nothing of what is done to the edit is done to the source.
        plain = {options.FEATURES: None, options.SELF_ATTENTION: None, options.SOURCE_RUNNING: True}
        published = {**plain, **published}
        executor(model, prompt, latents.to(x_in), timestep, options_with(model_options, **published))


def check_source_prompt(inversion: Inversion, conditioning) -> None:
    """Raise when the source cannot run: no prompt, a reference ControlNet, or rows of another clip's frames."""
    if conditioning is None:
        raise ValueError(
            "expected the source prompt, which this inversion does not hold (it had a ControlNet, an area, or several "
            "entries). Connect the conditioning of DDIM Inversion; with an area or several entries, a plain prompt."
        )
    check_no_reference(comfy.sampler_helpers.convert_cond(conditioning))
    check_conditioning(conditioning, inversion.frames)
