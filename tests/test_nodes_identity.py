"""Fingerprint of an inversion: different for every attribute that affects the run, equal for equal objects."""

import copy
import functools
import importlib
import random
import threading
from collections import OrderedDict, defaultdict, deque

import numpy
import pytest
import torch

from tests.helpers import hints, latents, prompt
from tests.inversion_helpers import guide, invert, small_lora, tiny

SIGMAS = torch.tensor([0.0, 1.0, 3.0])


@pytest.fixture
def name_of(comfy, pack):
    """MODEL, CONDITIONING -> fingerprint of their inversion."""
    run_fingerprint = importlib.import_module(f"{pack.__name__}.nodes.host.identity").run_fingerprint

    def found(model, conditioning=None):
        return run_fingerprint(model, conditioning or prompt(1), latents()["samples"], SIGMAS, 1)

    return found


# --- generated objects ---


class Held:
    """An object of another pack."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def method(self):
        return self


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Net(torch.nn.Module):
    def __init__(self, value, strength):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([float(value)]))
        self.strength = strength


def closing_over(value):
    def patch(x, more=0):
        return x if value is None else value

    return patch


def with_default(value):
    return lambda x, more=value: more


# Kind of object -> a function that wraps a value in it.
KINDS = {
    "list": lambda value: [1, value],
    "tuple": lambda value: (value, 2),
    "dict": lambda value: {"a": value, 2: 3},
    "ordered dict": lambda value: OrderedDict(a=value),
    "default dict": lambda value: defaultdict(list, {"a": value}),
    "deque": lambda value: deque([value]),
    "set": lambda value: {Held(a=value), "a", "b"},
    "object": lambda value: Held(a=1, b=value),
    "object with slots": Slotted,
    "method": lambda value: Held(a=value).method,
    "closure": closing_over,
    "default": with_default,
    "partial": lambda value: functools.partial(max, value, key=len),
    "partial keyword": lambda value: functools.partial(max, key=value),
    "network": lambda value: Net(repr(value) == "0", value),
}
LEAVES = [0, 1, -1, 0.0, 1.5, True, None, "a", "b", b"a", 1j, range(3), len, max, Held, Net, torch.float16]
LEAVES += [torch.device("cpu"), torch.arange(3), torch.arange(3.0), torch.zeros(2, 3), numpy.arange(3), numpy.zeros(2)]


def generated(seed, leaf):
    """Return `leaf` inside nested objects of random kinds."""
    draws, value = random.Random(seed), copy.deepcopy(leaf)
    for _ in range(draws.randint(1, 5)):
        value = KINDS[draws.choice(sorted(KINDS))](value)
    return value


def of(model, thing, place):
    """Return a clone of MODEL with an object in one of the places that nodes use."""
    model = model.clone()
    if place == "attachments":
        model.set_attachments("somebody", thing)
    elif place == "callbacks":
        model.add_callback_with_key("on_pre_run", "somebody", thing)
    elif place == "wrappers":
        model.add_wrapper_with_key("apply_model", "somebody", thing)
    elif place == "own wrappers":
        model.add_wrapper_with_key("apply_model", "cove of somebody", thing)
    elif place == "injections":
        model.set_injections("somebody", [thing])
    elif place == "object patches":
        model.add_object_patch("model_sampling", thing)
    elif place == "options":
        model.model_options["somebody"] = thing
    elif place == "transformer options":
        model.model_options["transformer_options"]["somebody"] = thing
    elif place == "wrappers in options":
        model.model_options["transformer_options"]["wrappers"] = {"apply_model": {"somebody": [thing]}}
    elif place == "hook patches":
        model.hook_patches[Held()] = {"weight": [thing]}
    elif place == "additional models":
        other = tiny(seed=1).clone()
        other.set_attachments("somebody", thing)
        model.set_additional_models("somebody", [other])
    return model


PLACES = ["attachments", "callbacks", "wrappers", "own wrappers", "injections", "object patches", "options"]
PLACES += ["transformer options", "wrappers in options", "hook patches", "additional models"]


@pytest.mark.parametrize("place", PLACES)
def test_run_fingerprint_includes_everything_nodes_add_to_a_model(small, name_of, place):
    found = [name_of(small), name_of(of(small, Held(strength=0.5), place)), name_of(of(small, Held(strength=1), place))]
    assert len(set(found)) == 3
    assert name_of(of(small, Held(strength=0.5), place)) == found[1]


def test_fingerprint_changes_with_any_value_in_nested_objects(small, pack):
    identity = importlib.import_module(f"{pack.__name__}.nodes.host.identity")

    def name_of(thing):
        return identity.fingerprint(thing, known=identity._Contents(small))

    for seed in range(50):
        names = {}
        for i, leaf in enumerate(LEAVES):
            found = name_of(generated(seed, leaf))
            assert found == name_of(generated(seed, leaf)), (seed, leaf)
            assert names.setdefault(found, i) == i, (seed, leaf, LEAVES[names[found]])


def test_run_fingerprint_includes_added_attributes_of_objects(small, name_of):
    for kind in ("object", "closure", "network", "method", "set"):
        thing = KINDS[kind](1)
        before = name_of(of(small, thing, "attachments"))
        if kind == "method":
            thing.__self__.added = 1
        elif kind == "set":
            thing = {*thing, "more"}
        else:
            thing.added = 1
        assert name_of(of(small, thing, "attachments")) != before, kind


def test_run_fingerprint_distinguishes_functions_of_one_name(small, name_of):
    one, other = (lambda x: x), (lambda x: -x)
    assert one.__qualname__ == other.__qualname__
    assert name_of(of(small, one, "wrappers")) != name_of(of(small, other, "wrappers"))


def test_run_fingerprint_reads_cyclic_objects(small, name_of):
    def ring(value):
        thing = Held(value=value, model=small)
        thing.itself, thing.all = thing, [thing]
        return thing

    assert name_of(of(small, ring(1), "attachments")) == name_of(of(small, ring(1), "attachments"))
    assert name_of(of(small, ring(1), "attachments")) != name_of(of(small, ring(2), "attachments"))


def unreadable():
    long = end = []
    for _ in range(5000):
        end.append([])
        (end,) = end
    many = [Held(i=i) for i in range(110_000)]
    return {"lock": threading.Lock(), "generator": (i for i in range(3)), "long": long, "many": many}


def test_run_fingerprint_of_unreadable_objects_is_unique(small, name_of):
    for kind, thing in unreadable().items():
        model = of(small, Held(thing=thing), "attachments")
        assert name_of(model) != name_of(model), kind


# --- the host's objects ---


@pytest.fixture
def net(base, controlnets):
    """() -> a freshly loaded ControlNet."""
    import comfy.controlnet

    return lambda: comfy.controlnet.load_controlnet(str(base / "models/controlnet" / controlnets["sd15"]))


def applied(net, conditioning=None, **settings):
    """Return a CONDITIONING with a ControlNet."""
    control = net.copy().set_cond_hint(hints().movedim(-1, 1), 0.5, (0.0, 0.75))
    vars(control).update(settings)
    return prompt(1, control=control, control_apply_to_uncond=False)


def test_run_fingerprint_of_a_controlnet_loaded_twice_is_equal(small, name_of, net):
    assert name_of(small, applied(net())) == name_of(small, applied(net()))


def test_run_fingerprint_of_a_controlnet_is_kept_after_a_run(sd15, nodes, name_of, net):
    conditioning = applied(net())
    before = name_of(sd15, conditioning)
    control = conditioning[0][1]["control"]
    invert(nodes, sd15, conditioning, steps=1)
    assert name_of(sd15, conditioning) == before
    # The state after an interrupt.
    control.cond_hint, control.timestep_range = torch.zeros(3, 3, 40, 56), (14.6, 0.5)
    control.model_sampling_current = sd15.get_model_object("model_sampling")
    assert name_of(sd15, conditioning) == before


def test_run_fingerprint_includes_every_setting_of_a_controlnet(small, name_of, net):
    loaded = net()
    found = [name_of(small, applied(loaded))]
    control = applied(loaded)[0][1]["control"]
    settings = {"cond_hint_original": hints(seed=1).movedim(-1, 1), "strength": 0.25, "sub_idxs": [0]}
    settings |= {"timestep_percent_range": (0.25, 0.75), "upscale_algorithm": "bilinear", "extra_args": {"a": 1}}
    settings |= {"timestep_keyframes": Held(keyframes=[Held(start_percent=0.5)]), "weights": [1.0, 0.5]}
    settings |= {"previous_controlnet": applied(loaded, strength=0.125)[0][1]["control"], "preprocess_image": len}
    found += [name_of(small, applied(loaded, **{name: value})) for name, value in settings.items()]
    with torch.no_grad():
        control.control_model.input_hint_block[0].bias[0] += 1
    found.append(name_of(small, applied(loaded)))
    assert len(set(found)) == len(found)


def test_run_fingerprint_of_a_lora_loaded_twice_is_equal(small, name_of, base):
    import comfy.sd
    import comfy.utils

    def patched(seed, strength=1.0):
        return comfy.sd.load_lora_for_models(
            small, None, comfy.utils.load_torch_file(small_lora(base, seed)), strength, 0.0
        )[0]

    assert patched(0).patches
    assert name_of(patched(0)) == name_of(patched(0))
    assert len({name_of(small), name_of(patched(0)), name_of(patched(1)), name_of(patched(0, 0.5))}) == 4


def test_run_fingerprint_is_kept_when_a_lora_is_merged_into_the_weights(small, name_of, base, nodes):
    import comfy.sd
    import comfy.utils

    file = comfy.utils.load_torch_file(small_lora(base))
    model = comfy.sd.load_lora_for_models(small, None, file, 1.0, 0.0)[0]
    holding = of(model, Held(network=small.model), "attachments")
    before = name_of(holding)
    invert(nodes, holding, steps=1)
    assert model.backup and name_of(holding) == before
    small.unpatch_model()


def test_run_fingerprint_of_equal_guidance_is_equal(small, name_of, nodes):
    found = name_of(guide(nodes, small))
    assert found == name_of(guide(nodes, small)) != name_of(guide(nodes, small, merge_ratio=0.25))
