"""`cove` never imports ComfyUI and needs only torch, einops and safetensors; the published pack is complete."""

import re
import subprocess
import sys

import cove
from tests.method_helpers import ROOT, fresh

METHOD = [
    *("correspondence", "merging", "attention", "ddim", "features", "reference"),
    *("injection", "inversion", "fingerprint", "files", "metrics", "tokenflow"),
]


def roots(*modules, after=()):
    """Return the top-level packages that these modules of `cove` import in a fresh interpreter, beyond `after`'s."""
    return set(
        fresh(
            "import importlib, json, sys\n"
            f"for name in {list(after)}: importlib.import_module(name)\n"
            "before = set(sys.modules)\n"
            f"for name in {list(modules)}: importlib.import_module('cove.' + name)\n"
            "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
        )
    )


def test_cove_never_imports_comfy():
    modules = [path.stem for path in (ROOT / "cove").glob("*.py") if path.stem != "__init__"]
    assert set(METHOD) < set(modules)
    found = roots(*modules)
    assert {"cove", "torch"} <= found
    assert not {name for name in found if name.startswith("comfy") or name in ("nodes", "folder_paths")}


def test_cove_method_needs_torch_einops_and_safetensors_only():
    needed = ["torch", "einops", "safetensors.torch"]
    assert roots(*METHOD, after=needed) - set(sys.stdlib_module_names) <= {"cove", "torch", "einops", "safetensors"}


def test_cove_version_matches_pyproject():
    (published,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert cove.__version__ == published


def test_comfyignore_keeps_everything_the_nodes_use():
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"]
    left_out = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    tops = {path.partition("/")[0] for path in left_out}
    assert {"tests", "docs", "scripts", "benchmarks", "evidence"} <= tops
    assert not tops & {
        "__init__.py",
        "cove",
        "nodes",
        "demo",
        "web",
        "workflows",
        "subgraphs",
        "README.md",
        "pyproject.toml",
    }
