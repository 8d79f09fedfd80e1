"""Shared by the tests of inversion and injection: a tiny MODEL, one-line calls of nodes, recorded UNet calls.

The MODEL is small only in width: its decoder has the family's number of blocks, so sites are those of a real
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import call, latents, prompt, windowed

SD15 = {"context_dim": 768, "adm_in_channels": None, "use_linear_in_transformer": False, "transformer_depth_middle": 1}
UNETS = {
    "two levels": SD15
    | {
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
    },
    "sd15": SD15
    | {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 16,
    },
}

ALL = {"resnet_blocks": "0-3", "attention_blocks": "0-3"}  # of a UNet of two levels
SITES = [*(f"resnet.{block}.0" for block in range(4)), *(f"attention.{block}.0" for block in range(4))]
AUTO_SITES = ["resnet.0.0", *(f"attention.{block}.0" for block in range(3))]  # FLATTEN's blocks in that UNet
TENSORS = ("clip", "latents", "sigmas", "residuals", "stopped")  # of an inversion

# The strength of the output's random part, set by trial: large enough for an effect, small enough to be reversible.
LAST = 0.1


@cache
def tiny(kind: str = "two levels", seed: int = 0):
    """Return a random MODEL of 32 to 128 channels, whose output is close to its normalised input.

    Each is made once, so a test must not change it.
    """
    import comfy.supported_models

    family = comfy.supported_models.SDXL if kind == "sdxl" else comfy.supported_models.SD15
    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "dtype": torch.float32}
    config |= {"use_spatial_transformer": True, "legacy": False, "use_checkpoint": False} | UNETS[kind]
    return with_random_weights(family(config).get_model({}, ""), seed)


def with_random_weights(model, seed: int = 0, share: float = 1.0):
    """Return the MODEL of a host's model of 32 channels, whose output is `share` times its input plus a random part."""
    import comfy.model_patcher

    unet, generator = model.diffusion_model, torch.Generator().manual_seed(seed)
    end = f"output_blocks.{len(unet.output_blocks) - 1}."
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            added = any(part in name for part in ("out_layers", "proj_out", "skip_connection", "to_out"))
            gain = LAST if name.startswith("out.") or (added and name.startswith(end)) else 0.3 if added else 1.0
            weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=generator)
        # The latent and its negative in channels 0-7, returned by the last skip: silu(x) - silu(-x) = x.
        first, last, head = unet.input_blocks[0][0].weight, unet.output_blocks[-1][0].skip_connection, unet.out[2]
        first[:8] = 0
        first[range(8), [0, 1, 2, 3] * 2, 1, 1] = torch.tensor([1.0] * 4 + [-1.0] * 4)
        last.weight[range(8), range(-32, -24)] += 1.0
        head.weight[range(4), range(4), 1, 1] += share
        head.weight[range(4), range(4, 8), 1, 1] -= share
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def small_lora(folder, seed: int = 0) -> str:
    """Write a LoRA for the MODEL of two levels to a folder and return its path."""
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_"
    tensors = {}
    for part in ("q", "v"):
        tensors[f"{name}{part}.lora_down.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"{name}{part}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
    path = folder / f"small_lora_{seed}.safetensors"
    save_file(tensors, path)
    return str(path)


# --- one-line calls of nodes ---


def invert(nodes, model, conditioning=None, latent=None, steps=3, **settings):
    """Return noise and inversion; without refinements by default."""
    wires = {"model": model, "conditioning": conditioning or prompt(1), "latent": latent or latents()}
    settings = {"refinements": 0} | settings
    return call(nodes["DDIMInversion"], **wires, steps=steps, **settings)


def store(nodes, model, inversion, share=1.0, **settings):
    """Return the inversion from Store Features, by default in memory and with every step."""
    return call(nodes["StoreFeatures"], model=model, inversion=inversion, share=share, **settings)[0]


def store_unless_recomputed(nodes, model, inversion, storage, **settings):
    """Return the inversion from Store Features with this storage, or unchanged for "recompute"."""
    return inversion if storage == "recompute" else store(nodes, model, inversion, storage=storage, **settings)


def guide(nodes, model, latent=None, **settings):
    """Return MODEL from Correspondence Attention, with the correspondence of its own features."""
    features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latent or latents())
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
    return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence, **settings)[0]


