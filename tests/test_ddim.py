"""DDIM inversion and sampling against a model with a closed form, against diffusers, and their errors."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from cove.ddim import inversion_steps, invert, sample, step
from cove.schedule import Schedule
from tests.method_helpers import randn

# Stable Diffusion's noise schedule.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def ascending(timesteps):
    return torch.cat((torch.zeros(1, dtype=torch.float64), SIGMAS[timesteps]))


# Latents of independent Gaussian values with deviations from 0.25 to 1; their optimal denoiser has a closed form.
DEVIATION = torch.linspace(0.25, 1, 7 * 11, dtype=torch.float64).view(7, 11)


def gaussian(x, sigma):
    sigma = sigma.view(-1, 1, 1)
    return x * DEVIATION**2 / (DEVIATION**2 + sigma**2)


def up_and_down(steps, multiple=1):
    """Return the sigmas of inversion and of sampling."""
    schedule = Schedule(steps, multiple)
    return ascending(schedule.inversion), ascending(schedule.sampling).flip(0)


def last_of(steps):
    *_, last = steps
    return last


def round_trip_error(steps, refinements, multiple=1, **options):
    x = DEVIATION * randn(3, 7, 11, dtype=torch.float64)
    up, down = up_and_down(steps, multiple)
    noise = last_of(inversion_steps(gaussian, x, up, refinements, **options)).x
    return float((sample(gaussian, noise, down) - x).norm() / x.norm())


@pytest.mark.parametrize(
    ("refinements", "percent", "scaled"), [(0, 0.41, 2.3), (1, 0.020, 0.041), (2, 0.0014, 0.0027), (3, 9e-5, 1.3e-4)]
)
def test_invert_round_trip_error_of_fifty_steps(refinements, percent, scaled):
    """Extrapolating the previous step reduces the error fivefold without refinements."""
    for expected, extrapolate in ((percent, True), (scaled, False)):
        error = 100 * round_trip_error(50, refinements, extrapolate=extrapolate)
        print(f"{refinements} refinements, extrapolate {extrapolate}: {error:.6f} %")
        assert expected / 1.5 < error < expected * 1.5


def test_inversion_steps_first_guess_is_first_order_accurate():
    """Doubling the steps quarters the error of extrapolation and halves that of scaling."""
    for extrapolate, ratio in ((True, 4), (False, 2)):
        errors = [round_trip_error(steps, 0, extrapolate=extrapolate) for steps in (25, 50, 100, 200)]
        assert all(0.7 * ratio < coarser / finer < 1.3 * ratio for coarser, finer in pairwise(errors)), errors


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_invert_error_shrinks_with_steps(refinements):
    errors = [round_trip_error(steps, refinements) for steps in (25, 50, 100, 200)]
    assert all(finer < 0.75 * coarser for coarser, finer in pairwise(errors))


def test_invert_with_a_multiple_has_an_error_independent_of_refinements():
    """Inversion takes other steps than sampling, and refinements do not reduce that error."""
    plain, refined = (round_trip_error(50, refinements, multiple=2) for refinements in (1, 3))
    assert plain > 20 * round_trip_error(50, 1) and abs(plain - refined) < 0.01 * plain


def test_invert_one_refinement_solves_a_linear_model_of_one_scale():
    """On such a model, Anderson acceleration of depth 1 is the secant method."""
    x = randn(3, 7, 11, dtype=torch.float64)
    up, down = up_and_down(20)

    def model(x, sigma):
        return x * 0.5 / (0.5 + sigma.view(-1, 1, 1) ** 2)

    assert_close(sample(model, invert(model, x, up, 1), down), x, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sample(model, invert(model, x, up, 0), down), x, rtol=1e-4, atol=1e-4)


def test_invert_matches_the_exact_flow_of_gaussian_data():
    """For N(0, s^2) data the exact flow is x * sqrt(1 + sigma^2 / s^2)."""
    x = DEVIATION * randn(3, 7, 11, dtype=torch.float64)
    sigmas = ascending(range(1, 1000))
    exact = x * (1 + (sigmas[-1] / DEVIATION) ** 2).sqrt()
    assert (invert(gaussian, x, sigmas, 2) - exact).norm() < 0.02 * exact.norm()


def epsilon(x, timestep):
    """A nonlinear noise prediction, in diffusers' scaling."""
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, -1)) * (0.4 + timestep / 1500)


def nonlinear(x, sigma):
    timestep = (SIGMAS - sigma[0]).abs().argmin()
    return x - sigma[0] * epsilon(x / (1 + sigma[0] ** 2).sqrt(), timestep)


def diffusers_loop(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(epsilon(x, timestep), timestep, x).prev_sample
    return x


@pytest.fixture(scope="module")
def schedulers():
    """diffusers' inverse and forward DDIM schedulers with SD's settings and a last alpha of 1.

    Their "leading" timesteps are 1 + i * (1000 // steps), equal to ours if steps divide 1000.
    """
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    config = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="leading",
    )
    return DDIMInverseScheduler(**config), DDIMScheduler(**config)


