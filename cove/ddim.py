"""DDIM inversion and sampling: one step, run in either direction.

DDIM (arXiv 2010.02502) without noise is Euler's method in (x / sqrt(alpha_bar), sigma), the coordinates of
k-diffusion and ComfyUI. COVE (arXiv 2406.08850), section 3.1, Eq. 3, where `sqrt(1 / (alpha - 1))` is a misprint for
`sqrt(1 / alpha - 1)`, which is sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_MIXING = 1.0  # weight of the previous iterate: without a limit, two residuals that are almost equal extrapolate far


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
        disable: part of the signature; progress is reported by the callback.

    Returns:
        x at sigmas[-1].

    Raises:
        ValueError: sigmas do not descend.
        FloatingPointError: a step gave NaN or Inf.
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


class InversionStep(NamedTuple):
    """One finished step of an inversion.

    i: number of the step, from 0.
    sigma: where it ended, sigmas[i + 1].
    x: latents at that sigma.
    denoised: the model's last answer.
    residual: by how much a sampling step back misses, as a share of the norm of x; measured at the last guess.
    stopped: whether refining stopped because it made the residual grow.
    """

    i: int
    sigma: Tensor
    x: Tensor
    denoised: Tensor
    residual: float
    stopped: bool


def invert(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    refinements: int = 1,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DDIM inversion in k-diffusion's signature: the noise from which DDIM sampling returns `x`.

    `inversion_steps` describes the method and the arguments.

    Args:
        callback: called after each step with x, i, sigma, denoised, residual and stopped.
        disable: part of the signature; progress is reported by the callback.

    Returns:
        x at sigmas[-1].
    """
    for taken in inversion_steps(model, x, sigmas, refinements, extra_args):
        x = taken.x
        if callback is not None:
            callback(taken._asdict())
    return x


@torch.no_grad()
def inversion_steps(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    refinements: int = 1,
    extra_args: dict[str, Any] | None = None,
    done: int = 0,
    before: Tensor | None = None,
    extrapolate: bool = True,
) -> Iterator[InversionStep]:
    """Yield the steps of a DDIM inversion.

    The sampling step from sigma_b to sigma_a evaluates the model at (x_b, sigma_b). Its inverse is a fixed point:
    x_b = x_a + (sigma_b - sigma_a) * direction(x_b, sigma_b). The first guess of x_b goes on in the direction of the
    step before, which is exact to first order and costs nothing. Each refinement evaluates the model once more, at what
    the last evaluation gave, and mixes both by Anderson acceleration of depth 1 (Pan et al., arXiv 2309.04907). A
    refinement that increases the residual is rejected: the step then ends with the guess of the smallest residual.

    Args:
        model: model(x, sigma of each sample, **extra_args) -> denoised x.
        x: clean latents, [frames, ...]; or those at sigmas[done], to resume.
        sigmas: ascending from 0, [steps + 1].
        refinements: further evaluations of the model in each step.
        done: number of steps taken before.
        before: latents at sigmas[done - 1], if `done` is not 0.
        extrapolate: False: the first guess is x scaled by the model's input scaling, as in diffusers'
            DDIMInverseScheduler. The first step always starts so.

    Raises:
        ValueError: sigmas do not ascend, or refinements are negative.
        FloatingPointError: a step gave NaN or Inf.
    """
    extra_args = extra_args or {}
    if refinements < 0:
        raise ValueError(f"refinements must be 0 or more, got {refinements}")
    if not (sigmas[:-1] < sigmas[1:]).all():
        raise ValueError(f"sigmas must ascend to invert, got {sigmas.tolist()}")
    for i in range(done, len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        if extrapolate and before is not None:
            guess = step(x, (x - before) / (sigma - sigmas[i - 1]), sigma, sigma_next)
        else:
            guess = x * ((1 + sigma_next**2) / (1 + sigma**2)).sqrt()
        found, best, stopped = _solve(partial(_evaluate, model, x, sigmas, i, extra_args), guess, refinements)
        before, x = x, found
        yield InversionStep(i, sigma_next, x, best.denoised, best.miss / (float(x.norm()) or 1.0), stopped)


class _Iterate(NamedTuple):
    """One evaluation of a fixed-point equation. miss: norm of result - guess."""

    guess: Tensor
    result: Tensor
    denoised: Tensor
    miss: float


def _evaluate(
    model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, i: int, extra_args: dict[str, Any], guess: Tensor
) -> _Iterate:
    """Return what x at sigmas[i] becomes at sigmas[i + 1] by the model's answer at `guess`."""
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    denoised = model(guess, sigma_next.expand(len(x)), **extra_args)
    result = step(x, (guess - denoised) / sigma_next, sigma, sigma_next)
    _check_finite(result, "inversion", i, len(sigmas) - 1, sigma_next)
    return _Iterate(guess, result, denoised, float((result - guess).norm()))


def _solve(evaluate: Callable[[Tensor], _Iterate], guess: Tensor, refinements: int) -> tuple[Tensor, _Iterate, bool]:
    """Return the fixed point of `evaluate`, the iterate of the smallest miss, and whether refining stopped early."""
    best = evaluate(guess)
    candidate = best.result
    for _ in range(refinements):
        refined = evaluate(candidate)
        if refined.miss > best.miss:
            return best.guess, best, True
        best, candidate = refined, _mix(best, refined)
    return candidate, best, False


def _mix(first: _Iterate, second: _Iterate) -> Tensor:
    """Anderson acceleration of depth 1, for each frame: the combination of both with the smallest linearised miss."""
    residual = (second.result - second.guess).flatten(1).float()
    change = residual - (first.result - first.guess).flatten(1).float()
    weight = (residual * change).sum(1) / change.square().sum(1).clamp_min(torch.finfo(change.dtype).tiny)
    weight = weight.clamp(-MAX_MIXING, MAX_MIXING).view(-1, *[1] * (second.result.ndim - 1))
    return second.result - weight.to(second.result) * (second.result - first.result)


def _check_finite(x: Tensor, what: str, i: int, steps: int, sigma: Tensor) -> None:
    if not torch.isfinite(x).all():
        frames = [f for f in range(len(x)) if not torch.isfinite(x[f]).all()]
        raise FloatingPointError(
            f"NaN or Inf in the latents at {what} step {i + 1} of {steps} (sigma {float(sigma):.4g}), in frames "
            f"{frames[:8]}. Half precision overflowing is the usual cause: run the model in fp32 or bf16."
        )
