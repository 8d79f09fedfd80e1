"""Measure everything that docs/results.md reports, and write its tables and plots; takes hours on two cores.

    python -m nox -s evidence [-- --clips FOLDER]

An interrupted run resumes where it stopped: .evidence/ holds one measurement per line. Delete its files to measure
again; measurements on another demo model are never reused. Cases are split among one process per core, up to four, or a
single process on a GPU. Time and memory are measured without other processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from scripts.host import PACK

from .records import FOLDER

TABLES = ("samples", "matches", "edits", "reconstruction")  # each skips cases already measured
COSTS = ("correspondence_cost", "injection_cost", "attention_cost", "kernel_report")


def start(module: str, *arguments: str, threads: int | None = None) -> subprocess.Popen:
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=PACK, env=environment)


def finish(*processes: subprocess.Popen) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"interrupted: {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of .mp4 files for the table of real clips; without: skipped")
    arguments = parser.parse_args()
    import torch

    cores = os.cpu_count() or 1
    parts = 1 if torch.cuda.is_available() else min(4, cores)
    tables = [(name,) for name in TABLES]
    tables += [("real_clips", str(arguments.clips.resolve()))] if arguments.clips else []
    for name, *rest in tables:
        shares = [(*rest, f"--part={i}/{parts}") for i in range(parts)]
        finish(*(start(f"evidence.tables.{name}", *share, threads=cores // parts) for share in shares))
    for name in COSTS:
        done = FOLDER / f"{name}.done"
        if not done.is_file():
            finish(start(f"benchmarks.{name}"))
            done.touch()
    finish(start("evidence.tables.results"))


if __name__ == "__main__":
    main()
