"""TokenFlow with other nodes on the MODEL: combinations, errors, and no trace after a run."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import (
    FRAMES,
    HEIGHT,
    WIDTH,
    call,
    hints,
    latents,
    prompt,
    refused,
    run_stock,
    set_free_memory,
    state_of,
    transformer,
)
from tests.inversion_helpers import (
    ALL,
    SITES,
    answer_at,
    ask,
    down,
    edited_at,
    flow,
    inject,
    invert,
    joint,
    keyframes_of,
    noise_like,
    part_of,
    sample,
    source_at,
    store,
    store_unless_recomputed,
    tiny,
    watched,
    windows_in,
    windows_of,
)

NODE = "TokenFlow"
LONG = 7  # frames; enough for some between two keyframes


# --- with other nodes ---


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_works_before_and_after_feature_injection(small, nodes, blend):
    noise, inversion = invert(nodes, small, latent=latents(LONG))
    settings = {"every": 3, "blend_keyframes": blend}
    after = flow(nodes, inject(nodes, small, inversion, **ALL), inversion, **settings)
    before = inject(nodes, flow(nodes, small, inversion, **settings), inversion, **ALL)
    source = source_at(small, inversion, 1)
    passes = 2 if blend else 1
    for model, runs in ((after, 2 + passes), (before, 1 + 2 * passes)):
        calls, _ = edited_at(model, inversion, 1)
        assert len(calls) == runs
        last = calls[-1]
        assert all(torch.equal(half, source.at[site]) for site in SITES for half in last.at[site].chunk(2))
    edit = sample(nodes, after, noise)
    assert_close(sample(nodes, before, noise), edit, rtol=1e-3, atol=1e-2)
    kept, again = (
        sample(nodes, flow(nodes, inject(nodes, small, some), inversion, **settings), noise)
        for some in (store(nodes, small, inversion), inversion)
    )
    assert_close(kept, again, rtol=1e-3, atol=1e-2)
    for other in (small, flow(nodes, small, inversion, **settings), inject(nodes, small, inversion, **ALL)):
        assert not torch.equal(sample(nodes, other, noise), edit)


@pytest.mark.parametrize("storage", ["recompute", "memory"])
@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_token_flow_works_with_feature_injection_and_context_windows(small, nodes, order, storage):
    """A window is a separate clip, and its keyframes get the features of their frames."""
    _, inversion = invert(nodes, small, latent=latents(5), steps=4)
    inversion = store_unless_recomputed(nodes, small, inversion, storage)
    blocks = ALL if storage == "recompute" else {}  # the stored ones

    def both(model, inversion):
        return flow(nodes, inject(nodes, model, inversion, **blocks), inversion)

    total, count = torch.zeros_like(inversion.clip), torch.zeros(5, 1, 1, 1)
    for frames, batch in windows_in(order):
        asked = (down(inversion), -2 - 1, prompt(2), prompt(3), 2.0)
        part = both(small, part_of(inversion, batch))
        total[frames] += ask(part, noise_like(inversion)[batch], *asked)[-len(frames) :]
        count[frames] += 1
    model = windows_of(small, order, lambda model: both(model, inversion))
    assert_close(answer_at(model, inversion, 1), total / count, rtol=1e-4, atol=1e-4)


def test_token_flow_works_with_perturbed_attention_guidance(comfy, small, nodes):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    _, inversion = invert(nodes, small)
    flowing = flow(nodes, small, inversion)
    after = run_stock(PerturbedAttentionGuidance, flowing, 3.0)[0]
    before = flow(nodes, run_stock(PerturbedAttentionGuidance, small, 3.0)[0], inversion)
    got = answer_at(after, inversion, 1)
    assert got.isfinite().all() and not torch.equal(got, answer_at(flowing, inversion, 1))
    assert torch.equal(answer_at(before, inversion, 1), got)


def test_token_flow_keeps_hints_with_their_frames(comfy, sd15, nodes, cove, control):
    """Hints of the source, and of keyframes in their joint attention."""
    source = control(prompt(1), hints())
    _, inversion = invert(nodes, sd15, source, steps=2)
    model = flow(nodes, sd15, inversion, conditioning=source, blend_keyframes=False)
    keyframes = keyframes_of(cove, inversion, 1, 2)
    edit = answer_at(model, inversion, 1, control(prompt(2), hints(seed=3)), cfg=1.0)
    alone = ask(
        joint(nodes, sd15),
        noise_like(inversion)[keyframes],
        *(down(inversion), -2 - 1, control(prompt(2), hints(seed=3)[keyframes])),
    )
    assert_close(edit[keyframes], alone, rtol=1e-3, atol=1e-3)
    blended = flow(nodes, sd15, inversion, conditioning=source)
    with watched(sd15) as calls:
        assert answer_at(blended, inversion, 1, control(prompt(2), hints(seed=3)), cfg=1.0).isfinite().all()
    assert [len(seen.latents) for seen in calls] == [FRAMES, len(keyframes), FRAMES]


# --- errors ---


def test_token_flow_refuses_attention_replaced_by_another_node(small, nodes):
    noise, inversion = invert(nodes, small)
    guided = call(nodes["CorrespondenceAttention"], model=small)[0]
    wrong = ("already replaced by", "remove the other from this model", "Correspondence Attention or TokenFlow")
    with refused(NODE, *wrong):
        flow(nodes, guided, inversion)
    with refused(NODE, *wrong):
        flow(nodes, flow(nodes, small, inversion), inversion)
    with refused("Correspondence Attention", *wrong):
        call(nodes["CorrespondenceAttention"], model=flow(nodes, small, inversion))
    overwritten = flow(nodes, small, inversion)
    overwritten.set_model_attn1_replace(lambda query, key, value, options: value, "output", 2)
    with refused(NODE, *wrong, "block output 2"), watched(small) as calls:
        sample(nodes, overwritten, noise)
    assert not calls


def test_token_flow_refuses_a_changed_number_of_tokens(comfy, small, nodes):
    from comfy_extras.nodes_tomesd import TomePatchModel

    noise, inversion = invert(nodes, small)
    wrong = (NODE, "Patch ToMe", "changes the number of tokens", "Remove it from this model")
    with refused(*wrong):
        flow(nodes, run_stock(TomePatchModel, small, 0.3)[0], inversion)
    with refused(*wrong):
        sample(nodes, run_stock(TomePatchModel, flow(nodes, small, inversion), 0.3)[0], noise)
    dropping = flow(nodes, small, inversion)
    dropping.set_model_attn1_patch(lambda query, key, value, options: (query[:, 1:], key, value))
    with refused(NODE, "expected a grid of 5x7 tokens, got 34 tokens", "Remove it"):
        sample(nodes, dropping, noise)


def test_token_flow_refuses_another_size_of_edit_and_source(small, nodes):
    noise, inversion = invert(nodes, small)

    def shorter(apply_model, arguments):
        rows = 3 if len(arguments["cond_or_uncond"]) == 2 else HEIGHT
        return apply_model(arguments["input"][:, :, :rows], arguments["timestep"], **arguments["c"])

    model = flow(nodes, small, inversion, blend_keyframes=False)
    model.set_model_unet_function_wrapper(shorter)
    with refused(NODE, "expected a grid of 3x7 tokens, got 35 in the source", "Remove it"):
        sample(nodes, model, noise)


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_refuses_a_cut_batch(small, nodes, blend):
    noise, inversion = invert(nodes, small)

    def first_frame(apply_model, arguments):
        return apply_model(arguments["input"][:1], arguments["timestep"][:1], **arguments["c"])

    model = flow(nodes, small, inversion, blend_keyframes=blend)
    model.set_model_unet_function_wrapper(first_frame)
    with refused(NODE, "expected 3 frames for each of 1 conditionings", "got a batch of 1"):
        sample(nodes, model, noise)


def test_nodes_before_sampling_refuse_a_model_with_token_flow(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    model = flow(nodes, small, inversion)
    wrong = ("without TokenFlow", "Connect the model from before that node")
    with refused("DDIM Inversion", *wrong):
        invert(nodes, model)
    with refused("Store Features", *wrong):
        store(nodes, model, inversion)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())


def test_token_flow_refuses_an_inversion_of_another_checkpoint_or_clip(small, nodes):
    with refused(NODE, "another checkpoint"):
        flow(nodes, small, invert(nodes, tiny(seed=1), steps=1)[1])
    noise, inversion = invert(nodes, small, steps=2)
    for other in (latents(2), latents(FRAMES, WIDTH, HEIGHT)):
        wrong = (str([FRAMES, 4, HEIGHT, WIDTH]), str(list(other["samples"].shape)), "noise of the same inversion")
        with refused(NODE, *wrong), watched(small) as calls:
            sample(nodes, flow(nodes, small, inversion), noise | other)
        assert not calls


def test_token_flow_refuses_other_sigmas_than_those_of_the_inversion(comfy, small, nodes):
    from comfy_extras import nodes_custom_sampler as custom

    # Timesteps 1, 101, ..., 901 and 1, 91, ..., 910 share the first one only.
    noise, _ = invert(nodes, small, steps=10)
    model = flow(nodes, small, invert(nodes, small, steps=11)[1])
    wrong = ("inversion (11 steps", "got 10 steps", "9 of 10 do not match", "Sample with DDIM Sampler")
    with refused(NODE, *wrong), watched(small) as calls:
        sample(nodes, model, noise)
    assert not calls
    noise, inversion = invert(nodes, small)
    (guider,) = run_stock(custom.CFGGuider, flow(nodes, small, inversion), prompt(2), prompt(3), 2.0)
    (nothing,), (sampler,) = run_stock(custom.DisableNoise), run_stock(custom.KSamplerSelect, "dpm_2")
    with refused(NODE, "got 1 step, ", "1 of 1 do not match"):  # evaluates the model between the sigmas
        run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, inversion.sigmas.flip(0), noise)


def test_token_flow_requires_a_source_prompt_with_a_controlnet(sd15, nodes, control):
    import comfy.model_management as management

    source = control(prompt(1), hints())
    noise, inversion = invert(nodes, sd15, source, steps=1)
    with refused(NODE, "which this inversion does not hold", "Connect the conditioning"), watched(sd15) as calls:
        sample(nodes, flow(nodes, sd15, inversion), noise)
    assert not calls
    two = flow(nodes, sd15, inversion, conditioning=control(prompt(1), hints(2)))
    with refused(NODE, "2 hint images for 3 frames"), watched(sd15) as calls:
        sample(nodes, two, noise)
    assert not calls
    management.unload_all_models()
    assert sample(nodes, flow(nodes, sd15, inversion, conditioning=source), noise).isfinite().all()
    # The ControlNet was loaded like the edit's ControlNets, and keeps no hint of this size.
    net = source[0][1]["control"]
    loaded = [patcher for patcher in management.loaded_models() if patcher is not None]
    assert net.control_model in [patcher.model for patcher in loaded]
    assert net.cond_hint is None


@pytest.mark.parametrize("memory", ["enough", "short"])
def test_token_flow_refuses_a_source_prompt_of_several_parts(comfy, small, nodes, monkeypatch, memory):

    noise, inversion = invert(nodes, small, steps=1)
    if memory == "short":  # conditionings run one by one
        set_free_memory(monkeypatch, 0)
    for source in ([*prompt(1), *prompt(2)], prompt(1, area=(3, 4, 1, 3))):
        with refused(NODE, "one source prompt for the whole picture", "Use a plain source prompt"):
            sample(nodes, flow(nodes, small, inversion, conditioning=source), noise)


def test_token_flow_refuses_hints_of_other_frames_in_a_stock_sampler(sd15, nodes, control):
    from comfy_extras import nodes_custom_sampler as custom

    noise, inversion = invert(nodes, sd15, steps=1)
    edit = control(prompt(2), hints(2))
    (guider,) = run_stock(custom.CFGGuider, flow(nodes, sd15, inversion), edit, prompt(3), 2.0)
    (nothing,), (sampler,) = run_stock(custom.DisableNoise), run_stock(custom.KSamplerSelect, "euler")
    with refused(NODE, "2 hint images for 3 frames", "one for each frame"):
        run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, inversion.sigmas.flip(0), noise)


def test_token_flow_refuses_a_transformer_model(comfy, small, nodes):
    model = transformer()
    with refused(NODE, "Flux", "expected a Stable Diffusion UNet", "Load such a checkpoint"):
        flow(nodes, model, invert(nodes, small, steps=1)[1])


def test_feature_injection_refuses_a_second_one_beside_token_flow(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    both = flow(nodes, inject(nodes, small, inversion, **ALL), inversion)
    with refused("Feature Injection", "got one with it", "Connect the model from before that node"):
        inject(nodes, both, inversion)


# --- no trace, no sharing ---


def test_token_flow_models_share_nothing_and_leave_no_trace(small, nodes):
    noise, one = invert(nodes, small, latent=latents(LONG))
    two = invert(nodes, small, prompt(5), latents(LONG))[1]
    plain, random = sample(nodes, small, noise), torch.random.get_rng_state()
    models = [flow(nodes, small, one, 3), flow(nodes, small, two, 5, seed=1)]
    states = [state_of(model) for model in models]
    alone = [sample(nodes, model, noise) for model in models]
    assert not torch.equal(*alone)
    for model, expected in ((models[1], alone[1]), (small, plain), (models[0], alone[0]), (models[0], alone[0])):
        assert torch.equal(sample(nodes, model, noise), expected)
    assert torch.equal(sample(nodes, models[0].clone().clone(), noise), alone[0])
    assert [state_of(model) for model in models] == states
    assert torch.equal(torch.random.get_rng_state(), random)


def test_token_flow_leaves_no_trace_after_an_error(small, nodes):
    noise, inversion = invert(nodes, small)
    model = flow(nodes, small, inversion)
    state, expected = state_of(model), sample(nodes, model, noise)
    broken, calls = model.clone(), []

    def fail(apply_model, arguments):
        calls.append(1)
        if len(calls) == 5:
            raise ArithmeticError
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(ArithmeticError):
        sample(nodes, broken, noise)
    assert state_of(model) == state
    assert torch.equal(sample(nodes, model, noise), expected)
