"""Inversion and sampling: against a model whose answer is a formula, against diffusers, and when things go wrong."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from cove.ddim import inversion_timesteps, invert, sample, sampling_timesteps, step
from tests.method_helpers import randn

# Stable Diffusion's noise schedule.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def ascending(timesteps):
    return torch.cat((torch.zeros(1, dtype=torch.float64), SIGMAS[timesteps]))


# Latents of independent Gaussian values with deviations from 0.25 to 1: the best denoiser of those is a formula.
DEVIATION = torch.linspace(0.25, 1, 7 * 11, dtype=torch.float64).view(7, 11)


def gaussian(x, sigma):
    sigma = sigma.view(-1, 1, 1)
    return x * DEVIATION**2 / (DEVIATION**2 + sigma**2)


def round_trip_error(steps, refinements):
    x = DEVIATION * randn(3, 7, 11, dtype=torch.float64)
    sigmas = ascending(sampling_timesteps(steps))
    found = sample(gaussian, invert(gaussian, x, sigmas, refinements), sigmas.flip(0))
    return float((found - x).norm() / x.norm())


@pytest.mark.parametrize(
    ("refinements", "percent"),
    [(0, 2.4), (1, 0.18), (2, 0.015), (4, 0.0002)],
)
def test_refinements_bring_the_input_back(refinements, percent):
    """50 steps. The errors of design.md, section 3."""
    error = 100 * round_trip_error(50, refinements)
    print(f"{refinements} refinements: {error:.5f} %")
    assert percent / 1.5 < error < percent * 1.5


@pytest.mark.parametrize(("refinements", "bound"), [(1, 0.002), (4, 1e-5)])
def test_fifty_refined_steps_keep_what_is_promised(refinements, bound):
    assert round_trip_error(50, refinements) < bound


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_more_steps_bring_the_input_back(refinements):
    errors = [round_trip_error(steps, refinements) for steps in (25, 50, 100, 200)]
    assert all(finer < 0.75 * coarser for coarser, finer in pairwise(errors))


def test_fifty_refined_steps_are_worth_a_hundred_plain_ones():
    assert round_trip_error(50, 1) < round_trip_error(100, 0)


def test_noise_is_found():
    """Of N(0, s^2) data the exact flow gives x * sqrt(1 + sigma^2 / s^2)."""
    x = DEVIATION * randn(3, 7, 11, dtype=torch.float64)
    sigmas = ascending(range(1, 1000))
    exact = x * (1 + (sigmas[-1] / DEVIATION) ** 2).sqrt()
    assert (invert(gaussian, x, sigmas, 2) - exact).norm() < 0.02 * exact.norm()


def epsilon(x, timestep):
    """A nonlinear model of noise, in diffusers' scaling."""
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
    """diffusers' inverse and forward DDIM scheduler with SD's settings, and a last alpha of 1."""
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


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_equals_diffusers(schedulers, steps):
    x, sigmas = randn(3, 5, 7, 11, dtype=torch.float64), ascending(sampling_timesteps(steps))
    scale = (1 + sigmas[-1] ** 2).sqrt()
    inverse, forward = schedulers
    assert_close(invert(nonlinear, x, sigmas, 0) / scale, diffusers_loop(inverse, x, steps), atol=1e-4, rtol=1e-4)
    assert inverse.timesteps.tolist() == sampling_timesteps(steps)
    assert_close(sample(nonlinear, x * scale, sigmas.flip(0)), diffusers_loop(forward, x, steps), atol=1e-4, rtol=1e-4)
    assert forward.timesteps.tolist() == sampling_timesteps(steps)[::-1]


def test_refined_inversion_is_the_inverse_on_a_nonlinear_model():
    x, sigmas = randn(3, 5, 7, 11, dtype=torch.float64), ascending(sampling_timesteps(50))
    assert_close(sample(nonlinear, invert(nonlinear, x, sigmas, 30), sigmas.flip(0)), x, atol=1e-4, rtol=1e-4)


def test_one_step_runs_both_ways():
    x, direction = randn(2, 5, 7)
    there = step(x, direction, torch.tensor(0.5), torch.tensor(2.0))
    assert_close(there, x + 1.5 * direction)
    assert_close(step(there, direction, torch.tensor(2.0), torch.tensor(0.5)), x)


def test_grids():
    assert sampling_timesteps(50) == list(range(1, 982, 20))
    assert sampling_timesteps(1) == [1] and sampling_timesteps(999) == list(range(1, 1000))
    assert sampling_timesteps(7) == [1 + 142 * i for i in range(7)]
    assert inversion_timesteps(100, 50) == list(range(1, 982, 10))
    assert inversion_timesteps(50, 50) == sampling_timesteps(50)
    assert set(sampling_timesteps(50)) < set(inversion_timesteps(100, 50))
    for steps in (0, 1000):
        with pytest.raises(ValueError, match=f"from 1 to 999, got {steps}"):
            sampling_timesteps(steps)


