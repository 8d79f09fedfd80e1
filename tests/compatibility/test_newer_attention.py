"""Attention calls of newer ComfyUIs, imitated on every version: tensors in containers, and an attention override."""

import pytest
import torch
from torch import Tensor

from tests.inversion_helpers import flow, guide, inject, invert, sample


class Container:
    """A tensor that can be taken once, so that the callee can free its memory."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        return tensor


@pytest.fixture
def contained(comfy, monkeypatch) -> list:
    """Pass containers to the attention function in attention that no node replaces; list its calls."""
    from comfy.ldm.modules import attention

    calls, attend = [], attention.optimized_attention

    def unpack(*arguments, **options):
        if isinstance(arguments[0], Container):
            calls.append(1)
            arguments = (*(container.take() for container in arguments[:3]), *arguments[3:])
        return attend(*arguments, **options)

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        tensors = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        options = {"attn_precision": self.attn_precision, "transformer_options": transformer_options}
        return self.to_out(attention.optimized_attention(*map(Container, tensors), self.heads, **options))

    for name in ("optimized_attention", attend.__name__):
        monkeypatch.setattr(attention, name, unpack)
    monkeypatch.setattr(attention.CrossAttention, "forward", forward)
    return calls


@pytest.fixture
def edit(nodes, small):
    """Name of a node, function that changes MODEL before it -> the edited clip."""

    def edited(node: str, change=lambda model: model) -> Tensor:
        noise, inversion = invert(nodes, small)
        model = change(small.clone())
        if node == "CorrespondenceAttention":
            patched = guide(nodes, model)
        else:
            patched = (inject if node == "FeatureInjection" else flow)(nodes, model, inversion)
        return sample(nodes, patched, noise)

    return edited


NODES = pytest.mark.parametrize("node", ["CorrespondenceAttention", "FeatureInjection", "TokenFlow"])


@NODES
def test_nodes_accept_attention_tensors_in_containers(request, edit, node):
    expected = edit(node)
    calls = request.getfixturevalue("contained")
    assert torch.equal(edit(node), expected)
    assert calls


@NODES
def test_nodes_apply_the_attention_override_to_self_attention(edit, node):
    """Correspondence Attention and TokenFlow call it themselves, because they replace all self-attention."""
    self_attention = []

    def override(attend, query, key, value, heads, *arguments, **options):
        assert all(isinstance(tensor, Tensor) for tensor in (query, key, value))
        self_attention.append(query.shape == key.shape)
        return attend(query, key, value, heads, *arguments, **options)

    def overridden(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    expected = edit(node)
    assert torch.equal(edit(node, overridden), expected)
    assert any(self_attention)
