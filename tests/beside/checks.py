"""What the tests beside other packs share: each frame alone, a MODEL patched in two orders, equal or refused."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import call, prompt
from tests.inversion_helpers import ask, down, noise_like

FRAMES, STEPS = 5, 4  # the host's context windows (0.3.75) need one step less than frames
CLOSE = {"rtol": 1e-3, "atol": 1e-2}  # of values up to 50: batches of another size add up in another order
ORDERS = pytest.mark.parametrize("order", ["before", "after"])

NODES = ("Diffusion Features: ", "DDIM Inversion: ", "DDIM Sampler: ", "Correspondence Attention: ")
NODES += ("Feature Injection: ", "Store Features: ", "TokenFlow: ")


def alone(nodes, model):
    """MODEL with Correspondence Attention in which every frame sees itself: the clip at once is its frames."""
    return call(nodes["CorrespondenceAttention"], model=model, spatial_temporal="own frame")[0]


def arranged(order, model, theirs, ours):
    """MODEL patched by both: by theirs `before` or `after` ours."""
    return ours(theirs(model)) if order == "before" else theirs(ours(model))


def answer(model, inversion, positive=None):
    """The answer of MODEL for an edit, in the middle of sampling."""
    return ask(model, noise_like(inversion), down(inversion), -2 - 1, positive or prompt(2), prompt(3), 2.0)


def answer_of_clips(windows, model_of, inversion, positive=None):
    """`answer` where every window is a clip of its own with the MODEL that `model_of` gives for its frames."""
    total, count = torch.zeros_like(inversion.clip), torch.zeros(len(inversion.clip), 1, 1, 1)
    for frames in windows:
        asked = (down(inversion), -2 - 1, positive or prompt(2), prompt(3), 2.0)
        total[frames] += ask(model_of(frames), noise_like(inversion)[frames], *asked)
        count[frames] += 1
    return total / count


def equal_or_refused(run, expected, *pieces: str) -> None:
    """The run gives what is expected, or one of our nodes refuses it in a sentence with these pieces."""
    try:
        got = run()
    except ValueError as error:
        assert str(error).startswith(NODES), error
        assert all(piece in str(error) for piece in pieces), error
        return
    assert_close(got, expected, **CLOSE)
