"""Every UNet family of the host runs in every node, or is refused with an error that names it."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import call, latents, refused, state_of
from tests.inversion_helpers import invert, tiny, with_random_weights

SD1_DEPTH = [1, 1, 1, 1, 1, 1, 0, 0]
REFUSED = {
    "SVD_img2vid": "got the video model SVD_img2vid",
    "SV3D_u": "got the video model SV3D_u",
    "SV3D_p": "got the video model SV3D_p",
    "LotusD": "got Lotus with ModelSamplingDiscrete and IMG_TO_IMG",
}

# Variants within a family: UNet settings, and the tensors by which the host detects them.
NO_MIDDLE, RESNET_MIDDLE = {"transformer_depth_middle": -2}, {"transformer_depth_middle": -1}
EDM_V = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
SDXS = {"num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 4], "transformer_depth_output": [1, 1, 1, 1, 1, 1]}
FAMILIES = ["SD15", "SD20", "SD21UnclipL", "SD21UnclipH", "SDXLRefiner", "SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M"]
FAMILIES += ["KOALA_1B", "Stable_Zero123", "SD_X4Upscaler", "SD15_instructpix2pix", "SDXL_instructpix2pix"]
VARIANTS = {
    "SD15 inpainting": ("SD15", {"in_channels": 9}, {}),
    "SD20 inpainting": ("SD20", {"in_channels": 9}, {}),
    "SDXL inpainting": ("SDXL", {"in_channels": 9}, {}),
    "SDXS": ("SD15", SDXS | NO_MIDDLE | {"transformer_depth": [1, 1, 1]}, {}),
    "SDXS 0.9": (
        "SD20",
        SDXS | NO_MIDDLE | {"transformer_depth": [1, 1, 1], "disable_self_attentions": [True, False, False]},
        {},
    ),
    "SDXL zsnr v": ("SDXL", {}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}),
    "Playground 2.5": ("SDXL", {}, {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}),
    "CosXL": ("SDXL", {}, EDM_V),
    "CosXL edit": ("SDXL_instructpix2pix", {}, EDM_V),
}
VIDEO = {"merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1]}
VIDEO |= {"extra_ff_mix_layer": True, "use_spatial_context": True}
PARTS = {"KOALA_700M": NO_MIDDLE, "SSD1B": RESNET_MIDDLE, "Segmind_Vega": RESNET_MIDDLE}
PARTS |= {"SVD_img2vid": VIDEO, "SV3D_u": VIDEO, "SV3D_p": VIDEO}


def families() -> dict[str, type]:
    """Return the host's configuration of each UNet model by name."""
    import comfy.supported_models

    return {made.__name__: made for made in comfy.supported_models.models if "model_channels" in made.unet_config}


@cache
def build(name: str):
    """Return a random MODEL of a family or variant: narrow and shallow, with the real one's parts and inputs."""
    family, settings, tensors = VARIANTS.get(name, (name, PARTS.get(name, {}), {}))
    family = families()[family]
    depth = [min(count, 2) for count in family.unet_config.get("transformer_depth", SD1_DEPTH)]
    count = 1 if len(depth) == 3 else 2  # ResNet blocks per level
    levels = [depth[i : i + count] for i in range(0, len(depth), count)]
    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "context_dim": 1024}
    config |= {"use_spatial_transformer": True, "legacy": False, "use_checkpoint": False}
    config |= {"num_res_blocks": [count] * len(levels), "channel_mult": [1, 2, 4, 4][: len(levels)]}
    config |= {"transformer_depth_output": [some[-1] for some in levels for _ in range(count + 1)]}
    config |= {"transformer_depth_middle": max(depth)} | family.unet_config | {"transformer_depth": depth}
    if config.get("adm_in_channels"):
        config["num_classes"] = "sequential"
    made = family(config | settings)
    made.unet_config |= {"model_channels": 32, "num_heads": -1, "num_head_channels": 16, "dtype": torch.float32}
    projection = {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)}
    with torch.no_grad():
        model = made.get_model(tensors | projection, "")
    # Close to the ideal prediction for both eps and v, so that sampling returns the inverted clip.
    return with_random_weights(model, share=float(model.model_type.name == "EPS"))


