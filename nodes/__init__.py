"""ComfyUI's view of the method: each file has the name of its idea in `cove/` and lists its nodes."""

from comfy_api.v0_0_2 import ComfyExtension, io

from . import attention, correspondence, ddim, demo, draw, features, frames, injection, inversion, metrics, tokenflow

FILES = (demo, frames, features, correspondence, draw, attention, ddim, inversion, injection, tokenflow, metrics)


class CoveExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in FILES for node in file.NODES]


async def comfy_entrypoint() -> CoveExtension:
    return CoveExtension()
