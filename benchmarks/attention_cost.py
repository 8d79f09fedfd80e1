"""Measure the overhead of correspondence-guided attention over spatial-temporal attention, in time and memory.

    python -m benchmarks.attention_cost [--frames 9] [--size 512x320] [--family sd15] [--dtype float32] [--steps 1]

A UNet of SD1.5's or SDXL's shape with random weights runs sampling steps, cond and uncond together, in a real ComfyUI
(COMFYUI_PATH, or as `scripts/host.py` finds it). First the fast attention is compared with the reference loops. Then
runs with and without guidance alternate, each in its own process, and time and peak memory are measured. With several
`--steps`, the first, which loads kernels on a GPU, is not timed.
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
    """Sampling step of each variant on the same latents."""

    def __init__(self, host: Path, arguments: argparse.Namespace):
        import torch

        from benchmarks.random_model import CONTEXT, FINEST, load
        from cove.correspondence import find_correspondence
        from scripts.in_process import call

        model, nodes, self.host = load(host, arguments.family, arguments.dtype)
        generator = torch.Generator().manual_seed(1)
        width, height = (side // 8 for side in map(int, arguments.size.split("x")))
        grid = (height // FINEST[arguments.family], width // FINEST[arguments.family])
        matches = find_correspondence(torch.randn(arguments.frames, *grid, 32, generator=generator))
        self.latent = {"samples": torch.randn(arguments.frames, 4, height, width, generator=generator)}
        channels, pooled = CONTEXT[arguments.family]
        vector = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        self.text = [[torch.randn(1, 77, channels, generator=generator), vector]]
        self.sigmas = self.host.unet.sigmas_at(model, [481])
        self.models = {
            name: call(
                nodes["CorrespondenceAttention"],
                model=model,
                correspondence=None if ratio is None else matches,
                merge_ratio=ratio or 0.0,
            )[0]
            for name, ratio in VARIANTS.items()
        }

    def run(self, variant: str) -> float:
        """Return the seconds of one model call with cond and uncond."""
        import torch

        seconds = 0.0

        def evaluate(model, x, sigmas, extra_args, callback, disable):
            nonlocal seconds
            start = time.perf_counter()
            model(x, sigmas[0].expand(len(x)), **extra_args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            return x

        with torch.inference_mode():
            prompts = (self.text, self.text, 7.5)
            self.host.run.run_sampler(self.models[variant], evaluate, self.latent, self.sigmas, *prompts)
        return seconds


def run_one(arguments: argparse.Namespace) -> None:
    """Print seconds of each step of a variant and its working memory in bytes; with --profile, profile another step."""
    from benchmarks.memory import working_memory
    from scripts.host import provide_host

    step, seconds = Step(provide_host(), arguments), []
    memory = working_memory(lambda: seconds.extend(step.run(arguments.variant) for _ in range(arguments.steps)))
    if arguments.profile:
        from torch.profiler import profile

        with profile() as seen:
            step.run(arguments.variant)
        events = seen.key_averages()
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        waits = sum(event.count for event in events if event.key.endswith("Synchronize"))
        with arguments.profile.open("a", encoding="utf-8") as file:
            file.write(f"{arguments.variant}: {launches} kernel launches, {waits} waits\n")
            file.write(events.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=80) + "\n")
    print(*seconds, memory)


def measure(name: str) -> tuple[float, int]:
    """Return seconds and working memory in bytes of one step of a variant, in its own process."""
    command = [sys.executable, "-m", "benchmarks.attention_cost", *sys.argv[1:], f"--variant={name}"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    first, *others, memory = answer.splitlines()[-1].split()
    return statistics.median(map(float, others or [first])), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", default="512x320", help="width x height in pixels")
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=1, help="steps in each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="append a table of kernels to this file")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run_one(arguments)
        return

    from evidence.tables.records import FOLDER, Records, machine

    prove_equality()
    records = Records(FOLDER / "attention_cost.jsonl")
    settings = {name: getattr(arguments, name) for name in ("frames", "size", "family", "dtype", "steps")}

    def case_of(name: str, run: int) -> dict:
        return settings | {"attention": name, "run": run}

    first = "first step" if arguments.steps == 1 else f"median of {arguments.steps - 1} steps after the first"
    print(
        f"{machine()}, {arguments.family}, {arguments.dtype}, {arguments.frames} frames of {arguments.size}, cond and "
        f"uncond together; {first} of a fresh process, median of {arguments.repeats}"
    )
    for run in range(arguments.repeats):
        for name in VARIANTS:  # alternating, so that drift of the machine affects all equally
            seconds, memory = measure(name)
            records.add(case_of(name, run), {"seconds": seconds, "MiB": memory / 2**20})
    rounds = {name: [records[case_of(name, run)] for run in range(arguments.repeats)] for name in VARIANTS}
    print(f"{'':24}{'step':>10}{'':>9}{'working memory':>18}")
    for name in VARIANTS:
        seconds, memory = (statistics.median(run[what] for run in rounds[name]) for what in ("seconds", "MiB"))
        slower, larger = (
            statistics.median(run[what] / alone[what] for run, alone in zip(rounds[name], rounds[ALONE], strict=True))
            for what in ("seconds", "MiB")
        )
        print(f"{name:24}{seconds:8.3f} s{100 * (slower - 1):+7.1f} %{memory:12.0f} MiB {larger:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
