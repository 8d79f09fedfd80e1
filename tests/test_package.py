"""`pip install .` installs the method and nothing else."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.method_helpers import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of a wheel, built from a copy because setuptools writes into the source folder."""
    source, built = tmp_path_factory.mktemp("source") / "pack", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.safetensors", "*.jpg"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={built}"]
    run(*PIP, "wheel", *options, source, cwd=built)
    (path,) = built.glob("*.whl")
    return path


def test_wheel_contains_cove_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(ROOT).as_posix() for path in (ROOT / "cove").rglob("*.py")}


def test_wheel_imports_without_the_repository(wheel, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import cove, cove.correspondence, cove.attention, cove.ddim, json\n"
        "print(json.dumps([cove.__file__, cove.__version__]))"
    )
    file, version = json.loads(run(sys.executable, "-c", code, cwd=tmp_path))
    assert file.startswith(str(wheel)) and wheel.name.startswith(f"cove_video_editing-{version}-")


def test_wheel_installs_without_replacing_packages_of_comfyui(wheel, tmp_path):
    """The test environment has ComfyUI's requirements; pip would install only the wheel."""
    report = run(*PIP, "install", "--dry-run", "--quiet", "--no-index", "--report=-", wheel, cwd=tmp_path)
    assert [one["metadata"]["name"] for one in json.loads(report)["install"]] == ["cove-video-editing"]


def test_wheel_requires_every_package_that_cove_imports(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    required = {
        re.match(r"[\w-]+", line.removeprefix("Requires-Dist: "))[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    }
    packages = {"PIL": "pillow", "cv2": "opencv-python-headless"}
    for path in (ROOT / "cove").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for root in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert packages.get(root, root) in required, f"{path.name} imports {root}"
