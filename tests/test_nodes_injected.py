"""Feature Injection and Store Features with other nodes: combinations, errors, and no trace after a run."""

import copy
import gc

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
    store,
    store_unless_recomputed,
    tiny,
    watched,
)

# --- with other nodes ---


def test_feature_injection_works_before_and_after_correspondence_attention(small, nodes):
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)

    def guide(model):
        return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)[0]

    guided = guide(small)
    noise, inversion = invert(nodes, guided, refinements=2)
    after = inject(nodes, guided, inversion, **ALL)
    before = guide(inject(nodes, small, inversion, **ALL))
    asked = (inversion.latents[1], down(inversion), 1, prompt(1))
    assert torch.equal(ask(after, *asked), ask(guided, *asked))
    source, (calls, _) = source_at(guided, inversion, 1), edited_at(after, inversion, 1)
    assert all(torch.equal(half, source.at[site]) for site in SITES for half in calls[-1].at[site].chunk(2))
    edit = sample(nodes, after, noise)
    assert torch.equal(sample(nodes, before, noise), edit)
    assert not torch.equal(sample(nodes, guided, noise), edit)
    stored = store(nodes, guided, inversion)
    with watched(small) as calls:
        edit = sample(nodes, inject(nodes, guided, stored), noise)
    assert len(calls) == 3  # the source does not run
    assert torch.equal(edit, sample(nodes, inject(nodes, guided, inversion), noise))


def test_feature_injection_works_in_stock_samplers_on_the_schedule(comfy, small, nodes):
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
        refused(
            "Feature Injection", "the sigmas of the inversion (3 steps, sigma ", "got 1 step, ", "1 of 1 do not match"
        ),
        watched(small) as calls,
    ):
        stock("dpm_2")  # evaluates the model between the sigmas
    assert len(calls) == 2


def test_feature_injection_requires_a_source_prompt_with_a_controlnet(sd15, nodes, control):
    import comfy.model_management as management

    source = control(prompt(1), hints())
    noise, inversion = invert(nodes, sd15, source, steps=2)
    alone = inject(nodes, sd15, inversion, **ALL)
    wrong = ("which this inversion does not hold", "Connect the conditioning")
    with refused("Feature Injection", *wrong), watched(sd15) as calls:
        sample(nodes, alone, noise)
    with refused("Store Features", *wrong), watched(sd15) as stored_calls:
        store(nodes, sd15, inversion)
    assert not calls and not stored_calls
    management.unload_all_models()
    computed = sample(nodes, inject(nodes, sd15, inversion, conditioning=source, **ALL), noise)
    # The ControlNet was loaded like the edit's ControlNets, and keeps no hint of this size.
    net = source[0][1]["control"]
    loaded = [patcher.model for patcher in management.loaded_models() if patcher is not None]
    assert net.control_model in loaded
    assert net.cond_hint is None
    # Stored with that prompt, features need no prompt in the edit.
    stored = store(nodes, sd15, inversion, conditioning=source)
    recomputed = sample(nodes, inject(nodes, sd15, inversion, conditioning=source), noise)
    assert_close(sample(nodes, inject(nodes, sd15, stored), noise), recomputed)
    other = control(prompt(1), hints(seed=1))
    changed = sample(nodes, inject(nodes, sd15, inversion, conditioning=other, **ALL), noise)
    assert (changed - computed).abs().max() > 1e-3
    stored = store(nodes, sd15, inversion, conditioning=other)
    assert (sample(nodes, inject(nodes, sd15, stored), noise) - recomputed).abs().max() > 1e-3
    # A wrong number of hints is detected before the run.
    two = control(prompt(1), hints(2))
    with refused("Feature Injection", "2 hint images for 3 frames"), watched(sd15) as calls:
        sample(nodes, inject(nodes, sd15, inversion, conditioning=two, **ALL), noise)
    with refused("Store Features", "2 hint images for 3 frames"), watched(sd15) as stored_calls:
        store(nodes, sd15, inversion, conditioning=two)
    assert not calls and not stored_calls


# --- errors ---


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("2, 4", "decoder blocks 0, 1, 2, 3"), ("three", 'expected numbers ("3, 4, 6", "4-9")'), ("3-1", '"3-1"')],
)
@pytest.mark.parametrize("kind", ["resnet", "attention"])
def test_feature_injection_refuses_wrong_blocks(small, nodes, kind, text, wrong):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", kind, wrong):
        inject(nodes, small, inversion, **{f"{kind}_blocks": text})