def inject(nodes, model, inversion, **settings):
    """Return MODEL from Feature Injection, by default active in every step."""
    settings = {"resnet_share": 1.0, "attention_share": 1.0} | settings
    return call(nodes["FeatureInjection"], model=model, inversion=inversion, **settings)[0]


def flow(nodes, model, inversion, every=2, **settings):
    """Return MODEL from TokenFlow, by default with one keyframe in every two frames."""
    return call(nodes["TokenFlow"], model=model, inversion=inversion, every=every, **settings)[0]


def sample(nodes, model, noise, positive=None, negative=None, cfg=2.0):
    """Return the edited latents from DDIM Sampler."""
    wires = {"model": model, "noise": noise, "positive": positive or prompt(2), "negative": negative or prompt(3)}
    return call(nodes["DDIMSampler"], **wires, cfg=cfg)[0]["samples"]


# --- recorded UNet calls ---


@dataclass
class Seen:
    """One call of the UNet: its inputs, and the tensors at each site by name."""

    latents: Tensor
    options: dict
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of ResNet branches
    queries: dict[str, Tensor] = field(default_factory=dict)  # before the projection, like keys and values
    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def at(self) -> dict[str, Tensor]:
        return self.outputs | self.queries


@contextmanager
def watched(model) -> Iterator[list[Seen]]:
    """Record every call of the UNet in the block, with temporary hooks."""
    from comfy.ldm.modules.attention import SpatialTransformer

    unet, calls, hooks = model.model.diffusion_model, [], []

    def come(module, args, kwargs):
        calls.append(Seen(args[0].clone(), kwargs["transformer_options"]))

    def keep(kind: str, name: str):
        return lambda module, args, *output: getattr(calls[-1], kind).update({name: (output or args)[0].clone()})

    hooks.append(unet.register_forward_pre_hook(come, with_kwargs=True))
    for number, block in enumerate(unet.output_blocks):
        hooks.append(block[0].out_layers.register_forward_hook(keep("outputs", f"resnet.{number}.0")))
        transformers = [
            part for layer in block if isinstance(layer, SpatialTransformer) for part in layer.transformer_blocks
        ]
        for index, transformer in enumerate(transformers):
            for kind, projection in (("queries", "to_q"), ("keys", "to_k"), ("values", "to_v")):
                layer = getattr(transformer.attn1, projection)
                hooks.append(layer.register_forward_pre_hook(keep(kind, f"attention.{number}.{index}")))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def ask(model, at: Tensor, sigmas: Tensor, step: int, positive, negative=None, cfg: float = 1.0) -> Tensor:
    """Return the denoised latents at `at`, in the model's scale, in step `step` of a run over `sigmas`."""
    import comfy.sample
    import comfy.samplers

    def once(denoise, x, sigmas, extra_args, callback, disable):
        return denoise(at, sigmas[step].expand(len(at)), **extra_args)

    sampler, nothing = comfy.samplers.KSAMPLER(once), torch.zeros_like(at)
    negative = positive if negative is None else negative
    return comfy.sample.sample_custom(
        model, nothing, cfg, sampler, sigmas, positive, negative, nothing, disable_pbar=True
    )


def noise_like(inversion, seed=7):
    """Return latents in the model's scale that are not from the inversion."""
    return 3 * torch.randn(inversion.clip.shape, generator=torch.Generator().manual_seed(seed))


