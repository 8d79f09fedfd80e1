"""Kohya Deep Shrink with TokenFlow, whose source runs on the same shrunken grid as the edit."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import latents, prompt, refused, run_stock
from tests.inversion_helpers import ask, down, flow, invert, noise_like, sample, watched

FRAMES = 5


def shrunk(model, end_percent: float = 1.0):
    """Return MODEL patched by PatchModelAddDownscale: half size from the first level on, until `end_percent`."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return run_stock(PatchModelAddDownscale, model, 1, 2.0, 0.0, end_percent, True, "bicubic", "bicubic")[0]


def edit(model, inversion, at, positive=None):
    """Return the token counts of the decoder's self-attention and the denoised latents."""
    with watched(model) as calls:
        answer = ask(model, at, down(inversion), -2 - 1, positive or prompt(2), prompt(3), 2.0)
    return {query.shape[1] for seen in calls for query in seen.queries.values()}, answer


@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_token_flow_with_deep_shrink_edits_identical_frames_like_a_single_frame(comfy, small, nodes, order, blend):
    one = latents(1, 13, 11)
    clip = {"samples": one["samples"].expand(FRAMES, -1, -1, -1)}
    model = shrunk(small)
    _, alone = invert(nodes, model, latent=one)
    _, inversion = invert(nodes, model, latent=clip)
    settings = {"every": 2, "blend_keyframes": blend}
    flowing = (
        flow(nodes, model, inversion, **settings)
        if order == "before"
        else shrunk(flow(nodes, small, inversion, **settings))
    )
    at = noise_like(alone)
    shrunken, expected = edit(model, alone, at)
    grids, answer = edit(flowing, inversion, at.expand(FRAMES, -1, -1, -1))
    assert grids == shrunken and 9 in grids, "3x3 tokens at the level that has 7x6 without Deep Shrink"
    assert_close(answer, expected.expand(FRAMES, -1, -1, -1), rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, edit(small, alone, at)[1])


def test_token_flow_samples_with_deep_shrink_until_a_percentage(comfy, small, nodes):
    """The source shrinks at the same sigmas as the edit."""
    model = shrunk(small, 0.5)
    noise, inversion = invert(nodes, model, latent=latents(FRAMES, 13, 11))
    flowing = flow(nodes, model, inversion)
    with watched(flowing) as calls:
        result = sample(nodes, flowing, noise)
    grids = [{query.shape[1] for query in seen.queries.values()} for seen in calls]
    assert {9, 143} in grids and {42, 143} in grids and result.isfinite().all()


def test_token_flow_refuses_an_area_on_a_shrunken_grid(comfy, small, nodes):
    model = shrunk(small)
    _, inversion = invert(nodes, model, latent=latents(FRAMES, 13, 11))
    flowing = flow(nodes, model, inversion)
    area = [*prompt(2), *prompt(4, area=(7, 5, 3, 2))]
    with refused("TokenFlow", "tokens", "Deep Shrink"):
        edit(flowing, inversion, noise_like(inversion), area)
