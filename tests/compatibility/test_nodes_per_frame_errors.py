"""Errors about per-frame inputs: for other frames, not separable, or cut without a window."""

import pytest
import torch

from tests.compatibility.per_frame_helpers import (
    LONG,
    alone,
    anchored,
    drop_control,  # noqa: F401  (a fixture)
    hinted,
    masked,
    rows,
)
from tests.helpers import call, hints, latents, predict, prompt, refused
from tests.inversion_helpers import ALL, answer_at, flow, inject, invert, sample, store

WRONG = {
    "prompt": (lambda: rows(1, 2), ("the prompt has 2 rows for 3 frames", "one for each frame")),
    "mask": (lambda: masked(1, 2), ("the mask of a prompt has 2 rows for 3 frames",)),
    "picture": (
        lambda: prompt(1, concat_latent_image=latents(2)["samples"]),
        ("InstructPixToPixConditioning", "2 rows for 3 frames"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_nodes_refuse_per_frame_inputs_for_other_frames(small, nodes, kind):
    make, wrong = WRONG[kind]
    with refused("DDIM Inversion", *wrong):
        invert(nodes, small, conditioning=make())
    noise, inversion = invert(nodes, small)
    with refused("DDIM Sampler", *wrong):
        sample(nodes, small, noise, make())
    with refused("Correspondence Attention", *wrong):  # in a stock sampler
        predict(alone(nodes, small), latents(), prompt(2), make(), 2.0)
    with refused("TokenFlow", *wrong):
        answer_at(flow(nodes, small, inversion), inversion, 1, make())
    with refused("Store Features", *wrong):
        store(nodes, small, inversion, conditioning=make())
    if kind != "mask":  # features always cover the whole picture
        with refused("Diffusion Features", *wrong):
            call(nodes["DiffusionFeatures"], model=small, latent=latents(), conditioning=make())


def test_cut_controls_refuses_another_packs_controlnet_that_cannot_be_cut(small, nodes):
    """Methods bound to the original, as in Advanced-ControlNet, would run with the hints of all frames."""
    ((text, extras),) = hinted(1)
    net = extras["control"]
    foreign = type("Foreign", (type(net),), {"__module__": "foreign_pack.nodes"})
    other = net.copy()
    other.__class__ = foreign
    conditioning = [[text, {**extras, "control": other}]]
    model = alone(nodes, small)
    assert predict(model, latents(LONG), conditioning).isfinite().all()
    with pytest.raises(ValueError, match=r"type Foreign \(foreign_pack\).*Advanced-ControlNet's for all"):
        predict(anchored(model), latents(LONG), conditioning)
    other.sub_idxs = None  # it reads ad_params itself
    assert predict(anchored(model), latents(LONG), conditioning).isfinite().all()


class Reference:
    """A hint that is not a picture, as in Advanced-ControlNet's reference: every attribute raises."""

    def __getattr__(self, name):
        raise AttributeError("Invalid use of Reference Preprocess output")


def test_nodes_refuse_reference_controlnets(small, nodes):
    ((text, extras),) = hinted(1)
    net = extras["control"].copy()
    net.cond_hint_original, net.strength = Reference(), 0.0
    conditioning = [[text, {**extras, "control": net}]]
    _, inversion = invert(nodes, small)
    wrong = ("expected ControlNets that take a picture", "got ControlNet", "Remove the reference")
    for node, model in (
        ("Correspondence Attention", alone(nodes, small)),
        ("TokenFlow", flow(nodes, small, inversion)),
    ):
        with refused(node, *wrong):
            answer_at(model, inversion, 1, conditioning)
    with refused("Store Features", *wrong):
        store(nodes, small, inversion, conditioning=conditioning)
    with refused("Feature Injection", *wrong):
        answer_at(inject(nodes, small, inversion, conditioning=conditioning, **ALL), inversion, 1)
    net.cond_hint_original, net.ref_opts = hints(1), object()  # its state after a run
    with refused("Correspondence Attention", *wrong):
        answer_at(alone(nodes, small), inversion, 1, conditioning)


def test_correspondence_attention_refuses_a_batch_cut_without_a_window(small, nodes):
    def cut(executor, model, conds, x, timestep, model_options):
        parts = [executor(model, conds, x[i : i + 2], timestep[i : i + 2], model_options) for i in range(0, len(x), 2)]
        return [torch.cat(some) for some in zip(*parts, strict=True)]

    model = small.clone()
    model.add_wrapper_with_key("calc_cond_batch", "cutter", cut)
    with pytest.raises(ValueError, match="run on 2 frames of a clip of 5, and no context window"):
        predict(alone(nodes, model), latents(LONG), prompt(1))
