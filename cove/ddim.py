"""DDIM inversion and sampling: one step, run in either direction.

DDIM (arXiv 2010.02502) without noise is Euler's method in (x / sqrt(alpha_bar), sigma), the coordinates of
k-diffusion and ComfyUI. COVE (arXiv 2406.08850), section 3.1, Eq. 3, where `sqrt(1 / (alpha - 1))` is a misprint for
`sqrt(1 / alpha - 1)`, which is sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
MOST_STEPS = TRAIN_TIMESTEPS - 1  # grids begin at timestep 1, and the last timestep is 999


def sampling_timesteps(steps: int) -> list[int]:
    """Timesteps 1, 1 + d, 1 + 2d, ... with d = floor(1000 / steps), ascending: for 50 steps 1, 21, ..., 981."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be from 1 to {MOST_STEPS}, got {steps}")
    return [1 + i * (TRAIN_TIMESTEPS // steps) for i in range(steps)]


def inversion_timesteps(steps: int, sampling_steps: int) -> list[int]:
    """The grid of `steps` as far as sampling with `sampling_steps` starts: for 100 and 50 it is 1, 11, ..., 981.

    ValueError when the finer grid does not pass through all of the other.
    """
    grid, wanted = sampling_timesteps(steps), sampling_timesteps(sampling_steps)
    missed = set(wanted) - set(grid)
    if missed:
        meeting = [n for n in range(1, MOST_STEPS + 1) if set(wanted) <= set(sampling_timesteps(n))]
        nearest = sorted(sorted(meeting, key=lambda n: abs(n - steps))[:3])
        raise ValueError(
            f"{steps} inversion steps (timesteps {_spell(grid)}) miss {len(missed)} of the timesteps of "
            f"{sampling_steps} sampling steps ({_spell(wanted)}). "
            f"Numbers of inversion steps near it that miss none: {_spell(nearest)}."
        )
    return grid[: grid.index(wanted[-1]) + 1]


def _spell(grid: list[int]) -> str:
    return ", ".join(map(str, grid if len(grid) < 5 else [*grid[:2], "...", grid[-1]]))


def step(x: Tensor, direction: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One DDIM step from `sigma` to `sigma_next`, either way; `direction` is the noise that the model predicts."""
    return x + (sigma_next - sigma) * direction


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DDIM sampling with eta = 0, in k-diffusion's signature.

    Args:
        model: model(x, sigma of each sample, **extra_args) -> denoised x.
        x: noise at sigmas[0], [frames, ...].
        sigmas: descending to 0, [steps + 1].
        callback: called before each step with x, i, sigma and denoised.
        disable: taken for the signature's sake; progress is the callback's.

    Returns:
        x at sigmas[-1]. FloatingPointError at the first step that gives NaN or Inf.
    """
    extra_args = extra_args or {}
    if not (sigmas[:-1] > sigmas[1:]).all():
        raise ValueError(f"sigmas must descend to sample, got {sigmas.tolist()}")
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = step(x, (x - denoised) / sigma, sigma, sigma_next)
        _check_finite(x, "sampling", i, len(sigmas) - 1, sigma)
    return x


@torch.no_grad()
def invert(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    refinements: int = 1,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    done: int = 0,
) -> Tensor:
    """DDIM inversion: the noise that DDIM sampling turns into `x`, in k-diffusion's signature.

    The step that sampling takes from sigma_b to sigma_a uses the model at (x_b, sigma_b). Inverting it, x_b is not
    known: the first guess is x_a, scaled to the size that the model sees at sigma_a (what diffusers'
    DDIMInverseScheduler does), and each refinement puts the x_b found in its place (fixed-point iteration; Pan et al.,
    arXiv 2309.04907). A refinement is one more call of the model a step.

    Where refining makes the residual grow, the step ends with the guess that had the smallest.

    Args:
        model: model(x, sigma of each sample, **extra_args) -> denoised x.
        x: clean latents, [frames, ...]; or those at sigmas[done], to go on with an inversion that was broken off.
        sigmas: ascending from 0, [steps + 1].
        refinements: fixed-point iterations a step; 0 is diffusers' one-shot inversion.
        callback: called after each step with x, i, sigma, denoised, and
            guess: where the model gave the answer that x rests on; where the residual grew, x itself;
            residual: by how much the last refinement changed x, as a share of its norm; where the residual grew, by
            how much sampling a step back from x misses (NaN without refinements);
            grew: whether the residual grew, so that refining stopped.
        disable: taken for the signature's sake; progress is the callback's.
        done: steps taken before.

    Returns:
        x at sigmas[-1]. FloatingPointError at the first step that gives NaN or Inf.
    """
    extra_args = extra_args or {}
    if refinements < 0:
        raise ValueError(f"refinements must be 0 or more, got {refinements}")
    if not (sigmas[:-1] < sigmas[1:]).all():
        raise ValueError(f"sigmas must ascend to invert, got {sigmas.tolist()}")
    for i in range(done, len(sigmas) - 1):
        refine = partial(_refine, model, x, sigmas, i, extra_args)
        guess = x * ((1 + sigmas[i + 1] ** 2) / (1 + sigmas[i] ** 2)).sqrt()
        inverted, denoised, miss = refine(guess)
        grew = False
        for _ in range(refinements):
            refined, denoised_there, miss_there = refine(inverted)
            grew = miss_there > miss
            if grew:
                inverted = guess
                break
            guess, inverted, denoised, miss = inverted, refined, denoised_there, miss_there
        x = inverted
        residual = miss / (float(x.norm()) or 1.0) if refinements else math.nan
        if callback is not None:
            found = {"guess": guess, "residual": residual, "grew": grew}
            callback({"x": x, "i": i, "sigma": sigmas[i + 1], "denoised": denoised, **found})
    return x


def _refine(
    model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, i: int, extra_args: dict[str, Any], guess: Tensor
) -> tuple[Tensor, Tensor, float]:
    """What x at sigmas[i] becomes by the model's answer at `guess`; that answer; how far the guess is from it."""
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    denoised = model(guess, sigma_next.expand(len(x)), **extra_args)
    refined = step(x, (guess - denoised) / sigma_next, sigma, sigma_next)
    _check_finite(refined, "inversion", i, len(sigmas) - 1, sigma_next)
    return refined, denoised, float((refined - guess).norm())


def _check_finite(x: Tensor, what: str, i: int, steps: int, sigma: Tensor) -> None:
    if not torch.isfinite(x).all():
        frames = [f for f in range(len(x)) if not torch.isfinite(x[f]).all()]
        raise FloatingPointError(
            f"NaN or Inf in the latents at {what} step {i + 1} of {steps} (sigma {float(sigma):.4g}), in frames "
            f"{frames[:8]}. Half precision overflowing is the usual cause: run the model in fp32 or bf16."
        )