@pytest.mark.parametrize("steps", [8, 20, 50])
def test_invert_and_sample_match_diffusers(schedulers, steps):
    timesteps = Schedule(steps).sampling
    x, sigmas = randn(3, 5, 7, 11, dtype=torch.float64), ascending(timesteps)
    scale = (1 + sigmas[-1] ** 2).sqrt()
    inverse, forward = schedulers
    found = last_of(inversion_steps(nonlinear, x, sigmas, 0, extrapolate=False)).x
    assert_close(found / scale, diffusers_loop(inverse, x, steps), atol=1e-4, rtol=1e-4)
    assert inverse.timesteps.tolist() == timesteps
    assert_close(sample(nonlinear, x * scale, sigmas.flip(0)), diffusers_loop(forward, x, steps), atol=1e-4, rtol=1e-4)
    assert forward.timesteps.tolist() == timesteps[::-1]


def test_invert_with_refinements_is_the_inverse_on_a_nonlinear_model():
    x, sigmas = randn(3, 5, 7, 11, dtype=torch.float64), ascending(Schedule(50).sampling)
    assert_close(sample(nonlinear, invert(nonlinear, x, sigmas, 30), sigmas.flip(0)), x, atol=1e-4, rtol=1e-4)


def test_step_is_reversible():
    x, direction = randn(2, 5, 7)
    there = step(x, direction, torch.tensor(0.5), torch.tensor(2.0))
    assert_close(there, x + 1.5 * direction)
    assert_close(step(there, direction, torch.tensor(2.0), torch.tensor(0.5)), x)


UP = torch.tensor([0, 0.5, 1, 2, 4])
RUNS = [(invert, UP), (sample, UP.flip(0))]


@pytest.mark.parametrize(("run", "sigmas"), RUNS)
def test_invert_and_sample_stop_at_the_step_of_a_nan(run, sigmas):
    calls = []

    def broken(x, sigma):
        calls.append(float(sigma[0]))
        return x.clone().index_fill_(0, torch.tensor(1), float("nan") if sigma[0] == 2 else 0.5)

    step = 3 if run is invert else 2
    with pytest.raises(FloatingPointError, match=rf"step {step} of 4 \(sigma 2\), in frames \[1\]"):
        run(broken, randn(3, 5, 7), sigmas)
    assert calls[-1] == 2


@pytest.mark.parametrize(("run", "sigmas"), RUNS)
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 2, 1, 3, 4], [0, 1, 1, 3, 4]])
def test_invert_and_sample_refuse_unsorted_sigmas(run, sigmas, order):
    with pytest.raises(ValueError, match="sigmas must"):
        run(lambda x, sigma: x, randn(3, 5, 7), sigmas[order])


def test_invert_refuses_negative_refinements():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        invert(gaussian, randn(3, 7, 11), UP, -1)


def plain_inversion(model, x, sigmas, refinements, before=None):
    """Invert in a plain loop, frame by frame; return latents, residual and whether refining stopped for each step."""
    found = []
    for i in range(len(sigmas) - 1):
        a, b = sigmas[i], sigmas[i + 1]
        answer = lambda guess: x + (b - a) * (guess - model(guess, b.expand(len(x)))) / b  # noqa: B023, E731
        guess = x * ((1 + b**2) / (1 + a**2)).sqrt()
        if before is not None:
            guess = x + (b - a) * (x - before) / (a - sigmas[i - 1])
        result = answer(guess)
        candidate, stopped = result, False
        for _ in range(refinements):
            refined = answer(candidate)
            if (refined - candidate).norm() > (result - guess).norm():
                candidate, stopped = guess, True
                break
            mixed = []
            for frame in range(len(x)):
                now, then = (refined - candidate)[frame].flatten(), (result - guess)[frame].flatten()
                weight = float(now @ (now - then) / max(float((now - then) @ (now - then)), 1e-300))
                weight = max(-1.0, min(1.0, weight))
                mixed.append((1 - weight) * refined[frame] + weight * result[frame])
            guess, result, candidate = candidate, refined, torch.stack(mixed)
        before, x = x, candidate
        found.append((x, float((result - guess).norm() / x.norm()), stopped))
    return found


@pytest.mark.parametrize("refinements", [0, 1, 2, 3, 7])
def test_invert_matches_a_plain_loop_and_reports_each_step(refinements):
    calls, reported = [], []

    def model(x, sigma, **extra):
        assert extra == {"seed": 5} and sigma.shape == (3,) and not torch.is_grad_enabled()
        calls.append(float(sigma[0]))
        return nonlinear_3d(x, sigma)

    x = randn(3, 7, 11, dtype=torch.float64)
    found = invert(model, x, UP.double(), refinements, {"seed": 5}, reported.append, disable=True)
    assert [t["i"] for t in reported] == [0, 1, 2, 3] and [float(t["sigma"]) for t in reported] == UP[1:].tolist()
    assert torch.equal(reported[-1]["x"], found)
    expected = plain_inversion(nonlinear_3d, x, UP.double(), refinements)
    assert len(calls) <= 4 * (refinements + 1) and calls == sorted(calls)
    for t, (latents, residual, stopped) in zip(reported, expected, strict=True):
        assert_close(t["x"], latents)
        assert t["residual"] == pytest.approx(residual, rel=1e-6, abs=1e-12) and t["stopped"] == stopped
        assert t["denoised"].shape == x.shape


