"""Everything a contributor runs, on Linux, macOS and Windows alike.

nox -s edit -- [--clip FILE] [--checkpoint FILE] [--prompt TEXT] ...   edit a clip in a real ComfyUI
nox -s measure -- SOURCE EDITED [--plot FILE]                          measure an edited clip against its source
nox -s tests [-- pytest's arguments]                                   run the tests in a real ComfyUI
nox -s check                                                           formatting and lint
nox -s train -- shapes                                                 train the demo model; goes on where it stopped
nox -s train -- patterns [--folder FOLDER] [--export FILE] ...         train the model of patterns; likewise
nox -s evidence                                                        measure what docs/results.md says; goes on, too
"""

import hashlib
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from scripts.host import own_python  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["check", "tests"]
nox.options.reuse_existing_virtualenvs = True

# The newest three that go together, and one thing ComfyUI imports and does not list.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "requests"]
TEST = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["test"]


@nox.session
def check(session: nox.Session) -> None:
    """Formatting and lint; nothing is changed."""
    session.install(*[package for package in TEST if package.startswith("ruff")])
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The tests, in a real ComfyUI that is found or fetched."""
    comfy = Environment(session)
    host = comfy.provide_host()
    comfy.install(host)
    two = ("-n", "2", "--dist", "loadfile")  # two processes; tests of one file may build on one another
    comfy.run("-m", "pytest", *two, *session.posargs, env={"COMFYUI_PATH": str(host)})


@nox.session(venv_backend="none")
def edit(session: nox.Session) -> None:
    """The main job: edit a clip. A ComfyUI that has an environment of its own runs in that one."""
    session.chdir(session.invoked_from)
    script = str(ROOT / "scripts" / "edit.py")
    session.run(sys.executable, script, "--check-only", *session.posargs, external=True, log=False)
    if any(argument in ("-h", "--help") for argument in session.posargs):
        return
    comfy = Environment(session)
    host = comfy.provide_host()
    if own := own_python(host):
        comfy.python = own
    else:
        comfy.install(host)
    comfy.run(script, *session.posargs, env={"COMFYUI_PATH": str(host)})


@nox.session(venv_backend="none")
def measure(session: nox.Session) -> None:
    """Measure an edited clip against its source."""
    session.chdir(session.invoked_from)
    script = str(ROOT / "scripts" / "measure.py")
    session.run(sys.executable, script, "--check-only", *session.posargs, external=True, log=False)
    if any(argument in ("-h", "--help") for argument in session.posargs):
        return
    comfy = Environment(session)
    comfy.install(comfy.provide_host())
    comfy.run(script, *session.posargs)


@nox.session(venv_backend="none")
def train(session: nox.Session) -> None:
    """Train the demo model, or go on with it."""
    comfy = Environment(session)
    comfy.install(comfy.provide_host())
    if session.posargs[:1] == ["patterns"]:
        comfy.run("-m", "evidence.train", *session.posargs[1:])
    else:
        comfy.run("-m", "training.train", *session.posargs)


@nox.session(venv_backend="none")
def evidence(session: nox.Session) -> None:
    """Measure what docs/results.md says, or go on with it."""
    comfy = Environment(session)
    host = comfy.provide_host()
    comfy.install(host)
    comfy.run("benchmarks/evidence.py", env={"COMFYUI_PATH": str(host)})


class Environment:
    """The one environment that every session shares which runs ComfyUI: torch is too large to have twice."""

    def __init__(self, session: nox.Session):
        self.session, self.folder = session, ROOT / ".nox" / "comfy"
        self.python = str(self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
        if not Path(self.python).is_file():
            session.run(sys.executable, "-m", "virtualenv", "--quiet", str(self.folder), external=True)

    def run(self, *arguments: str, **options) -> str | None:
        return self.session.run(self.python, *arguments, external=True, **options)

    def provide_host(self) -> Path:
        return Path(self.run(str(ROOT / "scripts" / "host.py"), silent=True, log=False).splitlines()[-1])

    def install(self, host: Path) -> None:
        """Install what ComfyUI and the tests need, unless the last install here was of the same."""
        requirements = host / "requirements.txt"
        wanted = "\n".join([*TORCH, *TEST, requirements.read_text(encoding="utf-8")])
        digest, stamp = hashlib.sha256(wanted.encode()).hexdigest(), self.folder / "installed"
        if not stamp.is_file() or stamp.read_text() != digest:
            self.run("-m", "pip", "install", "--quiet", *TORCH, *TEST, "-r", str(requirements))
            stamp.write_text(digest)