def text(model, seed: int) -> list:
    """Return a CONDITIONING of random numbers with the shape of the family's text encoder."""
    generator = torch.Generator().manual_seed(seed)
    width = model.model.model_config.unet_config["context_dim"]
    pooled = torch.randn(1, 1280, generator=generator)
    return [[5 * torch.randn(1, 77, width, generator=generator), {"pooled_output": pooled}]]


def run_everywhere(nodes, model):
    """Run every node with a MODEL input; return the clip, its reconstruction and the edits by name."""
    clip = latents(3, 13, 11)
    source, edit = text(model, 1), text(model, 2)
    features, _ = call(nodes["DiffusionFeatures"], model=model, latent=clip)
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
    (guided,) = call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)
    wires = {"model": guided, "conditioning": source, "latent": clip}
    noise, inversion = call(nodes["DDIMInversion"], **wires, steps=2, refinements=3)
    (stored,) = call(nodes["StoreFeatures"], model=guided, inversion=inversion)
    assert len(stored.features) == 2 and not inversion.features
    call(nodes["DDIMSamplerSelect"], model=guided, noise=noise)
    wires = {"noise": noise, "negative": text(model, 3)}
    back = call(nodes["DDIMSampler"], model=guided, positive=source, cfg=1.0, **wires)[0]["samples"]
    (flowing,) = call(nodes["TokenFlow"], model=model, inversion=inversion)
    edits = {"guided": guided, "flowing": flowing}
    for name, kept in (("recomputed", inversion), ("stored", stored)):
        (edits[name],) = call(nodes["FeatureInjection"], model=guided, inversion=kept)
    results = {
        name: call(nodes["DDIMSampler"], model=some, positive=edit, cfg=2.0, **wires)[0]["samples"]
        for name, some in edits.items()
    }
    return clip["samples"], back, results


def test_families_lists_every_unet_of_the_host(comfy):
    assert families().keys() == {*FAMILIES, *REFUSED}


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_nodes_run_every_unet_family(comfy, nodes, name):
    model = build(name)
    before = state_of(model)
    with torch.inference_mode():
        clip, back, edits = run_everywhere(nodes, model)
    assert state_of(model) == before
    assert (back - clip).norm() < 0.2 * clip.norm()
    assert all(edit.isfinite().all() for edit in edits.values())
    assert_close(edits["recomputed"], edits["stored"], rtol=1e-3, atol=1e-2)
    assert not torch.equal(edits["recomputed"], edits["guided"]) and not torch.equal(edits["flowing"], edits["guided"])


@pytest.mark.parametrize("name", REFUSED)
def test_nodes_refuse_unet_families_that_cannot_be_inverted(comfy, nodes, name):
    model, wrong = build(name), REFUSED[name]
    wires = {"positive": text(model, 1), "negative": text(model, 2), "noise": latents()}
    with refused("Diffusion Features", wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())
    with refused("Correspondence Attention", wrong):
        call(nodes["CorrespondenceAttention"], model=model)
    with refused("DDIM Inversion", wrong):
        call(nodes["DDIMInversion"], model=model, conditioning=text(model, 1), latent=latents())
    with refused("DDIM Sampler", wrong):
        call(nodes["DDIMSampler"], model=model, **wires)
    with refused("DDIM Sampler (for SamplerCustomAdvanced)", wrong):
        call(nodes["DDIMSamplerSelect"], model=model, noise=wires["noise"])
    _, inversion = invert(nodes, tiny())
    with refused("Feature Injection", wrong):
        call(nodes["FeatureInjection"], model=model, inversion=inversion)
    with refused("Store Features", wrong):
        call(nodes["StoreFeatures"], model=model, inversion=inversion)
    with refused("TokenFlow", wrong):
        call(nodes["TokenFlow"], model=model, inversion=inversion)
