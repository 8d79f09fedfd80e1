"""A MODEL with Feature Injection among other nodes: what it works beside, what is refused, that no trace is left."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import FRAMES, HEIGHT, WIDTH, call, hints, latents, prompt, refused, run_stock, state_of
from tests.inversion_helpers import (
    ALL,
    SITES,
    ask,
    down,
    edited_at,
    flow,
    inject,
    invert,
    sample,
    source_at,
    tiny,
    watched,
)

# --- beside other nodes ---


def test_it_works_before_and_after_correspondence_attention(small, nodes):
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)

    def guide(model):
        return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)[0]

    guided = guide(small)
    noise, inversion = invert(nodes, guided, refinements=2)
    after = inject(nodes, guided, inversion, **ALL)
    before = guide(inject(nodes, small, inversion, **ALL))
    asked = (inversion.guesses[1], down(inversion), 1, prompt(1))
    assert torch.equal(ask(after, *asked), ask(guided, *asked))
    source, (calls, _) = source_at(guided, inversion, 1), edited_at(after, inversion, 1)
    assert all(torch.equal(half, source.at[site]) for site in SITES for half in calls[-1].at[site].chunk(2))
    edit = sample(nodes, after, noise)
    assert torch.equal(sample(nodes, before, noise), edit)
    assert not torch.equal(sample(nodes, guided, noise), edit)
    stored = invert(nodes, guided, refinements=2, storage="memory", **ALL)[1]
    assert torch.equal(sample(nodes, inject(nodes, guided, stored, **ALL), noise), edit)


def test_stock_samplers_that_stay_on_the_grid_edit_alike(comfy, small, nodes):
    from comfy_extras import nodes_custom_sampler as custom

    noise, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    expected = sample(nodes, model, noise)

    def stock(name):
        (guider,) = run_stock(custom.CFGGuider, model, prompt(2), prompt(3), 2.0)
        (nothing,) = run_stock(custom.DisableNoise)
        (sampler,) = run_stock(custom.KSamplerSelect, name)
        return run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, down(inversion), noise)[0]["samples"]

    assert_close(stock("euler"), expected, rtol=1e-4, atol=1e-3)
    assert stock("heun").isfinite().all()
    with (
        refused("Feature Injection", "it missed 1", "Inversion: 3 steps, sigma ", "Sampling: 1 steps, sigma "),
        watched(small) as calls,
    ):
        stock("dpm_2")  # looks between the sigmas
    assert len(calls) == 2


def test_a_source_prompt_with_a_controlnet_is_connected_again(sd15, nodes, control):
    import comfy.model_management as management

    source = control(prompt(1), hints())
    noise, inversion = invert(nodes, sd15, source, steps=2)
    alone = inject(nodes, sd15, inversion, **ALL)
    with refused("Feature Injection", "does not hold its prompt", "Connect the conditioning"), watched(sd15) as calls:
        sample(nodes, alone, noise, steps=2)
    assert not calls
    management.unload_all_models()
    computed = sample(nodes, inject(nodes, sd15, inversion, conditioning=source, **ALL), noise, steps=2)
    # The ControlNet was loaded like those of the edit's prompts, and keeps no hint of this size.
    net = source[0][1]["control"]
    loaded = [patcher.model for patcher in management.loaded_models() if patcher is not None]
    assert net.control_model in loaded
    assert net.cond_hint is None
    stored = invert(nodes, sd15, source, steps=2, storage="memory", **ALL)[1]
    assert_close(sample(nodes, inject(nodes, sd15, stored, **ALL), noise, steps=2), computed)
    other = control(prompt(1), hints(seed=1))
    changed = sample(nodes, inject(nodes, sd15, inversion, conditioning=other, **ALL), noise, steps=2)
    assert (changed - computed).abs().max() > 1e-3
    # Hints that are not one a frame are found before the run.
    two = inject(nodes, sd15, inversion, conditioning=control(prompt(1), hints(2)), **ALL)
    with refused("Feature Injection", "2 hint images for 3 frames"), watched(sd15) as calls:
        sample(nodes, two, noise, steps=2)
    assert not calls


# --- refused ---


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("2, 4", "decoder blocks 0, 1, 2, 3"), ("three", 'expected numbers ("3, 4, 6", "4-9")'), ("3-1", '"3-1"')],
)
@pytest.mark.parametrize("kind", ["resnet", "attention"])
def test_wrong_blocks(small, nodes, kind, text, wrong):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", kind, wrong):
        inject(nodes, small, inversion, **{f"{kind}_blocks": text})
    with refused("DDIM Inversion", kind, wrong), watched(small) as calls:
        invert(nodes, small, storage="memory", **{f"{kind}_blocks": text})
    assert not calls


def test_two_injections(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", "got one with it", "Take one of them off"):
        inject(nodes, inject(nodes, small, inversion), inversion)


def test_a_model_with_injection_is_for_sampling_only(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    model = inject(nodes, small, inversion)
    wrong = ("without Feature Injection", "Connect the one before it")
    with refused("DDIM Inversion", *wrong):
        invert(nodes, model)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model(comfy, small, nodes, compiled_first):
    """What is compiled does not see the hooks that come after it, and says nothing."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def compiled(model):
        return run_stock(TorchCompileModel, model, "inductor")[0]

    wrong = ("expected a model that is not compiled", "Remove TorchCompileModel")
    noise, inversion = invert(nodes, small, steps=2, sampling_steps=2)
    model = inject(nodes, compiled(small), inversion) if compiled_first else compiled(inject(nodes, small, inversion))
    with refused("Feature Injection", *wrong), watched(small) as calls:
        sample(nodes, model, noise, steps=2)
    with refused("DDIM Inversion", *wrong):
        invert(nodes, compiled(small), storage="memory", **ALL)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=compiled(small), latent=latents())
    flowing = flow(nodes, compiled(small), inversion) if compiled_first else compiled(flow(nodes, small, inversion))
    with refused("TokenFlow", *wrong):
        sample(nodes, flowing, noise, steps=2)
    assert not calls