def source_at(model, inversion, step, conditioning=None, frames=slice(None)):
    """Return the UNet call of MODEL, without injection, at the stored latents of a step."""
    with watched(model) as calls:
        ask(model, inversion.latents[step][frames], down(inversion), -2 - step, conditioning or prompt(1))
    (seen,) = calls
    return seen


def down(inversion):
    """Return the sigmas of sampling on the grid of the inversion."""
    return inversion.sigmas.flip(0)


def edited_at(model, inversion, step, positive=None, negative=None, cfg=2.0):
    """Return the UNet calls of MODEL for an edit at this step, and the denoised latents."""
    with watched(model) as calls:
        positive, negative = positive or prompt(2), negative or prompt(3)
        answer = ask(model, noise_like(inversion), down(inversion), -2 - step, positive, negative, cfg)
    return calls, answer


# --- TokenFlow ---


def keyframes_of(cove, inversion, step, every, seed=0):
    """Return the keyframes of a step; there is one draw per step, starting with the noisiest."""
    generator = torch.Generator().manual_seed(seed)
    draws = inversion.schedule.steps - step
    return [cove.tokenflow.choose_keyframes(inversion.frames, every, generator) for _ in range(draws)][-1]


def part_of(inversion, frames):
    """Return the inversion of some of the frames, without features."""
    return replace(inversion, clip=inversion.clip[frames], latents=inversion.latents[:, frames], features={})


def joint(nodes, model):
    """Return MODEL with attention among all frames only."""
    return call(nodes["CorrespondenceAttention"], model=model)[0]


def answer_at(model, inversion, step, positive=None, negative=None, cfg=2.0):
    """Return the denoised latents for an edit at this step."""
    positive, negative = positive or prompt(2), negative or prompt(3)
    return ask(model, noise_like(inversion), down(inversion), -2 - step, positive, negative, cfg)


# --- windows ---


def windows_of(model, order, patched):
    """Return MODEL with core's or AnimateDiff-Evolved's context windows on 5 frames, before or after it is patched."""

    def core(model):
        return windowed(model, context_length=3)

    def evolved(model):
        def cut(executor, model, conds, x, timestep, model_options):
            total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
            for frames in ([0, 1, 2], [2, 3, 4]):
                model_options["transformer_options"]["ad_params"]["sub_idxs"] = frames
                parts = executor(model, conds, x[frames], timestep[frames], model_options)
                for whole, part in zip(total, parts, strict=True):
                    whole[frames] += part
                count[frames] += 1
            model_options["transformer_options"]["ad_params"]["sub_idxs"] = None
            return [whole / count for whole in total]

        model = model.clone()
        model.model_options["transformer_options"]["ad_params"] = {"sub_idxs": None}
        model.add_wrapper_with_key("calc_cond_batch", "ADE", cut)
        return model

    cut = core if "core" in order else evolved
    return patched(cut(model)) if order.endswith("before") else cut(patched(model))


def windows_in(order):
    """Return the windows of `windows_of`, each with the frames that it runs on.

    Since 0.21, core's windows by default run with the preceding frame in front.
    """
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    stock = {slot.id for slot in ContextWindowsManualNode.define_schema().inputs}
    anchored = "core" in order and "causal_window_fix" in stock
    return [([0, 1, 2], [0, 1, 2]), ([2, 3, 4], [1, 2, 3, 4] if anchored else [2, 3, 4])]


# --- two inversions ---


def same(one, other) -> bool:
    """Return whether two inversions are bit-identical."""
    tensors = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    tensors += [(one.conditioning[name], other.conditioning[name]) for name in one.conditioning]
    tensors += [(one.features[i][site], other.features[i][site]) for i in one.features for site in one.features[i]]
    alike = one.conditioning.keys() == other.conditioning.keys() and one.about == other.about
    alike &= {i: set(some) for i, some in one.features.items()} == {i: set(some) for i, some in other.features.items()}
    # NaN equals NaN.
    return alike and all(a.dtype == b.dtype and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in tensors)
