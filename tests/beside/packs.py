"""The other packs in `COVE_PACKS`, and their installation into a base folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

FOLDERS = [Path(folder) for folder in os.environ.get("COVE_PACKS", "").split(os.pathsep) if folder]

# Name in the pack's pyproject.toml -> fixture that calls its nodes.
PACKS = {
    "comfyui-advanced-controlnet": "acn",
    "comfyui-animatediff-evolved": "ade",
    "comfyui_ipadapter_plus": "ipa",
    "comfyui-kjnodes": "kj",
    "comfyui-videohelpersuite": "vhs",
}


def name_of(folder: Path) -> str:
    """Return the name of the pack in a folder from its pyproject.toml; raise if these tests do not know it."""
    project = folder / "pyproject.toml"
    if not project.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a pack: it holds no pyproject.toml")
    found = re.search(r'^name\s*=\s*"(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
    name = found[1].lower() if found else ""
    if name not in PACKS:
        raise ValueError(f"{folder} is the pack {name!r}; expected one of {', '.join(PACKS)}")
    return name


def install(folders: dict[str, Path], base: Path) -> list[Path]:
    """Copy packs into the custom nodes of a base folder; copies, because some write into their own folder."""
    copies = [base / "custom_nodes" / name for name in folders]
    for copy, folder in zip(copies, folders.values(), strict=True):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    return copies
