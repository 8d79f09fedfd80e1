"""Nodes that skip evaluations of the UNet or some of its blocks are detected by the nodes that need them."""

import pytest
import torch

from tests.helpers import call, latents, prompt, refused
from tests.inversion_helpers import ALL, flow, guide, inject, invert, sample, store, watched

NODES = {"FeatureInjection": inject, "TokenFlow": flow}
NAMES = {"FeatureInjection": "Feature Injection", "TokenFlow": "TokenFlow"}
STEPS = 7


def cached(model, kind):
    """Return MODEL with one of core's step caches, active from the first step."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    node = {"EasyCache": EasyCacheNode, "LazyCache": LazyCacheNode}[kind]
    return node.execute(model, 3.0, 0.0, 1.0, False).args[0]


def skipping(model, level, skips):
    """Return MODEL with another pack's step cache: call n, from 0, skips the UNet if skips(n, args)."""
    model, calls = model.clone(), []

    def answer(x):
        return x if level == "diffusion_model" else 0.5 * x

    def wrapper(executor, *args, **kwargs):
        calls.append(args)
        if not skips(len(calls) - 1, args):
            return executor(*args, **kwargs)
        return [answer(args[2]) for _ in args[1]] if level == "calc_cond_batch" else answer(args[0])

    if level == "function":
        model.set_model_unet_function_wrapper(
            lambda apply_model, given: wrapper(
                lambda x, timestep, conds: apply_model(x, timestep, **conds),
                *(given["input"], given["timestep"], given["c"]),
            )
        )
    else:
        model.add_wrapper_with_key(level, "somebody's cache", wrapper)
    return model


# --- core's caches, before the run ---


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("node", NODES)
def test_feature_injection_and_token_flow_refuse_core_caches_before_sampling(small, nodes, cache, order, node):
    noise, inversion = invert(nodes, small, steps=STEPS)
    patched = NODES[node](nodes, cached(small, cache) if order == "before" else small, inversion)
    patched = cached(patched, cache) if order == "after" else patched
    with refused(NAMES[node], cache, f"Remove {cache}"), watched(small) as calls:
        sample(nodes, patched, noise)
    assert not calls


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_ddim_inversion_store_features_and_features_refuse_core_caches(small, nodes, cache):
    _, inversion = invert(nodes, small)
    with refused("DDIM Inversion", cache, f"Remove {cache}"), watched(small) as calls:
        invert(nodes, cached(small, cache))
    assert not calls
    with refused("Store Features", cache, f"Remove {cache}"), watched(small) as calls:
        store(nodes, cached(small, cache), inversion)
    assert not calls
    with refused("Diffusion Features", cache, f"Remove {cache}"), watched(small) as calls:
        guide(nodes, cached(small, cache))
    assert not calls


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_ddim_sampler_accepts_core_caches(small, nodes, cache):
    noise, _ = invert(nodes, small, steps=STEPS)
    # At cfg 1, because EasyCache of ComfyUI 0.3.60 fails on two prompts in one batch, with any model.
    assert sample(nodes, cached(guide(nodes, small), cache), noise, cfg=1.0).isfinite().all()


# --- other caches, when they skip ---

LEVELS = ["function", "apply_model", "diffusion_model", "calc_cond_batch", "predict_noise"]
WHO = "another node on this model skips evaluations"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("node", NODES)
def test_feature_injection_and_token_flow_refuse_a_skipped_evaluation(small, nodes, level, order, node):
    noise, inversion = invert(nodes, small, steps=3)
    settings = ALL if node == "FeatureInjection" else {}
    # At the other levels the source runs before the edit; this is the second call of the source or of the edit.
    skipped = {"predict_noise": 2, "calc_cond_batch": 1, "apply_model": 2}.get(level, 3)

    def one(model):
        return skipping(model, level, lambda n, args: n == skipped)

    patched = NODES[node](nodes, one(small) if order == "before" else small, inversion, **settings)
    with refused(NAMES[node], WHO, "Remove that node"):
        sample(nodes, patched if order == "before" else one(patched), noise)


