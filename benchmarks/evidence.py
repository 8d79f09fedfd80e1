"""Measures all that docs/results.md says, and writes its tables and plots: hours on two cores.

    python -m nox -s evidence

Broken off, it goes on where it was: what was measured lies in .evidence/, one line a measurement. Delete files there to
measure anew; what was measured on another demo model is measured anew in any case. Cases are shared out among as many
processes as there are cores, up to four, or one on a GPU; what only costs are measured of runs alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.records import FOLDER  # noqa: E402

SHARED = ("samples", "matches", "masks", "real_clips", "edits", "reconstruction")  # each knows what it has measured
COSTS = ("correspondence_cost", "injection_cost", "attention_cost")


def start(name: str, *arguments: str, threads: int | None = None) -> subprocess.Popen:
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.Popen([sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments], env=environment)


def finish(*processes: subprocess.Popen) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"broken off: {codes}")


def main() -> None:
    import torch

    cores = os.cpu_count() or 1
    parts = 1 if torch.cuda.is_available() else min(4, cores)
    for name in SHARED:
        finish(*(start(name, f"--part={i}/{parts}", threads=cores // parts) for i in range(parts)))
    for name in COSTS:
        done = FOLDER / f"{name}.done"
        if not done.is_file():
            finish(start(name))
            done.touch()
    finish(start("results"))


if __name__ == "__main__":
    main()