def nonlinear_3d(x, sigma):
    return x - sigma.view(-1, 1, 1) * torch.tanh(0.7 * x + 0.3 * x.roll(1, -1)) * (0.4 + 0.1 * sigma.view(-1, 1, 1))


def test_sample_reports_each_step():
    reported = []

    def model(x, sigma, **extra):
        assert extra == {"seed": 5} and sigma.shape == (3,) and not torch.is_grad_enabled()
        return gaussian(x, sigma)

    x, sigmas = randn(3, 7, 11, dtype=torch.float64), UP.double().flip(0)
    found = sample(model, x, sigmas, {"seed": 5}, reported.append, disable=True)
    assert [t["i"] for t in reported] == [0, 1, 2, 3] and torch.equal(reported[0]["x"], x)
    assert [float(t["sigma"]) for t in reported] == [float(t["sigma_hat"]) for t in reported] == sigmas[:-1].tolist()
    for t in reported:
        assert torch.equal(t["denoised"], gaussian(t["x"], t["sigma"].expand(3)))
    assert_close(found, reported[-1]["denoised"])  # the last step ends at sigma 0


# --- divergence of refining ---

# Steps of slope (sigma_b - sigma_a) * SLOPE: the iteration oscillates around the fixed point, and diverges in the step
# across the gap.
GAP = torch.tensor([0, 0.1, 0.2, 0.9, 0.95, 1.0], dtype=torch.float64)
GAP_STEP = 2
SLOPES = torch.linspace(-9, 9, 11, dtype=torch.float64)
REST, START = randn(3, 7, 11, dtype=torch.float64), randn(3, 7, 11, seed=1, dtype=torch.float64)


def steep(x, sigma):
    return x - sigma.view(-1, 1, 1) * SLOPES * (x - REST)


@pytest.mark.parametrize("refinements", [1, 2, 3, 4, 7])
def test_inversion_steps_rejects_a_refinement_that_increases_the_residual(refinements):
    reported = list(inversion_steps(steep, START, GAP, refinements))
    assert [t.stopped for t in reported] == [i == GAP_STEP for i in range(5)]
    before, found = reported[GAP_STEP - 1], reported[GAP_STEP]
    sigma, sigma_next = GAP[GAP_STEP], GAP[GAP_STEP + 1]
    guess = before.x + (sigma_next - sigma) * (before.x - reported[0].x) / (sigma - GAP[1])
    assert_close(found.x, guess)  # where the model was evaluated and the residual is known
    back = found.x + (sigma - sigma_next) * (found.x - steep(found.x, sigma_next.expand(3))) / sigma_next
    assert found.residual == pytest.approx(float((back - before.x).norm() / found.x.norm()))
    assert torch.isfinite(reported[-1].x).all()


def test_inversion_steps_stops_evaluating_when_refining_diverges():
    asked = []
    list(inversion_steps(lambda x, sigma: asked.append(float(sigma[0])) or steep(x, sigma), START, GAP, 7))
    counts = [asked.count(float(sigma)) for sigma in GAP[1:]]
    assert counts == [2 if i == GAP_STEP else 8 for i in range(5)]


def test_inversion_steps_limits_extrapolation_of_nearly_equal_residuals():
    """A model that moves all latents by almost the same amount, so that the secant extrapolates far."""

    def model(x, sigma):
        sigma = sigma.view(-1, 1, 1)
        return x - sigma * 0.999 * (x - REST) / sigma

    x = START
    (taken,) = inversion_steps(model, x, torch.tensor([0.0, 1.0], dtype=torch.float64), 1)
    guess = x * 2**0.5
    refined = x + 0.999 * (x + 0.999 * (guess - REST) - REST)
    first = x + 0.999 * (guess - REST)
    assert_close(taken.x, refined + (refined - first))  # the weight is limited to 1


# --- resuming ---


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize(("model", "refinements"), [(gaussian, 0), (gaussian, 2), (steep, 7)])
def test_inversion_steps_resumed_is_bit_identical(model, refinements, done):
    whole = list(inversion_steps(model, START, GAP, refinements))
    trajectory = [START, *(taken.x for taken in whole)]
    before = trajectory[done - 1] if done else None
    rest = list(inversion_steps(model, trajectory[done], GAP, refinements, done=done, before=before))
    assert [taken.i for taken in rest] == list(range(done, 5))
    for found, expected in zip(rest, whole[done:], strict=True):
        assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("done", [1, 2])
def test_inversion_steps_resumed_reports_a_nan_at_its_step(done, refinements):
    def broken(x, sigma):
        return x / (sigma[0] != 2)  # 0 / 0 and x / 0

    x = randn(3, 5, 7)
    with pytest.raises(FloatingPointError, match=r"inversion step 3 of 4 \(sigma 2\), in frames \[0, 1, 2\]"):
        list(inversion_steps(broken, x, UP, refinements, done=done, before=x))
