"""Run a real ComfyUI in this process, with the pack loaded as ComfyUI loads it, for tables and benchmarks."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from pathlib import Path

from scripts.host import PACK


def start(host: Path, **options):
    """Import ComfyUI and return the pack as a module; user files go to a temporary folder.

    Afterwards, `import nodes` imports ComfyUI's file: import modules from the root of the repository first.

    Args:
        host: ComfyUI's folder.
        options: command-line options of ComfyUI, by their names in `comfy.cli_args.args`.
    """
    # The pack's `nodes` would shadow ComfyUI's.
    sys.path[:] = [str(host), *(path for path in sys.path if Path(path or ".").resolve() != PACK)]
    import comfy.cli_args
    import torch

    for name, value in {"cpu": not torch.cuda.is_available(), **options}.items():
        setattr(comfy.cli_args.args, name, value)
    import comfy.model_management
    import folder_paths

    folder_paths.set_user_directory(tempfile.mkdtemp())  # so that no interrupted inversion is resumed

    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nodes_of(pack) -> dict[str, type]:
    """Return the pack's nodes by id without the leading Cove."""
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id.removeprefix("Cove"): node for node in asyncio.run(extension.get_node_list())}


def call(node: type, **inputs) -> tuple:
    """Return a node's outputs; missing inputs get their defaults."""
    defaults = {i.id: i.default for i in node.define_schema().inputs or [] if getattr(i, "default", None) is not None}
    return node.execute(**defaults | inputs).args


def run_prompt(prompt: dict, pack, wanted: str) -> dict[str, tuple]:
    """Run all nodes of a prompt (API form) that the nodes of the class `wanted` depend on, and these nodes.

    Returns:
        Outputs of each node, by "id title".
    """
    from nodes import NODE_CLASS_MAPPINGS as stock  # ComfyUI's, after `start`

    classes = dict(stock) | {f"Cove{name}": node for name, node in nodes_of(pack).items()}
    done: dict[str, tuple] = {}

    def outputs(key: str) -> tuple:
        if key not in done:
            node = classes[prompt[key]["class_type"]]
            given = prompt[key]["inputs"].items()
            inputs = {name: outputs(value[0])[value[1]] if isinstance(value, list) else value for name, value in given}
            if hasattr(node, "define_schema"):
                done[key] = call(node, **inputs)
            else:
                done[key] = getattr(node(), node.FUNCTION)(**inputs)
        return done[key]

    for key, node in prompt.items():
        if node["class_type"] == wanted:
            outputs(key)
    return {f"{key} {prompt[key]['_meta']['title']}": found for key, found in done.items()}
