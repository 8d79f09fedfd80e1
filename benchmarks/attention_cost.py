"""Time and memory that correspondence-guided attention adds to a step of spatial-temporal attention.

    python -m benchmarks.attention_cost [--frames 9] [--size 512x320] [--repeats 3]

A UNet of SD1.5's shape with random weights runs one sampling step, cond and uncond together, in a real ComfyUI
(COMFYUI_PATH, or as `scripts/host.py` finds it). First the fast attention is compared with the plain loops; then steps
with and without guided attention alternate, each in its own process, for time and peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ALONE = "spatial-temporal alone"
VARIANTS = {ALONE: None, "guided, all matches": 0.0, "guided, half merged": 0.5}


def prove_equality() -> None:
    import torch

    from cove import attention, correspondence, reference

    generator = torch.Generator().manual_seed(0)
    matches = correspondence.find_correspondence(torch.randn(3, 5, 7, 11, generator=generator), window=3, k=2)
    tokens = torch.randn(2, 3, 35, 22, generator=generator)
    for ratio in (0.0, 0.5):
        fast = attention.correspondence_attention(tokens, matches, 2, ratio, memory_budget=10_000)
        torch.testing.assert_close(fast, reference.correspondence_attention(tokens, matches, 2, ratio))


class Step:
    """One sampling step of each variant on the same latents."""

    def __init__(self, host: Path, frames: int, width: int, height: int):
        import torch

        from benchmarks.random_model import load
        from cove.correspondence import find_correspondence

        model, self.host = load(host)
        generator = torch.Generator().manual_seed(1)
        size = (height // 8, width // 8)
        matches = find_correspondence(torch.randn(frames, *size, 32, generator=generator))
        self.latent = {"samples": torch.randn(frames, 4, *size, generator=generator)}
        self.text = [[torch.randn(1, 77, 768, generator=generator), {}]]
        self.sigmas = self.host.sigmas_at(model, [481], "benchmark")
        self.models = {
            name: self.host.guide_self_attention(
                model, None if ratio is None else matches, ratio or 0.0, True, 0.0, 1.0, node="benchmark"
            )
            for name, ratio in VARIANTS.items()
        }

    def run(self, variant: str) -> float:
        """Return the seconds of one model call with cond and uncond."""
        import torch

        seconds = 0.0

        def call(model, x, sigmas, extra_args, callback, disable):
            nonlocal seconds
            start = time.perf_counter()
            model(x, sigmas[0].expand(len(x)), **extra_args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            return x

        with torch.inference_mode():
            self.host.run(
                self.models[variant], call, self.latent, self.sigmas, self.text, self.text, 7.5, node="benchmark"
            )
        return seconds


def measure(arguments: argparse.Namespace, name: str) -> tuple[float, int]:
    """Return seconds and working memory in bytes of one step of a variant, in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.attention_cost",
        f"--frames={arguments.frames}",
        f"--size={arguments.size}",
    ]
    answer = subprocess.run([*command, f"--variant={name}"], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, memory = answer.splitlines()[-1].split()
    return float(seconds), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", default="512x320", help="width x height in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))

    from benchmarks.memory import working_memory
    from evidence.tables.records import FOLDER, Records, machine
    from scripts.host import provide_host

    if arguments.variant:
        step, seconds = Step(provide_host(), arguments.frames, width, height), []
        memory = working_memory(lambda: seconds.append(step.run(arguments.variant)))
        print(*seconds, memory)
        return

    prove_equality()
    records = Records(FOLDER / "attention_cost.jsonl")

    def case_of(name: str, run: int) -> dict:
        return {"frames": arguments.frames, "size": arguments.size, "attention": name, "run": run}

    print(
        f"{machine()}, float32, {arguments.frames} frames of "
        f"{arguments.size}, cond and uncond together; median of {arguments.repeats}, first step of a fresh process"
    )
    for run in range(arguments.repeats):
        for name in VARIANTS:  # alternating, so that a drifting machine affects all alike
            seconds, memory = measure(arguments, name)
            records.add(case_of(name, run), {"seconds": seconds, "MiB": memory / 2**20})
    rounds = {name: [records[case_of(name, run)] for run in range(arguments.repeats)] for name in VARIANTS}
    print(f"{'':24}{'step':>10}{'':>9}{'working memory':>18}")
    for name in VARIANTS:
        seconds, memory = (statistics.median(run[what] for run in rounds[name]) for what in ("seconds", "MiB"))
        slower, larger = (
            statistics.median(run[what] / alone[what] for run, alone in zip(rounds[name], rounds[ALONE], strict=True))
            for what in ("seconds", "MiB")
        )
        print(f"{name:24}{seconds:8.1f} s{100 * (slower - 1):+7.1f} %{memory:12.0f} MiB {larger:5.2f}x")


if __name__ == "__main__":
    main()
