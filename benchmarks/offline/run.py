"""Run checks, tests, benchmarks and training on the offline machine, each part within its time limit.

    python pack/benchmarks/offline/run.py PART [PART ...] [--limit SECONDS] [--results FOLDER] [--start FILE]

check       workflow 0 in each precision, compared with the CPU
tests       the tests of the pack, with those that need a GPU
host_tests  the tests of the nodes again, with ComfyUI on the GPU
server      the demo edit through ComfyUI's server
costs       time, memory and kernels of a step, in order of importance until the limit
train       the model of patterns; saves its state at the limit and exports the model so far

FOLDER gets logs, figures and the files of training. Every part runs with the interpreter of this script.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"check": 240, "tests": 500, "host_tests": 300, "server": 180, "costs": 540, "train": 540}
GRACE = 45  # seconds for a part to save and print after its limit
ATTENTION = "attention_cost --steps=6 --repeats=1"
COSTS = (
    f"{ATTENTION} --dtype=float16 --frames=16 --size=512x512 --profile={{results}}/kernels.txt",
    f"{ATTENTION} --dtype=float16 --frames=32 --size=512x512",
    f"{ATTENTION} --dtype=float16 --frames=8 --size=1024x1024 --family=sdxl",
    "correspondence_cost",
    "injection_cost --frames=16 --size=512x512",
    f"{ATTENTION} --frames=16 --size=512x512",
    f"{ATTENTION} --dtype=bfloat16 --frames=16 --size=512x512",
    f"{ATTENTION} --dtype=float16 --frames=16 --size=1024x1024 --family=sdxl",
    f"{ATTENTION} --dtype=float16 --frames=64 --size=512x512",
)


class Machine:
    """Environment of the packed folder, and the folder for results."""

    def __init__(self, packed: Path, results: Path):
        self.results = results
        results.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join((str(packed / "site"), str(ROOT)))
        self.environment = os.environ | {"PYTHONPATH": path, "COMFYUI_PATH": str(packed / "host")}
        self.environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}

    def run(
        self, log: str, seconds: float, *arguments: str, stop: int = signal.SIGINT, **environment: str
    ) -> int | None:
        """Run Python in the repository with its output in a log; return the exit code, or None if it was stopped."""
        with (self.results / f"{log}.log").open("ab") as file:
            options = {"cwd": ROOT, "env": self.environment | environment, "stdout": file, "stderr": file}
            process = subprocess.Popen([sys.executable, *arguments], **options, start_new_session=True)
            try:
                return process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):  # its children, and itself if it did not stop
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, log: str, lines: int) -> str:
        text = (self.results / f"{log}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    def pytest(self, name: str, seconds: float, *arguments: str) -> None:
        report = self.results / f"{name}.xml"
        workers = max(1, (os.cpu_count() or 1) - 2)
        command = ["-m", "pytest", f"-n{workers}", "--dist=loadfile", "-q", "-p", "no:cacheprovider", "--durations=10"]
        code = self.run(name, seconds, *command, f"--junitxml={report}", *arguments, OMP_NUM_THREADS="1")
        print(summary(report) if report.is_file() else self.tail(name, 15))
        print(f"{name}: {'stopped at the limit' if code is None else f'exit code {code}'}")


def summary(report: Path) -> str:
    """Return the counts of outcomes, with the first line of every failure."""
    lines, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped") is not None
        counts["skipped" if skipped else "passed" if failure is None else "failed"] += 1
        if failure is not None:
            message = (failure.get("message") or "").splitlines() or [""]
            lines.append(f"  {case.get('classname')}::{case.get('name')}: {message[0][:150]}")
    return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])


def check(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    code = machine.run("check", seconds, "-m", "benchmarks.offline.check")
    print(machine.tail("check", 80 if code == 0 else 30))


def tests(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    # Neither a browser nor a git repository is packed.
    git = "tests/test_wall.py::test_comfyignore_keeps_everything_the_nodes_use"
    machine.pytest("tests", seconds, "tests", "--ignore=tests/workflows/test_browser.py", f"--deselect={git}")


def host_tests(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_nodes_*.py"))
    machine.pytest("host_tests", seconds, "-p", "benchmarks.offline.gpu_host", *files, "tests/test_inversion.py")


def server(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    output = machine.results / "demo-edited.mp4"
    code = machine.run("server", seconds, "scripts/edit.py", f"--output={output}")
    log = ROOT / ".edit" / "server.log"
    if log.is_file():
        shutil.copyfile(log, machine.results / "comfyui.log")
        known = ("Device:", "Total VRAM", "Set vram state", "Using", "Prompt executed")
        print("\n".join(line for line in log.read_text(errors="replace").splitlines() if line.startswith(known)))
    print(machine.tail("server", 3 if code == 0 else 15))


def costs(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    end = time.monotonic() + seconds
    for case in COSTS:
        left = end - time.monotonic()
        if left < 30:
            print(f"no time left: {case}")
            continue
        module, *options = case.format(results=machine.results).split()
        code = machine.run("cost", left, "-m", f"benchmarks.{module}", *options)
        print(f"-- {case}\n{machine.tail('cost', 5)}" if code == 0 else f"-- {case}: failed\n{machine.tail('cost', 3)}")
    for records in (ROOT / ".evidence").glob("*_cost.jsonl"):
        shutil.copyfile(records, machine.results / records.name)


def train(machine: Machine, seconds: float, arguments: argparse.Namespace) -> None:
    folder = machine.results / "training"
    command = ["-m", "evidence.patterns.train", f"--folder={folder}"]
    begun = (folder / "diffusion.pt").is_file()
    start = [f"--start={arguments.start.resolve()}"] if arguments.start and not begun else []
    machine.run("train", seconds, *command, *start, "--threads=4", stop=signal.SIGTERM)
    print(machine.tail("train", 5))
    if (folder / "diffusion.pt").is_file():
        model = machine.results / "patterns.safetensors"
        machine.run("train", 120, *command, f"--export={model}")
        print(f"the model so far: {model}; to continue elsewhere: train --start={model.name}")


def main() -> None:
    parts = {part.__name__: part for part in (check, tests, host_tests, server, costs, train)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts, metavar="PART")
    parser.add_argument("--limit", type=float, help="seconds for each part, in place of its own limit")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--start", type=Path, help="exported file from which training starts")
    parser.add_argument(
        "--packed", type=Path, default=ROOT.parent, help="folder with host/ and site/ (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not all((arguments.packed / name).is_dir() for name in ("host", "site")):
        parser.error(f"{arguments.packed} has no host/ and site/: give the folder that pack.py made as --packed")
    machine = Machine(arguments.packed.resolve(), arguments.results.resolve())
    for name in arguments.parts:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        parts[name](machine, arguments.limit or LIMITS[name], arguments)
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
