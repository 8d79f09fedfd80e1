"""Everything a contributor runs, on Linux, macOS and Windows alike.

nox -s edit -- [--clip FILE] [--checkpoint FILE] [--prompt TEXT] ...   edit a clip in a real ComfyUI
nox -s measure -- SOURCE EDITED [--plot FILE]                          measure an edited clip against its source
nox -s tests [-- pytest's arguments]                                   run the tests in a real ComfyUI
nox -s compatibility_tests [-- pytest's arguments]                     run those with other models, nodes, workflows
nox -s evidence_tests [-- pytest's arguments]                          run the tests of evidence/ and benchmarks/
nox -s packs -- FOLDER [FOLDER ...]                                    run it beside other packs, from their folders
nox -s hosts -- FOLDER [FOLDER ...]                                    run all tests in each of these ComfyUIs
nox -s check                                                           formatting and lint
nox -s train -- shapes [--output FILE]                                 train the demo model; continues a stopped run
nox -s train -- patterns [--folder FOLDER] [--export FILE] ...         train the model of patterns; likewise
nox -s evidence [-- --clips FOLDER]                                    measure docs/results.md; continues a stopped run
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from scripts.host import is_host, own_python, version_of  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["check", "tests", "compatibility_tests", "evidence_tests"]
nox.options.reuse_existing_virtualenvs = True

# The newest three that go together, and one thing ComfyUI imports and does not list.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "requests"]
COMPATIBILITY_TESTS = ["tests/compatibility", "tests/workflows"]
EVIDENCE_TESTS = ["tests/evidence"]
WORLDS = ["shapes", "patterns"]
TEST = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["test"]


@nox.session
def check(session: nox.Session) -> None:
    """Formatting and lint; nothing is changed."""
    session.install(*[package for package in TEST if package.startswith("ruff")])
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The tests of the pack, in a real ComfyUI that is found or fetched."""
    _test(session, *(f"--ignore={folder}" for folder in COMPATIBILITY_TESTS + EVIDENCE_TESTS), *session.posargs)


@nox.session(venv_backend="none")
def compatibility_tests(session: nox.Session) -> None:
    """The tests with other models, samplings and nodes, and the workflows in a server and in the real page."""
    _test(session, *(session.posargs or COMPATIBILITY_TESTS))


@nox.session(venv_backend="none")
def evidence_tests(session: nox.Session) -> None:
    """The tests of worlds, training, tables and the offline kit; no node depends on them."""
    _test(session, *(session.posargs or EVIDENCE_TESTS))


def _test(session: nox.Session, *arguments: str) -> None:
    comfy = Environment(session)
    host = comfy.provide_host()
    comfy.install(host)
    comfy.test(host, *arguments)


@nox.session(venv_backend="none")
def hosts(session: nox.Session) -> None:
    """All tests in each ComfyUI whose folder is given, with the packages that it requires; fails if one fails."""
    folders = [Path(session.invoked_from, folder).resolve() for folder in session.posargs]
    wrong = [str(folder) for folder in folders if not is_host(folder)]
    if wrong or not folders:
        session.error(f"expected folders with a ComfyUI (main.py and comfy/), got {', '.join(wrong) or 'none'}")
    shared = Environment(session)
    shared.install(shared.provide_host())
    lines, failed = [], False
    for host in folders:
        comfy = Environment(session, f"comfy-{version_of(host)}", beside=shared)
        comfy.install(host)
        report = comfy.folder / "report.xml"
        report.unlink(missing_ok=True)
        try:
            comfy.test(host, f"--junitxml={report}")
        except CommandFailed:
            failed = True
        lines.append(f"ComfyUI {version_of(host)}: {_summary(report)}")
    for line in lines:
        session.log(line)
    if failed:
        session.error("the tests failed in at least one ComfyUI")


def _summary(report: Path) -> str:
    if not report.is_file():
        return "pytest did not finish"
    suite = ElementTree.parse(report).getroot()[0]
    total, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    passed = total - failures - errors - skipped
    return f"{passed} passed, {failures + errors} failed, {skipped} skipped, {float(suite.get('time')):.0f} s"


@nox.session(venv_backend="none")
def packs(session: nox.Session) -> None:
    """The tests beside other packs, in a real ComfyUI; what the packs need is installed into .nox/packs only."""
    folders = [Path(session.invoked_from, argument).resolve() for argument in session.posargs]
    if not folders or not all((folder / "pyproject.toml").is_file() for folder in folders):
        session.error("packs needs the folders of other packs, each with a pyproject.toml: nox -s packs -- FOLDER ...")
    comfy = Environment(session)
    host = comfy.provide_host()
    comfy.install(host)
    own = Environment(session, "packs", beside=comfy)
    own.install_requirements(folders)
    environment = {"COMFYUI_PATH": str(host), "COVE_PACKS": os.pathsep.join(map(str, folders))}
    own.run("-m", "pytest", "tests/beside", "-v", "-rs", env=environment)


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
    """Train the model of a world, or continue its training."""
    world, *arguments = session.posargs or [None]
    if world not in WORLDS:
        session.error(f"expected a world, {' or '.join(WORLDS)}: nox -s train -- {WORLDS[0]}")
    comfy = Environment(session)
    comfy.install(comfy.provide_host())
    session.chdir(session.invoked_from)
    comfy.run("-m", f"evidence.{world}.train", *arguments, env={"PYTHONPATH": str(ROOT)})


@nox.session(venv_backend="none")
def evidence(session: nox.Session) -> None:
    """Measure what docs/results.md reports, or continue measuring."""
    comfy = Environment(session)
    host = comfy.provide_host()
    comfy.install(host)
    session.chdir(session.invoked_from)
    environment = {"COMFYUI_PATH": str(host), "PYTHONPATH": str(ROOT)}
    comfy.run("-m", "evidence.tables.measure", *session.posargs, env=environment)


class Environment:
    """An environment that runs ComfyUI. Sessions share the one named comfy: torch is too large to have twice.

    beside: another environment, whose packages this one sees where it has none of its own.
    """

    def __init__(self, session: nox.Session, name: str = "comfy", beside: Environment | None = None):
        self.session, self.folder = session, ROOT / ".nox" / name
        self.python = str(self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
        if not Path(self.python).is_file():
            interpreter = () if beside is None else ("--python", beside.python)
            session.run(sys.executable, "-m", "virtualenv", "--quiet", *interpreter, str(self.folder), external=True)
        if beside is not None:
            (self._packages() / "beside.pth").write_text(f"{beside._packages()}\n", encoding="utf-8")

    def _packages(self) -> Path:
        question = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(self.run("-c", question, silent=True, log=False).strip())

    def test(self, host: Path, *arguments: str) -> None:
        two = ("-n", "2", "--dist", "loadfile")  # two processes; tests of one file may build on one another
        self.run("-m", "pytest", *two, *arguments, env={"COMFYUI_PATH": str(host)})

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

    def install_requirements(self, folders: list[Path]) -> None:
        """Install what these packs say they need."""
        lists = [folder / "requirements.txt" for folder in folders if (folder / "requirements.txt").is_file()]
        if lists:
            arguments = [argument for path in lists for argument in ("-r", str(path))]
            self.run("-m", "pip", "install", "--quiet", *arguments)
        # A package that KJNodes needs installs its own tests as `tests`, where pytest looks for ours.
        shutil.rmtree(self._packages() / "tests", ignore_errors=True)
