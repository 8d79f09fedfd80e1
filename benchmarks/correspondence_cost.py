"""Measure time and memory of finding the correspondence for different windows, as in the paper's Table 4.

    python -m benchmarks.correspondence_cost [--frames 20] [--grid 64x64] [--channels 320]

First the fast search is compared with the reference loops. Then each window runs in its own process, and time and peak
memory, excluding features and result, are measured. Operations are the multiplications and additions of one direction,
2 * (frames - 1) * height * width * window^2 * channels, as the paper counts them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.memory import working_memory
from cove import correspondence, reference
from evidence.tables.records import FOLDER, Records, machine


def prove_equality() -> None:
    features = torch.randn(3, 5, 7, 11, generator=torch.Generator().manual_seed(0))
    for window, k in ((3, 2), (5, 3), (13, 4)):
        fast = correspondence.find_correspondence(features, window, k)
        slow = reference.find_correspondence(features, window, k)
        assert torch.equal(fast.forward, slow.forward) and torch.equal(fast.backward, slow.backward)


def run(frames: int, height: int, width: int, channels: int, window: int) -> tuple[float, float]:
    """Return seconds, and peak memory in MiB excluding features and result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(frames, height, width, channels, generator=torch.Generator().manual_seed(0)).to(device)
    correspondence.find_correspondence(features[:2, :9, :9], 3, 3)  # warm-up: a first call loads libraries
    found, seconds = None, 0.0

    def find() -> None:
        nonlocal found, seconds
        start = time.perf_counter()
        found = correspondence.find_correspondence(features, window, 3)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start

    peak = working_memory(find)
    result = 2 * found.forward.numel() * found.forward.element_size()
    return seconds, (peak - result) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--grid", default="64x64", help="height x width in tokens")
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    height, width = map(int, arguments.grid.split("x"))
    if arguments.window:
        print(*run(arguments.frames, height, width, arguments.channels, arguments.window))
        return
    prove_equality()
    records = Records(FOLDER / "correspondence_cost.jsonl")
    print(
        f"{machine()}, {arguments.frames} frames of {height}x{width} "
        f"tokens, {arguments.channels} channels, float32, k = 3, both directions; median of {arguments.repeats}"
    )
    print(f"{'window':>8}{'operations':>14}{'time':>10}{'memory':>12}")
    for window in (3, 9, 15, 2 * max(height, width) - 1):  # the last: the whole frame
        operations = 2 * (arguments.frames - 1) * height * width * min(window**2, height * width) * arguments.channels
        case = {"frames": arguments.frames, "grid": arguments.grid, "channels": arguments.channels, "window": window}
        runs = [case | {"run": run} for run in range(arguments.repeats)]
        for one in runs:
            command = [sys.executable, "-m", "benchmarks.correspondence_cost", *sys.argv[1:], f"--window={window}"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, mebibytes = map(float, answer.split())
            records.add(one, {"operations": operations, "seconds": seconds, "MiB": mebibytes})
        seconds, mebibytes = (statistics.median(records[one][what] for one in runs) for what in ("seconds", "MiB"))
        print(f"{window:>8}{operations / 1e9:>12.3f}e9{seconds:>8.1f} s{mebibytes:>8.0f} MiB")


if __name__ == "__main__":
    main()
