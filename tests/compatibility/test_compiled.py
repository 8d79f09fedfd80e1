"""Correspondence Attention in a UNet compiled with torch.compile."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import call, latents, predict, prompt
from tests.inversion_helpers import guide, windows_of


@pytest.fixture
def compiled(comfy):
    """MODEL -> MODEL with the wrapper of TorchCompileModel.

    Dynamo traces and guards as usual; its graphs run in eager mode, without a C++ compiler.
    """
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compile_unet(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return model

    torch._dynamo.reset()
    yield compile_unet
    torch._dynamo.reset()


def test_correspondence_attention_matches_the_uncompiled_model_when_compiled(small, nodes, compiled):
    """Sigma, settings, prompts, areas, frames and windows change between calls; none may be baked into a graph."""
    part = {"start_percent": 0.3, "end_percent": 0.7}
    longer = latents(5)
    plain = {
        "part": guide(nodes, small, **part),
        "other": guide(nodes, small, latents(seed=9), merge_ratio=0.2),
        "longer": guide(nodes, small, longer),
        "windows": windows_of(small, "evolved after", lambda model: guide(nodes, model, longer)),
    }
    graphs = {name: compiled(model) for name, model in plain.items()}
    (features, _) = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (matches,) = call(nodes["Correspondence"], features=features, window=3)
    wires = {"model": compiled(small), "correspondence": matches}
    plain["before"], graphs["before"] = plain["part"], call(nodes["CorrespondenceAttention"], **wires, **part)[0]
    area = [*prompt(4, area=(3, 4, 1, 2), strength=1.0), *prompt(1)]
    calls = [("part", latents(), prompt(1), sigma) for sigma in (3.0, 9.0, 0.1)]
    calls += [("other", latents(), prompt(1), 3.0), ("part", latents(), prompt(3), 3.0), ("part", latents(), area, 3.0)]
    calls += [
        ("longer", longer, prompt(1), 3.0),
        ("windows", longer, prompt(1), 3.0),
        ("before", latents(), prompt(1), 9.0),
    ]
    calls += [("before", latents(), prompt(1), 3.0), ("part", latents(), prompt(1), 3.0)]
    answers = []
    for name, latent, positive, sigma in calls:
        expected, answer = (predict(models[name], latent, positive, sigma=sigma) for models in (plain, graphs))
        assert_close(answer, expected, rtol=1e-4, atol=1e-4)
        answers.append(answer)
    assert not torch.equal(answers[0], answers[3]) and not torch.equal(answers[0], answers[4])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
