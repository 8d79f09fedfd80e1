"""The pack's entry refuses an outdated ComfyUI with a clear error, and passes on any other error."""

import re
import subprocess
import sys

import pytest

from scripts.host import PACK

LOAD = """
import importlib.util, sys
_, host, pack = sys.argv
sys.path.insert(0, host)
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
(OLDEST,) = re.findall(r'^OLDEST = "(.+)"', (PACK / "__init__.py").read_text(encoding="utf-8"), re.M)


def last_line(host) -> str:
    """Return the last line that ComfyUI would log when it loads the pack with the code in `host`."""
    loaded = subprocess.run([sys.executable, "-c", LOAD, host, PACK], capture_output=True, text=True)
    assert loaded.returncode == 1
    return loaded.stderr.strip().splitlines()[-1]


@pytest.fixture
def broken_host(host, tmp_path):
    """Version -> the running host's code with this version number, without `comfy_api.v0_0_2`, as before 0.3.48."""

    def made(version: str | None):
        for path in host.iterdir():
            if path.name not in ("comfy_api", "comfyui_version.py", ".git"):
                (tmp_path / path.name).symlink_to(path)
        (tmp_path / "comfy_api").mkdir()
        for path in (host / "comfy_api").iterdir():
            if path.name != "v0_0_2":
                (tmp_path / "comfy_api" / path.name).symlink_to(path)
        if version is not None:
            (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        return tmp_path

    return made


@pytest.mark.parametrize("version", ["0.3.9", "0.3.47", "0.3.59", None])
def test_entry_names_the_required_and_the_found_version(broken_host, version):
    found = version or "none that states its version"
    expected = f"ImportError: COVE needs ComfyUI {OLDEST} or newer, found {found}. Update ComfyUI, then restart it."
    assert last_line(broken_host(version)) == expected


@pytest.mark.parametrize("version", [OLDEST, "0.3.100", "0.10.0", "1.0"])
def test_entry_passes_on_other_errors(broken_host, version):
    assert last_line(broken_host(version)) == "ModuleNotFoundError: No module named 'comfy_api.v0_0_2'"


def test_entry_requires_the_version_in_pyproject():
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^requires-comfyui = "(.+)"$', text, re.M) == [f">={OLDEST}"]