@pytest.mark.parametrize(("steps", "sampling_steps"), [(150, 50), (60, 30), (34, 30), (25, 50), (3, 4)])
def test_a_mismatch_names_both_grids_and_a_way_out(steps, sampling_steps):
    with pytest.raises(ValueError) as caught:
        inversion_timesteps(steps, sampling_steps)
    message = str(caught.value)
    for count in (steps, sampling_steps):
        assert f"{count} " in message and f"{sampling_timesteps(count)[-1]}" in message
    for offered in message.rstrip(".").rpartition(": ")[2].split(", "):
        met = inversion_timesteps(int(offered), sampling_steps)
        assert set(sampling_timesteps(sampling_steps)) <= set(met) and met[-1] == sampling_timesteps(sampling_steps)[-1]


UP = torch.tensor([0, 0.5, 1, 2, 4])
RUNS = [(invert, UP), (sample, UP.flip(0))]


@pytest.mark.parametrize(("run", "sigmas"), RUNS)
def test_nan_stops_at_its_step(run, sigmas):
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
def test_sigmas_of_the_wrong_direction(run, sigmas, order):
    with pytest.raises(ValueError, match="sigmas must"):
        run(lambda x, sigma: x, randn(3, 5, 7), sigmas[order])


def test_refinements_are_checked():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        invert(gaussian, randn(3, 7, 11), UP, -1)


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_what_the_model_and_the_callback_of_invert_get(refinements):
    calls, told = [], []

    def model(x, sigma, **extra):
        assert extra == {"seed": 5} and sigma.shape == (3,) and not torch.is_grad_enabled()
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    x = randn(3, 7, 11, dtype=torch.float64)
    found = invert(model, x, UP.double(), refinements, {"seed": 5}, told.append, disable=True)
    assert calls == [float(sigma) for sigma in UP[1:] for _ in range(refinements + 1)]
    assert [t["i"] for t in told] == [0, 1, 2, 3] and [float(t["sigma"]) for t in told] == UP[1:].tolist()
    assert torch.equal(told[-1]["x"], found)
    for before, t, sigma in zip([{"x": x}, *told[:-1]], told, UP[:-1], strict=True):
        direction = (t["x"] - before["x"]) / (t["sigma"] - sigma)
        # `denoised` and x belong together: the direction is that of the point where the model was asked.
        asked = t["denoised"] + direction * t["sigma"]
        assert_close(gaussian(asked, t["sigma"].expand(3)), t["denoised"])
        change = (t["x"] - asked).norm() / t["x"].norm()
        assert_close(t["residual"], float(change) if refinements else math.nan, equal_nan=True)
        assert_close(t["guess"], asked)
        assert not t["grew"]


def test_what_the_model_and_the_callback_of_sample_get():
    told = []

    def model(x, sigma, **extra):
        assert extra == {"seed": 5} and sigma.shape == (3,) and not torch.is_grad_enabled()
        return gaussian(x, sigma)

    x, sigmas = randn(3, 7, 11, dtype=torch.float64), UP.double().flip(0)
    found = sample(model, x, sigmas, {"seed": 5}, told.append, disable=True)
    assert [t["i"] for t in told] == [0, 1, 2, 3] and torch.equal(told[0]["x"], x)
    assert [float(t["sigma"]) for t in told] == [float(t["sigma_hat"]) for t in told] == sigmas[:-1].tolist()
    for t in told:
        assert torch.equal(t["denoised"], gaussian(t["x"], t["sigma"].expand(3)))
    assert_close(found, told[-1]["denoised"])  # the last step goes to sigma 0


# --- where refining diverges ---

# The third step is a gap. Refining iterates a map of slope (sigma_b - sigma_a) * SLOPES there: 0.45 where the first
# guess is far off, 1.5 where it is near. So the residual falls at first, then grows. Slopes of other steps: up to 0.5.
GAP = torch.tensor([0, 0.1, 0.2, 0.5, 0.55, 0.6], dtype=torch.float64)
GAP_STEP, BEST_GUESS = 2, 3
SLOPES = torch.tensor([1.5] * 7 + [5] * 4, dtype=torch.float64)
REST = torch.tensor([1] * 7 + [0.02] * 4) * randn(3, 7, 11, dtype=torch.float64)
START = 1.01 * REST


def steep(x, sigma):
    return x - sigma.view(-1, 1, 1) * SLOPES * (x - REST)


