"""`nodes/host/errors.py`: every error begins with the name of exactly one node."""

import inspect

import pytest
import torch

from tests.helpers import call, latents, prompt, refused
from tests.inversion_helpers import inject, invert


@pytest.fixture
def broken(host_module):
    """An exception -> a node that raises it."""
    from comfy_api.v0_0_2 import io

    def of(error):
        class Broken(io.ComfyNode):
            @classmethod
            def define_schema(cls):
                return io.Schema(node_id="Broken", display_name="COVE Broken Node", category="COVE", outputs=[])

            @classmethod
            @host_module.errors.named
            def execute(cls, value=7):
                raise error

        return Broken

    return of


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, ImportError, FloatingPointError])
def test_named_adds_the_display_name(broken, host_module, kind):
    with pytest.raises(host_module.errors.NodeError, match=r"^Broken Node: some text$") as caught:
        broken(kind("some text")).execute()
    assert type(caught.value.__cause__) is kind


def test_named_keeps_an_error_that_names_a_node(broken, host_module):
    with pytest.raises(host_module.errors.NodeError, match=r"^TokenFlow: some text$"):
        broken(host_module.errors.NodeError("TokenFlow", "some text")).execute()


def test_named_passes_on_interrupts_and_out_of_memory(comfy, broken):
    import comfy.model_management as management

    for error in (management.InterruptProcessingException(), management.OOM_EXCEPTION("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            broken(error).execute()
        assert caught.value is error


def test_named_keeps_the_signature_of_execute(nodes):
    for node in nodes.values():
        taken = inspect.signature(node.execute).parameters
        assert {slot.id for slot in node.define_schema().inputs or []} == set(taken), node


def test_naming_names_the_node_that_raised_an_error_in_a_run(small, nodes):
    """Feature Injection's check runs inside DDIM Sampler."""
    noise, inversion = invert(nodes, small)
    other = {**noise, "samples": noise["samples"][..., :4]}
    patched = inject(nodes, small, inversion)
    wires = {"model": patched, "positive": prompt(1), "negative": prompt(2), "noise": other}
    with refused("Feature Injection", "the inversion is of latents"):
        call(nodes["DDIMSampler"], **wires, cfg=1.0)


def test_named_names_the_node_that_runs_a_failing_model(small, nodes):
    def broken(apply, args):
        raise ValueError("some text")

    model = small.clone()
    model.set_model_unet_function_wrapper(broken)
    with refused("DDIM Inversion", "some text"), torch.inference_mode():
        call(nodes["DDIMInversion"], model=model, conditioning=prompt(1), latent=latents(), steps=2)


def test_checks_name_existing_nodes(nodes, host_module):
    names = {host_module.status.name_of(node) for node in nodes.values()}
    assert set(host_module.checks.NAMES.values()) <= names
