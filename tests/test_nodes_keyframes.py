"""Forward-only keyframe schedules in an inversion, where sigma rises: the same keyframe per sigma as in sampling."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.helpers import prompt
from tests.inversion_helpers import AUTO_SITES, invert, same, small_lora, source_at, store, watched
from tests.test_nodes_resume import break_off  # noqa: F401  (a fixture)

STEPS = 7
PERCENTS = (0.0, 0.3, 0.6)
STRENGTHS = (1.0, 0.5, 0.0)


class Keyframe:
    def __init__(self, start_percent, strength):
        self.start_percent, self.strength, self.start_t = start_percent, strength, 999999999.9


class Schedule:
    """Advance by at most one keyframe per step as sigma falls, and never back."""

    def __init__(self, percents=PERCENTS, strengths=STRENGTHS):
        self.frames = [Keyframe(*pair) for pair in zip(percents, strengths, strict=True)]
        self.place, self.before = 0, None

    def begin(self, percent_to_sigma):
        self.place, self.before = 0, None
        for frame in self.frames:
            frame.start_t = percent_to_sigma(frame.start_percent)

    def at(self, sigma, options):
        if sigma != self.before:
            self.before, most = sigma, float(options["sample_sigmas"].max())
            for place in range(self.place + 1, len(self.frames)):
                if self.frames[place].start_t < sigma:
                    break
                self.place = place
                if self.frames[place].start_t <= most:  # every keyframe that begins within the run holds for a step
                    break
        return self.frames[self.place].strength


def control_of(schedule, ranges=None):
    """Return a CONDITIONING with another pack's ControlNet, and the (sigma, strength) pairs of its calls.

    It follows `schedule`, or has a constant weight on each of the percent ranges.
    """
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        def __init__(self, schedule, seen):
            super().__init__()
            self.schedule, self.weight = schedule, 1.0
            type(self).seen = seen

        def pre_run(self, model, percent_to_sigma):
            super().pre_run(model, percent_to_sigma)
            if self.schedule is not None:
                self.schedule.begin(percent_to_sigma)

        def get_control(self, x, t, cond, batched, options):
            before = self.previous_controlnet
            before = before.get_control(x, t, cond, batched, options) if before is not None else None
            weight = self.weight if self.schedule is None else self.schedule.at(float(t[0]), options)
            if self.schedule is None and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
                return before
            self.seen.append((float(t[0]), weight))
            grid = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
            middle = [weight * torch.ones(len(x), 64, *grid)]
            return self.control_merge({"input": [], "middle": middle, "output": []}, before, None)

    control = Control(schedule, [])
    for weight, percents in ranges or ():
        constant = Control(None, control.seen)
        constant.weight, constant.timestep_percent_range = weight, percents
        constant.previous_controlnet = control
        control = constant
    return prompt(1, control=control, control_apply_to_uncond=True), control.seen


def holds(model, sigma, percents=PERCENTS, strengths=STRENGTHS):
    """Return the strength of the last keyframe that begins at or above a sigma."""
    begins = [model.get_model_object("model_sampling").percent_to_sigma(percent) for percent in percents]
    return [strength for begin, strength in zip(begins, strengths, strict=True) if begin >= sigma][-1]


def looks_at(model, schedule):
    """Return MODEL with a wrapper that scales its input by the schedule, which is in the wrapper's closure."""
    model = model.clone()
    begin = model.get_model_object("model_sampling").percent_to_sigma

    def look(apply_model, given):
        strength = schedule.at(float(given["timestep"][0]), given["c"]["transformer_options"])
        SEEN.append((float(given["timestep"][0]), strength))
        return apply_model(given["input"] * (1 + 0.01 * strength), given["timestep"], **given["c"])

    SEEN.clear()
    schedule.begin(begin)
    model.set_model_unet_function_wrapper(look)
    return model


SEEN = []


@pytest.mark.parametrize("refinements", [0, 2])
def test_ddim_inversion_uses_the_keyframe_in_force_of_a_control(small, nodes, refinements):
    conditioning, seen = control_of(Schedule())
    invert(nodes, small, conditioning, steps=STEPS, refinements=refinements)
    assert len(seen) >= STEPS and [sigma for sigma, _ in seen] == sorted(sigma for sigma, _ in seen)
    assert seen == [(sigma, holds(small, sigma)) for sigma, _ in seen]
    assert {strength for _, strength in seen} == set(STRENGTHS)


def test_ddim_inversion_uses_the_keyframe_in_force_of_a_chained_control(small, nodes):
    conditioning, seen = control_of(Schedule(), [(0.25, (0.0, 1.0))])
    invert(nodes, small, conditioning, steps=STEPS)
    of_schedule = [pair for pair in seen if pair[1] != 0.25]
    assert of_schedule == [(sigma, holds(small, sigma)) for sigma, _ in of_schedule] and len(of_schedule) == STEPS