def test_an_inversion_of_another_checkpoint(small, nodes):
    _, inversion = invert(nodes, tiny(seed=1), steps=1)
    with refused("Feature Injection", "another checkpoint", "Load the checkpoint as it was then"):
        inject(nodes, small, inversion)


def test_grids_that_do_not_meet_are_named_before_the_run(small, nodes):
    # Timesteps 1, 91, ..., 901 begin and end where 10 steps do, and miss 101, 201, ..., 801.
    noise, inversion = invert(nodes, small, steps=11, sampling_steps=11)
    model = inject(nodes, small, inversion, **ALL)
    all_sigmas = small.get_model_object("model_sampling").sigmas
    first, last = ([f"{sigma:.4g}" for sigma in all_sigmas[at].tolist()] for at in ([901, 801, 701], [101, 1]))
    named = (
        "of the 10 wanted it missed 8",
        "Inversion: 11 steps, sigma ",
        f"Sampling: 10 steps, sigma {', '.join([*first, '...', *last])}",
    )
    with refused("Feature Injection", *named, "`sampling_steps`"), watched(small) as calls:
        sample(nodes, model, noise, steps=10)
    assert not calls
    # The first step alone is shared.
    first = inject(nodes, small, inversion, resnet_steps=1, attention_steps=1, **ALL)
    assert sample(nodes, first, noise, steps=10).isfinite().all()


def test_latents_of_another_clip(small, nodes):
    _, inversion = invert(nodes, small, steps=2)
    model = inject(nodes, small, inversion, **ALL)
    for other in (latents(2), latents(FRAMES, WIDTH, HEIGHT)):
        wrong = (str([FRAMES, 4, HEIGHT, WIDTH]), str(list(other["samples"].shape)), "noise of the same inversion")
        with refused("Feature Injection", *wrong), watched(small) as calls:
            sample(nodes, model, other, steps=2)
        assert not calls


@pytest.mark.parametrize("area", [(3, 4, 1, 3), (HEIGHT, WIDTH, 0, 0)])
def test_a_source_prompt_with_an_area_or_of_several_parts(small, nodes, area):
    _, inversion = invert(nodes, small, steps=2)
    source, wrong = prompt(1, area=area), ("one source prompt for the whole picture", "Use a plain prompt")
    for conditioning in (source, [*prompt(1), *prompt(2)]):
        noise = {"samples": small.model.process_latent_out(inversion.noise)}
        with refused("Feature Injection", *wrong):
            sample(nodes, inject(nodes, small, inversion, conditioning=conditioning, **ALL), noise, steps=2)
        with refused("DDIM Inversion", *wrong):
            invert(nodes, small, conditioning, steps=2, storage="memory", **ALL)


# --- no trace ---


@pytest.mark.parametrize("storage", ["recompute", "memory"])
@pytest.mark.parametrize("ending", ["interrupt", "error"])
def test_a_run_that_breaks_leaves_nothing(comfy, small, nodes, monkeypatch, storage, ending):
    import comfy.model_management as management
    import comfy.utils

    noise, inversion = invert(nodes, small, storage=storage, **ALL)
    model = inject(nodes, small, inversion, **ALL)
    state, before = state_of(small), state_of(model)
    random = torch.random.get_rng_state()
    expected = sample(nodes, model, noise)
    with monkeypatch.context() as patched:
        if ending == "interrupt":
            stop = lambda value, *rest, **more: value == 2 and management.interrupt_current_processing()  # noqa: E731
            patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
            with pytest.raises(management.InterruptProcessingException):
                sample(nodes, model, noise)
        else:
            broken, calls = model.clone(), []

            def fail(apply_model, arguments):
                calls.append(1)
                if len(calls) == 3:
                    raise ArithmeticError
                return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

            broken.set_model_unet_function_wrapper(fail)
            with pytest.raises(ArithmeticError):
                sample(nodes, broken, noise)
    assert state_of(small) == state and state_of(model) == before
    assert torch.equal(sample(nodes, model, noise), expected)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_models_share_nothing(small, nodes):
    noise, one = invert(nodes, small)
    two = invert(nodes, small, prompt(5))[1]
    plain = sample(nodes, small, noise)
    models = [inject(nodes, small, inversion, **ALL) for inversion in (one, two)]
    alone = [sample(nodes, model, noise) for model in models]
    assert not torch.equal(*alone)
    for model, expected in ((models[1], alone[1]), (small, plain), (models[0], alone[0])):
        assert torch.equal(sample(nodes, model, noise), expected)


def test_nodes_after_it_take_it_along_without_copying_the_features(small, nodes):
    noise, inversion = invert(nodes, small, storage="memory", **ALL)
    model = inject(nodes, small, inversion, **ALL)
    clone = copy.copy(model.clone()).clone()
    wrappers = copy.deepcopy(clone.get_wrappers("calc_cond_batch", "cove_injection"))
    assert [wrapper.args[0].inversion for wrapper in wrappers] == [inversion]
    assert torch.equal(sample(nodes, clone, noise), sample(nodes, model, noise))
