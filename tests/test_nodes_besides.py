"""Inversion, Store Features and Feature Injection with other nodes on the model, full disks and unusual prompts."""

import gc

import pytest
import torch

from tests.helpers import call, hints, latents, prompt, refused, run_stock, set_free_memory
from tests.inversion_helpers import (
    ALL,
    AUTO_SITES,
    edited_at,
    guide,
    inject,
    invert,
    same,
    sample,
    source_at,
    store,
    watched,
)
from tests.method_helpers import full_disk


def run_fingerprint(host_module, model, conditioning=None):
    return host_module.identity.run_fingerprint(
        model, conditioning or prompt(1), latents()["samples"], torch.tensor([0.0, 1.0]), 1
    )


def test_run_fingerprint_distinguishes_patches_at_one_address(comfy, small, host_module):
    """The host frees a node's output before the next run, whose output may then have the same address."""
    from comfy_extras.nodes_freelunch import FreeU

    seen, addresses = [], []
    for number in range(20):
        model = FreeU().patch(small, 1.1 + 0.01 * number, 1.2, 0.9, 0.2)[0]
        addresses.append(id(model.model_options["transformer_options"]["patches"]["output_block_patch"][0]))
        seen.append(run_fingerprint(host_module, model))
        assert run_fingerprint(host_module, model) == seen[-1], "a model that still exists keeps its fingerprint"
        del model
        gc.collect()
    assert len(set(addresses)) < len(addresses), "this test saw no address twice"
    assert len(set(seen)) == len(seen)


def lora(model, seed, strength=1.0):
    from comfy.weight_adapter import LoRAAdapter

    name = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    rows, columns = model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight.flatten(1).shape
    up, down = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in ((rows, 2), (2, columns))
    )
    model = model.clone()
    assert model.add_patches({name: LoRAAdapter(set(), (up, down, 2.0, None, None, None))}, strength)
    return model


def test_run_fingerprint_depends_on_the_content_of_a_lora(small, host_module):
    """The host names patches randomly, so the names of equal patches differ after a crash."""
    one = run_fingerprint(host_module, lora(small, 1))
    assert run_fingerprint(host_module, lora(small, 1)) == one
    assert one not in {
        run_fingerprint(host_module, other) for other in (small, lora(small, 2), lora(small, 1, strength=0.5))
    }


def test_run_fingerprint_includes_the_type_of_a_union_controlnet(small, host_module, control):
    conditioning = control(prompt(1), hints())
    one = run_fingerprint(host_module, small, conditioning)
    assert run_fingerprint(host_module, small, conditioning) == one
    conditioning[0][1]["control"].set_extra_arg("control_type", [3])
    assert run_fingerprint(host_module, small, conditioning) != one


def test_ddim_inversion_completes_on_a_full_disk(small, nodes, pack, monkeypatch, caplog):
    noise, whole = invert(nodes, small)
    monkeypatch.setattr(f"{pack.__name__}.cove.files.save_file", full_disk)
    again, inversion = invert(nodes, small)
    assert torch.equal(again["samples"], noise["samples"]) and same(inversion, whole)
    assert "could not be kept for resuming" in caplog.text


