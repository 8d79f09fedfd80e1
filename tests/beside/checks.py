"""Shared by the tests beside other packs: independent frames, patches in both orders, equal or refused."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import call, prompt
from tests.inversion_helpers import ask, down, noise_like

FRAMES, STEPS = 5, 4  # the host's context windows (0.3.75) need one step less than frames
CLOSE = {"rtol": 1e-3, "atol": 1e-2}  # of values up to 50; the batch size changes the order of additions
ORDERS = pytest.mark.parametrize("order", ["before", "after"])

NODES = ("Diffusion Features: ", "DDIM Inversion: ", "DDIM Sampler: ", "Correspondence Attention: ")
NODES += ("Feature Injection: ", "Store Features: ", "TokenFlow: ")


def alone(nodes, model):
    """Return MODEL with Correspondence Attention in which frames attend only to themselves."""
    return call(nodes["CorrespondenceAttention"], model=model, spatial_temporal="own frame")[0]


def arranged(order, model, theirs, ours):
    """Return MODEL patched by both, theirs `before` or `after` ours."""
    return ours(theirs(model)) if order == "before" else theirs(ours(model))


def answer(model, inversion, positive=None):
    """Return MODEL's denoised edit in the middle of sampling."""
    return ask(model, noise_like(inversion), down(inversion), -2 - 1, positive or prompt(2), prompt(3), 2.0)


def answer_of_clips(windows, model_of, inversion, positive=None):
    """Return `answer` with every window as a separate clip, on the MODEL that `model_of` returns for its frames."""
    total, count = torch.zeros_like(inversion.clip), torch.zeros(len(inversion.clip), 1, 1, 1)
    for frames in windows:
        asked = (down(inversion), -2 - 1, positive or prompt(2), prompt(3), 2.0)
        total[frames] += ask(model_of(frames), noise_like(inversion)[frames], *asked)
        count[frames] += 1
    return total / count


def equal_or_refused(run, expected, *pieces: str) -> None:
    """Check that the run returns `expected`, or that one of our nodes refuses it with these pieces in the error."""
    try:
        got = run()
    except ValueError as error:
        assert str(error).startswith(NODES), error
        assert all(piece in str(error) for piece in pieces), error
        return
    assert_close(got, expected, **CLOSE)
