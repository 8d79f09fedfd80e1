"""The source branch: the inverted clip, run through the UNet beside the edit, on its own latents and prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor

from ...cove.inversion import Inversion
from .format import format_sigmas
from .frames import check_no_reference, check_rows, cut_conds, frames_in
from .run_info import area_of, options_with
from .start import start_warnings

# In transformer_options, for the calls of the UNet within: what takes or gives features (Feature Injection), what
# stands in for self-attention (TokenFlow), and whether the call is of a source branch.
FEATURES, ATTENTION, RUNNING = "cove_features", "cove_attention", "cove_source_running"


@dataclass(frozen=True, eq=False)
class SourceBranch:
    """What a node needs to run the source. Nothing in it changes in a run.

    key: of the node's wrappers; the prompt made ready for a run is published under it.
    conditioning: the source prompt; None when there is none.
    report: shows a line to the user, as `report_status` does.
    """

    inversion: Inversion
    conditioning: list | None
    key: str
    node: str
    report: Callable[..., None]

    def __deepcopy__(self, memo: dict) -> SourceBranch:
        """Itself: MODEL.clone() copies its options deeply, and an inversion is large."""
        return self

    def load_with(self, model) -> None:
        """Have the ControlNets of the prompt loaded whenever this clone of MODEL is."""
        if self.conditioning is not None:
            conds = {"source": comfy.sampler_helpers.convert_cond(self.conditioning)}
            nets, _ = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
            model.set_additional_models(self.key, nets)

    def check_clip(self, noise: Tensor) -> None:
        """An error when other latents are sampled than the inversion is of."""
        if noise.shape != self.inversion.clip.shape:
            raise ValueError(
                f"{self.node}: the inversion is of latents {list(self.inversion.clip.shape)}, but {list(noise.shape)} "
                f"are sampled. Give the sampler the noise of the same inversion."
            )

    def warn_of_start(self, guider, sigma: Tensor, noise: Tensor, latent_image: Tensor) -> None:
        """A warning when a run starts at `sigma` from other latents than the noise of this inversion, or attends
        otherwise."""
        start = guider.inner_model.model_sampling.noise_scaling(sigma, noise, latent_image, False)
        warnings = start_warnings(start, float(sigma), self.inversion.about, guider.model_options)
        inverted = self.inversion.noise.to(start)
        ends_here = self.inversion.step_at(float(sigma)) == self.inversion.schedule.steps - 1
        if not warnings and ends_here and (start - inverted).norm() > 0.05 * inverted.norm():
            warnings.append("sampling starts from other latents than the noise of this inversion")
        if warnings:
            self.report("; ".join(warnings), logging.WARNING)

    def check_prompt(self) -> None:
        """Raise when the source cannot run beside an edit: as `check_source_prompt`, or its prompt has hooks."""
        check_source_prompt(self.inversion, self.conditioning, self.node)
        if any(extras.get("hooks") for _, extras in self.conditioning):
            raise ValueError(
                f"{self.node}: the source prompt carries hooks (a LoRA on the prompt), which the host does not load "
                f"for a source that runs beside the edit. Put the LoRA on the model."
            )

    @contextmanager
    def ready(self, guider, extra_args: dict[str, Any], noise: Tensor) -> Iterator[dict[str, Any]]:
        """For a run: its extra_args, with the prompt made ready as the host makes ready those of the guider."""
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
        """The sampling step at `sigma`; an error for a sampler that evaluates the model elsewhere."""
        self.check_meets([sigma])
        return self.inversion.step_at(sigma)

    def check_meets(self, sigmas: list[float]) -> None:
        """An error when sampling evaluates the model where the source is not known."""
        missed = [sigma for sigma in sigmas if self.inversion.step_at(sigma) is None]
        if missed:
            known = self.inversion.sigmas[1:].flip(0).tolist()
            raise ValueError(
                f"{self.node}: expected the sigmas of the inversion ({format_sigmas(known)}), got "
                f"{format_sigmas(sigmas)}; {len(missed)} of {len(sigmas)} do not match. Sample with DDIM Sampler, or "
                "with the sampler and the sigmas of DDIM Sampler (for SamplerCustomAdvanced)."
            )

    def run(self, executor, model, step: int, x_in: Tensor, timestep: Tensor, model_options, **published) -> None:
        """Evaluate the source at a step of its inversion, on the frames in the batch, with `executor`."""
        latents, prompt = self.inversion.latents[step], [list(model_options["transformer_options"][self.key])]
        frames, clip = frames_in(model_options["transformer_options"]), len(latents)
        if frames is not None:
            latents, prompt = latents[list(frames)], cut_conds(prompt, range(clip), frames, clip)
        # Nothing of what is done to the edit is done to the source.
        published = {FEATURES: None, ATTENTION: None, RUNNING: True, **published}
        executor(model, prompt, latents.to(x_in), timestep, options_with(model_options, **published))


def check_source_prompt(inversion: Inversion, conditioning, node: str) -> None:
    """Raise when the source cannot be run: no prompt, a reference ControlNet, or rows of another clip's frames."""
    if conditioning is None:
        raise ValueError(
            f"{node}: expected the source prompt, which this inversion does not hold (it had a ControlNet, an area, or "
            f"several entries). Connect the conditioning of DDIM Inversion."
        )
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    check_no_reference(conds, node)
    check_rows(conds, inversion.frames, node)


def check_one_prompt(options: dict[str, Any], node: str, before: Any = None) -> Any:
    """The uuid of what runs as the source; an error when that is more than one prompt for the whole picture.

    before: the uuid that ran before it, if any: where memory is short, the host runs conditionings one after another.
    """
    uuids = options["uuids"]
    if len(uuids) != 1 or before not in (None, uuids[0]) or area_of(options, uuids[0]) is not None:
        raise ValueError(
            f"{node}: features can be taken of one source prompt for the whole picture, but several conditionings or "
            f"one with an area ran. Use a plain prompt."
        )
    return uuids[0]
