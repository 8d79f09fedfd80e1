"""The pack beside other packs, loaded by the host's loader: `nox -s packs -- FOLDER ...` runs these tests.

`COVE_PACKS` names the folders. Without it no test is collected here; tests of a pack that is not among them are skipped
with a message.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.beside.packs import FOLDERS, PACKS, install, name_of
from tests.helpers import call

collect_ignore_glob = [] if FOLDERS else ["test_*.py"]


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    """Name of a pack -> its folder in `COVE_PACKS`."""
    return {name_of(folder): folder for folder in FOLDERS}


@pytest.fixture(scope="session")
def use(comfy, base, folders) -> Callable[..., tuple]:
    """Call a node of the host or of a pack by its id, with its own defaults; returns its outputs.

    The host's loader loads all packs of `COVE_PACKS` into this process.
    """
    importlib.import_module("utils.install_util")  # as main.py does: `nodes` puts comfy/ first, which has a utils.py
    import server

    import nodes

    server.PromptServer(asyncio.new_event_loop())  # some packs add routes to it
    for folder in install(folders, base):
        assert asyncio.run(nodes.load_custom_node(str(folder))), f"{folder.name} could not be imported: see the log"

    @torch.inference_mode()  # as the host calls every node
    def use_node(node_id: str, **inputs) -> tuple:
        node = nodes.NODE_CLASS_MAPPINGS[node_id]
        for name, (kind, *options) in node.INPUT_TYPES().get("required", {}).items():
            default = options[0].get("default") if options else None
            if default is None and isinstance(kind, list):
                default = kind[0]
            if default is not None:
                inputs.setdefault(name, default)
        result = getattr(node(), node.FUNCTION)(**inputs)
        return result.args if hasattr(result, "args") else result

    return use_node


def _nodes_of(pack: str, fixture: str):
    @pytest.fixture(scope="session", name=fixture)
    def nodes_of(request, folders):
        """`use`, if this pack is in `COVE_PACKS`."""
        if pack not in folders:
            pytest.skip(f"not run: {pack} was not given")
        return request.getfixturevalue("use")

    return nodes_of


acn, ade, ipa, kj, vhs = (_nodes_of(*pack) for pack in PACKS.items())


# --- context windows ---


@pytest.fixture(params=["core before", "core after", "ade before", "ade after"])
def windowed(request):
    """A function that puts context windows of 3 frames on a MODEL, before or after it is patched."""
    cut = core_windows
    if request.param.startswith("ade"):
        ade = request.getfixturevalue("ade")
        (options,) = ade("ADE_StandardStaticContextOptions", context_length=3, context_overlap=1, fuse_method="flat")

        def cut(model):
            return ade("ADE_UseEvolvedSampling", model=model, context_options=options)[0]

    if request.param.endswith("before"):
        return lambda model, patch: patch(cut(model))
    return lambda model, patch: cut(patch(model))


def core_windows(model):
    """Return MODEL with the host's own context windows."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = {"context_length": 3, "context_overlap": 1, "context_schedule": "standard_static"}
    return call(ContextWindowsManualNode, model=model, **settings, fuse_method="flat")[0]