@pytest.mark.parametrize("order", ["before", "after"])
def test_feature_injection_accepts_skipped_steps_without_injection(small, nodes, order):
    noise, inversion = invert(nodes, small, steps=3)

    def last(model):
        return skipping(model, "predict_noise", lambda n, args: n > 0)

    settings = {"resnet_share": 0.4, "attention_share": 0.4} | ALL  # one step
    patched = inject(nodes, last(small) if order == "before" else small, inversion, **settings)
    assert sample(nodes, patched if order == "before" else last(patched), noise).isfinite().all()


@pytest.mark.parametrize("node", NODES)
def test_feature_injection_and_token_flow_refuse_a_skipped_conditioning(comfy, small, nodes, node, monkeypatch):
    """With little memory the host runs conditionings one by one, and a cache can skip only the negative prompt."""
    monkeypatch.setattr(type(small.model), "memory_required", lambda *args, **more: 1e30)
    noise, inversion = invert(nodes, small, steps=3)

    def no_negative(model):
        return skipping(model, "diffusion_model", lambda n, args: args[5]["cond_or_uncond"] == [1])

    settings = ALL if node == "FeatureInjection" else {}
    with refused(NAMES[node], WHO):
        sample(nodes, no_negative(NODES[node](nodes, small, inversion, **settings)), noise)


def test_feature_injection_and_token_flow_refuse_a_skipped_block(small, nodes):
    """DeepCache skips inner blocks like this."""
    noise, inversion = invert(nodes, small, steps=3)
    inner = small.model.diffusion_model.output_blocks[1][1]
    inner.forward = lambda hidden, *args, **more: hidden
    try:
        for node, name in NAMES.items():
            patched = NODES[node](nodes, small, inversion, **ALL if node == "FeatureInjection" else {})
            with refused(name, WHO):
                sample(nodes, patched, noise)
        with refused("Store Features", WHO):
            store(nodes, small, inversion)
    finally:
        del inner.forward


def third_skipped(nodes, model, level, order):
    """Return MODEL with Correspondence Attention and a step cache that skips the third call, in either order."""

    def third(model):
        return skipping(model, level, lambda n, args: n == 2)

    if order == "after":
        return third(guide(nodes, model))
    return call(nodes["CorrespondenceAttention"], model=third(model))[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_ddim_inversion_refuses_a_skipped_evaluation(small, nodes, level, order):
    model = third_skipped(nodes, small, level, order)
    with refused("DDIM Inversion", WHO):
        invert(nodes, model, steps=2, refinements=1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_store_features_refuses_a_skipped_evaluation(small, nodes, level, order):
    _, inversion = invert(nodes, small)
    model = third_skipped(nodes, small, level, order)
    with refused("Store Features", WHO, f"at sigma {float(inversion.sigmas[1]):.4g}"):
        store(nodes, model, inversion)


@pytest.mark.parametrize("level", LEVELS[:4])
def test_diffusion_features_refuse_a_skipped_evaluation(small, nodes, level):
    """Wrappers around a whole evaluation do not run for features, so a cache in them skips nothing."""
    if level == "calc_cond_batch":
        skipped = call(nodes["DiffusionFeatures"], model=skipping(small, level, lambda n, args: True), latent=latents())
        assert torch.equal(skipped[0].tokens, call(nodes["DiffusionFeatures"], model=small, latent=latents())[0].tokens)
        return
    with refused("Diffusion Features", WHO):
        guide(nodes, skipping(small, level, lambda n, args: True))


def test_feature_injection_and_token_flow_accept_a_prompt_that_ends_early(small, nodes):
    noise, inversion = invert(nodes, small, steps=5)
    positive = [*prompt(2, end_percent=0.4), *prompt(4, start_percent=0.4)]
    for node in NODES:
        settings = ALL if node == "FeatureInjection" else {}
        edit = sample(nodes, NODES[node](nodes, small, inversion, **settings), noise, positive)
        assert edit.isfinite().all() and not torch.equal(edit, noise["samples"])