def run_inversion(model, x, sigmas, refinements, done=0):
    """What the callback is told; the result is x of the last."""
    told = []
    found = invert(model, x, sigmas, refinements, None, told.append, done=done)
    assert torch.equal(found, told[-1]["x"] if told else x)
    return told


def iterates(model, x, sigma, sigma_next, count):
    """Of the fixed-point iteration in a plain loop: each guess, the next, and how far the next is, of its norm."""
    guess = x * ((1 + sigma_next**2) / (1 + sigma**2)).sqrt()
    for _ in range(count):
        direction = (guess - model(guess, sigma_next.expand(len(x)))) / sigma_next
        refined = x + (sigma_next - sigma) * direction
        yield guess, refined, float((refined - guess).norm() / refined.norm())
        guess = refined


@pytest.mark.parametrize("refinements", [1, 2, 3, 4, 7, 13])
def test_where_refining_diverges_the_best_guess_stays(refinements):
    told = run_inversion(steep, START, GAP, refinements)
    grew = []
    for i, (before, t) in enumerate(zip([{"x": START}, *told[:-1]], told, strict=True)):
        loop = iterates(steep, before["x"], GAP[i], GAP[i + 1], refinements + 1)
        guesses, following, residuals = zip(*loop, strict=True)
        best = residuals.index(min(residuals))
        # It falls to the best and grows from there on, so that the first growth shows the best.
        assert all((a > b) == (n < best) for n, (a, b) in enumerate(pairwise(residuals)))
        grew.append(best < refinements)
        assert t["grew"] == grew[i]
        assert_close(t["x"], guesses[best] if grew[i] else following[best])
        assert_close(t["guess"], guesses[best])
        assert_close(t["denoised"], steep(guesses[best], GAP[i + 1].expand(3)))
        assert_close(t["residual"], residuals[best], rtol=0.01, atol=0)  # a share of x or of what follows, 0.6 % apart
    # At the gap only, if refining goes so far; and the steps after it go on as ever.
    assert grew == [i == GAP_STEP and refinements > BEST_GUESS for i in range(5)]
    assert torch.isfinite(told[-1]["x"]).all()


@pytest.mark.parametrize("refinements", [0, 1, 2, 7, 13])
def test_refining_ends_where_the_residual_grows(refinements):
    asked = []
    run_inversion(lambda x, sigma: asked.append(float(sigma[0])) or steep(x, sigma), START, GAP, refinements)
    counts = [asked.count(float(sigma)) for sigma in GAP[1:]]
    expected = [refinements + 1] * 5
    expected[GAP_STEP] = min(refinements, BEST_GUESS + 1) + 1
    assert counts == expected


@pytest.mark.parametrize("refinements", [1, 3, 7])
@pytest.mark.parametrize("slope", [5, -5])
def test_an_iteration_that_runs_away_is_noticed(refinements, slope):
    """Steps of 1.5 times the distance, all the time: with the guesses, their norm grows as well."""

    def model(x, sigma):
        return x - slope * sigma.view(-1, 1, 1) * x

    told = run_inversion(model, REST, GAP, refinements)
    assert [t["grew"] for t in told] == [i == GAP_STEP for i in range(5)]
    before, found = (told[i]["x"] for i in (GAP_STEP - 1, GAP_STEP))
    sigma, sigma_next = GAP[GAP_STEP], GAP[GAP_STEP + 1]
    misses = [float((refined - guess).norm()) for guess, refined, _ in iterates(model, before, sigma, sigma_next, 7)]
    assert misses[0] == min(misses)
    assert_close(found, before * ((1 + sigma_next**2) / (1 + sigma**2)).sqrt())


# --- going on with an inversion that was broken off ---


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize(("model", "refinements"), [(gaussian, 0), (gaussian, 2), (steep, 7)])
def test_going_on_after_a_break_gives_the_same_bits(model, refinements, done):
    whole = run_inversion(model, START, GAP, refinements)
    rest = run_inversion(model, whole[done - 1]["x"] if done else START, GAP, refinements, done)
    assert [t["i"] for t in rest] == list(range(done, 5))
    for found, expected in zip(rest, whole[done:], strict=True):
        assert found.keys() == expected.keys()
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("done", [1, 2])
def test_nan_after_going_on_is_told_at_its_step(done, refinements):
    def broken(x, sigma):
        return x / (sigma[0] != 2)  # 0 / 0 and x / 0

    with pytest.raises(FloatingPointError, match=r"inversion step 3 of 4 \(sigma 2\), in frames \[0, 1, 2\]"):
        invert(broken, randn(3, 5, 7), UP, refinements, done=done)