def test_feature_injection_refuses_a_model_with_injection(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", "got one with it", "Connect the model from before that node"):
        inject(nodes, inject(nodes, small, inversion), inversion)


def test_nodes_before_sampling_refuse_a_model_with_feature_injection(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    model = inject(nodes, small, inversion)
    wrong = ("without Feature Injection", "Connect the model from before that node")
    with refused("DDIM Inversion", *wrong):
        invert(nodes, model)
    with refused("Store Features", *wrong):
        store(nodes, model, inversion)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())


@pytest.mark.parametrize("compiled_first", [True, False])
def test_nodes_with_hooks_refuse_a_compiled_model(comfy, small, nodes, compiled_first):
    """Compiled code silently ignores hooks that are added later."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def compiled(model):
        return run_stock(TorchCompileModel, model, "inductor")[0]

    wrong = ("expected a model that is not compiled", "Remove TorchCompileModel")
    noise, inversion = invert(nodes, small, steps=2)
    model = inject(nodes, compiled(small), inversion) if compiled_first else compiled(inject(nodes, small, inversion))
    with refused("Feature Injection", *wrong), watched(small) as calls:
        sample(nodes, model, noise)
    with refused("Store Features", *wrong):
        store(nodes, compiled(small), inversion)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=compiled(small), latent=latents())
    flowing = flow(nodes, compiled(small), inversion) if compiled_first else compiled(flow(nodes, small, inversion))
    with refused("TokenFlow", *wrong):
        sample(nodes, flowing, noise)
    assert not calls


def test_feature_injection_refuses_an_inversion_of_another_checkpoint(small, nodes):
    _, inversion = invert(nodes, tiny(seed=1), steps=1)
    wrong = ("another checkpoint", "Load the checkpoint as it was then")
    with refused("Feature Injection", *wrong):
        inject(nodes, small, inversion)
    with refused("Store Features", *wrong), watched(small) as calls:
        store(nodes, small, inversion)
    assert not calls


def test_feature_injection_refuses_another_schedule_before_the_run(comfy, small, nodes):
    """The inversion is of the same clip with another number of steps."""
    # Timesteps 1, 101, ..., 901 and 1, 91, ..., 910 share the first one only.
    noise, _ = invert(nodes, small, steps=10)
    _, inversion = invert(nodes, small, steps=11)
    all_sigmas = small.get_model_object("model_sampling").sigmas

    def texts(steps, *timesteps):
        first, last = ([f"{sigma:.4g}" for sigma in all_sigmas[list(some)].tolist()] for some in timesteps)
        return f"{steps} steps, sigma {', '.join([*first, '...', *last])}"

    named = (
        f"expected the sigmas of the inversion ({texts(11, (910, 819, 728), (91, 1))})",
        f"got {texts(10, (901, 801, 701), (101, 1))}; 9 of 10 do not match",
        "Sample with DDIM Sampler",
    )
    with refused("Feature Injection", *named), watched(small) as calls:
        sample(nodes, inject(nodes, small, inversion, **ALL), noise)
    assert not calls


def test_feature_injection_needs_only_the_sigmas_of_its_own_steps(comfy, small, nodes):
    """A run may leave the schedule of the inversion after the injected steps."""
    from comfy_extras import nodes_custom_sampler as custom

    noise, inversion = invert(nodes, small)
    sigmas = down(inversion) * torch.tensor([1.0, 0.9, 1.1, 1.0])

    def edit(share):
        model = inject(nodes, small, inversion, resnet_share=share, attention_share=share, **ALL)
        (guider,) = run_stock(custom.CFGGuider, model, prompt(2), prompt(3), 2.0)
        sampler, _ = call(nodes["DDIMSamplerSelect"], model=model, noise=noise)
        (nothing,) = run_stock(custom.DisableNoise)
        return run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, sigmas, noise)[0]["samples"]

    with refused("Feature Injection", "got 3 steps", "2 of 3 do not match"), watched(small) as calls:
        edit(1.0)
    assert not calls
    with watched(small) as calls:
        assert edit(0.4).isfinite().all()
    assert len(calls) == 1 + 3  # the source in the first step


def test_feature_injection_refuses_latents_of_another_clip(small, nodes):
    noise, inversion = invert(nodes, small, steps=2)
    model = inject(nodes, small, inversion, **ALL)
    for other in (latents(2), latents(FRAMES, WIDTH, HEIGHT)):
        other = noise | other
        wrong = (str([FRAMES, 4, HEIGHT, WIDTH]), str(list(other["samples"].shape)), "noise of the same inversion")
        with refused("Feature Injection", *wrong), watched(small) as calls:
            sample(nodes, model, other)
        assert not calls


@pytest.mark.parametrize("area", [(3, 4, 1, 3), (HEIGHT, WIDTH, 0, 0)])
def test_feature_injection_refuses_a_source_prompt_with_an_area_or_several_parts(small, nodes, area):
    noise, inversion = invert(nodes, small, steps=2)
    source, wrong = prompt(1, area=area), ("one source prompt for the whole picture", "Use a plain source prompt")
    for conditioning in (source, [*prompt(1), *prompt(2)]):
        with refused("Feature Injection", *wrong):
            sample(nodes, inject(nodes, small, inversion, conditioning=conditioning, **ALL), noise)
        with refused("Store Features", *wrong):
            store(nodes, small, inversion, conditioning=conditioning)


# --- no trace ---


@pytest.mark.parametrize("storage", ["recompute", "memory"])
@pytest.mark.parametrize("ending", ["interrupt", "error"])
def test_feature_injection_leaves_no_trace_after_an_error_or_interrupt(
    comfy, small, nodes, monkeypatch, storage, ending
):
    import comfy.model_management as management
    import comfy.utils

    noise, inversion = invert(nodes, small)
    blocks = ALL if storage == "recompute" else {}  # the stored ones
    model = inject(nodes, small, store_unless_recomputed(nodes, small, inversion, storage), **blocks)
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


def test_feature_injection_shares_nothing_between_models(small, nodes):
    noise, one = invert(nodes, small)
    two = invert(nodes, small, prompt(5))[1]
    plain = sample(nodes, small, noise)
    models = [inject(nodes, small, inversion, **ALL) for inversion in (one, two)]
    alone = [sample(nodes, model, noise) for model in models]
    assert not torch.equal(*alone)
    for model, expected in ((models[1], alone[1]), (small, plain), (models[0], alone[0])):
        assert torch.equal(sample(nodes, model, noise), expected)


def test_feature_injection_survives_clones_without_copying_the_features(small, nodes):
    noise, inversion = invert(nodes, small)
    inversion = store(nodes, small, inversion)
    model = inject(nodes, small, inversion)
    clone = copy.copy(model.clone()).clone()
    wrappers = copy.deepcopy(clone.get_wrappers("calc_cond_batch", "cove_injection"))
    assert [wrapper.args[0].source.inversion for wrapper in wrappers] == [inversion]
    assert torch.equal(sample(nodes, clone, noise), sample(nodes, model, noise))


def test_feature_injection_leaves_the_source_at_its_last_site(small, nodes):
    """In each step the source runs first, up to the last site; the edit's calls run to the end."""
    noise, inversion = invert(nodes, small)
    for settings, reached in ((ALL, SITES), ({"resnet_blocks": "0", "attention_blocks": "none"}, ["resnet.0.0"])):
        with watched(small) as calls:
            sample(nodes, inject(nodes, small, inversion, **settings), noise)
        assert [len(call.latents) for call in calls] == [len(calls[0].latents), 2 * len(calls[0].latents)] * 3
        for source, edit in zip(calls[::2], calls[1::2], strict=True):
            assert sorted(edit.at) == sorted(SITES)
            assert source.at.keys() < edit.at.keys() and len(source.at) == len(reached) - 1  # left inside the last one


def test_feature_injection_drops_source_features_after_its_last_step(small, nodes, host_module):
    """The callback of a step runs after its evaluation."""
    noise, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, resnet_share=0.34, attention_share=0.67)
    held = []

    def look(module, args):
        found = [one for one in gc.get_objects() if isinstance(one, host_module.injection._Computed)]
        held.append(sum(bool(one.features) for one in found))

    with small.model.diffusion_model.out.register_forward_hook(lambda module, args, output: look(module, args)):
        sample(nodes, model, noise)
    assert held == [1, 1, 0]  # the source itself never comes to the end of the UNet
