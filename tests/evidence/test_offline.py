"""The archive for an offline machine is complete, and a clean Python with torch can use it."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest

from benchmarks.offline import pack, run
from tests.method_helpers import ROOT

POSIX = pytest.mark.skipif(os.name == "nt", reason="the offline machine runs Linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, host):
    """The packed folder without packages, which would be downloaded."""
    folder = tmp_path_factory.mktemp("offline")
    pack.pack_repository(folder / "pack")
    pack.pack_host(host, folder / "host")
    (folder / "site").mkdir()
    pack.pack_page(host, folder / "site")
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory, folder):
    """A clean Python with links to torch and its requirements; `site` links to the packages to download."""
    clean = tmp_path_factory.mktemp("python")
    venv.create(clean, with_pip=False, symlinks=True)
    (own,) = clean.glob("lib/python*/site-packages")
    have = pack.closure(pack.TORCH)
    link(have, own)
    link([requirement.partition("==")[0] for requirement in pack.missing(folder / "host", have)], folder / "site")
    return clean / "bin" / "python"


def link(packages, folder):
    for package in packages:
        files = importlib.metadata.distribution(package)
        for top in {file.parts[0] for file in files.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(files.locate_file(top))


def test_pack_repository_copies_tracked_files_unchanged(folder):
    for name in ("__init__.py", "cove/correspondence.py", "demo/shapes.safetensors", "benchmarks/offline/run.py"):
        assert (folder / "pack" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not any((folder / "pack" / name).exists() for name in (".git", ".nox", ".host"))


def test_pack_repository_and_host_are_small(folder):
    sizes = {part: sum(file.lstat().st_size for file in (folder / part).rglob("*")) for part in ("pack", "host")}
    assert sizes["pack"] < 32 << 20 and sizes["host"] < 16 << 20


@POSIX
def test_pack_is_usable_in_a_clean_python(folder, python):
    """It has only the folder, its packages and torch; no network, no path outside."""
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from scripts.in_process import nodes_of, start\n"
        "import evidence.patterns.train, benchmarks.offline.check\n"
        f"nodes = nodes_of(start(Path({str(folder / 'host')!r})))\n"
        "import comfy\n"
        "files = [comfy.__file__ or list(comfy.__path__)[0], evidence.__file__, sys.modules['pack'].__file__]\n"
        "print(json.dumps([len(nodes), *files]))"
    )
    environment = {"PYTHONPATH": os.pathsep.join((str(folder / "site"), str(folder / "pack"))), "PATH": ""}
    done = subprocess.run([python, "-c", code], cwd=folder / "pack", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    count, *files = json.loads(done.stdout.splitlines()[-1])
    assert count > 10 and all(file.startswith(str(folder)) for file in files)


def test_missing_omits_installed_packages(host):
    everything = pack.missing(host, [])
    names = {requirement.partition("==")[0] for requirement in everything}
    assert {"torch", "av", "einops", "transformers", "pytest", "diffusers"} <= names and not names & pack.SKIPPED
    have = pack.frozen("einops==0.8.2\nPyYAML==6.0\n-e git+https://example.org/x#egg=x\nav @ file:///wheels/av.whl\n")
    assert {"einops", "pyyaml", "av"} == names - {one.partition("==")[0] for one in pack.missing(host, have)}


@POSIX
def test_machine_run_stops_a_process_and_its_children_at_the_limit(tmp_path):
    for name in ("host", "site"):
        (tmp_path / name).mkdir()
    machine = run.Machine(tmp_path, tmp_path / "results")
    child = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); {child}"
    )
    assert machine.run("some", 3, "-c", code) is None
    pid = int(machine.tail("some", 99).splitlines()[0])
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert machine.run("some", 20, "-c", "import os; print(os.environ['COMFYUI_PATH'])") == 0
    assert machine.tail("some", 1) == str(tmp_path / "host")


def test_summary_counts_outcomes_and_names_failures(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2, 'not equal'\n"
        "def test_c(): pytest.skip()\n@pytest.fixture\ndef broken(): raise OSError('gone')\ndef test_d(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    *failures, counts = run.summary(tmp_path / "report.xml").splitlines()
    assert counts == "1 passed, 2 failed, 1 skipped"
    assert "test_some::test_b: AssertionError: not equal" in failures[0] and "gone" in failures[1]


def test_run_names_missing_folders(tmp_path):
    script = Path(run.__file__)
    done = subprocess.run([sys.executable, script, "check", f"--packed={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2 and "has no host/ and site/" in done.stderr