@pytest.mark.parametrize("where", ["closure", "attachment", "partial"])
def test_ddim_inversion_uses_the_keyframe_in_force_of_a_model_patch(small, nodes, where):
    schedule = Schedule()
    model = looks_at(small, schedule)
    if where == "partial":
        wrapper = model.model_options["model_function_wrapper"]
        model.set_model_unet_function_wrapper(functools.partial(lambda schedule, *args: wrapper(*args), schedule))
    elif where == "attachment":
        model.set_attachments("somebody", {"all": [schedule]})
    invert(nodes, model, steps=STEPS)
    assert [(sigma, holds(small, sigma)) for sigma, _ in SEEN] == SEEN and len(SEEN) == STEPS


def test_store_features_uses_the_keyframes_of_sampling(small, nodes):
    conditioning, seen = control_of(Schedule())
    inversion = invert(nodes, small, conditioning, steps=STEPS, refinements=1)[1]
    seen.clear()
    stored = store(nodes, small, inversion, conditioning=conditioning)
    assert len(stored.features) == STEPS
    assert [sigma for sigma, _ in seen] == inversion.sigmas[1:].flip(0).tolist()
    assert seen == [(sigma, holds(small, sigma)) for sigma, _ in seen]
    assert {strength for _, strength in seen} == set(STRENGTHS)
    for step in range(STEPS):
        constant, _ = control_of(None)
        constant[0][1]["control"].weight = holds(small, float(inversion.sigmas[step + 1]))
        constant[0][1]["control"].timestep_percent_range = (0.0, 1.0)
        right = source_at(small, inversion, step, constant)
        assert all(torch.equal(stored.features[step][site], right.at[site]) for site in AUTO_SITES)


def hooked(model, base, percents, strengths, **extras):
    """Return a CONDITIONING with a LoRA whose strength follows hook keyframes, made with the stock nodes."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    lora = load_file(small_lora(base))
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    group = None
    for percent, strength in zip(percents, strengths, strict=True):
        (group,) = CreateHookKeyframe().create_hook_keyframe(strength, percent, group)
    (hooks,) = SetHookKeyframes().set_hook_keyframes(hooks, group)
    return prompt(1, hooks=hooks, **extras)


def test_ddim_inversion_uses_the_hook_keyframe_in_force(small, nodes, base):
    scheduled = invert(nodes, small, hooked(small, base, PERCENTS, STRENGTHS), steps=STEPS, refinements=1)[1]
    ends = (*PERCENTS[1:], 1.0)
    apart = [
        hooked(small, base, (0.0,), (strength,), start_percent=start, end_percent=end)[0]
        for strength, start, end in zip(STRENGTHS, PERCENTS, ends, strict=True)
    ]
    constant = invert(nodes, small, apart, steps=STEPS, refinements=1)[1]
    plain = invert(nodes, small, steps=STEPS, refinements=1)[1]
    assert_close(scheduled.noise, constant.noise)
    assert (scheduled.noise - plain.noise).abs().max() > 1e-3
    # Repeat after a run that left the hooks at their last keyframe.
    assert same(
        invert(nodes, small, hooked(small, base, PERCENTS, STRENGTHS), steps=STEPS, refinements=1)[1], scheduled
    )


def test_ddim_inversion_restores_schedules(small, nodes):
    conditioning, _ = control_of(schedule := Schedule())
    invert(nodes, small, conditioning, steps=STEPS)
    assert (schedule.place, schedule.before) == (0, None)
    assert [frame.start_t for frame in schedule.frames] == [999999999.9] * 3


def test_ddim_inversion_with_keyframes_resumes_after_a_break(small, nodes, break_off):  # noqa: F811
    conditioning, seen = control_of(Schedule())
    whole = invert(nodes, small, conditioning, steps=4)[1]
    seen.clear()
    break_off(lambda: invert(nodes, small, conditioning, steps=4), 2)
    with watched(small) as calls:
        assert same(invert(nodes, small, conditioning, steps=4)[1], whole)
    assert len(calls) == 2


def test_ddim_inversion_with_changed_keyframes_starts_over(small, nodes, break_off, lines):  # noqa: F811
    schedule = Schedule()
    conditioning, _ = control_of(schedule)
    break_off(lambda: invert(nodes, small, conditioning, steps=4), 2)
    schedule.frames[1].strength = 0.25
    with watched(small) as calls:
        invert(nodes, small, conditioning, steps=4)
    assert len(calls) == 4 and not any("resuming after step" in line for line in lines())
