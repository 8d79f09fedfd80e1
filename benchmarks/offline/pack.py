"""Pack the repository, ComfyUI and missing Python packages for an offline machine into one folder or archive.

    python -m benchmarks.offline.pack OUTPUT [--have FILE] [--python 3.12] [--no-repository]

Run it in the environment of `nox -s tests`, whose packages and versions are packed. OUTPUT is a new folder, or an
archive if it ends in .tar.xz. FILE is the output of `pip freeze --all` on the offline machine; its packages are left
out. Without it, the machine is assumed to have torch, torchvision, torchaudio and their requirements.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.host import PACK, provide_host

TORCH = ("torch", "torchvision", "torchaudio")
# Imported by ComfyUI but not in its requirements; needed by the tests; needed by training.
ALSO = ("requests", "pytest", "pytest-xdist", "scikit-image", "opencv-python-headless", "matplotlib", "diffusers")
# Not needed: ComfyUI's web page, templates and help.
SKIPPED = {"comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs"}
HOST = ("app", "api_server", "alembic_db", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras")
HOST += ("middleware", "utils", "models/configs", "alembic.ini", "requirements.txt", "pyproject.toml", "LICENSE")
# Tokenizers of models other than SD, 16 MiB.
UNUSED = ("__pycache__", "*.pyc", "llama_tokenizer", "qwen25_tokenizer", "t5_tokenizer", "t5_pile_tokenizer")
UNUSED += ("hydit_clip_tokenizer", "ace_lyrics_tokenizer")
MANYLINUX = (*(f"manylinux_2_{minor}_x86_64" for minor in range(34, 16, -1)), "manylinux2014_x86_64")


def closure(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each of these packages and of all their requirements."""
    found: dict[str, str] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found or name in SKIPPED:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"not installed here, left out: {wanted}", file=sys.stderr)
            continue
        found[name] = package.version.partition("+")[0]
        for text in package.requires or ():
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
                waiting.append(inner)
    return found


def requirements_of(host: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (host / "requirements.txt").read_text("utf-8").splitlines())
    return [*filter(None, lines), *ALSO]


def missing(host: Path, have: Iterable[str]) -> list[str]:
    """Return the packages that ComfyUI, tests and training need beyond those in `have`, as name==version."""
    known = {canonicalize_name(name) for name in have}
    return sorted(f"{name}=={version}" for name, version in closure(requirements_of(host)).items() if name not in known)


def frozen(text: str) -> list[str]:
    """Return the package names in the output of `pip freeze`."""
    return [match[0] for line in text.splitlines() if (match := re.match(r"[A-Za-z0-9][\w.-]*", line))]


def pack_repository(folder: Path) -> None:
    """Copy all files of the working tree that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=PACK, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (PACK / name).is_file() and not (PACK / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PACK / name, folder / name)


def pack_host(host: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (*HOST, *(path.name for path in host.glob("*.py"))):
        if (host / name).is_dir():
            shutil.copytree(host / name, folder / name, ignore=shutil.ignore_patterns(*UNUSED))
        elif (host / name).is_file():
            shutil.copy2(host / name, folder / name)
    for name in ("custom_nodes", "input", "output", "models/checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def pack_packages(packages: list[str], python: str, folder: Path) -> None:
    """Install wheels into a folder, for Linux on x86-64 and a given version of Python."""
    folder.mkdir(parents=True)
    if packages:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-compile", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        pip += [*(f"--platform={platform}" for platform in MANYLINUX), f"--target={folder}"]
        subprocess.run([*pip, *packages], check=True)
    for stub in folder.rglob("*.pyi"):
        stub.unlink()


def pack_page(host: Path, folder: Path) -> None:
    """Write an empty web page package, without which ComfyUI's server does not start."""
    wanted = re.search(r"comfyui-frontend-package==(\S+)", (host / "requirements.txt").read_text("utf-8"))
    package, version = folder / "comfyui_frontend_package", wanted[1] if wanted else "1.0.0"
    (package / "static").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "static" / "index.html").write_text("<!doctype html>")
    (folder / f"{package.name}-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: comfyui-frontend-package\nVersion: {version}\n"
    (folder / f"{package.name}-{version}.dist-info" / "METADATA").write_text(metadata)


def size(path: Path) -> str:
    total = sum(file.lstat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return f"{total / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--have", type=Path, help="output of `pip freeze --all` on the offline machine")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="its Python's version")
    parser.add_argument("--no-repository", action="store_true", help="where the repository gets there another way")
    arguments = parser.parse_args()
    archive = arguments.output if arguments.output.name.endswith(".tar.xz") else None
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already")
    have = frozen(arguments.have.read_text("utf-8")) if arguments.have else closure(TORCH)
    host = provide_host()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cove-offline" if archive else arguments.output
        if not arguments.no_repository:
            pack_repository(folder / "pack")
        pack_host(host, folder / "host")
        packages = missing(host, have)
        pack_packages(packages, arguments.python, folder / "site")
        pack_page(host, folder / "site")
        print(f"{len(packages)} packages: {' '.join(packages)}")
        for part in sorted(folder.iterdir()):
            print(f"{part.name:12}{size(part):>12}")
        if archive:
            with tarfile.open(archive, "w:xz") as whole:
                whole.add(folder, folder.name)
        print(f"{arguments.output.name:12}{size(arguments.output):>12}")


if __name__ == "__main__":
    main()