def test_save_nodes_report_a_full_disk(small, nodes, pack, monkeypatch):
    _, whole = invert(nodes, small)
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
    monkeypatch.setattr(f"{pack.__name__}.cove.files.save_file", full_disk)
    for name, run in {
        "Store Features": lambda: store(nodes, small, whole, storage="disk"),
        "Save Inversion": lambda: call(nodes["SaveInversion"], inversion=whole),
        "Save Correspondence": lambda: call(nodes["SaveCorrespondence"], correspondence=correspondence),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: .*No space left.*Make room"):
            run()


def test_store_features_stores_the_source_if_guidance_runs_the_unet_again(comfy, small, nodes):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    perturbed = run_stock(PerturbedAttentionGuidance, small, 3.0)[0]
    noise, inversion = invert(nodes, perturbed)
    with watched(small) as calls:
        stored = store(nodes, perturbed, inversion)
    assert len(calls) == 2 * 3
    for step in range(3):
        right = source_at(small, inversion, step)
        assert all(torch.equal(right.at[site], stored.features[step][site]) for site in AUTO_SITES)
    one, other = (sample(nodes, inject(nodes, perturbed, each), noise) for each in (inversion, stored))
    assert torch.equal(one, other)


@pytest.mark.parametrize("free", [1 << 40, 0], ids=["together", "one after another"])
def test_store_features_and_injection_refuse_two_source_prompts(comfy, small, nodes, monkeypatch, free):
    two = [*prompt(1), *prompt(2)]
    set_free_memory(monkeypatch, free)
    noise, inversion = invert(nodes, small, two)
    with refused("Store Features", "one source prompt for the whole picture, but several conditionings"):
        store(nodes, small, inversion, conditioning=two)
    with refused("Feature Injection", "one source prompt for the whole picture, but several conditionings"):
        sample(nodes, inject(nodes, small, inversion, conditioning=two, **ALL), noise)


def test_feature_injection_crops_an_area_past_the_edge_like_the_host(small, nodes):
    _, inversion = invert(nodes, small)
    height, width = latents()["samples"].shape[-2:]
    injected = inject(nodes, small, inversion, **ALL)
    over, inside = (
        edited_at(injected, inversion, 1, [*prompt(2), *prompt(4, area=(h, w, 1, 3))], cfg=1.0)[1]
        for h, w in ((height, width), (height - 1, width - 3))
    )
    assert torch.equal(over, inside)
    plain = edited_at(small, inversion, 1, [*prompt(2), *prompt(4, area=(height, width, 1, 3))], cfg=1.0)[1]
    assert not torch.equal(plain, over)


def other_nodes(model):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    from comfy_extras.nodes_tomesd import TomePatchModel

    def first(output):
        return output.args[0] if hasattr(output, "args") else output[0]

    def run(node, *settings):
        return first(node.execute(model, *settings) if hasattr(node, "execute") else node().patch(model, *settings))

    return {
        "Deep Shrink": lambda: run(PatchModelAddDownscale, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"),
        "HyperTile": lambda: run(HyperTile, 32, 2, 0, False),
        "ToMe": lambda: run(TomePatchModel, 0.5),
    }


@pytest.mark.parametrize("name", ["Deep Shrink", "HyperTile", "ToMe"])
def test_feature_injection_refuses_nodes_that_change_the_tokens(comfy, small, nodes, name):
    clip = latents(3, 16, 24)
    model = other_nodes(small)[name]()
    noise, inversion = invert(nodes, model, latent=clip)
    with refused("Feature Injection", "tokens", "(ToMe, HyperTile, Deep Shrink or similar). Remove it"):
        sample(nodes, inject(nodes, model, inversion, **ALL), noise)


def test_load_inversion_does_not_list_a_broken_link(nodes, base):
    folder = base / "output" / "cove"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "gone.inversion.safetensors"
    try:
        link.symlink_to(base / "nowhere")
    except OSError:
        pytest.skip("no links here")
    try:
        (file, *_) = nodes["LoadInversion"].define_schema().inputs
        assert not any("gone" in option for option in file.options)
    finally:
        link.unlink()


def with_hooks(model, conditioning):
    """Return the CONDITIONING with a LoRA attached as hooks."""
    import comfy.hooks

    hook, name = comfy.hooks.WeightHook(1.0, 1.0), "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    weight = dict(model.model.named_parameters())[name]
    hook.weights = {name: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),))}
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, group)


def test_feature_injection_refuses_hooks_of_a_source_prompt(comfy, small, nodes):
    """Hooks would be ignored silently."""
    source = with_hooks(small, prompt(1))
    noise, inversion = invert(nodes, small, source)
    model = inject(nodes, small, inversion, conditioning=source, **ALL)
    with (
        refused("Feature Injection", "source prompt carries hooks", "Put the LoRA on the model"),
        watched(small) as calls,
    ):
        sample(nodes, model, noise)
    assert not calls


def test_store_features_stores_the_source_of_a_prompt_with_hooks(comfy, small, nodes):
    source = with_hooks(small, prompt(1))
    noise, inversion = invert(nodes, small, source)
    stored = store(nodes, small, inversion, conditioning=source)
    for step, features in stored.features.items():
        right = source_at(small, inversion, step, source)
        assert all(torch.equal(features[site], right.at[site]) for site in AUTO_SITES)
    assert sample(nodes, inject(nodes, small, stored), noise).isfinite().all()


def test_store_features_refuses_a_negative_prompt_at_cfg_1(small, nodes):
    model = small.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    _, inversion = invert(nodes, model)
    wrong = ("runs one prompt at cfg 1", "requires the negative prompt as well", "or remove this one")
    with refused("Store Features", *wrong), watched(small) as calls:
        store(nodes, model, inversion)
    assert not calls


def test_check_fits_mentions_another_precision(small, nodes, host_module):
    _, inversion = invert(nodes, small)
    weights = small.model.diffusion_model
    try:
        weights.to(torch.bfloat16)
        with pytest.raises(ValueError, match=r"another checkpoint than the one connected.*in another precision"):
            host_module.identity.check_fits(inversion, small)
    finally:
        weights.to(torch.float32)


def test_reconstruction_check_refuses_frames_too_small_for_ssim(nodes):
    frames = torch.rand(3, 8, 16, 3, generator=torch.Generator().manual_seed(0))
    with refused("Reconstruction Check", "12x12 pixels or more", "Load larger frames"):
        call(nodes["ReconstructionCheck"], source=frames, reconstruction=frames)


def test_store_features_matches_recomputed_features_with_correspondence_attention(small, nodes):
    guided = guide(nodes, small)
    noise, inversion = invert(nodes, guided)
    stored = store(nodes, guided, inversion)
    one, other = (sample(nodes, inject(nodes, guided, each), noise) for each in (stored, inversion))
    assert torch.equal(one, other)
